"""The README.md of a pushed repository: what is in it, of whom, and what nobody checked.

A card says what the records and manifests say. What they do not record stands there as unknown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from duplex.base import Record
from duplex.characters import Persona, Scenario
from duplex.config import Config
from duplex.frames import SAMPLE_RATE, frames_to_seconds
from duplex.records import Dialogue, Speech, TensorClip, Voice
from pipeline.doctor import LICENCES
from pipeline.hubs.index import HubIndex, HubStage
from pipeline.hubs.scan import unconsented

TAGS = ["full-duplex", "speech", "moshi", "duplex-workbench"]
SHOWN = 20  # lines of a list


def data_card(
    repo: str,
    index: HubIndex,
    records: Sequence[Record],
    sections: Sequence[dict[str, Any]],
    consent: str | None,
) -> str:
    """Args:
    sections: rows of the view by split, as `convert datasets` reports them.
    consent: what the person who pushes states for voices without a record.
    """
    languages = sorted({r.language for r in records if isinstance(r, Persona)})
    head: dict[str, Any] = {"license": "other", "pretty_name": f"{index.name}: conversations"}
    head |= {"language": languages} if languages else {}
    head["tags"] = TAGS
    if sections:
        head["configs"] = [_view_config(row, row is sections[0]) for row in sections]
    lines = [
        f"# {index.name}: full-duplex conversations", "",
        "Made by Duplex Workbench. " + _synthetic(records), "",
        "## What is in it", "", *_table(_counts(records)), "",
        "## Who wrote and who speaks", "", *_writers(records), *_voices(records, consent), "",
        "## How it came about", "", *_funnel(index), *_splits(records), "",
        "## Loading", "", *_loading(repo, sections), "",
        "## Limits", "", *_limits(records, index), "",
    ]  # fmt: skip
    return _front(head) + "\n".join(lines)


def adapter_card(
    repo: str,
    index: HubIndex,
    facts: dict[str, Any],
    metrics: Sequence[dict[str, Any]],
    config: Config,
) -> str:
    """`facts`: of the artifact `adapter`; `metrics`: the lines of metrics.jsonl."""
    base, licence = index.base, LICENCES.get(index.base)
    head: dict[str, Any] = {"library_name": "peft", "tags": [*TAGS, "lora"]}
    if licence:
        head["base_model"] = base
        head |= _licence_head(base, licence)
    named = licence or "not known here: see where the base is from"
    lora, train = config.train.lora, config.train
    shown = [
        ("base model", f"{base} (weights sha256 {str(facts.get('base_sha256'))[:12]}…)"),
        ("base's licence, which binds the adapter too", named),
        ("LoRA", f"rank {facts.get('rank')}, alpha {facts.get('alpha')}, dropout {lora.dropout:g}"),
        ("adapted modules", _listed(facts.get("adapted_modules") or {})),
        ("trainable parameters", f"{facts.get('trainable_parameters'):,}"),
        ("steps, batch, learning rate",
         f"{facts.get('steps')}, {train.batch_size}, {train.learning_rate:g}"),
        ("loss weights", f"semantic {train.loss.semantic_weight:g}, acoustic "
         f"{train.loss.acoustic_weight:g}, padded text {train.loss.text_padding_weight:g}"),
        *_losses(metrics),
    ]  # fmt: skip
    lines = [
        f"# {index.name}: LoRA adapter", "",
        f"A LoRA adapter of Duplex Workbench for {base}, in PEFT's layout.", "",
        "## Training, as recorded", "", *_table(shown), "",
        "`metrics.jsonl` has a line for each step and validation.", "", *_funnel(index), "",
        "## Use", "",
        "```sh", f"duplex pull {repo} adapter", f"duplex merge {_merge_name(base)} adapter merged",
        "duplex serve merged", "```", "",
        "## Limits", "",
        "- The losses are of this run's own held-out clips; they say nothing of other prompts.",
        "- An adapter is for the weights that it was trained on: merging checks their sha256.",
        "- A low loss shows no conversation: listen, or run `duplex evaluate`.",
    ]  # fmt: skip
    if base == "pocket":
        lines.append(
            "- The pocket model is a thousandth of a 7B: it shows the path, not its speech."
        )
    return _front(head) + "\n".join(lines) + "\n"


# -- parts


def _front(head: dict[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n"


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    return ["| | |", "| --- | --- |", *(f"| {name} | {_cell(value)} |" for name, value in rows)]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _listed(counts: dict[str, Any]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items()) or "none"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 7200 else f"{seconds / 60:.1f} minutes"


def _licence_head(base: str, licence: str) -> dict[str, str]:
    if licence.startswith("CC-BY-4.0"):
        return {"license": "cc-by-4.0"}
    name = licence.partition(":")[0]
    return {
        "license": "other",
        "license_name": name.lower().replace(" ", "-"),
        "license_link": f"https://huggingface.co/{base}",
    }


def _merge_name(base: str) -> str:
    return "BASE" if base == "a local folder" else base


def _losses(metrics: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    rows = []
    for kind, name in (("train", "training loss"), ("valid", "validation loss")):
        losses = [
            (line["step"], line["loss"]) for line in metrics if line.get("kind") == kind
        ]  # fmt: skip
        if losses:
            (first, start), (last, end) = losses[0], losses[-1]
            rows.append((name, f"{start:.4g} at step {first}, {end:.4g} at step {last}"))
    return rows or [("loss", "not recorded")]


def _synthetic(records: Sequence[Record]) -> str:
    writers = {r.writer for r in records if isinstance(r, Dialogue)}
    machine = bool(writers) and "import" not in writers
    voices = [r for r in records if isinstance(r, Voice)]
    recorded = unconsented(records) or [v for v in voices if v.sample or v.source]
    said = []
    if machine:
        said.append("The conversations are synthetic: a program wrote them, nobody held them.")
    if voices and not recorded:
        said.append("The speech is synthetic too.")
    return " ".join(said) or "Where the conversations are from is below, as far as it is recorded."


def _counts(records: Sequence[Record]) -> list[tuple[str, str]]:
    dialogues = [r for r in records if isinstance(r, Dialogue)]
    speeches = [r for r in records if isinstance(r, Speech)]
    clips = [r for r in records if isinstance(r, TensorClip)]
    personas = [r for r in records if isinstance(r, Persona)]
    rows = []
    if personas:
        types = Counter(persona.type for persona in personas)
        rows.append(("personas", f"{len(personas)}: {_listed(dict(sorted(types.items())))}"))
    if number := sum(isinstance(r, Scenario) for r in records):
        rows.append(("scenarios", str(number)))
    if dialogues:
        turns = sum(len(dialogue.turns) for dialogue in dialogues)
        rows.append(("dialogues", f"{len(dialogues)}, {turns} turns"))
    if speeches:
        seconds = sum(speech.num_samples for speech in speeches) / SAMPLE_RATE
        said = f"{len(speeches)} recordings, {_duration(seconds)}, 24 kHz stereo WAV"
        rows.append(("speech", f"{said}, left the agent, right the user"))
    if clips:
        seconds = sum(frames_to_seconds(clip.num_frames) for clip in clips)
        layouts = sorted({f"{clip.layout}, {clip.alignment} alignment" for clip in clips})
        rows.append(("tensors", f"{len(clips)} of int64 [17, T] at 12.5 frames/s, "
                     f"{_duration(seconds)} with prompts; {'; '.join(layouts)}"))  # fmt: skip
        codecs = sorted({clip.codec_digest[:12] for clip in clips})
        rows.append(("codec", f"sha256 {', '.join(codecs)}…: to another codec they mean nothing"))
    return rows


def _writers(records: Sequence[Record]) -> list[str]:
    names = {"scripted": "the workbench's own grammar", "import": "imported; by whom is unknown"}
    counts = Counter(r.writer for r in records if isinstance(r, Dialogue))
    lines = []
    for writer, count in sorted(counts.items()):
        kind = names.get(writer.partition(":")[0].partition("-")[0], "a language model")
        lines.append(f"- {count} dialogues: {kind} (`{writer}`)")
    return lines


def _voices(records: Sequence[Record], stated: str | None) -> list[str]:
    groups: Counter[tuple[str, ...]] = Counter()
    for voice in records:
        if isinstance(voice, Voice):
            parts = [f"engine {voice.engine}", f"licence: {voice.licence}"]
            parts += [f"source: {voice.source}"] if voice.source else []
            parts += [f"consent: {voice.consent}"] if voice.consent else []
            groups[tuple(parts)] += 1
    lines = [f"- {n} voices: {'; '.join(parts)}" for parts, n in sorted(groups.items())]
    nameless = unconsented(records)
    if nameless and stated:
        lines.append(f"- consent, as stated on pushing: {' '.join(stated.split())}; it is for:")
        lines += [f"  - {line}" for line in nameless[:SHOWN]]
        if len(nameless) > SHOWN:
            lines.append(f"  - and {len(nameless) - SHOWN} more")
    return lines or ["- whose voices these are is not recorded"]


def _funnel(index: HubIndex) -> list[str]:
    return [line for stage in index.stages for line in _funnel_of(stage)]


def _funnel_of(stage: HubStage) -> list[str]:
    lines = [f"- {stage.stage}: {_listed(stage.counts)}"]
    funnel, spent = stage.provenance.get("funnel"), stage.provenance.get("llm")
    if isinstance(funnel, dict):
        written, kept = funnel.get("written"), funnel.get("kept")
        lines.append(f"  - candidates: {_number(written)} written, {_number(kept)} kept")
        reasons = funnel.get("reasons")
        if isinstance(reasons, dict) and reasons:
            shown = dict(list(reasons.items())[:SHOWN])
            numbers = {_cell(str(code))[:40]: _number(count) for code, count in shown.items()}
            lines.append(f"  - not kept, by reason: {_listed(numbers)}")
    if isinstance(spent, dict):
        tokens = f"{_number(spent.get('tokens_in'))} tokens in, {_number(spent.get('tokens_out'))}"
        models = ", ".join(f"`{_cell(str(model))[:80]}`" for model in spent.get("models") or ())
        by = f" by {models}" if models else ""
        lines.append(f"  - {_number(spent.get('requests'))} requests{by}: {tokens} out")
    return lines


def _number(value: object) -> str:
    """A count as text; what is none, in a manifest of somebody else, is unknown."""
    return str(value) if isinstance(value, int) else "unknown"


def _splits(records: Sequence[Record]) -> list[str]:
    clips = [r for r in records if isinstance(r, TensorClip)]
    counts = Counter(clip.split for clip in clips)
    by = sorted({clip.split_by for clip in clips if clip.split_by})
    if not clips:
        return []
    return [f"- split: {_listed(dict(sorted(counts.items())))}, by {' and '.join(by) or 'unknown'}"]


def _view_config(row: dict[str, Any], default: bool) -> dict[str, Any]:
    files = [
        {"split": split, "path": f"{row['name']}/{split}-*.parquet"}
        for split in ("train", "validation")
        if split in row
    ]
    entry: dict[str, Any] = {"config_name": row["name"], "data_files": files}
    return entry | ({"default": True} if default else {})


def _loading(repo: str, sections: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["To train on it, or to go on with the run, with a config of yours:", "", "```sh"]
    lines += [f"duplex pull {repo} CONFIG", "duplex run CONFIG --to train", "```"]
    if sections:
        names = ", ".join(f"`{row['name']}`" for row in sections)
        lines += ["", f"To look at it with `datasets` ({names}):", "", "```python",
                  "from datasets import load_dataset", "",
                  f'rows = load_dataset("{repo}", "{sections[0]["name"]}")', "```"]  # fmt: skip
    return lines


def _limits(records: Sequence[Record], index: HubIndex) -> list[str]:
    lines = [
        "- No record says that a person read or heard it; the figures are those of the manifests.",
    ]
    if not any(isinstance(r, Voice) for r in records):
        lines.append("- The run holds no record of the voices.")
    packages = next((s.provenance.get("packages") for s in index.stages[::-1]), None)
    if isinstance(packages, dict):
        listed = ", ".join(f"{name} {version}" for name, version in sorted(packages.items()))
        lines.append(f"- Made with {listed}.")
    return lines
