"""What the coffee set costs before training: written, spoken and mixed, offline.

    python -m benchmarks.data                 # prints
    python -m benchmarks.data --write         # and writes docs/results/data.{json,md}

All of configs/pocket-full.yaml, 20 personas times 10 scenarios, in a fresh run folder: seconds of
each stage's own clock, of the whole command, CPU seconds and the largest process's memory; then
the same again with nothing to do. Then the near-duplicate search over a set of 100 times that size.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from duplex.configfile import load_config
from duplex.datafiles import CHECKOUT
from duplex.frames import SAMPLE_RATE
from duplex.records import Dialogue, Speech
from pipeline.engines.near_duplicates import NearDuplicates
from pipeline.engines.set_review import full_text
from pipeline.run import plan
from training.device import cpu_name

CONFIG = CHECKOUT / "configs" / "pocket-full.yaml"
STAGES = ("personas", "dialogues", "voices", "speech")
RESULTS = CHECKOUT / "docs" / "results"
MANY = 100


def measure() -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="data-benchmark-"))
    try:
        wall_s, cpu_s = _run(folder)
        again_s, _ = _run(folder)
        steps = {step.stage.name: step for step in plan(load_config(CONFIG, None), folder)}
        folders = {name: steps[name].folder for name in STAGES}
        manifests = {name: found.manifest() or {} for name, found in folders.items() if found}
        dialogues = _records(folders["dialogues"], Dialogue)
        speeches = _records(folders["speech"], Speech)
        return {
            "machine": f"{cpu_name()}, Python {platform.python_version()}",
            "wall_s": round(wall_s, 1),
            "cpu_s": round(cpu_s, 1),
            "again_s": round(again_s, 1),
            "peak_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
            "stage_s": {name: m["provenance"]["seconds"] for name, m in manifests.items()},
            "funnel": manifests["dialogues"]["provenance"]["funnel"],
            "dialogues": len(dialogues),
            "turns": sum(len(dialogue.turns) for dialogue in dialogues),
            "minutes": round(sum(s.num_samples for s in speeches) / SAMPLE_RATE / 60, 1),
            "near_duplicates": _search(dialogues),
        }
    finally:
        shutil.rmtree(folder)


def _run(runs: Path) -> tuple[float, float]:
    """Wall clock and CPU seconds of the command with all that it starts."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "duplex.cli", "run", str(CONFIG), "--to", "speech",
         "--runs", str(runs)],
        cwd=CHECKOUT, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - started, cpu_s


def _records(folder: Any, kind: type) -> list[Any]:
    return [record for record in folder.records() if isinstance(record, kind)]


def _search(dialogues: list[Any]) -> dict[str, Any]:
    """The index over each dialogue `MANY` times, a word of its own in each copy's every turn."""
    started = time.process_time()
    near = NearDuplicates(0.7)
    for copy in range(MANY):
        for dialogue in dialogues:
            text = full_text(dialogue)
            near.put(f"{dialogue.id}-{copy}", " ".join(f"{w} v{copy}" for w in text.split()))
    return {"texts": MANY * len(dialogues), "cpu_s": round(time.process_time() - started, 1)}


def page(found: dict[str, Any]) -> str:
    rows = "\n".join(f"| {name} | {s:.1f} |" for name, s in found["stage_s"].items())
    funnel = found["funnel"]
    reasons = ", ".join(f"{count} {code}" for code, count in funnel["reasons"].items())
    search = found["near_duplicates"]
    return f"""# The data stages

`python -m benchmarks.data --write`: configs/pocket-full.yaml on {found["machine"]}, offline.

| stage | seconds |
| --- | ---: |
{rows}

The whole command: {found["wall_s"]:.1f} s, {found["cpu_s"]:.1f} s of CPU time, the largest \
process {found["peak_mb"]} MB. Again, with nothing to do: {found["again_s"]:.1f} s.

{found["dialogues"]} dialogues, {found["turns"]} turns, {found["minutes"]:.0f} minutes of stereo: \
{found["minutes"] * 60 / found["wall_s"]:.0f} times real time. Of {funnel["written"]} candidates \
{funnel["kept"]} were kept{f" ({reasons})" if reasons else ""}.

The index that finds near-duplicates takes {search["cpu_s"]:.1f} s of CPU time for \
{search["texts"]} texts.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/results/data.{json,md}")
    options = parser.parse_args()
    found = measure()
    print(page(found))
    if options.write:
        (RESULTS / "data.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        (RESULTS / "data.md").write_text(page(found))


if __name__ == "__main__":
    main()
