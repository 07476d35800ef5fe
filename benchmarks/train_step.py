"""One training step: our forward against the library's, with the same weights and batch.

    python -m benchmarks.train_step                     # prints; small and medium, fp32 and bf16
    python -m benchmarks.train_step --write             # and into docs/results/train_step.{json,md}
    python -m benchmarks.train_step --size 7b --device cuda --rank 128 --checkpointing full

The library's path is `LMModel.forward` with moshi's own `LoRALinear` on every Linear layer, and
the loss over all of its logits. Ours is `training.fast.FastForward` with PEFT's adapters. Both
train the same adapters (one's A and B are copied to the other), and must agree in loss before
anything is timed. A step is forward, backward and AdamW.

Speed: the two in turn in one process; the ratio is the median of the rounds' ratios; and so
for ours in bfloat16 against ours in float32, where both are asked for. Memory: the
peak of a process that runs one of them alone for two steps, and what that is above the process
with its weights loaded. Utilisation: the operations that a step needs (`flops`) against `--peak`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from duplex.datafiles import CHECKOUT

RESULTS = CHECKOUT / "docs" / "results"
DATA = RESULTS / "train_step.json"
PATHS = ("library", "ours")
SIZES: dict[str, dict[str, Any]] = {
    "small": {"dim": 512, "num_heads": 8, "num_layers": 8, "depformer_dim": 256,
              "depformer_num_heads": 8, "depformer_num_layers": 4,
              "depformer_dim_feedforward": int(4.125 * 256)},
    "medium": {"dim": 1024, "num_heads": 16, "num_layers": 12, "depformer_dim": 512,
               "depformer_num_heads": 8, "depformer_num_layers": 6,
               "depformer_dim_feedforward": int(4.125 * 512)},
    "7b": {},  # moshi's own arguments
}  # fmt: skip
SHAPES = {"small": (4, 250), "medium": (2, 250), "7b": (16, 1250)}  # clips, frames
PROMPT_SHARE = 0.15  # of a clip's frames, without loss; as in the coffee set


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=SIZES, action="append")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=120, help="no further round after these")
    parser.add_argument("--checkpointing", default="none")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device in this dtype, dense")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--alone", choices=PATHS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    import torch

    if args.alone:
        print(json.dumps(measure_memory(args, args.alone, args.size[0], args.dtype[0])))
        return
    result: dict[str, Any] = {"machine": _machine(args.device), "rank": args.rank, "runs": {},
                              "bfloat16": {}}  # fmt: skip
    if args.write and DATA.is_file():
        before = json.loads(DATA.read_text())
        if before["machine"] == result["machine"] and before["rank"] == args.rank:
            result = before
    for size in args.size or ["small", "medium"]:
        dtypes = args.dtype or default_dtypes(size)
        if len(dtypes) == 2:
            result["bfloat16"][size] = measure_bfloat16(args, size)
            save(args, result)
        for dtype in dtypes:
            run = {"size": size, "dtype": dtype, "threads": torch.get_num_threads()}
            run |= measure_speed(args, size, dtype)
            run["tflops"] = run["frames_per_s"]["ours"] * flops(args, size) / 1e12
            run["utilisation"] = run["tflops"] / args.peak if args.peak else None
            run["memory"] = {path: _memory_of(args, path, size, dtype) for path in PATHS}
            result["runs"][f"{size} {dtype}"] = run
            save(args, result)
    print(describe(result))


def save(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """What is known so far: a large size may take long, or not fit."""
    print(json.dumps(result), file=sys.stderr)
    if args.write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        DATA.write_text(json.dumps(result, indent=2) + "\n")
        (RESULTS / "train_step.md").write_text(describe(result))


# -- the two paths


def build(path: str, args: argparse.Namespace, size: str, dtype: str) -> tuple[Any, list[Any]]:
    """(forward, its trainable parameters in the order of the model's names)."""
    import torch

    from pipeline.engines import pocket

    kind = getattr(torch, dtype)
    if size == "7b":
        lm = _random_lm(config_of(size), args.device, kind)
    else:
        lm = pocket.build_lm(config_of(size), 7).to(device=args.device, dtype=kind)
    lm.requires_grad_(False)
    if path == "library":
        from moshi.modules.lora import replace_all_linear_with_lora

        from training.forward import LibraryForward

        replace_all_linear_with_lora(lm, args.rank, 2.0, device=args.device, dtype=kind)
        chosen = [p for name, p in lm.named_parameters() if "lora_" in name]
        forward: Any = LibraryForward(lm, checkpointing=args.checkpointing == "full")
    else:
        from duplex.config_train import LoraSection
        from training.fast import FastForward
        from training.lora import adapter_parameters, add_adapters, target_modules

        section = LoraSection(rank=args.rank, alpha=2.0 * args.rank)
        add_adapters(lm, section, target_modules(lm), 3)
        chosen = list(adapter_parameters(lm).values())
        forward = FastForward(lm, checkpointing=args.checkpointing)
    for parameter in chosen:
        parameter.requires_grad_(True)
    _fill(chosen)
    return forward, chosen


def config_of(size: str) -> dict[str, Any]:
    from moshi.models import loaders

    from pipeline.engines.pocket import LM_CONFIG

    if size == "7b":
        return dict(loaders._lm_kwargs)
    return {**LM_CONFIG, "card": 2048, "text_card": 32000, "context": 3000, **SIZES[size]}


def flops(args: argparse.Namespace, size: str) -> float:
    """Operations of a step, a frame, nothing computed twice.

    A frozen weight takes 4 (forward, and back to its input), an adapter's 6, an attention layer
    6 · T · dim; the depth transformer's own attention, norms and gates are left out.
    """
    from training.estimate import layer_kinds

    config = config_of(size)
    due = {"depth", "heads", "text"}  # on frames with loss alone
    total = 0.0
    for kind in layer_kinds(config):
        if kind.group != "embeddings":
            adapters = kind.count * args.rank * (kind.rows + kind.columns)
            share = 1 - PROMPT_SHARE if kind.group in due else 1
            total += share * (4 * kind.parameters + 6 * adapters)
    frames = args.frames or SHAPES[size][1]
    return total + config["num_layers"] * 6 * frames * config["dim"]


def _random_lm(config: dict[str, Any], device: str, dtype: Any) -> Any:
    """A 7B model drawn on the device itself: 31 GB of float32 on the host would be in its way."""
    import torch
    from moshi.models.lm import LMModel

    lm = LMModel(device="meta", dtype=dtype, **config).to_empty(device=device)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.normal_(std=0.02) if parameter.dim() == 2 else parameter.fill_(1)
    return lm


def _fill(parameters: list[Any]) -> None:
    """The same noise in every A and B of both paths: their order is the model's."""
    import torch

    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.copy_(noise.to(parameter))


def batch(size: str, args: argparse.Namespace) -> tuple[Any, Any, Any, int]:
    """codes, loss mask, coefficients, frames: half of the text is padding, prompts have no loss."""
    import torch

    from duplex.config_train import LossSection
    from duplex.streams import DELAYS, TEXT_PAD
    from training.loss import coefficients, part_counts

    clips, frames = args.batch or SHAPES[size][0], args.frames or SHAPES[size][1]
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 2048, (clips, 17, frames), generator=generator)
    codes[:, 0] = torch.randint(4, 32000, (clips, frames), generator=generator)
    codes[:, 0, ::2] = TEXT_PAD
    mask = torch.zeros(clips, 9, frames, dtype=torch.bool)
    for row in range(9):
        mask[:, row, int(PROMPT_SHARE * frames) : frames - DELAYS[row]] = True
    weights = coefficients(part_counts(codes, mask), LossSection())
    on_device = [tensor.to(args.device) for tensor in (codes, mask, weights)]
    return on_device[0], on_device[1], on_device[2], clips * frames


def stepper(path: str, args: argparse.Namespace, size: str, dtype: str) -> Callable[[], float]:
    """One step of training; returns its loss."""
    import torch
    from moshi.utils.compile import no_compile

    forward, parameters = build(path, args, size, dtype)
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
    codes, mask, weights, _ = batch(size, args)

    def step() -> float:
        with no_compile():
            loss, _ = forward(codes, mask, weights)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


# -- measuring


def measure_speed(args: argparse.Namespace, size: str, dtype: str) -> dict[str, Any]:
    steps = {path: stepper(path, args, size, dtype) for path in PATHS}
    losses = {path: step() for path, step in steps.items()}  # warm
    difference = abs(losses["ours"] / losses["library"] - 1)
    allowed = 1e-4 if dtype == "float32" else 2e-2
    if not difference < allowed:
        sys.exit(f"the two paths must agree in loss within {allowed:g}, found {losses}")
    seconds = in_turn(args, steps)
    frames = batch(size, args)[3]
    return {
        "frames": frames,
        "losses": losses,
        "frames_per_s": {p: frames / statistics.median(seconds[p]) for p in PATHS},
        "ratios": ratios_of(seconds["library"], seconds["ours"]),
    }


def measure_bfloat16(args: argparse.Namespace, size: str) -> list[float]:
    """Ours: how many times as fast in bfloat16 as in float32, one figure a round."""
    steps = {dtype: stepper("ours", args, size, dtype) for dtype in ("float32", "bfloat16")}
    for step in steps.values():
        step()
    seconds = in_turn(args, steps)
    return ratios_of(seconds["float32"], seconds["bfloat16"])


def in_turn(
    args: argparse.Namespace, steps: dict[str, Callable[[], float]]
) -> dict[str, list[float]]:
    """Seconds of each step, `--rounds` times one after the other, or once past `--seconds`."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    began = time.perf_counter()
    for number in range(args.rounds):
        if number and time.perf_counter() - began > args.seconds:
            break
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratios_of(slow: list[float], fast: list[float]) -> list[float]:
    return sorted(a / b for a, b in zip(slow, fast, strict=True))


def measure_memory(args: argparse.Namespace, path: str, size: str, dtype: str) -> dict[str, float]:
    import torch

    cuda = args.device.startswith("cuda")
    step = stepper(path, args, size, dtype)
    loaded = torch.cuda.memory_allocated() if cuda else _resident_bytes()
    for _ in range(2):
        step()
    peak = torch.cuda.max_memory_allocated() if cuda else _peak_bytes()
    return {"peak_gb": peak / 1e9, "loaded_gb": loaded / 1e9}


def _memory_of(args: argparse.Namespace, path: str, size: str, dtype: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.train_step", "--alone", path]
    command += ["--size", size, "--dtype", dtype, "--device", args.device]
    command += ["--rank", str(args.rank), "--checkpointing", args.checkpointing]
    for name in ("batch", "frames"):
        if getattr(args, name):
            command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT)
    if done.returncode:
        print(done.stderr[-500:], file=sys.stderr)
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _peak_bytes() -> int:
    """Of this process image: `ru_maxrss` would count the parent that it was forked from."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _machine(device: str) -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name") and not device.startswith("cuda"):
            name = line.split(":")[1].strip()
            break
    return {"device": name, "cores": os.cpu_count(), "torch": torch.__version__}


def default_dtypes(size: str) -> list[str]:
    """7B: float32 is 31 GB for each of two models."""
    return ["bfloat16"] if size == "7b" else ["float32", "bfloat16"]


# -- the page


def describe(result: dict[str, Any]) -> str:
    machine = result["machine"]
    rows = []
    for run in result["runs"].values():
        ours, library = (run["frames_per_s"][path] for path in ("ours", "library"))
        memory = {path: run["memory"][path].get("peak_gb") for path in PATHS}
        peaks = [f"{memory[p]:.2f}" if memory[p] else "failed" for p in PATHS]
        share = f"{memory['ours'] / memory['library']:.2f}" if all(memory.values()) else "-"
        rows.append(
            f"| {run['size']} | {run['dtype']} | {run['threads']} | {library:.0f} | {ours:.0f} | "
            f"{_spread(run['ratios'])} | {peaks[0]} | {peaks[1]} | {share} |"
        )
    notes = [
        f"At {size} size ours is {_spread(ratios)} times as fast in bfloat16 as in float32."
        for size, ratios in result["bfloat16"].items()
    ]
    for run in result["runs"].values():
        if run.get("utilisation"):
            speed = f"{run['tflops']:.0f} TFLOP/s, {run['utilisation']:.0%} of the peak"
            notes.append(f"{run['size']}, {run['dtype']}: {speed}, recomputation not counted.")
    table = "\n".join(rows)
    return f"""# One training step

`python -m benchmarks.train_step --write` on {machine["device"]}, {machine["cores"]} cores, torch
{machine["torch"]}; LoRA of rank {result["rank"]} on every Linear layer, {_shapes(result)}.
Library: `LMModel.forward` with moshi's LoRA and the same loss.

| size | dtype | threads | library, frames/s | ours | ratio (least to most) | library, GB | ours | |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{table}

Ratios are of steps run in turn in one process; GB is the peak of a process that trains one way
alone, its last column ours against the library's. {" ".join(notes)}
"""


def _spread(ratios: list[float]) -> str:
    """The median, and the least and most."""
    found = f"{statistics.median(ratios):.2f}"
    return found if len(ratios) == 1 else f"{found} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def _shapes(result: dict[str, Any]) -> str:
    frames = {run["size"]: run["frames"] for run in result["runs"].values()}
    return ", ".join(f"{count} frames a step ({size})" for size, count in frames.items())


if __name__ == "__main__":
    main()
