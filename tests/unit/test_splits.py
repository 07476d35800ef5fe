"""Splits: nothing on both sides that must not be, whatever is shared."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duplex.splits import Member, assign_splits, hold_out, overlaps


@st.composite
def members(draw):
    count = draw(st.integers(1, 30))
    return [
        Member(
            id=f"m{i}",
            persona=f"p{draw(st.integers(0, 6))}",
            conversation=f"c{draw(st.integers(0, 20))}",
            text=f"t{draw(st.integers(0, 25))}",
            voices=tuple(draw(st.lists(st.sampled_from("uvwxyz"), max_size=1))),
        )
        for i in range(count)
    ]


@given(members(), st.sampled_from(["persona", "conversation"]), st.floats(0, 1), st.integers(0, 9))
def test_no_text_voice_persona_or_conversation_is_on_both_sides(group, by, fraction, seed):
    split = assign_splits(group, by, fraction, seed)
    assert set(split) == {member.id for member in group}
    assert overlaps(group, split, by) == []
    assert "train" in split.values()


@given(st.sets(st.text("abcdef", min_size=1, max_size=4), min_size=2), st.integers(0, 99))
def test_at_least_one_is_held_out_and_one_is_left(names, seed):
    for fraction in (0.01, 0.5, 1.0):
        held = hold_out(names, fraction, seed)
        assert 1 <= len(held) < len(names)
    assert hold_out(names, 0.0, seed) == set()


@given(st.sets(st.integers(0, 500), min_size=10, max_size=40), st.integers(0, 99))
def test_one_name_more_moves_few_others(numbers, seed):
    names = {f"p{n}" for n in numbers}
    before, after = hold_out(names, 0.2, seed), hold_out(names | {"new"}, 0.2, seed)
    assert len((before ^ after) - {"new"}) <= 2


PAIR = [
    Member("a", "p1", "c1", "t1", ("v1",)),
    Member("b", "p2", "c2", "t2", ("v2",)),
]


@pytest.mark.parametrize(
    ("change", "by", "kind"),
    [
        ({"persona": "p1"}, "persona", "persona"),
        ({"voices": ("v1",)}, "persona", "voice"),
        ({"text": "t1"}, "conversation", "text"),
        ({"conversation": "c1"}, "conversation", "conversation"),
    ],
)
def test_each_thing_shared_is_named(change, by, kind):
    split = {"a": "train", "b": "valid"}
    assert overlaps(PAIR, split, by) == []
    faults = overlaps([PAIR[0], replace(PAIR[1], **change)], split, by)
    assert [fault for fault in faults if f" {kind}(s)" in fault]


def test_a_conversation_with_the_same_words_goes_with_its_twin():
    group = [Member(f"m{i}", f"p{i}", f"c{i}", "same" if i < 5 else f"t{i}") for i in range(20)]
    for seed in range(20):
        split = assign_splits(group, "conversation", 0.3, seed)
        assert len({split[f"m{i}"] for i in range(5)}) == 1
