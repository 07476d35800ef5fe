"""Measures against hand-made signals and texts whose answers are known, and against laws."""

import functools
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duplex.frames import FRAME_SAMPLES
from duplex.metrics import (
    Segment,
    frame_levels_dbfs,
    is_echo,
    longest_common_subsequence,
    mean_interval,
    proportion_interval,
    repeated_share,
    response_delays_s,
    says_any,
    segments,
    speech_activity,
    timing,
    word_error_rate,
    words_of,
)

LOUD = 10 ** (-24 / 20)


def frames(pattern: str) -> np.ndarray:
    """`..##.` -> bool per frame."""
    return np.array([c == "#" for c in pattern])


def sound(pattern: str, amplitude: float = LOUD) -> np.ndarray:
    """A square wave in the frames marked #: its RMS is its amplitude."""
    wave = np.tile([amplitude, -amplitude], FRAME_SAMPLES // 2)
    return np.concatenate([wave * on for on in frames(pattern)])


def text_of(active: np.ndarray) -> str:
    return "".join("#" if on else "." for on in active)


bools = st.lists(st.booleans(), max_size=60).map(lambda values: np.array(values, dtype=bool))
words = st.lists(st.sampled_from(list("abcd")), max_size=8)


# -- levels and activity


def test_levels_of_known_signals():
    # 500 Hz: whole periods in a frame.
    tone = np.sin(2 * np.pi * 500 * np.arange(4 * FRAME_SAMPLES) / 24_000)
    assert frame_levels_dbfs(tone) == pytest.approx([-3.01] * 4, abs=0.01)
    assert frame_levels_dbfs(tone / 10) == pytest.approx([-23.01] * 4, abs=0.01)
    assert frame_levels_dbfs(np.zeros(FRAME_SAMPLES)).tolist() == [-math.inf]
    assert frame_levels_dbfs(np.zeros(0)).tolist() == []


def test_a_partial_last_frame_counts_with_silence_behind_it():
    half = np.ones(FRAME_SAMPLES + FRAME_SAMPLES // 2)
    assert frame_levels_dbfs(half) == pytest.approx([0, 20 * math.log10(math.sqrt(0.5))])


@pytest.mark.parametrize(
    ("heard", "found"),
    [
        ("..####..", "..####.."),
        ("##..##..", "######.."),  # two silent frames are bridged
        ("##...##.", "##...##."),  # three are not
        (".##.....", ".##....."),  # the hangover never lengthens
        ("...#....", "........"),  # a click
        ("#.#.....", "###....."),  # bridged first: together they last
        ("........", "........"),
        ("########", "########"),
        ("..##..", "..##.."),  # short silences at the edges are no gaps within speech
    ],
)
def test_activity_bridges_gaps_and_drops_clicks(heard, found):
    assert text_of(speech_activity(sound(heard))) == found


def test_the_threshold_is_inclusive_and_a_setting():
    quiet = sound("..##..", 10 ** (-50 / 20))
    assert not speech_activity(quiet).any()
    assert text_of(speech_activity(quiet, threshold_dbfs=-50.001)) == "..##.."
    assert text_of(speech_activity(sound("..##.."), threshold_dbfs=-24.001)) == "..##.."
    assert not speech_activity(sound("..##.."), threshold_dbfs=-23.999).any()


@given(bools)
def test_segments_rebuild_what_they_were_found_in(active):
    rebuilt = np.zeros(len(active), dtype=bool)
    for segment in segments(active):
        assert not rebuilt[segment.start : segment.end].any()
        rebuilt[segment.start : segment.end] = True
    assert (rebuilt == active).all()
    found = segments(active)
    assert all(a.end < b.start for a, b in itertools.pairwise(found))


@given(bools.filter(len))
def test_activity_only_fills_gaps_and_only_drops_clicks(loud):
    found = speech_activity(sound(text_of(loud)))
    for segment in segments(found):
        assert loud[segment.start] and loud[segment.end - 1]
        assert segment.end - segment.start >= 2
    for segment in segments(loud):
        if segment.end - segment.start >= 2:
            assert found[segment.start : segment.end].all()


# -- timing

USER = "..####......####......"
TURNS = [Segment(2, 6), Segment(12, 16)]


@pytest.mark.parametrize(
    ("agent", "delays_s"),
    [
        (".......###............", (0.08, None)),
        ("......###.......###...", (0.0, 0.0)),
        (".....####......####...", (-0.08, -0.08)),  # early: not clamped at 0
        ("##....................", (None, None)),  # a greeting is no answer
        ("##......###...........", (0.16, None)),
        ("#######...............", (None, None)),  # began before the turn, goes on after it
        ("######################", (None, None)),  # an agent that never stops answers nothing
        ("...##.................", (None, None)),  # "mhm" within the turn
        ("...##....##...........", (0.24, None)),  # after it the answer counts
        ("...........##.........", (0.4, None)),
        ("............#####.....", (None, -0.32)),  # from the next turn's start on it answers that
        ("......................", (None, None)),
        ("......##.##...........", (0.0, None)),  # the first of two
        ("....................##", (None, 0.32)),
    ],
)
def test_response_delay_is_agent_onset_minus_user_end(agent, delays_s):
    found = timing(frames(agent), frames(USER), TURNS)
    assert found.delays_s == delays_s
    assert found.responses == sum(delay is not None for delay in delays_s)


@given(bools, st.integers(0, 5), st.integers(1, 5), st.integers(0, 20))
def test_delays_move_with_the_whole_conversation(agent, start, length, shift):
    turns = [Segment(start, start + length)]
    num_frames = max(len(agent), start + length)
    later = [Segment(s.start + shift, s.end + shift) for s in segments(agent)]
    moved = [Segment(start + shift, start + length + shift)]
    before = response_delays_s(segments(agent), turns, num_frames)
    assert response_delays_s(later, moved, num_frames + shift) == before
    if before[0] is not None:
        assert before[0] >= -length * 0.08 - 1e-9


def test_overlap_dead_air_and_share():
    #          0         1         2         3
    agent = frames("..####..............####..............####")
    user_ = frames("....####................####..........####")
    found = timing(agent, user_, [])
    assert found.overlap_s == pytest.approx((2 + 4) * 0.08)
    # 12 silent frames are 0.96 s; ten are less; neither is dead air.
    assert found.dead_air_s == 0
    assert found.agent_speech_s == pytest.approx(12 * 0.08)
    assert found.agent_share == pytest.approx(12 / 42)


def test_dead_air_counts_silences_over_a_second_whole():
    both = "##" + "." * 13 + "##" + "." * 12 + "##" + "." * 25
    found = timing(frames(both), frames(both), [])
    assert found.dead_air_s == pytest.approx((13 + 25) * 0.08)


@given(bools.filter(len), st.randoms(use_true_random=False))
def test_the_parts_of_a_conversation_add_up(agent, rng):
    user = np.array([rng.random() < 0.5 for _ in agent])
    found, turned = timing(agent, user, []), timing(user, agent, [])
    assert found.overlap_s == turned.overlap_s
    assert found.dead_air_s == turned.dead_air_s
    assert found.overlap_s <= found.agent_speech_s + 1e-9
    assert found.dead_air_s <= np.count_nonzero(~(agent | user)) * 0.08 + 1e-9


def test_channels_and_turns_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="same frames"):
        timing(frames("##"), frames("###"), [])
    with pytest.raises(ValueError, match="in order"):
        timing(frames("####"), frames("####"), [Segment(2, 4), Segment(0, 1)])
    with pytest.raises(ValueError, match="in order"):
        timing(frames("####"), frames("####"), [Segment(2, 5)])


# -- words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, WORLD!", ["hello", "world"]),
        ("Don't -- I said 'no'", ["don't", "i", "said", "no"]),
        ("don’t", ["don't"]),
        ("$4.50?", ["4", "50"]),
        ("Straße ﬁne", ["strasse", "fine"]),
        ("हिन्दी भाषा।", ["हिन्दी", "भाषा"]),  # vowel signs are marks, and stay
        (" \n…!", []),
    ],
)
def test_words_for_comparison(text, expected):
    assert words_of(text) == expected


def test_word_error_rate_of_known_pairs():
    the = words_of("the cat sat on the mat")
    assert word_error_rate(the, the) == 0
    assert word_error_rate(the, words_of("the cat sat on mat")) == pytest.approx(1 / 6)
    assert word_error_rate(the, words_of("a cat sat on the red mat")) == pytest.approx(2 / 6)
    assert word_error_rate(the, []) == 1
    assert word_error_rate(["a"], list("bcd")) == 3
    assert word_error_rate([], []) == 0
    assert word_error_rate([], ["a"]) == math.inf


@given(words.filter(len), words)
def test_word_error_rate_agrees_with_its_definition(reference, hypothesis):
    @functools.cache
    def distance(i, j):
        if not i or not j:
            return i + j
        same = reference[i - 1] == hypothesis[j - 1]
        return min(
            distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (not same)
        )

    expected = distance(len(reference), len(hypothesis)) / len(reference)
    assert word_error_rate(reference, hypothesis) == pytest.approx(expected)


@given(words, words)
def test_longest_common_subsequence_agrees_with_trying_all(a, b):
    def holds(sequence, picked):
        rest = iter(sequence)
        return all(word in rest for word in picked)

    best = max(
        len(picked)
        for size in range(len(a) + 1)
        for picked in itertools.combinations(a, size)
        if holds(b, picked)
    )
    assert longest_common_subsequence(a, b) == best


@pytest.mark.parametrize(
    ("user", "reply", "echo"),
    [
        ("What?", "What?", True),  # equal at any length
        ("What?", "what", True),
        ("What can I get you today?", "What can I get you today", True),
        ("What can I get you today?", "what can I get for you today", True),  # WER 1/6
        ("Can I get you a latte today my friend?", "you a latte today", True),  # LCS, none new
        ("What can I get you today?", "a latte", False),
        ("yes", "yes please", False),  # short and not equal
        ("So one large latte, is that right?", "one large latte with oat milk please", False),
        ("one two three four", "one two three", False),  # three words are too few to tell
        ("What can I get you?", "", False),
        ("", "", False),
        ("", "I will have a latte", False),
        ("a b c d e f g h", "a b c d x", True),  # LCS 4/5, new 1/5: on both edges
        ("a b c d e f g h", "a b c x y", False),
        ("a b c d e f g h", "d c b a", False),  # all words, other order
    ],
)
def test_echo(user, reply, echo):
    assert is_echo(user, reply) is echo


def test_echo_by_word_errors_has_its_edge_at_35_percent():
    user = " ".join(f"w{i}" for i in range(20))
    spoken = user.split()
    assert is_echo(user, " ".join([*spoken[:13], *(f"n{i}" for i in range(7))]))  # 7/20 = .35
    assert not is_echo(user, " ".join([*spoken[:12], *(f"n{i}" for i in range(8))]))


@given(st.lists(st.sampled_from(["tea", "milk", "please", "no"]), min_size=1, max_size=9))
def test_the_users_own_words_are_always_an_echo(spoken):
    assert is_echo(" ".join(spoken), "… " + " ".join(spoken).upper() + "!")


def test_facts_are_said_in_whole_words_whatever_the_case():
    assert says_any("My name is MARCUS.", ["Marcus"])
    assert says_any("a large, black coffee", ["large black coffee"])
    assert not says_any("concatenate", ["cat"])
    assert not says_any("black tea, large coffee", ["black coffee"])
    assert says_any("five bucks", ["five dollars", "five bucks"])
    assert not says_any("", ["Marcus"])
    assert not says_any("", ["…"])
    assert not says_any("anything", ["…"])  # a wording without a word says nothing


def test_repeats():
    assert repeated_share("one two three") is None
    assert repeated_share("one two three four five") == 0
    assert repeated_share("a b c d a b c d") == pytest.approx(1 / 5)
    assert repeated_share("no " * 103) == pytest.approx(0.99)


# -- counts


def test_bounds_of_a_rate_against_closed_forms():
    for trials in (1, 15, 59):
        low, high = proportion_interval(0, trials)
        assert low == 0
        assert high == pytest.approx(1 - 0.025 ** (1 / trials))
        assert proportion_interval(trials, trials) == pytest.approx((1 - high, 1))
    # One-sided bounds: 15 clean runs under 18 %, 59 under 5 %.
    assert proportion_interval(0, 15, confidence=0.9)[1] == pytest.approx(0.181, abs=5e-4)
    assert proportion_interval(0, 59, confidence=0.9)[1] < 0.05
    assert proportion_interval(5, 10) == pytest.approx((0.1871, 0.8129), abs=1e-4)
    for hits, trials in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="hits"):
            proportion_interval(hits, trials)


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_bounds_hold_the_rate_and_mirror(counts):
    hits, trials = counts
    low, high = proportion_interval(hits, trials)
    assert 0 <= low <= hits / trials <= high <= 1
    assert proportion_interval(trials - hits, trials) == pytest.approx((1 - high, 1 - low))


def test_the_interval_of_a_mean_against_tables_of_students_t():
    for n, quantile in ((2, 12.7062), (3, 4.3027), (4, 3.1824), (11, 2.2281), (64, 1.9983)):
        values = [1.0, -1.0] * (n // 2) + [0.0] * (n % 2)
        spread = (sum(v * v for v in values) / (n - 1)) ** 0.5
        low, high = mean_interval(values) or (0, 0)
        assert low == pytest.approx(-quantile * spread / n**0.5, rel=1e-4) and high == -low
    assert mean_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    assert mean_interval([1.0]) is None and mean_interval([]) is None


@pytest.mark.parametrize(("hits", "trials"), [(600, 1200), (4999, 5000), (0, 9000), (7, 7)])
def test_bounds_of_many_trials_are_those_of_scipy(hits, trials):
    from scipy import stats  # here: a second for each worker, and one needs it

    found = stats.binomtest(hits, trials).proportion_ci(0.95, method="exact")
    assert proportion_interval(hits, trials) == pytest.approx((found.low, found.high), abs=1e-9)
