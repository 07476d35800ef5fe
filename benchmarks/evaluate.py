"""What an evaluation costs, how often it is wrong about equal models, and how large its page is.

    python -m benchmarks.evaluate                      # the pocket base
    python -m benchmarks.evaluate --checkpoint FOLDER --write
                                                       # and writes docs/results/evaluate.*

speed     greedy conversations of 20 s: all in batches (`pipeline.evaluation.offline`, start-up and
          the first one's repeat included) against a sample over WebSockets in lock-step, one at a
          time and as many at once as the server has slots, its start not counted; in turns, so
          that all meet the same machine
verdicts  the same checkpoint against itself, 20 pairs of seeds that differ, over the items of
          configs/pocket.yaml with its sampling: every verdict is a false one
power     made-up rates that do differ by 30 percentage points: how many items it takes
page      report.html of 40 conversations of 30 s

Verdicts on a model that says nothing mean little: give --checkpoint one that talks, such as the
merged model of `make demo`. What was played is kept in --work by what it hangs on, so that a run
that was cut off goes on, and --write can be repeated. Pocket model on two cores: half an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.evaluate_page import describe
from benchmarks.evaluate_power import POWER_DRAWS, POWER_ITEMS, power
from duplex.base import canonical_json
from duplex.config import Config, EvaluateSection, SamplingSection
from duplex.configfile import load_config
from duplex.datafiles import CHECKOUT
from duplex.files import sha256_bytes, write_atomic, write_json
from duplex.frames import FRAME_S, FRAME_SAMPLES
from duplex.metrics import proportion_interval
from duplex.verdict import LEVEL, least_items
from pipeline.engines import espeak
from pipeline.engines.checkpoint import Checkpoint
from pipeline.evaluate import play_settings, protocol_of, speak_items
from pipeline.evaluation.found import report_data
from pipeline.evaluation.items import SpokenItem, load_all_items, speak_item
from pipeline.evaluation.offline import play_checkpoint
from pipeline.evaluation.play import Played, PlaySettings, evaluate_urls, same_answer
from pipeline.evaluation.report import page_files
from pipeline.evaluation.verdicts import verdicts
from pipeline.serving.launch import running_server
from training.device import cpu_name
from training.servable import servable_checkpoint

RESULTS = CHECKOUT / "docs" / "results"
CONFIG = CHECKOUT / "configs" / "pocket.yaml"
WORK = CHECKOUT / "runs" / ".evaluate-benchmark"
GREEDY = SamplingSection(text_temperature=0, audio_temperature=0)
VOICES = ("en-us", "en-gb", "en-gb-scotland")  # each says all items: other audio, another call
SPEED_ITEMS, SPEED_S, ROUNDS, SAMPLE = 100, 20.0, 2, 6
PAIRS, DEALS = 20, 5
PAGE_CONVERSATIONS, PAGE_S = 40, 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="a folder; the pocket base without it")
    parser.add_argument("--called", default="the given checkpoint", help="its name on the page")
    parser.add_argument("--slots", type=int, default=32, help="to measure speed with")
    parser.add_argument("--work", type=Path, default=WORK, help="where what was played is kept")
    parser.add_argument("--write", action="store_true", help="docs/results/evaluate.*")
    arguments = parser.parse_args()
    base = servable_checkpoint(Config(name="x").model, CHECKOUT / "runs", print).folder
    folder = arguments.checkpoint or base
    section = load_config(CONFIG, None).evaluate
    result = {
        "machine": f"{cpu_name()}, {os.cpu_count()} cores",
        "model": arguments.called if arguments.checkpoint else "the pocket base",
        "speed": speed(folder, arguments.work, slots=arguments.slots),
        "false": false_verdicts(folder, section, arguments.work, slots=section.runtime.slots),
        "power": kept(arguments.work, "power", [POWER_ITEMS, POWER_DRAWS], power),
        "page": page_size({"base": base, "tuned": folder}, section, arguments.work),
    }
    page = describe(result)
    print(page)
    if arguments.write:
        write_json(RESULTS / "evaluate.json", result)
        write_atomic(RESULTS / "evaluate.md", page.encode())


def kept(work: Path, name: str, hangs_on: Any, make: Callable[[], Any]) -> Any:
    """What `make` gives, as JSON; from `work` where it was made before of the same."""
    key = sha256_bytes(canonical_json({"of": hangs_on}).encode())[:12]
    path = work / f"{name}-{key}.json"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
    return json.loads(path.read_text())


def weights_of(folder: Path) -> str:
    return Checkpoint.open(folder).digest("moshi")


def tokenizer_of(folder: Path) -> bytes:
    return Checkpoint.open(folder).files()["tokenizer"].read_bytes()


def spoken_items(count: int, seconds: float) -> list[SpokenItem]:
    """So many different calls, each of exactly `seconds`: all items of data/prompts, said by one
    voice after the other."""
    items = load_all_items([str(path) for path in sorted(CHECKOUT.glob("data/prompts/*.yaml"))])
    wanted = [(item, voice) for voice in VOICES for item in items][:count]
    assert len(wanted) == count, f"there are {len(items)} items and {len(VOICES)} voices"
    found = []
    with espeak.EspeakEngine() as engine:
        for item, voice in wanted:
            one = speak_item(item, engine, {"voice": voice}, seconds=seconds, answer_s=2.4)
            samples = np.zeros(round(seconds / FRAME_S) * FRAME_SAMPLES, dtype=np.float32)
            samples[: len(one.samples)] = one.samples
            named = item.model_copy(update={"id": f"{item.id}-{voice}"})
            found.append(replace(one, item=named, samples=samples))
    return found


# -- speed


def speed(
    folder: Path,
    work: Path,
    *,
    slots: int,
    count: int = SPEED_ITEMS,
    seconds: float = SPEED_S,
    rounds: int = ROUNDS,
    sample: int = SAMPLE,
) -> dict[str, Any]:
    """Conversations a minute of the three ways, by round, and how many of those that were held two
    ways are equal."""
    items = spoken_items(count, seconds)
    settings = PlaySettings(sampling=GREEDY, tokenizer=tokenizer_of(folder))
    hangs_on = [weights_of(folder), slots, count, seconds, sample, "most words first"]

    def one_round(number: int) -> dict[str, Any]:
        load = os.getloadavg()[0]
        before_s = _cpu_s()
        batch = play_checkpoint(
            "batch", folder, items, settings, print, tokenizer=tokenizer_of(folder), slots=slots
        )
        batch_s = _cpu_s() - before_s
        # Who says most comes first: of two who say nothing, equal transcripts tell little.
        talkative = sorted(batch.conversations, key=lambda one: -one.num_words)
        ordered = [one.spoken for one in talkative]
        some = ordered[number * sample % count :][:sample]
        alone, alone_s = _served(folder, some, settings, 1)
        slots_each = batch.info["slots"]
        some = ordered[number * slots_each % count :][:slots_each]
        together, together_s = _served(folder, some, settings, slots_each)
        return {
            "load_before": round(load, 1),
            "info": batch.info,
            "repeats": batch.repeats,
            "words": float(np.mean([m.num_words for m in batch.conversations])),
            "batch": _rate(batch, batch_s),
            "alone": _rate(alone, alone_s) | _equal(batch, alone),
            "together": _rate(together, together_s) | _equal(batch, together),
        }

    found = [
        kept(work, f"speed-{number}", hangs_on, lambda number=number: one_round(number))
        for number in range(rounds)
    ]
    ways = ("alone", "together")
    return {
        "conversations": count,
        "seconds": seconds,
        "rounds": found,
        "ratios": {
            way: [one["batch"]["a_minute"] / one[way]["a_minute"] for one in found] for way in ways
        },
        "cpu_ratios": {
            way: [one[way]["cpu_s_each"] / one["batch"]["cpu_s_each"] for one in found]
            for way in ways
        },
        "equal": {
            way: {
                **{
                    key: sum(one[way][key] for one in found)
                    for key in ("held", "with_words", "texts", "audio")
                },
                "steps": max(one[way]["steps"] for one in found),
            }
            for way in ways
        },
    }


def _served(
    folder: Path, items: Sequence[SpokenItem], settings: PlaySettings, slots: int
) -> tuple[Played, float]:
    """What was played, and CPU seconds of server and client without the server's start."""
    once = replace(settings, again=False, at_a_time=slots)
    before_s = _cpu_s()
    with running_server(folder, device="cpu", slots=slots):
        pass
    started_s = _cpu_s()
    with running_server(folder, device="cpu", slots=slots) as url:
        (played,) = evaluate_urls({f"{slots} slots": url}, items, once)
    return played, _cpu_s() - started_s - (started_s - before_s)


def _cpu_s() -> float:
    """Of this process and of all that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _rate(played: Played, cpu_s: float) -> dict[str, float]:
    number = len(played.conversations)
    return {
        "wall_s": round(played.wall_s, 2),
        "a_minute": 60 * number / played.wall_s,
        "cpu_s_each": cpu_s / number,
    }


def _equal(batch: Played, served: Played) -> dict[str, int]:
    """How many were held both ways, have words, and are equal; and by how many steps of 16 bits
    the samples differ at most."""
    by_name = {one.name: one.conversation for one in batch.conversations}
    pairs = [(by_name[one.name], one.conversation) for one in served.conversations]
    return {
        "held": len(pairs),
        "with_words": sum(bool(other.text) for _, other in pairs),
        "texts": sum(one.text == other.text for one, other in pairs),
        "audio": sum(same_answer(one, other) for one, other in pairs),
        "steps": max(round(32768 * float(np.abs(a.agent - b.agent).max())) for a, b in pairs),
    }


# -- verdicts on equal models


def false_verdicts(
    folder: Path,
    section: EvaluateSection,
    work: Path,
    *,
    slots: int,
    pairs: int = PAIRS,
    spoken: Sequence[SpokenItem] | None = None,
) -> dict[str, Any]:
    """Seeds 2k and 2k + 1 of one checkpoint as two models, for each k."""
    items = speak_items(section) if spoken is None else list(spoken)
    tokenizer = tokenizer_of(folder)
    settings = play_settings(section, tokenizer)
    protocol = protocol_of(section, settings)
    protocol |= {"audio": [sha256_bytes(one.samples.tobytes()) for one in items]}

    def play(seeds: tuple[int, int]) -> list[dict[str, Any]]:
        """Both at once, which fills the batch."""
        both = replace(settings, seeds=seeds, again=False)
        played = play_checkpoint(
            "self", folder, items, both, print, tokenizer=tokenizer, slots=slots
        )
        data = report_data([played], about={}, protocol={})
        return [{k: one[k] for k in ("item", "seed", "sums")} for one in data["conversations"]]

    found: list[dict[str, Any]] = []
    for seeds in zip(range(0, 2 * pairs, 2), range(1, 2 * pairs, 2), strict=True):
        found += kept(work, f"seeds-{seeds[0]}", [weights_of(folder), protocol, slots],
                      lambda seeds=seeds: play(seeds))  # fmt: skip
    cells = _cells(found, pairs)
    rng = np.random.default_rng(0)
    dealt = [cell for _ in range(DEALS) for cell in _cells(_deal(found, rng), pairs)]
    return {
        "items": len(items),
        "pairs": pairs,
        "words": float(np.mean([one["sums"]["words"][0] for one in found])),
        "unlike": sum(row["difference"] != 0 for row in cells),
        **_shares(cells),
        # Fewer items never come to the level, and cells of theirs make the share small.
        "able": _shares([row for row in cells if row["n"] >= least_items(1)]),
        "dealt": _shares(dealt) | {"pairs": DEALS * pairs},
        "measures": {
            key: _shares([row for row in cells if row["key"] == key])
            | {"dealt": _shares([row for row in dealt if row["key"] == key])}
            for key in dict.fromkeys(row["key"] for row in cells)
        },
    }


def _cells(conversations: Sequence[dict[str, Any]], pairs: int) -> list[dict[str, Any]]:
    """The verdicts of all pairs, where there is a p."""
    rows = []
    for k in range(pairs):
        seeds = (2 * k, 2 * k + 1)
        taken = [one | {"model": str(one["seed"])} for one in conversations if one["seed"] in seeds]
        rows += verdicts(taken, [str(seed) for seed in seeds])[0]["rows"]
    return [row for row in rows if row["p"] is not None]


def _deal(
    conversations: Sequence[dict[str, Any]], rng: np.random.Generator
) -> list[dict[str, Any]]:
    """The same conversations, each item's seeds shuffled by themselves: as if no two items had
    been drawn with the same numbers."""
    seeds = sorted({one["seed"] for one in conversations})
    names = sorted({one["item"] for one in conversations})
    new = {name: dict(zip(seeds, map(int, rng.permutation(seeds)), strict=True)) for name in names}
    moved = [one | {"seed": new[one["item"]][one["seed"]]} for one in conversations]
    return sorted(moved, key=lambda one: (one["seed"], one["item"]))


def _shares(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of cells with a p: how many are under the level, alone and after Holm."""
    hits = sum(row["p"] <= LEVEL for row in cells)
    low, high = proportion_interval(hits, len(cells)) if cells else (None, None)
    return {
        "cells": len(cells),
        "hits": hits,
        "share": hits / len(cells) if cells else None,
        "low": low,
        "high": high,
        "after_holm": sum(row["p_holm"] <= LEVEL for row in cells),
        "median_items": median(row["n"] for row in cells) if cells else None,
    }


# -- page


def page_size(
    checkpoints: dict[str, Path],
    section: EvaluateSection,
    work: Path,
    *,
    conversations: int = PAGE_CONVERSATIONS,
    seconds: float = PAGE_S,
) -> dict[str, Any]:
    """Bytes of report.html, and of what they are."""
    hangs_on = [*map(weights_of, checkpoints.values()), conversations, seconds]
    return kept(
        work, "page", hangs_on, lambda: _page_size(checkpoints, section, conversations, seconds)
    )


def _page_size(
    checkpoints: dict[str, Path], section: EvaluateSection, conversations: int, seconds: float
) -> dict[str, Any]:
    items = spoken_items(conversations // len(checkpoints), seconds)
    settings = PlaySettings(sampling=section.sampling)
    played = [
        play_checkpoint(label, folder, items, settings, print, tokenizer=tokenizer_of(folder))
        for label, folder in checkpoints.items()
    ]
    started_s = time.perf_counter()
    protocol = protocol_of(section, settings)
    _, loose = page_files(played, {}, about={"name": "page"}, protocol=protocol, training=[])
    made_s = time.perf_counter() - started_s
    html = loose["report.html"].decode()
    players = re.findall(r'"data:audio/[^"]*"', html)
    return {
        "conversations": len(played) * len(items),
        "seconds": seconds,
        "bytes": len(loose["report.html"]),
        "players": len(players),
        "audio_bytes": sum(map(len, players)),
        "drawing_bytes": sum(map(len, re.findall(r"<svg.*?</svg>", html, re.DOTALL))),
        "made_s": round(made_s, 1),
    }


if __name__ == "__main__":
    main()
