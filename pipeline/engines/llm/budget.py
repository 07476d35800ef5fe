"""What requests may cost: an upper bound before each, its bill after it, and the hard stop.

A request starts only when spent + unknown + reserved + its own bound stays within the budget,
so the bill never passes it, whatever the endpoint does with what was sent.

Bounds. Byte-level tokenizers make at most one token of a byte, so a prompt has at most its UTF-8
bytes in tokens; what the server's chat template puts around the messages is covered by
`TEMPLATE_TOKENS` and `MESSAGE_TOKENS`. A reply has at most `max_tokens`, reasoning included.
A reply of which no usage came, a cut stream, a time-out and a kill leave a bill that nobody
knows: it stays counted at its bound.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from duplex.errors import BudgetError

TEMPLATE_TOKENS = 256  # gpt-oss's own system preamble takes about 70
MESSAGE_TOKENS = 16


@dataclass(frozen=True)
class Named:
    """What messages call the work and its settings: a config's keys, or a command's options."""

    work: str = "dialogues"
    folder: str = "this run folder"
    api_key: str = "dialogues.runtime.api_key"
    base_url: str = "base_url"
    prices: str = "dialogues.runtime.price_in and price_out"
    budget_usd: str = "dialogues.runtime.budget_usd"
    budget_tokens: str = "dialogues.runtime.budget_tokens"
    max_retries: str = "dialogues.runtime.max_retries"
    max_wait_s: str = "dialogues.runtime.max_wait_s"


@dataclass(frozen=True)
class Cost:
    tokens: int = 0
    usd: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.tokens + other.tokens, self.usd + other.usd)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.tokens - other.tokens, self.usd - other.usd)


NOTHING = Cost()


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens; None where nobody said."""

    usd_in: float | None = None
    usd_out: float | None = None

    @property
    def known(self) -> bool:
        return self.usd_in is not None and self.usd_out is not None

    def cost(self, tokens_in: int, tokens_out: int) -> Cost:
        usd = (tokens_in * (self.usd_in or 0) + tokens_out * (self.usd_out or 0)) / 1e6
        return Cost(tokens_in + tokens_out, usd)


def prompt_bound(messages: Sequence[dict[str, str]], schema: dict[str, Any] | None) -> int:
    """The most tokens that a prompt can have; some servers count the schema too."""
    size = sum(len(text.encode("utf-8", "replace")) for m in messages for text in m.values())
    size += len(json.dumps(schema)) if schema else 0
    return size + TEMPLATE_TOKENS + MESSAGE_TOKENS * len(messages)


class Budget:
    """Shared by all threads. None is no limit.

    `before` is what earlier runs spent, and what they may have: see `exchanges.account`.
    """

    def __init__(
        self,
        *,
        usd: float | None = None,
        tokens: int | None = None,
        before: tuple[Cost, Cost] = (NOTHING, NOTHING),
        named: Named | None = None,
    ):
        self._usd, self._tokens = usd, tokens
        self._named = named or Named()
        self.spent, self.unknown = before
        self.reserved = NOTHING
        self._in_flight = 0
        self._changed = threading.Condition()

    def reserve(self, bound: Cost) -> None:
        """Set `bound` aside; waits while requests in flight may still give some back.

        Raises:
            BudgetError: not even when all of them cost nothing.
        """
        with self._changed:
            while not self._fits(self.spent + self.unknown + self.reserved + bound):
                if not self._in_flight:
                    raise BudgetError(self._refusal(bound))
                if not self._fits(self.spent + self.unknown + bound):
                    raise BudgetError(self._refusal(bound))
                self._changed.wait()
            self.reserved += bound
            self._in_flight += 1

    def settle(self, bound: Cost, bill: Cost | None) -> None:
        """A request is over. `bill` None: unknown, counted at its bound; `Cost()`: not billed."""
        with self._changed:
            self._in_flight -= 1
            # Sums of floats leave a rest: with nothing in flight there is none.
            self.reserved = self.reserved - bound if self._in_flight else NOTHING
            if bill is None:
                self.unknown += bound
            else:
                self.spent += bill
            self._changed.notify_all()

    def _fits(self, total: Cost) -> bool:
        return (self._usd is None or total.usd <= self._usd) and (
            self._tokens is None or total.tokens <= self._tokens
        )

    def _refusal(self, bound: Cost) -> str:
        total, named = self.spent + self.unknown + bound, self._named
        if self._usd is not None and total.usd > self._usd:
            return (
                f"{named.work}: at most {self._usd:.2f} USD may be spent in {named.folder}; "
                f"{self.spent.usd:.4f} is spent, {self.unknown.usd:.4f} more may have been "
                f"(replies that were cut off), and the next request may cost {bound.usd:.4f}. "
                f"Raise {named.budget_usd} and run again: nothing is paid twice."
            )
        return (
            f"{named.work}: at most {self._tokens} tokens may be used in {named.folder}; "
            f"{self.spent.tokens} are used, {self.unknown.tokens} more may have been (replies "
            f"that were cut off), and the next request may take {bound.tokens}. "
            f"Raise {named.budget_tokens} and run again: nothing is paid twice."
        )

    def describe(self) -> str:
        """For a line of progress."""
        text = f"{self.spent.tokens} tokens"
        if self._usd is not None:
            text += f", {self.spent.usd:.4f} of {self._usd:.2f} USD"
        elif self.spent.usd:
            text += f", {self.spent.usd:.4f} USD"
        if self.unknown.tokens:
            text += f", up to {self.unknown.tokens} tokens more unknown"
        return text
