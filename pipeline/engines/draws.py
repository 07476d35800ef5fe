"""Draws from a hash: the same on every machine and Python, and apart from every other draw."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


class Draw:
    """Numbers from a hash: the same on every machine and Python."""

    def __init__(self, material: str):
        self._rest = int.from_bytes(hashlib.sha256(material.encode()).digest(), "big")

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        self._rest, offset = divmod(self._rest, high - low + 1)
        return low + offset


def ranked(material: str, names: Iterable[str]) -> list[str]:
    """The names in an order of their own for each material: one name more moves no others."""
    return sorted(
        names, key=lambda name: hashlib.sha256(f"{material}\x00{name}".encode()).hexdigest()
    )
