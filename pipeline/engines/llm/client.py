"""One request to the endpoint, through everything that guards it.

The log first: a request whose reply is there costs nothing. Else: wait as the endpoint asks, set
its upper bound aside in the budget, note it in the log, send it, note the reply, settle the bill.
At most `concurrency` requests are under way at once, whoever asks.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from duplex.base import canonical_json
from duplex.errors import RecordError, RequestError, TransientError
from pipeline.engines.llm.budget import Budget, Cost, Named, Price, prompt_bound
from pipeline.engines.llm.dialect import Dialects
from pipeline.engines.llm.exchanges import Account, Exchanges, Reply
from pipeline.engines.llm.pace import Pace, backoff_s, exhausted_s, retry_after_s
from pipeline.engines.llm.replicas import Replicas
from pipeline.engines.llm.wire import Failure, Whole, Wire

NOTE_EVERY_S = 30  # a line of progress where nobody sees a bar
STOPPED = "the run was interrupted before this request was sent; run again to go on"
_SEEDS = 2**31  # some servers take no larger seed
# Turned away for what all threads do together: all of them wait.
_SHARED = frozenset({"http-429", "http-503", "http-529"})


@dataclass(frozen=True)
class Request:
    """What a model is asked. `schema`: of the JSON object that is the answer, by name."""

    model: str
    messages: tuple[dict[str, str], ...]
    seed: int
    temperature: float
    max_tokens: int
    schema_name: str
    schema: dict[str, Any] = field(repr=False)

    @property
    def body(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": list(self.messages),
            "temperature": self.temperature,
            "seed": self.seed % _SEEDS,
            "max_tokens": self.max_tokens,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": self.schema_name, "strict": True, "schema": self.schema},
            },
        }

    @property
    def id(self) -> str:
        return hashlib.sha256(canonical_json(self.body).encode("utf-8", "replace")).hexdigest()

    def bound(self, price: Price) -> Cost:
        return price.cost(prompt_bound(self.messages, self.schema), self.max_tokens)


class Client:
    """Thread-safe. `prices` by model; a model without one costs nothing that is known."""

    def __init__(
        self,
        wire: Wire | Replicas,
        log: Exchanges,
        budget: Budget,
        *,
        prices: dict[str, Price],
        concurrency: int = 1,
        max_retries: int = 8,
        max_wait_s: float = 120.0,
        pace: Pace | None = None,
        named: Named | None = None,
    ):
        self._wire, self._log, self._budget = wire, log, budget
        self._prices = prices
        self._named = named or Named()
        self._slots = threading.BoundedSemaphore(concurrency)
        self._max_retries, self._max_wait_s = max_retries, max_wait_s
        self._stopped = threading.Event()
        self._pace = pace or Pace(sleep=self._sleep)
        self._dialects = Dialects()
        self._connecting = threading.Lock()
        self._connected = False
        self._asking: dict[str, threading.Lock] = {}
        self._count = Account()
        self._counting = threading.Lock()
        self._noted = time.monotonic()

    def ask(self, request: Request, task_id: str) -> Reply:
        """The model's whole reply, of the log or of the endpoint.

        Raises:
            TransientError: the endpoint kept turning the request away, or cutting it off; or
                `stop` was called before it was sent.
            RequestError: no request will work: the key, the account, the model, the address.
            RecordError: the endpoint refuses this one.
            BudgetError: it may cost more than is left.
        """
        with self._alone(request.id):
            found = self._log.find(request.id, task_id)
            if found is not None:
                return found
            self._connect()
            number = 0
            while True:
                outcome = self._send(request, task_id)
                if isinstance(outcome, Whole):
                    return outcome.reply
                if outcome is None:  # refused a parameter: at once again, without it
                    continue
                number += 1
                self._wait_after(outcome, request, number)

    def stop(self) -> None:
        """Start no further request, from any thread; those under way end and are logged."""
        self._stopped.set()

    def close(self) -> None:
        self._wire.close()
        self._connected = False

    @property
    def replies(self) -> int:
        """How many came from the endpoint, and not from a log."""
        return self._count.replies

    @property
    def dialects(self) -> dict[str, Any]:
        """What the endpoint was found to take, by model."""
        return self._dialects.describe()

    def describe(self) -> str:
        with self._counting:
            retries = sum(self._count.failures.values())
            return f"{self._count.replies} replies, {retries} retries, {self._budget.describe()}"

    @contextlib.contextmanager
    def _alone(self, request_id: str) -> Iterator[None]:
        """One thread at a time for one request: the second one finds the first one's reply."""
        with self._connecting:
            lock = self._asking.setdefault(request_id, threading.Lock())
        with lock:
            yield

    def _connect(self) -> None:
        with self._connecting:
            if not self._connected:
                self._wire.connect()
                self._connected = True

    def _send(self, request: Request, task_id: str) -> Whole | Failure | None:
        price = self._prices.get(request.model, Price())
        bound = request.bound(price)
        with self._slots:
            self._pace.wait()
            dialect = self._dialects.of(request.model)
            self._budget.reserve(bound)
            bill: Cost | None = None
            try:
                if self._stopped.is_set():
                    bill = Cost()
                    raise TransientError(STOPPED)
                send = self._log.sent(request.id, task_id, request.body, bound)
                started = time.monotonic()
                outcome = self._wire.post(dialect.speak(request.body))
                if isinstance(outcome, Whole):
                    bill = self._bill(outcome.reply, price)
                    usd = bill.usd if bill else 0.0
                    elapsed = time.monotonic() - started
                    self._log.replied(send, request.id, outcome.reply, usd, elapsed)
                else:
                    bill = Cost() if outcome.billed is False else None
                    billed = "no" if outcome.billed is False else "unknown"
                    self._log.failed(send, request.id, outcome.reason, billed=billed)
            finally:
                self._budget.settle(bound, bill)
            self._note(outcome, bill)
        if isinstance(outcome, Failure) and outcome.kind != "retry":  # a parameter, perhaps
            learnt = self._dialects.refused(
                request.model, dialect, outcome.said, outcome.param, outcome.code
            )
            return None if learnt else outcome
        return outcome

    def _sleep(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise TransientError(STOPPED)

    def _bill(self, reply: Reply, price: Price) -> Cost | None:
        if reply.tokens_in is None or reply.tokens_out is None:
            return None
        return price.cost(reply.tokens_in, reply.tokens_out)

    def _note(self, outcome: Whole | Failure, bill: Cost | None) -> None:
        tokens = bill.tokens if bill else 0
        hold = exhausted_s(outcome.headers, tokens, time.time())
        if hold:
            self._pace.hold(min(hold, self._max_wait_s))
        with self._counting:
            if isinstance(outcome, Whole):
                self._count.replies += 1
            else:
                self._count.failures[outcome.reason] += 1
            now = time.monotonic()
            if sys.stderr.isatty() or now - self._noted < NOTE_EVERY_S:
                return
            self._noted = now
        print(f"{self._named.work}: {self.describe()}", file=sys.stderr, flush=True)

    def _wait_after(self, failure: Failure, request: Request, number: int) -> None:
        """Wait before try `number` + 1, or raise what ends the request."""
        named = self._named
        if failure.kind == "refused":
            raise RecordError(failure.detail)
        if failure.kind == "stop":
            raise RequestError(
                f"{failure.detail}. Check the key that {named.api_key} names, the "
                f"account's credit, the model {request.model!r} and {named.base_url}. What was "
                "answered is kept: mend it and run again."
            )
        if number > self._max_retries:
            raise TransientError(
                f"{failure.detail}; it was asked {number} times ({named.max_retries}). "
                f"Check {named.base_url} if it never worked"
            )
        asked = retry_after_s(failure.headers, time.time())
        if asked is not None and asked > self._max_wait_s:
            raise TransientError(
                f"{failure.detail}; it asks to wait {asked:.0f} s, and at most "
                f"{self._max_wait_s:g} s are waited ({named.max_wait_s})"
            )
        if asked is None:
            asked = min(backoff_s(request.id, number), self._max_wait_s)
        if failure.reason in _SHARED or "retry-after" in failure.headers:
            self._pace.hold(asked)
        else:
            self._pace.pause(asked)
