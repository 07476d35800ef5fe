"""`duplex judge`: a language model reads the conversations of a report folder.

judge/exchanges.jsonl   each request and reply: the cache, and what the budget is held to
judge.json              protocol, counts, cost, scores with their quotes, verdicts
judge.html              the same to read
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from duplex.config_data import DialoguesSection
from duplex.configfile import load_config
from duplex.datafiles import describe_faults, validate
from duplex.errors import DataFileError, MissingInputError, RequestError
from duplex.files import read_lines, sha256_bytes, write_atomic, write_json
from duplex.lock import RunLock
from pipeline.engines.llm.budget import NOTHING, Named
from pipeline.engines.llm.build import BYTES_PER_TOKEN, Estimate, client_of, prices
from pipeline.engines.llm.client import Request
from pipeline.engines.llm.exchanges import FILE, Exchanges, account
from pipeline.engines.llm.wire import DEFAULT_BASE_URL
from pipeline.evaluation import judge, judged
from pipeline.evaluation.comparison import MAX_BYTES
from pipeline.evaluation.rubric import load_rubric

FOLDER = "judge"
KEY_VARIABLE = "OPENAI_API_KEY"
NAMED = Named(
    work="judge", folder="this report folder", api_key="--api-key-env", base_url="--endpoint",
    prices="--price-in and --price-out", budget_usd="--budget-usd",
    budget_tokens="dialogues.runtime.budget_tokens of --config",
    max_retries="dialogues.runtime.max_retries of --config",
    max_wait_s="dialogues.runtime.max_wait_s of --config",
)  # fmt: skip


@dataclass(frozen=True)
class JudgeOptions:
    """Who is asked, at what price, by which rubric; what is None is the config's or the default."""

    config: Path | None = None
    endpoint: str | None = None
    model: str | None = None
    api_key_env: str | None = None
    price_in: float | None = None
    price_out: float | None = None
    budget_usd: float | None = None
    rubric: Path | None = None
    pairwise: bool = False


def run(folder: Path, options: JudgeOptions, *, as_json: bool) -> None:
    """
    Raises:
        RequestError: no report, no model, no key, a budget without prices.
        BudgetError, TransientError: what was answered is kept, and no judge.json is written.
    """
    section = settings(options)
    rubric = load_rubric(options.rubric)
    conversations, models, report_sha256 = read_report(folder)
    pairs = judged.matches(conversations, models) if options.pairwise else []
    if options.pairwise and not pairs:
        raise RequestError(
            f"{folder} must hold two models' conversations on the same items for --pairwise, found "
            f"{', '.join(models) or 'none'}. Judge without it, or evaluate --against another model."
        )
    asked = judged.questions(conversations, pairs, rubric, section.llm or "")
    with RunLock(folder / FOLDER):
        log = Exchanges(folder / FOLDER / FILE)
        client = client_of(section, log, NAMED)
        print(f"judge: {estimate(asked, log, section).describe()}", file=sys.stderr)
        try:
            answers = judge.ask_all(asked, client, section.runtime.concurrency)
        finally:
            client.close()
            print(f"judge: {client.describe()}", file=sys.stderr)
        found = {
            "protocol": {
                "rubric": {"version": rubric.version, "sha256": rubric.digest},
                "wording_sha256": judge.wording(rubric),
                "model": section.llm,
                "endpoint": ", ".join(
                    str(urlsplit(address).hostname)
                    for address in section.runtime.addresses or (DEFAULT_BASE_URL,)
                ),
                "endpoint_takes": client.dialects.get(section.llm or "")
                or _known_dialect(folder, section.llm),
                "temperature": 0,
                "max_tokens": judge.MAX_TOKENS,
                "replies_at_most": judge.ATTEMPTS,
                "report_sha256": report_sha256,
            },
            "models": models,
            "criteria": [{"id": one.id, "title": one.title} for one in rubric.criteria],
            "cost": account(read_lines(folder / FOLDER / FILE)).notes(),
            **judged.judgement(conversations, pairs, rubric, models, answers),
        }
        write_json(folder / "judge.json", found)
        from pipeline.evaluation.judge_page import page

        write_atomic(folder / "judge.html", page(found).encode())
    _say(found, folder, as_json=as_json)


def read_report(folder: Path) -> tuple[dict[judged.Key, judge.Conversation], list[str], str]:
    """The conversations of report.json, the models in their order, and the file's digest.

    Raises:
        MissingInputError: no report there.
        DataFileError: it is none.
    """
    path = folder / "report.json"
    if not path.is_file():
        raise MissingInputError(
            f"{folder} must hold report.json, found none. Give the folder that `duplex evaluate` "
            "wrote: evaluation/, or runs/<config>/09-evaluate-<key>."
        )
    if path.stat().st_size > MAX_BYTES:
        raise DataFileError(f"{path}: a report must be under {MAX_BYTES >> 20} MB")
    content = path.read_bytes()
    try:
        value = json.loads(content)
        listed = list(value["conversations"])
    except (ValueError, LookupError, TypeError):
        raise DataFileError(f"{path}: must be a report with conversations, found none") from None
    conversations = [validate(judge.Conversation, one, path) for one in listed]
    models = list(dict.fromkeys(one.model for one in conversations))
    return judged.by_key(conversations), models, sha256_bytes(content)


def settings(options: JudgeOptions) -> DialoguesSection:
    """Who is asked, at what price: the config's dialogues section, with what was given over it.

    Another endpoint or model than the config's has prices of its own.
    """
    section = load_config(options.config).dialogues if options.config else DialoguesSection()
    known, endpoint = section.runtime.model_dump(), options.endpoint
    given: dict[str, Any] = {"base_url": endpoint}
    given["api_key"] = _key(options.api_key_env, known["api_key"])
    model = options.model or section.llm
    if not model:
        raise RequestError("--model must name a model at the endpoint, found none")
    if (endpoint or known["base_url"]) != known["base_url"] or model != section.llm:
        given |= {"price_in": None, "price_out": None}
        known |= {"price_in": None, "price_out": None}
    given |= {key: getattr(options, key) for key in ("price_in", "price_out", "budget_usd")}
    runtime = known | {k: v for k, v in given.items() if v is not None}
    if runtime["budget_usd"] is not None and None in (runtime["price_in"], runtime["price_out"]):
        raise RequestError(
            "a budget in dollars needs --price-in and --price-out, the model's prices in dollars "
            "per million tokens; they are on its provider's page"
        )
    try:
        return DialoguesSection.model_validate(
            {"writer": "openai", "llm": model, "runtime": runtime}
        )
    except ValidationError as error:
        raise RequestError(f"judge: {describe_faults(error)}") from None


def _key(variable: str | None, of_config: str | None) -> str:
    """The key, from the environment alone: an option would stand in the shell's history."""
    if variable is None and of_config and of_config.strip():
        return of_config
    variable = variable or KEY_VARIABLE
    if not re.fullmatch(r"[A-Za-z_]\w*", variable):  # perhaps the key itself: not shown
        raise RequestError("--api-key-env must be the name of a variable, as in OPENAI_API_KEY")
    key = os.environ.get(variable, "").strip()
    if not key:
        raise RequestError(
            "the variable that --api-key-env names must hold the endpoint's key, found nothing in "
            f"{variable if variable == KEY_VARIABLE else 'it'} (any word will do for a local "
            "server without keys)"
        )
    return key


def estimate(
    questions: Sequence[judge.Question], log: Exchanges, section: DialoguesSection
) -> Estimate:
    """What is not in the log yet: the next request of each question, and what may follow it."""
    price = prices(section)[section.llm or ""]
    count = most_count = 0
    about = most = NOTHING
    seen: set[str] = set()
    for question in questions:
        waiting, number = judge.settle(question, lambda request: log.find(request.id, ""))
        if not isinstance(waiting, Request) or waiting.id in seen:
            continue
        seen.add(waiting.id)  # two conversations of the same words are one request
        size = sum(len(message["content"].encode()) for message in waiting.messages)
        quotes = len(waiting.schema["properties"])
        about += price.cost(size // BYTES_PER_TOKEN, quotes * judge.REPLY_TOKENS)
        count += 1
        for _ in range(judge.ATTEMPTS - number):
            most += waiting.bound(price)
            most_count += 1
            # From the second on, the last reply and the reason are in the prompt too.
            waiting = replace(
                waiting,
                messages=(*waiting.messages[:2], {"role": "assistant", "content": _LONGEST}),
            )
    return Estimate(section.llm or "", count, most_count, about, most, price.known, NAMED)


_LONGEST = " " * (judge.MAX_TOKENS + 400)


def _known_dialect(folder: Path, model: str | None) -> Any:
    """What an earlier call found out: a call that is answered from the log asks nothing."""
    try:
        protocol = json.loads((folder / "judge.json").read_text(encoding="utf-8"))["protocol"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return protocol.get("endpoint_takes") if protocol.get("model") == model else None


def _say(found: dict[str, Any], folder: Path, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False))
        return
    print("Judged:  " + ", ".join(f"{n} {status}" for status, n in found["counts"].items()))
    for row in found["verdict"]:
        difference = "" if row["difference"] is None else f", {row['difference']:+.2f}"
        sure = "" if row["p_holm"] is None else f", p = {row['p_holm']:.2g}"
        print(f"  {row['label']}: {row['to']} against {row['from']}: {row['word']}{difference}"
              f" (n = {row['n']}{sure})")  # fmt: skip
    if found["pairwise"]:
        bias = found["pairwise"]["position_bias"]
        print(f"  position bias: {bias['hits']} of {bias['n']} pairs")
    cost = found["cost"]
    print(f"Cost:    {cost['usd']:.4f} USD, {cost['tokens_in'] + cost['tokens_out']} tokens, for "
          f"all of {folder / FOLDER}")  # fmt: skip
    print(f"Report:  {folder / 'judge.html'}")
