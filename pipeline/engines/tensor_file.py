"""A `.pt` from outside -> codes. Files are hostile: sizes are bounded before anything is
unpacked, `weights_only=True` runs no code, and whatever torch refuses becomes a finding.
"""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from duplex.errors import RecordError
from duplex.findings import Finding, finding
from pipeline.engines.voicesample import PACKAGED_VOICES, is_packaged_voice

MAX_BYTES = 64 << 20  # eight hours of int64 codes
STARTS = (b"PK\x03\x04", b"\x80")  # a zip archive, or a pickle: what torch.save writes
WIDENABLE = ("int8", "uint8", "int16", "uint16", "int32", "int64")


class NotCodesError(RecordError):
    """The file holds no codes; `finding` says what it holds."""

    def __init__(self, code: str, found: str):
        self.finding: Finding = finding(code, found)
        super().__init__(self.finding.message)


def read_codes(path: Path) -> tuple[np.ndarray, str]:
    """int64 codes of whatever shape, and the type that the file has.

    Raises:
        NotCodesError: the file holds something else, or more than `MAX_BYTES`.
        OSError: it cannot be read.
    """
    import torch

    size = path.stat().st_size
    if size > MAX_BYTES:
        raise NotCodesError("not-codes", f"a file of {size >> 20} MiB, more than {MAX_BYTES >> 20}")
    content = path.read_bytes()
    if not content.startswith(STARTS):
        begins = f"it begins with {content[:16]!r}" if content else "it is empty"
        raise NotCodesError("not-codes", f"no file of torch.save: {begins}")
    _check_unpacked_size(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign pickle protocols: the result is judged
            value = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch raises many kinds on a hostile file
        raise NotCodesError("not-codes", _refusal(error)) from None
    if not isinstance(value, torch.Tensor):
        raise _not_a_tensor(value, path)
    dtype = str(value.dtype).removeprefix("torch.")
    shape = list(value.shape)
    if value.layout != torch.strided:
        kind = str(value.layout).removeprefix("torch.")
        raise NotCodesError("not-codes", f"a tensor of layout {kind}, {shape}")
    if value.is_quantized:
        raise NotCodesError("not-codes", f"a quantized tensor ({dtype}) {shape}")
    if value.device.type != "cpu":
        raise NotCodesError("not-codes", f"a tensor without data (device {value.device}), {shape}")
    if dtype not in WIDENABLE:
        kind = "complex" if value.is_complex() else "real" if value.is_floating_point() else "other"
        raise NotCodesError("not-codes", f"a tensor of {kind} numbers ({dtype}) {shape}")
    # A view can claim more than the file holds: `expand` costs nothing until it is copied.
    if value.numel() * 8 > MAX_BYTES * 4:
        raise NotCodesError("not-codes", f"a tensor {shape}, more than any conversation")
    return value.detach().to(torch.int64).contiguous().numpy(), dtype


def _check_unpacked_size(content: bytes) -> None:
    """torch's own files are stored, not packed; a packed one may unfold without end."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):
        return  # the old format, or rubbish: torch says which
    if unpacked > 2 * MAX_BYTES:
        raise NotCodesError("not-codes", f"an archive that unpacks to {unpacked >> 20} MiB")


def _refusal(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()
    if "weights_only" in str(error) or "Unsupported" in str(error):
        named = re.search(r"(?:GLOBAL|class|global) ([\w.]+)", str(error))
        culprit = f" ({named[1]})" if named else ""
        return f"pickled objects, which are not loaded since they may run code{culprit}"
    return f"no file of torch.save: {text[0][:200]}"


def _not_a_tensor(value: Any, path: Path) -> NotCodesError:
    import torch

    if not isinstance(value, dict):
        return NotCodesError("not-codes", f"a {type(value).__name__}")
    held = {str(key)[:40]: item for key, item in list(value.items())[:20]}
    listing = ", ".join(
        f"{key} {list(item.shape) if isinstance(item, torch.Tensor) else type(item).__name__}"
        for key, item in held.items()
    )
    if is_packaged_voice(value):
        name = f" {path.stem}" if path.stem in PACKAGED_VOICES else ""
        return NotCodesError(
            "packaged-voice",
            f"PersonaPlex's packaged voice{name}: input embeddings and the token cache's end "
            f"state ({listing})",
        )
    return NotCodesError("not-codes", f"a dict of {len(value)} ({listing})")
