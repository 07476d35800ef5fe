"""What a 7B merge costs: memory, and time against copying the file.

    python -m benchmarks.merge --folder DIR            # prints; DIR needs 35 GB
    python -m benchmarks.merge --folder DIR --write    # and writes docs/results/merge.{json,md}

Moshi 7B's own architecture and file layout with random bfloat16 weights, and a rank-64 adapter on
all of its Linear layers: both written here and removed afterwards. A round copies the weights
(`cp`, then fsync) and merges them in a process of its own; files are put out of the page cache
before each. The merge's time is that of plan, check, writing, fsync and reading back, from the
call to `merge_checkpoint` on; comparing the logits comes on top and is given by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from duplex.datafiles import CHECKOUT
from training.device import cpu_name

RESULTS = CHECKOUT / "docs" / "results"
RANK, ALPHA = 64, 128
UPDATE = 0.1  # size of the update, of that of the weights
COMPANIONS = ("mimi.safetensors", "tokenizer.model")  # stand beside the weights; no part in this


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=32, help="fewer: to try the benchmark itself")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--merge", nargs=3, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.merge:
        print(json.dumps(merge_here(*args.merge)))
        return
    with tempfile.TemporaryDirectory(prefix="duplex-bench-", dir=args.folder) as name:
        result = measure(Path(name), args.rounds, args.layers)
    text = describe(result)
    print(text)
    if args.write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "merge.json").write_text(json.dumps(result, indent=2) + "\n")
        (RESULTS / "merge.md").write_text(text)


def measure(root: Path, num_rounds: int, layers: int) -> dict[str, Any]:
    import torch

    base, adapter = root / "base", root / "adapter"
    sha256, linears = write_base(base, layers)
    write_lora(adapter, linears, sha256)
    weights = base / "model.safetensors"
    rounds = []
    for _ in range(num_rounds):
        load = os.getloadavg()[0]
        _put_out_of_cache(base, adapter)
        copy_s = _copy(weights, root / "copy")
        (root / "copy").unlink()
        _put_out_of_cache(base, adapter)
        rounds.append({"load_before": load, "copy_s": copy_s} | _merge(base, adapter, root / "out"))
    return {
        "machine": {"cores": os.cpu_count(), "cpu": cpu_name(), "torch": torch.__version__},
        "weights_gb": weights.stat().st_size / 1e9,
        "adapter_gb": (adapter / "adapter_model.safetensors").stat().st_size / 1e9,
        "rank": RANK,
        "modules": len(linears),
        "rounds": rounds,
    }


# -- what is merged


def write_base(folder: Path, layers: int) -> tuple[str, dict[str, tuple[int, int]]]:
    """A checkpoint folder of random weights; its digest, and (out, in) of its Linear layers."""
    import torch
    from moshi.models.lm import LMModel
    from moshi.models.loaders import _lm_kwargs
    from torch import nn

    from training.tensorfile import TensorSpec, aligned_order, tensor_writer

    folder.mkdir()
    config = {**_lm_kwargs, "num_layers": layers}
    lm = LMModel(device="meta", dtype=torch.bfloat16, **config)
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in lm.named_modules()
        if isinstance(module, nn.Linear)
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in lm.state_dict().items():  # fused, as Kyutai's files are
        fused = _fused_name(name)
        first, *rest = tensor.shape
        shapes[fused] = (shapes.get(fused, (0,))[0] + first, *rest) if fused != name else (
            first, *rest)  # fmt: skip
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))
    pools = {1: torch.ones(1 << 24).bfloat16()}  # of norms
    specs = [TensorSpec(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    ordered = aligned_order(specs, lambda spec: spec.name)
    with tensor_writer(folder / "model.safetensors", ordered) as writer:
        for number, spec in enumerate(ordered):
            fan_in = 1 if len(spec.shape) == 3 else spec.shape[-1]
            pool = pools.setdefault(fan_in, (noise * fan_in**-0.5).bfloat16())
            start, left = 7919 * number % (1 << 20), spec.num_elements
            while left:
                piece = pool[start : start + left]
                writer.write(piece)
                start, left = 0, left - piece.numel()
        sha256 = writer.sha256
    for name in COMPANIONS:
        (folder / name).write_bytes(b"stands in; a merge copies it")
    names = {"moshi_name": "model.safetensors", "mimi_name": COMPANIONS[0],
             "tokenizer_name": COMPANIONS[1]}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | names))
    _sync(folder / "model.safetensors")
    return sha256, linears


def _fused_name(name: str) -> str:
    stem, _, rest = name.partition(".self_attn.")
    kind = rest.partition(".")[0]
    fused = {"in_projs": "in_proj_weight", "out_projs": "out_proj.weight"}.get(kind)
    return f"{stem}.self_attn.{fused}" if fused else name


def write_lora(folder: Path, linears: dict[str, tuple[int, int]], base_sha256: str) -> None:
    """An adapter whose update is `UPDATE` of the weights, which are 1/sqrt(in)."""
    import torch

    from training.adapter import write_adapter
    from training.lora import KEY_PREFIX

    generator = torch.Generator().manual_seed(1)
    std_b = UPDATE / (ALPHA / RANK) / RANK**0.5
    state = {}
    for name, (rows, columns) in linears.items():
        a = torch.randn(RANK, columns, generator=generator) * columns**-0.5
        state[f"{KEY_PREFIX}{name}.lora_A.weight"] = a
        b = torch.randn(rows, RANK, generator=generator) * std_b
        state[f"{KEY_PREFIX}{name}.lora_B.weight"] = b
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none",
              "target_modules": sorted(linears)}  # fmt: skip
    write_adapter(folder, state, config, base_sha256)


# -- what is measured


def _copy(source: Path, target: Path) -> float:
    started = time.perf_counter()
    subprocess.run(["cp", str(source), str(target)], check=True)
    _sync(target)
    return time.perf_counter() - started


def _merge(base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.merge", "--merge", str(base), str(adapter)]
    result = subprocess.run([*command, str(out)], check=True, stdout=subprocess.PIPE, text=True,
                            cwd=CHECKOUT)  # fmt: skip
    shutil.rmtree(out)
    return json.loads(result.stdout)


def merge_here(base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """Merge in this process, and note seconds and peak memory by phase."""
    from training.process import prepare_process

    prepare_process()
    from training.merge import merge_checkpoint

    started, cpu_before = time.perf_counter(), time.process_time()
    noted: dict[str, Any] = {}

    def tell(what: str, done: int, total: int) -> None:
        if what == "comparing logits" and not done:
            (weights,) = out.parent.glob(f".{out.name}.unfinished-*/model.safetensors")
            written = time.perf_counter()
            _sync(weights)  # the merge does it when all is proven
            noted["fsync_s"] = time.perf_counter() - written
            noted["merge_s"] = time.perf_counter() - started
            noted["merge_peak_gb"] = _peak_bytes() / 1e9
            noted["merge_cpu_s"] = time.process_time() - cpu_before
        noted.setdefault(f"{what} from", time.perf_counter() - started)

    certificate = merge_checkpoint(base, adapter, out, "bfloat16", tell=tell)
    whole_s = time.perf_counter() - started
    return {
        "merge_s": noted["merge_s"],
        "merge_cpu_s": noted["merge_cpu_s"],
        "of_it": {
            "plan and check": noted["writing from"],
            "writing": noted["reading back from"] - noted["writing from"],
            "reading back": noted["merge_s"] - noted["fsync_s"] - noted["reading back from"],
            "fsync": noted["fsync_s"],
        },
        "logits_s": whole_s - noted["merge_s"],
        "merge_peak_gb": noted["merge_peak_gb"],
        "peak_gb": _peak_bytes() / 1e9,
        "modules_changed": certificate["modules_changed"],
        "survived": certificate["survived"],
        "logits": certificate["logits"],
    }


def _put_out_of_cache(*folders: Path) -> None:
    for path in (path for folder in folders for path in folder.iterdir()):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _peak_bytes() -> int:
    """Linux's VmHWM, which is this program's own: `ru_maxrss` keeps the parent's peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


# -- the page


def describe(result: dict[str, Any]) -> str:
    machine, rounds = result["machine"], result["rounds"]
    ratios = [one["merge_s"] / one["copy_s"] for one in rounds]
    peak = max(one["merge_peak_gb"] for one in rounds)
    whole = max(one["peak_gb"] for one in rounds)
    last = rounds[-1]
    logits, survived = last["logits"], last["survived"]
    lines = [
        "# Merging a 7B model",
        "",
        f"`python -m benchmarks.merge --write`: {result['weights_gb']:.1f} GB of random bfloat16 "
        f"weights in Moshi 7B's layout, rank {result['rank']} on {result['modules']} Linear layers "
        f"(adapter {result['adapter_gb']:.2f} GB in float32), merged to bfloat16; "
        f"{machine['cores']} cores ({machine['cpu']}), torch {machine['torch']}. Files out of the "
        "page cache before each line; copy and merge take turns.",
        "",
        "| round | load before | copy (`cp`, fsync) | merge | its CPU time | against the copy | "
        "logits, on top |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {number} | {one['load_before']:.1f} | {one['copy_s']:.1f} s | "
            f"{one['merge_s']:.1f} s | {one['merge_cpu_s']:.1f} s | "
            f"{one['merge_s'] / one['copy_s']:.2f} | "
            f"{one['logits_s']:.1f} s |"
            for number, one in enumerate(rounds, 1)
        ),
        "",
        f"On average {mean(ratios):.2f} times the copy. `load before` says how busy the machine "
        "was: a merge, unlike a copy, needs its cores. Of the last round's merge: "
        + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in last["of_it"].items())
        + ". Both digests are taken on the way.",
        "",
        "| peak resident memory of the merging process | GB |",
        "| --- | ---: |",
        f"| until the weights are written and read back | {peak:.2f} |",
        f"| with the comparison of logits, layer by layer in float32 | {whole:.2f} |",
        "",
        f"{last['modules_changed']} modules changed; {survived['total']:.2%} of the update "
        f"survived rounding, least {survived['least']:.2%} ({survived['least_module']}). Merged "
        f"against unmerged logits {logits['error']:.1e} (allowed {logits['tolerance']:.0e}), base "
        f"against unmerged {logits['effect']:.1e}. The update was made {UPDATE:.0%} as large as "
        "the weights; a trained one is usually smaller, and loses more.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
