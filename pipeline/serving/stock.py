"""`duplex serve --engine moshi`: the same files under moshi's own server.

`python -m moshi.server` holds one conversation at a time, needs CUDA (it synchronises with it
while it warms up), and knows no `text_prompt`: a prompt in the URL is ignored. It reads file names
from `config.json`; there a plain name means a file on the hub, so it is given a copy of the config
in which each is a `file://`.

Without CUDA the files are proven in its place: loaded strictly through moshi's `CheckpointInfo`, by
that same config, and compared with what our server loads.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duplex.errors import (
    EXIT_WORK_FAILED,
    CorruptFileError,
    MissingInputError,
    RequestError,
    ServerError,
)
from pipeline.engines.checkpoint import Checkpoint
from pipeline.serving.access import is_loopback

IGNORES_PROMPT = (
    "moshi.server ignores text_prompt, voice_prompt, seed and sampling in its URL: who talks there "
    "talks to the model without a persona. `duplex serve` without --engine moshi reads them."
)
CHECK_FRAMES = 12
MOST_APART = 1e-4


@dataclass(frozen=True)
class StockFiles:
    """What moshi's server is given. lora: unmerged adapter in moshi's form, or None."""

    config: Path
    moshi: Path
    mimi: Path
    tokenizer: Path
    lora: Path | None = None

    def arguments(self, host: str, port: int) -> list[str]:
        """Of `python -m moshi.server`."""
        command = [
            *("--host", host, "--port", str(port), "--config-path", str(self.config)),
            *("--moshi-weight", str(self.moshi), "--mimi-weight", str(self.mimi)),
            *("--tokenizer", str(self.tokenizer)),
        ]
        return command + (["--lora-weight", str(self.lora)] if self.lora else [])


def stock_files(checkpoint: Checkpoint, adapter: Path | None, work: Path) -> StockFiles:
    """Write the config, and an adapter in moshi's form, into `work`.

    Raises:
        MissingInputError, MergeError: the adapter is none that moshi can load over this base.
    """
    files, config, lora = checkpoint.files(), dict(checkpoint.config), None
    if adapter is not None:
        folder = moshi_adapter(adapter, checkpoint, work / "adapter")
        config = json.loads((folder / "config.json").read_text())
        lora = folder / "lora.safetensors"
        config["lora_name"] = f"file://{lora}"
    for role, path in files.items():
        config[f"{role}_name"] = f"file://{path}"
    path = work / "config.json"
    path.write_text(json.dumps(config))
    return StockFiles(path, files["moshi"], files["mimi"], files["tokenizer"], lora)


def moshi_adapter(adapter: Path, base: Checkpoint, out: Path) -> Path:
    """An adapter folder in moshi's form: itself if it is in that, else converted into `out`."""
    from training.adapter_formats import MOSHI_CONFIG, MOSHI_WEIGHTS, is_peft, to_moshi

    if not is_peft(adapter):
        for name in (MOSHI_WEIGHTS, MOSHI_CONFIG):
            if not (adapter / name).is_file():
                raise MissingInputError(
                    f"{adapter}: must be an adapter folder, of PEFT or with {MOSHI_WEIGHTS} and "
                    f"{MOSHI_CONFIG}; found no {name}"
                )
        return adapter
    to_moshi(adapter, base, out)
    return out


def load_by_moshi(files: StockFiles, device: str = "cpu", dtype: Any = None) -> Any:
    """The `LMModel` as moshi's server loads it, an adapter unmerged.

    Raises:
        CorruptFileError: moshi refuses the files (it loads strictly).
    """
    import torch
    from moshi.models.loaders import CheckpointInfo
    from safetensors import SafetensorError

    from training.failures import is_out_of_memory

    info = CheckpointInfo.from_hf_repo(
        "local",
        moshi_weights=str(files.moshi),
        mimi_weights=str(files.mimi),
        tokenizer=str(files.tokenizer),
        config_path=str(files.config),
        lora_weights=None if files.lora is None else str(files.lora),
    )
    try:
        return info.get_moshi(device=device, dtype=dtype or torch.float32, fuse_lora=False)
    except (SafetensorError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise CorruptFileError(
            f"{files.lora or files.moshi}: must fit the model of {files.moshi.parent}; moshi "
            f"refused it: {str(error).splitlines()[0][:300]}"
        ) from error


def serve_stock(
    folder: Path, adapter: Path | None, *, host: str, port: int, ssl: Path | None = None
) -> int:
    """Run `python -m moshi.server` on a checkpoint folder; its exit code.

    Args:
        adapter: LoRA over the folder's weights, which moshi's server fuses while it loads.
        ssl: folder of cert.pem and key.pem.

    Raises:
        RequestError: others could reach it: it asks for no token.
        ServerError: moshi's loader gives other logits than ours.
    """
    import torch

    if not is_loopback(host):
        raise RequestError(
            f"moshi.server asks for no token, so it must listen on loopback, found {host}. Reach "
            "it through an ssh tunnel, or serve without --engine moshi."
        )

    print(IGNORES_PROMPT, flush=True)
    checkpoint = Checkpoint.open(folder)
    with tempfile.TemporaryDirectory(prefix="duplex-moshi-") as name:
        files = stock_files(checkpoint, adapter, Path(name))
        command = [sys.executable, "-m", "moshi.server", *files.arguments(host, port)]
        command += ["--ssl", str(ssl)] if ssl else []
        if os.environ.get("HF_HUB_OFFLINE") == "1":
            command += ["--static", "none"]  # else it fetches its page from the hub
        if torch.cuda.is_available():
            return _run(command)
        apart = compare(files, checkpoint)
        if apart > MOST_APART:
            raise ServerError(
                f"moshi must give our logits from the same files, found them {apart:.2g} apart"
            )
        print(f"It would be: {' '.join(command)}")
        print(
            f"Checked in its place: moshi's CheckpointInfo loads these files strictly, and its "
            f"logits are ours within {apart:.2g} ({CHECK_FRAMES} frames)."
        )
        print(
            "error: moshi.server must have CUDA, torch finds no GPU here. Serve without --engine "
            "moshi: that runs on a CPU.",
            file=sys.stderr,
        )
        return EXIT_WORK_FAILED


def _run(command: list[str]) -> int:
    """Run until it ends; a request to stop is passed on, so that it lets go of GPU and port."""
    process = subprocess.Popen(command)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, _: process.send_signal(number))
    return process.wait()


def compare(files: StockFiles, checkpoint: Checkpoint) -> float:
    """The largest difference of logits, moshi's load against ours, on random codes."""
    import torch
    from moshi.utils.compile import no_compile

    theirs = load_by_moshi(files)
    ours = checkpoint.load_lm() if files.lora is None else _with_adapter(files, checkpoint)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, theirs.card, (1, 17, CHECK_FRAMES), generator=generator)
    codes[:, 0] %= theirs.text_card
    with torch.no_grad(), no_compile():
        one, other = theirs(codes), ours(codes)
    apart = [
        (a - b).nan_to_num().abs().max().item()
        for a, b in ((one.logits, other.logits), (one.text_logits, other.text_logits))
    ]
    return max(apart)


def _with_adapter(files: StockFiles, checkpoint: Checkpoint) -> Any:
    """Our own sum W + scale B A, so that the comparison is not of a thing with itself."""
    import torch
    from safetensors.torch import load_file

    assert files.lora is not None
    config = json.loads(files.config.read_text())
    lm = checkpoint.load_lm()
    lora = load_file(files.lora)
    with torch.no_grad():
        for name, module in lm.named_modules():
            a, b = lora.get(f"{name}.lora_A.weight"), lora.get(f"{name}.lora_B.weight")
            if a is not None and b is not None:
                module.weight += config["lora_scaling"] * (b.float() @ a.float())
    return lm
