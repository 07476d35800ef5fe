"""Which clips each step trains on: a pure function of (clips, seed, step).

**Order.** Clips are ordered anew for each epoch by sha256 of seed, epoch and clip id; the epochs
make one endless row, of which step s takes the next `batch_size`. A batch may span two epochs.

**Buckets.** Padding is computed and thrown away. So `bucket_batches` batches are one window: its
clips are sorted by length, cut into batches, and the batches ordered by hash, so that long ones
come at any time. A window is a stretch of that row, so each clip still comes once an epoch, and
cutting a sorted row gives the least sum of longest clips that any division of the window has.
Padding of 2 000 clips of 200 to 1 250 frames, evenly spread, in batches of 8: 35 % of what is
computed, with windows of 4 batches 13 %, of 16 batches 4 %.

**Base data.** With `share` > 0 a slot of a batch holds a clip of other data with that probability,
by a hash of (seed, slot). The row of own clips goes on after it: none is left out.

**Parts.** A batch is worked through in `accumulate` parts, each by `processes` ranks. Neighbours in
length make a part, and the ranks take turns within it: little padding, and equal work.

Cost: a sort of the clips for each epoch (10 000 clips: 0.14 s on a busy core), and, of a resumed
run that mixes, one hash for each slot before its first step, once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from training.batches import Clip

_PER_HASH = 1 << 64


class Sampler:
    """The batches of a run. What it keeps is a cache: any step may be asked for at any time.

    Args:
        clips: the run's own; at least one.
        base: clips mixed in, `share` of all slots on average.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        seed: int,
        batch_size: int,
        *,
        bucket_batches: int = 1,
        base: Sequence[Clip] = (),
        share: float = 0.0,
    ):
        self._clips, self._seed, self._batch_size = clips, seed, batch_size
        self._window_batches = bucket_batches
        self._base, self._share = base, share if base else 0.0
        self._orders: dict[int, list[Clip]] = {}
        self._windows: dict[int, list[list[Clip]]] = {}
        self._own_before = [0]  # own clips before window w

    def batch(self, step: int) -> list[Clip]:
        """The `batch_size` clips of step `step` (from 0)."""
        window, place = divmod(step, self._window_batches)
        if window not in self._windows:
            self._windows = {window: self._make_window(window)}
        return self._windows[window][place]

    def _make_window(self, window: int) -> list[list[Clip]]:
        size = self._window_batches * self._batch_size
        mixed = [self._mixed_in(slot) for slot in range(window * size, (window + 1) * size)]
        own = self._count_before(window, size)
        chosen = []
        for clip in mixed:
            if clip is None:
                clip = self._own(own)
                own += 1
            chosen.append(clip)
        if self._window_batches == 1:
            return [chosen]
        chosen.sort(key=lambda clip: (clip.num_frames, clip.id))
        batches = [chosen[i : i + self._batch_size] for i in range(0, size, self._batch_size)]
        order = sorted(range(len(batches)), key=lambda i: _digest(self._seed, "batch", window, i))
        return [batches[i] for i in order]

    def _own(self, position: int) -> Clip:
        epoch, place = divmod(position, len(self._clips))
        if epoch not in self._orders:
            if len(self._orders) > 1:
                self._orders.pop(min(self._orders))
            self._orders[epoch] = epoch_order(self._clips, self._seed, epoch)
        return self._orders[epoch][place]

    def _count_before(self, window: int, size: int) -> int:
        if not self._share:
            return window * size
        for earlier in range(len(self._own_before) - 1, window):
            slots = range(earlier * size, (earlier + 1) * size)
            own = sum(self._mixed_in(slot) is None for slot in slots)
            self._own_before.append(self._own_before[-1] + own)
        return self._own_before[window]

    def _mixed_in(self, slot: int) -> Clip | None:
        """The base clip in place `slot` of the run, if one is there."""
        if not self._share:
            return None
        digest = _digest(self._seed, "base", slot)
        if int.from_bytes(digest[:8], "big") >= self._share * _PER_HASH:
            return None
        return self._base[int.from_bytes(digest[8:16], "big") % len(self._base)]


def parts_of(
    clips: Sequence[Clip], accumulate: int, processes: int = 1, rank: int = 0
) -> list[list[Clip]]:
    """A rank's clips of each part of a batch; together, over parts and ranks, all of them.

    Args:
        clips: as many as a multiple of accumulate * processes.
    """
    size = len(clips) // accumulate
    assert size * accumulate == len(clips) and size % processes == 0, "the config checks this"
    return [list(clips[i * size : (i + 1) * size][rank::processes]) for i in range(accumulate)]


def epoch_order(clips: Sequence[Clip], seed: int, epoch: int) -> list[Clip]:
    """Each clip once, in an order that no library version can change."""
    return sorted(clips, key=lambda clip: _digest(seed, epoch, clip.id))


def _digest(*parts: object) -> bytes:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
