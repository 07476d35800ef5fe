"""How often measures of words blame conversations in which nothing is wrong.

    python -m benchmarks.grounding            # prints
    python -m benchmarks.grounding --write    # and writes docs/results/grounding.*

The 200 scripted dialogues of configs/pocket-full.yaml (20 personas, 10 scenarios each), whose agent
turns are what a perfect model would say: each is measured as the reply to the user's turns before
it, by the functions that `duplex evaluate` uses. Every alarm is a false one. Not measured: what
they miss.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from duplex.datafiles import CHECKOUT
from duplex.files import write_atomic, write_json
from duplex.metrics import is_echo, proportion_interval, says_any
from duplex.records import Dialogue
from duplex.store import StageFolder
from pipeline.evaluation.grounding import invented
from pipeline.evaluation.items import load_items

RESULTS = CHECKOUT / "docs" / "results"
CONFIG = CHECKOUT / "configs" / "pocket-full.yaml"
EXAMPLES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="docs/results/grounding.*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = measure(dialogues(Path(name)))
    page = describe(result)
    print(page)
    if arguments.write:
        write_json(RESULTS / "grounding.json", result)
        write_atomic(RESULTS / "grounding.md", page.encode())


def dialogues(runs: Path) -> list[Dialogue]:
    """What the dialogues stage writes for the config."""
    command = [sys.executable, "-m", "duplex.cli", "run", str(CONFIG), "--to", "dialogues"]
    subprocess.run([*command, "--runs", str(runs)], check=True, stdout=subprocess.DEVNULL)
    (folder,) = runs.glob("*/02-dialogues-*")
    key = json.loads((folder / "manifest.json").read_text())["key"]
    records = StageFolder(folder, "dialogues", key).records()
    return [record for record in records if isinstance(record, Dialogue)]


def measure(conversations: list[Dialogue]) -> dict[str, Any]:
    lines = load_items(CHECKOUT / "data" / "prompts" / "seeds.yaml")[0].must_not_say
    alarms: Counter[str] = Counter()
    replies, blamed = 0, []
    for one in conversations:
        given = [one.system_prompt]
        user = ""
        for turn in one.turns:
            if turn.role == "user":
                user = turn.text
                given.append(user)
                continue
            replies += 1
            details = invented(turn.text, given)
            alarms["invented details"] += bool(details)
            alarms["out of role"] += says_any(turn.text, lines)
            alarms["echo"] += is_echo(user, turn.text)
            if details:
                blamed.append([", ".join(details), turn.text])
    return {
        "dialogues": len(conversations),
        "replies": replies,
        "alarms": {k: alarms[k] for k in ("invented details", "out of role", "echo")},
        "examples": blamed[:: max(1, len(blamed) // EXAMPLES)][:EXAMPLES],
    }


def describe(result: dict[str, Any]) -> str:
    lines = [
        "# False alarms of measures of words",
        "",
        f"`python -m benchmarks.grounding --write`: {result['replies']} replies of "
        f"{result['dialogues']} scripted dialogues without a fault (configs/pocket-full.yaml).",
        "",
        "| measure | blamed | share | 95 % |",
        "| --- | ---: | ---: | --- |",
    ]
    for name, hits in result["alarms"].items():
        low, high = proportion_interval(hits, result["replies"])
        lines.append(
            f"| {name} | {hits} | {hits / result['replies']:.2%} | {low:.2%} to {high:.2%} |"
        )
    lines += ["", "Some of what was called invented:", ""]
    lines += [f"- {details}: {text}" for details, text in result["examples"]]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
