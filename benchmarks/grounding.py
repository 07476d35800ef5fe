"""How often measures of words blame conversations in which nothing is wrong.

    python -m benchmarks.grounding            # prints
    python -m benchmarks.grounding --write    # and writes docs/results/grounding.*

The 200 scripted dialogues of configs/pocket-full.yaml (20 personas, 10 scenarios each), whose agent
turns are what a perfect model would say: each is measured as the reply to the user's turns before
it, by the functions that `duplex evaluate` uses. Every alarm is a false one.

What they miss is measured for off-topic replies alone: `STRAY` are replies that have nothing to do
with a coffee shop, written for this; each is put at the middle of each dialogue.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from duplex.datafiles import CHECKOUT, load_domain
from duplex.files import write_atomic, write_json
from duplex.metrics import is_echo, proportion_interval, says_any
from duplex.records import Dialogue
from duplex.store import StageFolder
from duplex.topic import MIN_CONTENT, content_words, off_topic
from pipeline.evaluation.grounding import invented
from pipeline.evaluation.items import load_items

RESULTS = CHECKOUT / "docs" / "results"
CONFIG = CHECKOUT / "configs" / "pocket-full.yaml"
DOMAIN = CHECKOUT / "data" / "domains" / "coffee-shop.yaml"
EXAMPLES = 8
ALONE, WITH_TOPIC = "off topic, prompt and user alone", "off topic, with the domain's topic"
LEAST = (3, 4, 5, 6)  # content words that a reply must have to be called off topic
STRAY = (
    "The volcano erupted twice during the last century.",
    "My sister plays the cello in a symphony orchestra.",
    "Our train leaves from platform seven, so hurry up.",
    "Goalkeepers should practise penalties every week.",
    "I painted the garden fence bright green on Sunday.",
    "Quantum computers need temperatures close to absolute zero.",
    "The parliament voted against the new railway law.",
    "Your password must contain a number and a capital letter.",
    "Dinosaurs died out sixty six million years ago.",
    "The dentist pulled two of my teeth yesterday.",
    "Rabbits dig deep burrows beneath the old oak tree.",
    "As a language model I have no personal opinions.",
    "Shakespeare wrote thirty seven plays and many sonnets.",
    "The mechanic replaced both brake pads and the exhaust.",
    "Wolves hunt in packs across the frozen tundra.",
    "The lawyer filed an appeal with the supreme court.",
    "My flight to Lisbon was cancelled because of fog.",
    "Turn left at the traffic lights and follow the river.",
    "The moon orbits the earth in about four weeks.",
    "He studied medieval history at the university.",
)


def main() -> None:
    show_or_write("grounding", __doc__ or "", measure, describe)


def show_or_write(
    name: str,
    purpose: str,
    measure: Callable[[list[Dialogue]], dict[str, Any]],
    describe: Callable[[dict[str, Any]], str],
) -> None:
    """Measure on the scripted dialogues, print the page; with --write docs/results/NAME.* too."""
    parser = argparse.ArgumentParser(description=purpose.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"docs/results/{name}.*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(dialogues(Path(folder)))
    page = describe(result)
    print(page)
    if arguments.write:
        write_json(RESULTS / f"{name}.json", result)
        write_atomic(RESULTS / f"{name}.md", page.encode())


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
    topic = load_domain(DOMAIN).topic
    alarms: Counter[str] = Counter()
    caught, false = Counter[int](), Counter[int]()
    replies, judged, blamed, strayed = 0, 0, [], []
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
            judged += len(content_words(turn.text)) >= MIN_CONTENT
            alarms[ALONE] += off_topic(turn.text, given)
            if off_topic(turn.text, given, topic):
                alarms[WITH_TOPIC] += 1
                strayed.append(turn.text)
            for least in LEAST:
                false[least] += off_topic(turn.text, given, topic, least)
            if details:
                blamed.append([", ".join(details), turn.text])
        users = [turn.text for turn in one.turns if turn.role == "user"]
        given = [one.system_prompt, *users[: len(users) // 2 + 1]]
        for least in LEAST:
            caught[least] += sum(off_topic(stray, given, topic, least) for stray in STRAY)
    measures = ("invented details", "out of role", "echo", ALONE, WITH_TOPIC)
    return {
        "dialogues": len(conversations),
        "replies": replies,
        "judged_by_topic": judged,
        "alarms": {name: alarms[name] for name in measures},
        "strays": len(STRAY) * len(conversations),
        "by_least_words": [[least, false[least], caught[least]] for least in LEAST],
        "called_off_topic": strayed[:: max(1, len(strayed) // EXAMPLES)][:EXAMPLES],
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
    lines += [
        "",
        f"Off topic is asked of replies with {MIN_CONTENT} content words and more: "
        f"{result['judged_by_topic']} of them have those. The topic is the list of "
        "data/domains/coffee-shop.yaml. "
        f"Asked of replies with more content words, the topic known, beside {len(STRAY)} replies "
        "about something else in each dialogue:",
        "",
        "| content words | blamed of the right replies | found of the stray ones |",
        "| ---: | ---: | ---: |",
    ]
    lines += [
        f"| {least} | {false / result['replies']:.1%} | {caught / result['strays']:.1%} |"
        for least, false, caught in result["by_least_words"]
    ]
    lines += ["", "Some of what was called invented:", ""]
    lines += [f"- {details}: {text}" for details, text in result["examples"]]
    lines += ["", "Some of what was called off topic, the topic known:", ""]
    lines += [f"- {text}" for text in result["called_off_topic"]]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
