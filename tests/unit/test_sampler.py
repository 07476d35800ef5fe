"""Which clips a step trains on: each once an epoch, by length, a function of (seed, step)."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duplex.streams import NUM_ROWS
from training.batches import Clip
from training.sampler import Sampler, parts_of


def clips_of(lengths, name="c"):
    return [
        Clip(f"{name}{i}", np.zeros((NUM_ROWS, n), np.int16), 0, 0) for i, n in enumerate(lengths)
    ]


def padded(batch):
    return len(batch) * max(clip.num_frames for clip in batch)


LENGTHS = st.lists(st.integers(1, 1250), min_size=1, max_size=40)
SMALL = st.integers(1, 6)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, SMALL, SMALL, st.integers(0, 99), st.integers(1, 4))
def test_each_clip_comes_once_an_epoch_and_padding_never_grows(
    lengths, batch_size, bucket_batches, seed, windows
):
    clips = clips_of(lengths)
    steps = windows * bucket_batches
    plain = Sampler(clips, seed, batch_size)
    sorted_ = Sampler(clips, seed, batch_size, bucket_batches=bucket_batches)
    by_window = [range(w * bucket_batches, (w + 1) * bucket_batches) for w in range(windows)]
    seen = Counter()
    for window in by_window:
        before = [plain.batch(step) for step in window]
        after = [sorted_.batch(step) for step in window]
        assert Counter(c.id for b in before for c in b) == Counter(c.id for b in after for c in b)
        assert sum(map(padded, after)) <= sum(map(padded, before))
        assert all(len(batch) == batch_size for batch in after)
        seen.update(clip.id for batch in after for clip in batch)
    drawn = steps * batch_size
    whole = drawn // len(clips)
    assert set(seen.values()) <= {whole, whole + 1} and len(seen) == min(drawn, len(clips))
    backwards = Sampler(clips, seed, batch_size, bucket_batches=bucket_batches)
    for step in reversed(range(steps)):  # in any order, by any object
        assert [c.id for c in backwards.batch(step)] == [c.id for c in sorted_.batch(step)]


def test_batches_of_a_window_come_in_an_order_that_is_not_of_length():
    clips = clips_of(range(10, 410))
    firsts = []
    for seed in range(8):
        sampler = Sampler(clips, seed, 4, bucket_batches=25)
        batches = [sampler.batch(step) for step in range(25)]
        firsts.append(sorted(batches, key=padded).index(batches[0]))
    assert len(set(firsts)) > 3, "the shortest always came first"


@given(
    st.lists(st.integers(1, 99), min_size=12, max_size=12),
    st.sampled_from([(1, 1), (2, 2), (3, 2), (2, 1), (1, 4)]),
)
def test_parts_of_all_ranks_are_the_batch(lengths, shape):
    accumulate, processes = shape
    clips = clips_of(lengths)
    every = [parts_of(clips, accumulate, processes, rank) for rank in range(processes)]
    assert {len(part) for parts in every for part in parts} == {12 // accumulate // processes}
    found = sorted(clip.id for parts in every for part in parts for clip in part)
    assert found == sorted(clip.id for clip in clips)


@pytest.mark.parametrize("bucket_batches", [1, 3])
def test_base_data_takes_its_share_and_leaves_no_own_clip_out(bucket_batches):
    own, base = clips_of(range(20, 70)), clips_of(range(30, 37), "base")
    options = {"bucket_batches": bucket_batches, "base": base, "share": 0.25}
    sampler = Sampler(own, 5, 4, **options)
    batches = [sampler.batch(step) for step in range(300)]
    drawn = [clip.id for batch in batches for clip in batch]
    mixed = [name for name in drawn if name.startswith("base")]
    # 1 200 draws at .25: three standard deviations are 45.
    assert abs(len(mixed) - 300) < 45 and len(set(mixed)) == 7
    counts = Counter(name for name in drawn if name.startswith("c"))
    assert len(counts) == 50 and max(counts.values()) - min(counts.values()) <= 1
    late = Sampler(own, 5, 4, **options).batch(299)
    assert [c.id for c in late] == [c.id for c in batches[299]]
    without = Sampler(own, 5, 4, bucket_batches=bucket_batches, base=base, share=0)
    plain = Sampler(own, 5, 4, bucket_batches=bucket_batches)
    assert [c.id for c in without.batch(7)] == [c.id for c in plain.batch(7)]
