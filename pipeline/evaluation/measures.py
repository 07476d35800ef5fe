"""What is measured: a row for each measure, pooled over conversations.

Rates are pooled over turns, facts or replies, not averaged over conversations, and stand with their
counts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from duplex.base import rounded
from duplex.degeneration import compression_ratio, foreign_share, loops
from duplex.emotion_words import emotion_of
from duplex.frames import FRAME_S
from duplex.metrics import proportion_interval, repeated_share, words_of
from duplex.topic import MIN_CONTENT, drift
from duplex.verdict import Better
from pipeline.evaluation.items import QuestionKind
from pipeline.evaluation.scoring import Exchange, Measured, answered_delays, timed_words

# Raise it when a row means something else than before: reports of two versions don't compare.
MEASURES_VERSION = 1


class Measure(NamedTuple):
    """A row: how it is pooled over the conversations of one model, and what it means.

    kind: `rate` (values are (hits, trials) pairs); `mean`, `median` or `p95`, the value that 95 %
        are not over (values are numbers).
    better: which way is; "" where that depends on the persona.
    """

    key: str
    label: str
    unit: str
    kind: str
    values: Callable[[Measured], list[Any]]
    meaning: str
    better: Better = ""


def _some(value: float | None) -> list[float]:
    return [] if value is None else [value]


def _answered(measured: Measured) -> list[Exchange]:
    return [exchange for exchange in measured.exchanges if exchange.delay_s is not None]


def _of_kind(
    measured: Measured, kind: QuestionKind, is_hit: Callable[[Exchange], bool]
) -> list[tuple[int, int]]:
    """Over the replies to one kind of question."""
    asked = [exchange for exchange in measured.replies if exchange.kind == kind]
    return [(sum(is_hit(exchange) for exchange in asked), len(asked))]


def first_word_s(measured: Measured) -> float | None:
    """From the end of the first user turn to the first word behind it."""
    if not measured.spoken.turns:
        return None
    end = measured.spoken.turns[0].end
    frames = (frame for frame, _ in timed_words(measured.conversation.text) if frame >= end)
    first = next(frames, None)
    return None if first is None else (first - end) * FRAME_S


def backchannels_per_min(measured: Measured) -> float | None:
    minutes = sum(turn.seconds for turn in measured.spoken.turns) / 60
    return measured.backchannels / minutes if minutes else None


def topic_drift(measured: Measured) -> float | None:
    """Without replies to unrelated questions, which can't be off topic."""
    return drift([e.off_topic for e in measured.replies if e.kind != "unrelated"])


def emotions_kept(measured: Measured) -> list[tuple[int, int]]:
    """(replies with the item's emotion, replies that count)."""
    wanted = measured.spoken.item.emotion
    if wanted is None:
        return []
    found = [emotion_of(exchange.reply).emotion for exchange in measured.replies]
    counted = [one for one in found if one != "neutral" or wanted == "neutral"]
    return [(sum(one == wanted for one in counted), len(counted))]


MEASURES = (
    Measure(
        "prompt_proven", "Prompts proven", "conversations", "rate",
        lambda m: [(int(m.proof.proven), 1)],
        "The tokens read from the model's own input equal our tokenization of the prompt.",
    ),
    Measure(
        "response_rate", "Turns answered", "user turns", "rate",
        lambda m: [(m.timing.responses, len(m.exchanges))],
        "The agent begins to speak after the turn's start, before the next turn, and still "
        "speaks after the turn's end.",
        "high",
    ),
    Measure(
        "answered_in_words", "Answers with words", "answered turns", "rate",
        lambda m: [(sum(bool(e.num_words) for e in _answered(m)), len(_answered(m)))],
        "Of the turns that speech answers, those in whose window the text stream has words too: "
        "sound without words is noise.",
        "high",
    ),
    Measure(
        "response_delay_s", "Response delay", "s", "median", answered_delays,
        "Agent onset minus user end, over answered turns, not clamped: negative is early "
        "(floor-transfer offset, Heldner & Edlund 2010). Known to one frame, 0.08 s.",
    ),
    Measure(
        "response_delay_p95_s", "Response delay, late", "s", "p95", answered_delays,
        "The delay that 95 % of the answered turns are not over.",
    ),
    Measure(
        "first_word_s", "First word", "s", "mean", lambda m: _some(first_word_s(m)),
        "From the end of the first user turn to the first word behind it; a conversation without "
        "one does not count.",
        "low",
    ),
    Measure(
        "greeting", "Greeting given", "conversations", "rate",
        lambda m: [(int(bool(words_of(m.opening))), 1)]
        if m.spoken.item.first_speaker == "agent" else [],
        "Conversations that the agent is to open in which it says something before the user does.",
        "high",
    ),
    Measure(
        "yield_rate", "Yields", "interruptions", "rate",
        lambda m: [(sum(cut.yield_s is not None for cut in m.interruptions), len(m.interruptions))],
        "User turns that begin while the agent has been speaking for .24 s and more, and before "
        "whose end it falls silent.",
        "high",
    ),
    Measure(
        "yield_s", "Time to yield", "s", "mean",
        lambda m: [cut.yield_s for cut in m.interruptions if cut.yield_s is not None],
        "From the start of such a turn until the agent is silent, where it yields.",
        "low",
    ),
    Measure(
        "backchannels_per_min", "Backchannels", "1/min of user speech", "mean",
        lambda m: _some(backchannels_per_min(m)),
        "The agent's stretches of speech of a second at most that begin and end within a user "
        "turn, by the minute of the user's turns.",
    ),
    Measure(
        "overlap_s", "Both speak", "s", "mean", lambda m: [m.timing.overlap_s],
        "Seconds of a conversation in which both channels hold speech.",
    ),
    Measure(
        "dead_air_s", "Dead air", "s", "mean", lambda m: [m.timing.dead_air_s],
        "Seconds of a conversation in silences of both of over 1 s (Jefferson 1989), each "
        "counted whole; the user's script leaves pauses for the answer.",
        "low",
    ),
    Measure(
        "agent_speech_share", "Agent speaks", "share", "mean", lambda m: [m.timing.agent_share],
        "Frames with agent speech / all frames.",
    ),
    Measure(
        "words", "Agent words", "words", "mean", lambda m: [m.num_words],
        "Words of the agent's text stream in a conversation.",
    ),
    Measure(
        "words_per_s", "Words a second", "1/s", "mean",
        lambda m: _some(m.num_words / m.timing.agent_speech_s if m.timing.agent_speech_s else None),
        "Agent words / seconds of agent speech, over conversations with agent speech.",
    ),
    Measure(
        "facts_said", "Facts said", "facts", "rate",
        lambda m: [(sum(m.facts.values()), len(m.facts))],
        "Facts of the prompt of which the agent's text holds one of the listed wordings, whole "
        "words, any case. A fact that nobody asked for counts in the total too.",
        "high",
    ),
    Measure(
        "due_said", "Says what is due", "replies", "rate",
        lambda m: [(sum(e.says_due for e in m.exchanges), sum(bool(e.due) for e in m.exchanges))],
        "Turns with a list of right answers (must_say) whose reply holds one of them; no reply is "
        "a wrong one.",
        "high",
    ),
    Measure(
        "wrong", "Says what it must not", "replies", "rate",
        lambda m: [(sum(e.wrong for e in m.replies), sum(e.may_be_wrong for e in m.replies))],
        "Replies to turns with a list of what must not be said (must_not_say) which hold some of "
        "it, such as a nut for an allergic.",
        "low",
    ),
    Measure(
        "declined", "Declines what can't be", "replies", "rate",
        lambda m: _of_kind(m, "unfulfillable", lambda e: e.says_due),
        "Turns that want what the prompt rules out, and whose reply says so (their must_say).",
        "high",
    ),
    Measure(
        "abstained", "Admits not to know", "replies", "rate",
        lambda m: _of_kind(m, "unspecified", lambda e: e.abstains)
        if m.spoken.item.abstains else [],
        "Replies to what nobody has said which hold a wording of the items file's abstains.",
        "high",
    ),
    Measure(
        "echo_rate", "Echoed replies", "replies", "rate",
        lambda m: [(sum(e.echo for e in m.exchanges), len(m.replies))],
        "Replies that say the user's words back: equal, or four words and more with WER <= .35 "
        "or LCS >= .8 of the reply with at most .2 new words.",
        "low",
    ),
    Measure(
        "out_of_role", "Out of role", "replies", "rate",
        lambda m: [(sum(e.out_of_role for e in m.exchanges), len(m.replies))]
        if m.spoken.item.must_not_say else [],
        "Replies that hold a line of the other side's, of the items file's must_not_say: whole "
        "words, any case.",
        "low",
    ),
    Measure(
        "ungrounded", "Invented details", "replies", "rate",
        lambda m: [(sum(bool(e.invented) for e in m.exchanges), len(m.replies))],
        "Replies that name a number or a name which neither the prompt nor the user up to then "
        "has given. Of scripted dialogues without a fault it blames some too: "
        "docs/results/grounding.md says how many.",
        "low",
    ),
    Measure(
        "off_topic", "Off topic", "replies", "rate",
        lambda m: [(sum(e.off_topic for e in m.exchanges), len(m.replies))],
        f"Replies of {MIN_CONTENT} content words and more none of which stands in the prompt, in "
        "what the user has said, or in the items file's topic; to an unrelated question none is.",
        "low",
    ),
    Measure(
        "hallucinated", "Hallucinations", "replies", "rate",
        lambda m: [(sum(e.made_up for e in m.replies), len(m.replies))],
        "Replies with invented details, off topic, or of three words and more to what nobody has "
        "said, without admitting that.",
        "low",
    ),
    Measure(
        "perfect", "Graded perfect", "conversations", "rate",
        lambda m: [(int(m.grade == "perfect"), 1)] if m.grade else [],
        "Conversations without any fault: words for each turn, no echo, in role, nothing made up, "
        "all that was due.",
        "high",
    ),
    Measure(
        "poor", "Graded poor", "conversations", "rate",
        lambda m: [(int(m.grade == "poor"), 1)] if m.grade else [],
        "Conversations that change sides or repeat the user, ignore the prompt (less than half of "
        "what was due, of two and more; else no fact of three and more), fall silent on half of "
        "the turns, or make things up in over a quarter of the replies.",
        "low",
    ),
    Measure(
        "drift", "Drift off topic", "share", "mean", lambda m: _some(topic_drift(m)),
        "Off-topic share of the last third of a conversation's replies minus that of the first, "
        "over conversations with six replies and more.",
        "low",
    ),
    Measure(
        "emotion_kept", "Emotion kept", "replies", "rate", emotions_kept,
        "Replies with an emotion in their words (keyword lists, negation, intensity) in which it "
        "is the item's; of a neutral item all replies count, and neutral ones are right. Lists of "
        "words read few emotions right (docs/results/emotion_words.md): it fails nobody.",
    ),
    Measure(
        "silence", "Falls silent", "conversations", "rate",
        lambda m: [(int(m.silence != "speaks"), 1)] if m.silence else [],
        "Conversations without any agent speech, or in whose last third of turns (two at least) "
        "none is met by speech.",
        "low",
    ),
    Measure(
        "unspoken_share", "Text not spoken", "share", "mean", lambda m: _some(m.unspoken),
        "Words of the text stream without agent speech within .48 s / words.",
        "low",
    ),
    Measure(
        "unwritten_share", "Speech without text", "share", "mean", lambda m: _some(m.unwritten),
        "Seconds of agent speech in stretches without a word near / seconds of agent speech.",
        "low",
    ),
    Measure(
        "word_error_rate", "Audio against text", "WER", "mean", lambda m: _some(m.error_rate),
        "Word error rate of the agent's audio, recognised stretch by stretch, against its text "
        "stream; the recogniser's own errors are in it.",
        "low",
    ),
    Measure(
        "dnsmos", "Sound rated by DNSMOS", "1 to 5", "mean", lambda m: _some(m.rating),
        "DNSMOS P.835, overall, of the agent's whole channel (Reddy et al. 2022), where it is "
        "asked for (evaluate.dnsmos).",
        "high",
    ),
    Measure(
        "loops", "Stuck in loops", "conversations", "rate",
        lambda m: [(int(bool(loops(m.conversation.transcript))), 1)] if m.num_words else [],
        "Conversations in which one to four words come three times in a row.",
        "low",
    ),
    Measure(
        "compression_ratio", "Compression ratio", "ratio", "mean",
        lambda m: _some(compression_ratio(m.conversation.transcript)),
        "Bytes of the text / bytes that zlib makes of it, of 64 bytes and more; over 2.4 text is "
        "a loop (Radford et al. 2022).",
    ),
    Measure(
        "foreign_share", "Other script", "share", "mean",
        lambda m: _some(foreign_share(m.conversation.transcript)),
        "Letters that are not Latin / letters.",
        "low",
    ),
    Measure(
        "clipped_share", "Clipped samples", "share", "mean",
        lambda m: [m.sound.clipped_share],
        "Samples of the agent in runs of three and more at full scale / samples.",
        "low",
    ),
    Measure(
        "speech_dbfs", "Loudness of speech", "dBFS", "mean",
        lambda m: _some(m.sound.speech_dbfs),
        "Mean level of the agent's speech frames; training data has -24.",
    ),
    Measure(
        "repeated_share", "Repeated 4-grams", "share", "mean",
        lambda m: _some(repeated_share(m.conversation.transcript)),
        "1 - different runs of four words / runs of four words (seq-rep-4, Welleck et al. "
        "2020), over conversations with four words and more.",
        "low",
    ),
)  # fmt: skip


def summarize(conversations: Sequence[Measured], models: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each measure: `by_model` holds value, n and spread for each model.

    `value` is None where n is 0. A rate's `low` and `high` are its exact 95 % bounds, those of
    a mean or median the least and greatest value.
    """
    return [
        {
            "key": measure.key,
            "label": measure.label,
            "unit": measure.unit,
            "kind": measure.kind,
            "meaning": measure.meaning,
            "by_model": {
                model: _pool(
                    measure.kind,
                    [v for m in conversations if m.model == model for v in measure.values(m)],
                )
                for model in models
            },
        }
        for measure in MEASURES
    ]


def _counted(values: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return sum(hits for hits, _ in values), sum(trials for _, trials in values)


def _p95(values: Sequence[float]) -> float:
    """The least value that 95 % are not over."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


def _pool(kind: str, values: list[Any]) -> dict[str, Any]:
    if kind == "rate":
        hits, trials = _counted(values)
        low, high = proportion_interval(hits, trials) if trials else (None, None)
        found = {"value": hits / trials if trials else None, "n": trials, "hits": hits}
    else:
        pool = {"median": statistics.median, "p95": _p95, "mean": math.fsum}[kind]
        value = pool(values) if values else None
        if value is not None and kind == "mean":
            value /= len(values)
        low, high = (min(values), max(values)) if values else (None, None)
        found = {"value": value, "n": len(values)}
    return rounded(found | {"low": low, "high": high})


def sums_of(measured: Measured) -> dict[str, tuple[float, float]]:
    """Sum and count of each measure in one conversation; a median's values are added up too."""
    found = {}
    for measure in MEASURES:
        values = measure.values(measured)
        if measure.kind == "rate":
            hits, trials = _counted(values)
            found[measure.key] = (float(hits), float(trials))
        else:
            found[measure.key] = (math.fsum(values), float(len(values)))
    return found
