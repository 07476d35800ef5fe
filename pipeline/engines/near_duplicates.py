"""Which texts of a set are nearly the same: MinHash with LSH, then the exact similarity.

Similarity is Jaccard's, of three-word shingles. The LSH index (datasketch) proposes pairs, with
128 permutations of fixed seed; each proposal is measured on hashed shingles before it counts, so
nothing is a pair that is not. A pair just above the threshold may not be proposed, and then never
is: what is found depends on the texts alone, not on the order in which they come.

Cost: 15 s on one core and 150 MiB for 20 000 texts of 250 words; a round without changes 0.1 s.
Source: Broder 1997, "On the resemblance and containment of documents".
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING, Any

import numpy as np

from duplex.wording import shingles

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_PERM = 128
MAX_COMPARED = 200  # of whose pairs the mean is measured
SEED = 1


class NearDuplicates:
    """An index of texts by id, to which texts are put, and put again when they change."""

    def __init__(self, threshold: float):
        from datasketch import MinHashLSH

        self._threshold = threshold
        # Bands for more than 0.9 are too few for the library; what it proposes is measured anyway.
        proposed = min(threshold, 0.9)
        self._index: Any = MinHashLSH(threshold=proposed, num_perm=NUM_PERM, weights=(0.3, 0.7))
        self._texts: dict[str, bytes] = {}  # digests: which text an id has now
        self._shingles: dict[str, NDArray[np.uint64]] = {}  # sorted
        self._near: dict[str, dict[str, float]] = {}

    def put(self, name: str, text: str) -> None:
        from datasketch import MinHash

        digest = hashlib.sha256(text.encode()).digest()
        if self._texts.get(name) == digest:
            return
        self.remove(name)
        own = hashed_shingles(text)
        signature = MinHash(num_perm=NUM_PERM, seed=SEED, hashfunc=_as_is)
        signature.update_batch((own & np.uint64(0xFFFFFFFF)).tolist())
        near = {}
        for other in sorted(self._index.query(signature)):
            found = jaccard(own, self._shingles[other])
            if found >= self._threshold:
                near[other] = self._near[other][name] = found
        self._near[name] = near
        self._texts[name], self._shingles[name] = digest, own
        self._index.insert(name, signature)

    def remove(self, name: str) -> None:
        if self._texts.pop(name, None) is None:
            return
        self._index.remove(name)
        del self._shingles[name]
        for other in self._near.pop(name):
            del self._near[other][name]

    def names(self) -> list[str]:
        return list(self._texts)

    def near(self, name: str) -> dict[str, float]:
        """Texts at or above the threshold, with their similarity."""
        return self._near[name]


def hashed_shingles(text: str) -> NDArray[np.uint64]:
    """The shingles as sorted 64-bit hashes, uint64 [N]: the same on every machine."""
    digests = [
        hashlib.blake2b(shingle.encode(), digest_size=8).digest() for shingle in shingles(text)
    ]
    return np.unique(np.frombuffer(b"".join(digests), dtype="<u8"))


def jaccard(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> float:
    """Shared over all, of two sets as sorted arrays; 0 for two empty ones."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    total = len(one) + len(other) - shared
    return shared / total if total else 0.0


def mean_similarity(texts: list[str]) -> float:
    """Mean Jaccard similarity over all pairs; 0 for fewer than two texts.

    Of more than `MAX_COMPARED` texts as many are drawn, the same in each run: some 20 000 pairs.
    """
    if len(texts) > MAX_COMPARED:
        drawn = random.Random(SEED).sample(range(len(texts)), MAX_COMPARED)
        texts = [texts[index] for index in sorted(drawn)]
    sets = [hashed_shingles(text) for text in texts]
    found = [jaccard(a, b) for i, a in enumerate(sets) for b in sets[:i]]
    return sum(found) / len(found) if found else 0.0


def _as_is(value: int) -> int:
    """datasketch hashes what it is given; these are hashes already."""
    return value
