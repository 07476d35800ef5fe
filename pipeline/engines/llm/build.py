"""From a config's section to what talks to the endpoint: client, log and budget; and the estimate.

The budget is that of the run folder: what all its logs hold is spent already.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from duplex.config_data import DialoguesSection
from duplex.files import read_lines
from duplex.store import StageFolder, folders_of
from pipeline.engines.llm.budget import NOTHING, Budget, Cost, Named, Price, prompt_bound
from pipeline.engines.llm.client import Client, Request
from pipeline.engines.llm.exchanges import FILE, KEPT_FOLDER, Exchanges, account, logs_of
from pipeline.engines.llm.replicas import Replicas
from pipeline.engines.llm.wire import Wire

DRAFTS = "drafts.jsonl"  # personas that a model drafted
# For the estimate alone; the bounds are the budget's.
BYTES_PER_TOKEN = 4  # English
TOKENS_PER_TURN = 75  # 12 words, and the fields of the JSON object around them
PROMPTS_TOKENS = 350  # three system prompts


def prices(section: DialoguesSection) -> dict[str, Price]:
    runtime, critic = section.runtime, section.checks.critic
    found = {section.llm or "": Price(runtime.price_in, runtime.price_out)}
    if critic and critic != section.llm:
        found[critic] = Price(runtime.critic_price_in, runtime.critic_price_out)
    return found


def build_client(section: DialoguesSection, folder: StageFolder, number: int) -> Client:
    """`number` is the stage's, by which its other folders in the run are found."""
    return _client(section, folder.path.parent, number, folder.path / FILE)


def build_client_beside(section: DialoguesSection, run_folder: Path, number: int) -> Client:
    """A client for requests of no stage, whose log is among those that `clean` keeps."""
    return _client(section, run_folder, number, run_folder / KEPT_FOLDER / DRAFTS)


def _client(section: DialoguesSection, run_folder: Path, number: int, own: Path) -> Client:
    stage_folders = (other.path for other in folders_of(run_folder, number, "dialogues"))
    others = [path for path in logs_of(run_folder, stage_folders, own) if path != own]
    return client_of(section, Exchanges(own, others))


def client_of(section: DialoguesSection, log: Exchanges, named: Named | None = None) -> Client:
    """A client for any log; what that holds is spent already."""
    runtime = section.runtime
    wires = [
        Wire(
            base_url=address,
            api_key=runtime.api_key or "",
            timeout_s=runtime.timeout_s,
            deadline_s=runtime.deadline_s,
        )
        for address in runtime.addresses or (None,)
    ]
    budget = Budget(
        usd=runtime.budget_usd,
        tokens=runtime.budget_tokens,
        before=(log.before.spent, log.before.unknown),
        named=named,
    )
    return Client(
        wires[0] if len(wires) == 1 else Replicas(wires),
        log,
        budget,
        prices=prices(section),
        concurrency=runtime.concurrency,
        max_retries=runtime.max_retries,
        max_wait_s=runtime.max_wait_s,
        named=named,
    )


def spending_notes(folder: StageFolder) -> dict[str, Any]:
    """What this folder's log adds up to; empty where nothing was ever sent."""
    path = folder.path / FILE
    if not path.is_file():
        return {}
    asked = (line.get("request") for line in read_lines(path))
    models = {str(request["model"]) for request in asked if isinstance(request, dict)}
    return {"llm": account(read_lines(path)).notes() | {"models": sorted(models)}}


@dataclass(frozen=True)
class Estimate:
    """`about` if each first reply is kept, `most` if all take as many as they may."""

    model: str
    requests: int
    most_requests: int
    about: Cost
    most: Cost
    priced: bool
    named: Named = field(default_factory=Named)

    def describe(self) -> str:
        text = (
            f"{self.requests} requests to {self.model}: about {self.about.tokens / 1e6:.2f} M "
            f"tokens{self._usd(self.about)}; at most {self.most_requests} requests and "
            f"{self.most.tokens / 1e6:.2f} M tokens{self._usd(self.most)}, retries apart"
        )
        if not self.priced:
            text += f"; dollars unknown: give {self.named.prices}"
        return text + " (computed)"

    def _usd(self, cost: Cost) -> str:
        return f", {cost.usd:.2f} USD" if self.priced else ""


def estimate(requests: Iterable[Request], section: DialoguesSection) -> Estimate:
    """What the first requests of all slots, and what may follow them, would cost."""
    price_of = prices(section)
    own = price_of[section.llm or ""]
    critic = section.checks.critic if section.writer == "openai" else None
    judge = price_of.get(critic or "", own)
    reply = round((section.min_turns + section.max_turns) / 2 * TOKENS_PER_TURN)
    reply = PROMPTS_TOKENS if section.writer == "annotate" else min(reply, section.max_tokens)
    count, about, most = 0, NOTHING, NOTHING
    for request in requests:
        count += 1
        bound = prompt_bound(request.messages, request.schema)
        about += own.cost(_size(request) // BYTES_PER_TOKEN, reply)
        for number in range(section.max_candidates):
            # From the second on, the last reply and the reason are in the prompt too.
            before = section.max_tokens + 200 if number else 0
            most += own.cost(bound + before, section.max_tokens)
        if critic:
            about += judge.cost(reply + 300, 60)
            most_each = judge.cost(2 * (bound + section.max_tokens), 2 * 1024)
            for _ in range(section.max_candidates):
                most += most_each
    each = 1 + (critic is not None)
    per_slot = section.max_candidates * (1 + 2 * (critic is not None))
    priced = own.known and (critic is None or judge.known)
    return Estimate(section.llm or "", count * each, count * per_slot, about, most, priced)


def _size(request: Request) -> int:
    return sum(len(message["content"].encode()) for message in request.messages)


def pending(task_ids: Sequence[str], folder: StageFolder) -> set[str]:
    """Those of the tasks that are in no ledger line of the folder."""
    return set(task_ids) - folder.ledger().keys()
