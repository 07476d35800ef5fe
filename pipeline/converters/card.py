"""The data set card of an exported folder: its files by split, what it is, whose voices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from duplex.records import TensorClip, Voice

WHAT = {
    "tensors": "int32 codes `[17][T]` at 12.5 frames/s, undelayed: row 0 text ids, rows 1-8 the "
    "agent's Mimi codebooks, rows 9-16 the user's; `prompt` and `turns` are spans in frames",
    "speech": "24 kHz stereo WAV, left agent, right user, with turns and word times in seconds; "
    "`audio` gives the file's bytes and is not decoded on loading",
}
READ_AUDIO = """
```python
import io, soundfile
from datasets import load_dataset

row = load_dataset(FOLDER, "speech", split="train")[0]
samples, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]))  # [S, 2], left agent
```
"""


@dataclass(frozen=True)
class Section:
    """A part of the data set, a configuration to `datasets`: rows by split."""

    name: str
    counts: dict[str, int]


def dataset_card(
    sections: Sequence[Section],
    voices: Sequence[Voice],
    clips: Sequence[TensorClip],
    used_voices: set[str],
    source: str,
) -> str:
    configs = []
    for section in sections:
        files = [
            {"split": split, "path": f"{section.name}/{split}-*.parquet"}
            for split in ("train", "validation")
            if split in section.counts
        ]
        entry = {"config_name": section.name, "data_files": files}
        configs.append(entry | ({"default": True} if section is sections[0] else {}))
    head = {"license": "other", "pretty_name": "Full-duplex conversations", "configs": configs}
    lines = ["---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", ""]
    lines += ["# Full-duplex conversations", ""]
    lines += [f"Spoken conversations of an agent and a user, by Duplex Workbench (`{source}`).", ""]
    for section in sections:
        rows = ", ".join(f"{count} {split}" for split, count in section.counts.items())
        lines.append(f"- `{section.name}` ({rows}): {WHAT[section.name]}.")
    if any(section.name == "speech" for section in sections):
        lines += ["", READ_AUDIO.strip()]
    lines += ["", "## Licence of the voices", ""]
    lines += [f"- {line}" for line in _licences(voices, used_voices)]
    if clips:
        codecs = sorted({clip.codec_digest for clip in clips})
        tokenizers = sorted({clip.tokenizer_digest for clip in clips})
        lines += ["", "## Codec and tokenizer", "",
                  f"Codes mean nothing to another codec. sha256 of the codec: {', '.join(codecs)}; "
                  f"of the tokenizer: {', '.join(tokenizers)}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _licences(voices: Sequence[Voice], used: set[str]) -> list[str]:
    """A line for each engine and licence, and one for voices that no record names."""
    known: dict[tuple[str, str], int] = {}
    for voice in voices:
        pair = (voice.engine, voice.licence)
        known[pair] = known.get(pair, 0) + 1
    lines = [f"{engine}, {count} voices: {licence}" for (engine, licence), count in known.items()]
    strange = sorted(used - {voice.id for voice in voices})
    if strange:
        lines.append(f"unknown, since no record of the run names them: {', '.join(strange[:10])}")
    return lines or ["unknown: the run holds no record of the voices"]
