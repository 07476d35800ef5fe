"""The model that a run trains: base, in 4 bits or not, adapters, and what they start from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from duplex.config import Config
from duplex.config_train import TrainSection
from duplex.datafiles import find_path
from duplex.errors import RequestError
from duplex.stage import record_seed
from duplex.streams import CODEBOOKS
from pipeline.engines.checkpoint import Checkpoint

Report = Callable[[str], None]


def adapted_model(
    config: Config, checkpoint: Checkpoint, base_sha256: str, report: Report
) -> tuple[Any, dict[str, list[str]]]:
    """An `LMModel` with adapters on it, and the names of the adapted modules by group.

    Raises:
        MissingInputError: bitsandbytes, or the adapter to go on from, is not there.
        RequestError: settings that exclude each other; an adapter that is not of this run's kind.
    """
    import torch

    from training.adapter import load_adapter_weights
    from training.lora import add_adapters, target_modules

    section = config.train
    model = checkpoint.load_lm(dtype=getattr(torch, section.dtype))
    if section.loss.user_streams and model.dep_q < 2 * CODEBOOKS:
        raise RequestError(
            f"train.loss.user_streams needs a base that predicts the user's codes (dep_q 16), "
            f"found dep_q {model.dep_q}. Set it to false, or name such a base in model.base."
        )
    targets = target_modules(
        model,
        section.lora.targets,
        embeddings=section.lora.embeddings,
        codebooks=CODEBOOKS * (2 if section.loss.user_streams else 1),
    )
    if section.quantize != "none":
        _quantize_base(model, targets, section, report)
    add_adapters(model, section.lora, targets, record_seed(config.seed, "train", "adapters"))
    if section.quantize != "none":
        from training.quantized import check_wrapped

        check_wrapped(model)
    if section.continue_from is not None:
        start = find_path(section.continue_from)
        load_adapter_weights(model, start, section.lora, base_sha256)
        report(f"going on from the adapter {start}")
    return model, targets


def _quantize_base(
    model: Any, targets: dict[str, list[str]], section: TrainSection, report: Report
) -> None:
    """Put the frozen Linear layers into 4 bits, and say what that saves."""
    import torch

    from training.quantized import quantize_linears

    on_gpu = section.runtime.device != "cpu" and torch.cuda.is_available()
    size = quantize_linears(model, targets, device="cuda" if on_gpu else "cpu")
    report(
        f"  4-bit base: {size.layers} Linear layers, {size.before / 1e6:,.1f} -> "
        f"{size.after / 1e6:,.1f} MB; rms error {size.error:.3f} of the weights'"
        + (f"; {len(size.left)} not packed (first {size.left[0]})" if size.left else "")
    )
