"""What the coffee set takes on one rented GPU: batch, memory, time, cost. Computed, nothing is run.

    python -m benchmarks.pod_costs            # prints the table
    python -m benchmarks.pod_costs --write    # to runpod/README.md, docs/results/pod_costs.json

    memory    training.estimate.estimate_memory, which `duplex doctor` shows
    settings  the first of `SETTINGS` whose memory the GPU `holds`, with a margin
    speed     data/gpu_speed.yaml: measured where somebody has, else moshi-finetune's published
              speed scaled by the chips' bf16 peaks; settings that compute again are not counted
    training  steps x batch_size x frames of a clip / speed
    whole     start, speech at real time, training. Not in it: dialogues (an endpoint writes them),
              encoding, merging, evaluation, which nobody has timed on a GPU

Every figure has a mark: m measured with this project, c computed from the sources above.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from duplex.base import Frozen, Text
from duplex.config import Config
from duplex.config_train import TrainSection
from duplex.configfile import load_config
from duplex.datafiles import CHECKOUT, find_path, load_personas, read_yaml, validate
from duplex.errors import DataFileError
from duplex.frames import FRAME_RATE
from duplex.streams import CODEBOOKS
from pipeline.doctor import GB, TURN_S, model_sizes, set_size
from pipeline.pods.gpus import CONTEXT_GB, MARGIN, GpuType, holds, load_gpus
from training.estimate import estimate_memory, parameter_count

CONFIG = CHECKOUT / "configs" / "coffee.yaml"
GPUS, SPEED = CHECKOUT / "data" / "gpus.yaml", CHECKOUT / "data" / "gpu_speed.yaml"
README, RESULT = CHECKOUT / "runpod" / "README.md", CHECKOUT / "docs" / "results" / "pod_costs.json"
BEGIN, END = "<!-- pod_costs: begin -->", "<!-- pod_costs: end -->"
START_MIN = 10  # a cold start, by the predecessor's notes: 5 to 10 minutes
TOKENS_A_WORD = 4 / 3  # of a prompt
PROMPT_SILENCE = 11  # frames around its text
BATCH_PARTS = "train.accumulate"
SETTINGS: tuple[dict[str, str], ...] = (
    {BATCH_PARTS: "1"},
    {BATCH_PARTS: "2"},
    {BATCH_PARTS: "4"},
    {BATCH_PARTS: "4", "train.runtime.checkpointing": "full"},
    {BATCH_PARTS: "4", "train.runtime.checkpointing": "full", "train.quantize": "nf4"},
)


class GpuSpeed(Frozen):
    name: Text
    bf16_tflops: Annotated[float, Field(gt=0)]
    source: Text
    measured_frames_per_s: Annotated[float, Field(gt=0)] | None = None


class Reference(Frozen):
    name: Text
    frames_per_s: Annotated[float, Field(gt=0)]
    source: Text


class Speeds(Frozen):
    reference: Reference
    gpus: tuple[GpuSpeed, ...]


@cache
def load_speeds() -> Speeds:
    return validate(Speeds, read_yaml(SPEED), SPEED)


class Figure(NamedTuple):
    value: float
    mark: Literal["m", "c"] = "c"


@dataclass(frozen=True)
class Row:
    """One GPU. `settings`: what to give `duplex run` with --set; None: the set does not fit."""

    gpu: GpuType
    settings: dict[str, str] | None
    clips: Figure | None = None
    memory_gb: Figure | None = None
    frames_per_s: Figure | None = None
    train_min: Figure | None = None
    train_usd: Figure | None = None
    whole_h: Figure | None = None
    whole_usd: Figure | None = None
    slots: Figure | None = None


def clip_frames(config: Config) -> float:
    """Mean frames of a training clip: the prompt and a dialogue at 3.5 s a turn."""
    personas = load_personas(find_path(config.personas.folder), config.personas.only)
    words = [len(prompt.split()) for p in personas for prompt in p.prompts]
    prompt = PROMPT_SILENCE + TOKENS_A_WORD * sum(words) / len(words)
    turns = (config.dialogues.min_turns + config.dialogues.max_turns) / 2
    return min(prompt + turns * TURN_S * FRAME_RATE, config.train.crop_frames)


def speech_minutes(config: Config) -> float:
    return set_size(config, personas_keys(config))[2]


def personas_keys(config: Config) -> list[str]:
    from pipeline.run import STAGES

    return list(STAGES[0].files(config))


def frames_per_s(name: str, speeds: Speeds) -> Figure:
    """
    Raises:
        DataFileError: no peak is known of the GPU, or of the reference.
    """
    by_name = {speed.name: speed for speed in speeds.gpus}
    for needed in (name, speeds.reference.name):
        if needed not in by_name:
            raise DataFileError(f"{SPEED}: must have the bf16 peak of {needed}, found none.")
    own, reference = by_name[name], speeds.reference
    if own.measured_frames_per_s is not None:
        return Figure(own.measured_frames_per_s, "m")
    return Figure(reference.frames_per_s * own.bf16_tflops / by_name[reference.name].bf16_tflops)


def fitting_settings(
    sizes: dict[str, Any], overrides_to_train: list[tuple[dict[str, str], TrainSection]], gb: float
) -> tuple[dict[str, str], TrainSection, float] | None:
    """The first settings whose training a GPU of `gb` holds, with their memory in GB."""
    for settings, section in overrides_to_train:
        need_gb = estimate_memory(sizes, section).total / GB
        if holds(gb, need_gb):
            return settings, section, need_gb
    return None


def serving_slots(sizes: dict[str, Any], gb: float) -> int:
    """Conversations at a time beside the merged model, in bfloat16. A slot's keys and values are
    allocated whole: two of `dim` values a layer and frame of context."""
    model = 2 * parameter_count({**sizes, "dep_q": CODEBOOKS}) / GB
    slot = 2 * 2 * sizes["num_layers"] * sizes["dim"] * sizes.get("context", 3000) / GB
    return max(0, int((gb - CONTEXT_GB - MARGIN * model) / (MARGIN * slot)))


def rows(config_path: Path = CONFIG) -> list[Row]:
    config = load_config(config_path)
    sizes = model_sizes(config)
    ways = [
        (settings, load_config(config_path, [f"{k}={v}" for k, v in settings.items()]).train)
        for settings in SETTINGS
    ]
    speeds = load_speeds()
    frames = config.train.steps * config.train.batch_size * clip_frames(config)
    other_h = (START_MIN + speech_minutes(config)) / 60
    found = []
    for gpu in load_gpus(GPUS):
        fitting = fitting_settings(sizes, ways, gpu.memory_gb)
        if fitting is None:
            found.append(Row(gpu, None))
            continue
        settings, section, need_gb = fitting
        speed = frames_per_s(gpu.id, speeds)
        train_h = frames / speed.value / 3600
        found.append(
            Row(
                gpu, settings,
                clips=Figure(section.batch_size // section.accumulate),
                memory_gb=Figure(need_gb),
                frames_per_s=speed,
                train_min=Figure(60 * train_h, speed.mark),
                train_usd=Figure(train_h * gpu.usd_h, speed.mark),
                whole_h=Figure(train_h + other_h),
                whole_usd=Figure((train_h + other_h) * gpu.usd_h),
                slots=Figure(serving_slots(sizes, gpu.memory_gb)),
            )
        )  # fmt: skip
    return found


def table(found: list[Row], config: Config) -> str:
    lines = [
        "| GPU (USD an hour, as of) | clips at once | training, GB | frames/s | training, min "
        "| USD | whole, h | USD | talk at once | give `DUPLEX_SET` |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in found:
        gpu = row.gpu
        name = f"{gpu.id} ({gpu.usd_h:.2f}, {gpu.date or 'undated'})"
        if row.settings is None:
            lines.append(f"| {name} | does not fit |  |  |  |  |  |  |  |  |")
            continue
        cells = [
            _cell(row.clips, 0), _cell(row.memory_gb, 1), _cell(row.frames_per_s, 0),
            _cell(row.train_min, 0), _cell(row.train_usd, 2), _cell(row.whole_h, 1),
            _cell(row.whole_usd, 2), _cell(row.slots, 0),
        ]  # fmt: skip
        given = "<br>".join(f"`{key}={value}`" for key, value in row.settings.items())
        lines.append(f"| {name} | {' | '.join(cells)} | {given} |")
    dialogues = set_size(config, personas_keys(config))[1]
    return "\n".join(
        [
            *lines,
            "",
            f"c computed, m measured. {dialogues} dialogues, {speech_minutes(config):.0f} minutes "
            f"of speech at {TURN_S} s a turn (c), {config.train.steps} steps of "
            f"{config.train.batch_size} clips of {clip_frames(config):.0f} frames (c). Whole: "
            f"{START_MIN} minutes of start, speech at real time, training; encoding, merging and "
            "evaluation are not in it. Formulas and sources: `benchmarks/pod_costs.py`, "
            "`data/gpus.yaml`, `data/gpu_speed.yaml`.",
        ]
    )


def _cell(figure: Figure | None, digits: int) -> str:
    assert figure is not None
    return f"{figure.value:,.{digits}f} {figure.mark}".replace(",", " ")


def as_json(found: list[Row]) -> str:
    figures = ("clips", "memory_gb", "frames_per_s", "train_min", "train_usd", "whole_h",
               "whole_usd", "slots")  # fmt: skip
    kinds = {"m": "measured", "c": "computed"}

    def one(row: Row) -> dict[str, Any]:
        named = {name: getattr(row, name) for name in figures}
        return {
            "gpu": row.gpu.id,
            "usd_per_hour": row.gpu.usd_h,
            "settings": row.settings,
            **{
                name: {"value": round(figure.value, 3), "kind": kinds[figure.mark]}
                for name, figure in named.items()
                if figure is not None
            },
        }

    return json.dumps([one(row) for row in found], indent=1) + "\n"


def with_table(page: str, new: str) -> str:
    """`page` with what stands between the two markers replaced.

    Raises:
        ValueError: the markers are not there.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{README} must hold {BEGIN} and {END}, one after the other")
    return f"{before}{begin}\n{new}\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {README.name} and its JSON")
    options = parser.parse_args()
    found = rows()
    text = table(found, load_config(CONFIG))
    print(text)
    if options.write:
        README.write_text(with_table(README.read_text(), text))
        RESULT.write_text(as_json(found))


if __name__ == "__main__":
    main()
