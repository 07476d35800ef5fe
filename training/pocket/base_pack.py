"""A bank and its labels in one file, for processes and machines that neither speak nor encode.

    WORK/bank.safetensors
        codes        int16 [8, ΣT]       of all units, one behind the other
        frames       int32 [U]           T of each
        phones       int16 [ΣT', 2]      of units with labels, in their order
        phone_frames int32 [U']          T' of each
        word_ends    int32 [W]           of their words, in their order
        word_counts  int32 [U']
        tokenizer    uint8 [B]           a SentencePiece model's bytes
        room.<name>  int16 [8, T]
    metadata: units and classes of phones as JSON, the codec's steady state, digests of codec,
    grammar and voices, the time that it took, what the units were drawn by

Legend: U units, U' of them with labels, W words of those.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from duplex.errors import CorruptFileError, MissingInputError
from duplex.files import atomic_path
from duplex.streams import CODEBOOKS, CodecTokens
from pipeline.engines.pocket import CARD
from training.pocket.base_bank import Bank
from training.pocket.base_phones import Phones, Sounds, labelled
from training.pocket.base_units import Unit
from training.pocket.base_voices import ROOMS, Speaker
from training.pocket.codec_labels import IGNORED

ROOM = "room."


@dataclass(frozen=True)
class Pack:
    """tokenizer: a SentencePiece model; codec, grammar, voices: digests of what made it; seconds:
    that speech and codes took; seed: of the units, and small: whether they are a fifth of all."""

    bank: Bank
    phones: Phones
    tokenizer: bytes
    codec: str
    grammar: str
    voices: str
    seconds: float
    seed: int
    small: bool

    @property
    def drawn_by(self) -> dict[str, Any]:
        """What the units were drawn by, as base.json says it."""
        return {"seed": self.seed, "small": self.small}


def save_pack(path: Path, pack: Pack) -> None:
    """Write the file, whole or not at all."""
    bank, phones = pack.bank, pack.phones
    sounds = [phones.sounds[place] for place in sorted(phones.sounds)]
    tensors = {
        "codes": np.concatenate(bank.codes, axis=1),
        "frames": _numbers(codes.shape[1] for codes in bank.codes),
        "phones": np.concatenate([one.phones for one in sounds]),
        "phone_frames": _numbers(len(one.phones) for one in sounds),
        "word_ends": _numbers(end for one in sounds for end in one.word_ends),
        "word_counts": _numbers(len(one.word_ends) for one in sounds),
        "tokenizer": np.frombuffer(pack.tokenizer, dtype=np.uint8),
        **{ROOM + name: codes for name, codes in bank.rooms.items()},
    }
    metadata = {
        "units": json.dumps([asdict(unit) for unit in bank.units]),
        "names": json.dumps(phones.names),
        "tokens": json.dumps(asdict(bank.tokens)),
        "codec": pack.codec,
        "grammar": pack.grammar,
        "voices": pack.voices,
        "seconds": json.dumps(pack.seconds),
        "drawn_by": json.dumps(pack.drawn_by),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_pack(path: Path) -> Pack:
    """What `save_pack` wrote.

    Raises:
        MissingInputError, CorruptFileError
    """
    if not path.exists():
        raise MissingInputError(
            f"{path}: must be there, found none. Make it: python -m training.pocket base "
            "--codes-only --work WORK"
        )
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        _check(tensors)
        bank = Bank(
            tuple(_unit(found) for found in json.loads(metadata["units"])),
            tuple(_parts(tensors["codes"], tensors["frames"], 1)),
            {n.removeprefix(ROOM): codes for n, codes in tensors.items() if n.startswith(ROOM)},
            CodecTokens(**{n: tuple(v) for n, v in json.loads(metadata["tokens"]).items()}),
        )
        _require(len(bank.codes) == len(bank.units), "codes of each unit")
        phones = _phones(tensors, json.loads(metadata["names"]), bank.units)
        tokenizer = tensors["tokenizer"].tobytes()
        return Pack(
            bank, phones, tokenizer, metadata["codec"], metadata["grammar"], metadata["voices"],
            float(metadata["seconds"]), **_drawn_by(metadata["drawn_by"]),
        )  # fmt: skip
    except (
        SafetensorError, OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError
    ) as error:  # fmt: skip
        raise CorruptFileError(
            f"{path}: must be what --codes-only writes, found otherwise: {error}. Remove it and "
            "make it again."
        ) from None


def _drawn_by(text: str) -> dict[str, Any]:
    found = json.loads(text)
    _require(type(found["seed"]) is int and type(found["small"]) is bool, "the units' seed")
    return {"seed": found["seed"], "small": found["small"]}


def _phones(tensors: dict[str, np.ndarray], names: list[str], units: Sequence[Unit]) -> Phones:
    labels = tensors["phones"]
    _require(bool(((labels == IGNORED) | (labels >= 0)).all()), "labels from 0 on")
    _require(labels.size == 0 or int(labels.max()) < len(names), "a name of each phone")
    sounds = zip(
        _parts(labels, tensors["phone_frames"], 0),
        _parts(tensors["word_ends"], tensors["word_counts"], 0),
        strict=True,
    )
    heard = {
        place: Sounds(phones, tuple(ends.tolist()))
        for place, (phones, ends) in zip(labelled(units), sounds, strict=True)
    }
    return Phones(tuple(names), heard)


def _check(tensors: dict[str, np.ndarray]) -> None:
    """
    Raises:
        ValueError, KeyError: a tensor that is not there, or not of its type, shape and range.
    """
    encoded = ["codes", *(name for name in tensors if name.startswith(ROOM))]
    numbers = ("frames", "phone_frames", "word_ends", "word_counts")
    kinds = dict.fromkeys((*encoded, "phones"), ("int16", 2))
    kinds |= dict.fromkeys(numbers, ("int32", 1)) | {"tokenizer": ("uint8", 1)}
    for name, (dtype, dimensions) in kinds.items():
        found = tensors[name]
        _require(found.dtype == dtype and found.ndim == dimensions, f"{name} as {dtype}")
    for name in numbers:
        _require(bool((tensors[name] >= 0).all()), f"{name} from 0 on")
    for name in encoded:
        codes = tensors[name]
        fits = codes.shape[0] == CODEBOOKS and bool(((codes >= 0) & (codes < CARD)).all())
        _require(fits, f"{name} of {CODEBOOKS} codebooks of {CARD}")
    _require(tensors["phones"].shape[1] == 2, "two phones a frame")
    rooms = {name.removeprefix(ROOM) for name in tensors if name.startswith(ROOM)}
    _require(rooms == set(ROOMS), f"the rooms {sorted(ROOMS)}")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"it must hold {what}")


def _numbers(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, dtype=np.int32)


def _parts(whole: np.ndarray, lengths: np.ndarray, axis: int) -> list[np.ndarray]:
    """`whole`, cut to pieces of these lengths.

    Raises:
        ValueError: they do not add up to it.
    """
    if lengths.sum() != whole.shape[axis]:
        raise ValueError(f"lengths add up to {lengths.sum()}, of {whole.shape[axis]}")
    parts = np.split(whole, np.cumsum(lengths)[:-1], axis)
    return [np.ascontiguousarray(part) for part in parts]


def _unit(found: dict) -> Unit:
    speaker = Speaker(**found.pop("speaker"))
    values = tuple((slot, value) for slot, value in found.pop("values"))
    return Unit(speaker=speaker, values=values, **found)
