"""An evaluation in Weights & Biases, where `train.runtime.wandb` is set, also offline.

    summary         the value of each measure and model, as model/measure
    verdicts        a table: measure, models, word, difference, interval, p, items
    conversations   a table: item, seed, model, grade, faults, what was said, and the recording

The report is what counts, and does not wait for this: whatever fails here is said in a line. It is
told nothing of this machine (`training.wandb_run`), and of the config no path and no runtime.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from duplex.config import Config
from pipeline.engines.redaction import redacted

MOST_RECORDINGS = 100  # as Ogg/Opus, 0.5 MB for 40 s; those with the most faults
VERDICT_COLUMNS = (
    "measure", "from", "to", "verdict", "difference", "low", "high", "p_holm", "items",
)  # fmt: skip
CONVERSATION_COLUMNS = (
    "item", "seed", "model", "persona_type", "grade", "faults", "transcript", "audio",
)  # fmt: skip


def log_evaluation(
    data: Mapping[str, Any],
    folder: Path,
    work: Path,
    config: Config,
    report: Callable[[str], None],
) -> bool:
    """Log a report, if the config asks for it; returns whether it was done.

    Args:
        data: the content of report.json.
        folder: where the recordings are that it names.
        work: gets wandb's own files.
    """
    if not config.train.runtime.wandb:
        return False
    try:
        _log(data, folder, work, config)
    except Exception as error:  # noqa: BLE001 - of wandb or its service: the stage goes on
        said = redacted(f"{type(error).__name__}: {error}", os.environ.get("WANDB_API_KEY", ""))
        report(f"Weights & Biases got nothing of this evaluation: {said}")
        return False
    return True


def _log(data: Mapping[str, Any], folder: Path, work: Path, config: Config) -> None:
    import wandb

    from training.wandb_run import open_run

    work.mkdir(parents=True, exist_ok=True)
    run = open_run(f"{config.name}-evaluate", work, _settings(data, config), job_type="evaluation")
    failed = True
    try:
        run.summary.update(summary_values(data))
        recorded = {
            path: wandb.Audio(_as_opus(folder / path, work), caption=Path(path).stem)
            for path in recordings_to_log(data["conversations"])
        }
        rows = [[*row, recorded.get(path)] for *row, path in conversation_rows(data)]
        verdicts: Any = verdict_rows(data)  # its types would have a DataFrame
        held: Any = rows
        run.log(
            {
                "verdicts": wandb.Table(columns=list(VERDICT_COLUMNS), data=verdicts),
                "conversations": wandb.Table(columns=list(CONVERSATION_COLUMNS), data=held),
            }
        )
        failed = False
    finally:
        run.finish(exit_code=int(failed))


def _as_opus(recording: Path, work: Path) -> str:
    """A stereo WAV of `recordings`, smaller, in `work`; its path."""
    import soundfile

    from pipeline.evaluation.audio import opus_bytes

    samples, _ = soundfile.read(recording, dtype="float32")
    path = work / "recordings" / f"{recording.stem}.ogg"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(opus_bytes(samples[:, 0], samples[:, 1]))
    return str(path)


# No path and no name of a file: `recogniser` and `base_clips` may be one.
SENT = {"seconds", "answer_s", "seed", "seeds", "prompts", "vad", "sockets", "sampling", "clips",
        "swaps"}  # fmt: skip


def _settings(data: Mapping[str, Any], config: Config) -> dict[str, Any]:
    section = config.evaluate.model_dump(mode="json", include=SENT)
    return section | {
        "items": [Path(name).name for name in config.evaluate.items],
        "fingerprint": data["fingerprint"],
        "models": {model["label"]: model["digest"] for model in data["models"]},
    }


def summary_values(data: Mapping[str, Any]) -> dict[str, float]:
    """model/measure -> its value over all items; what gave nothing to measure is left out."""
    return {
        f"{label}/{row['key']}": pooled["value"]
        for row in data["summary"]
        for label, pooled in row["by_model"].items()
        if pooled["value"] is not None
    }


def verdict_rows(data: Mapping[str, Any]) -> list[list[Any]]:
    """In the order of `VERDICT_COLUMNS`, those that say something first."""
    quiet = ("inconclusive", "not measured")
    rows = [
        [row["label"], one["from"], one["to"], row["word"], row["difference"], row["low"],
         row["high"], row["p_holm"], row["n"]]
        for one in data["verdicts"]
        for row in one["rows"]
    ]  # fmt: skip
    return sorted(rows, key=lambda row: row[3] in quiet)


def conversation_rows(data: Mapping[str, Any]) -> list[list[Any]]:
    """In the order of `CONVERSATION_COLUMNS`, most faults first; the recording by its name."""
    return [
        [one["item"], one["seed"], one["model"], one["persona_type"], one["grade"] or "",
         _faults(one), one["transcript"], one["audio"]]
        for one in sorted(data["conversations"], key=lambda one: -one["faults"])
    ]  # fmt: skip


def recordings_to_log(conversations: Iterable[Mapping[str, Any]]) -> list[str]:
    worst = sorted(conversations, key=lambda one: -one["faults"])
    return [one["audio"] for one in worst[:MOST_RECORDINGS]]


def _faults(conversation: Mapping[str, Any]) -> str:
    return "; ".join(
        f"turn {turn}: {', '.join(exchange['faults'])}"
        for turn, exchange in enumerate(conversation["exchanges"], start=1)
        if exchange["faults"]
    )
