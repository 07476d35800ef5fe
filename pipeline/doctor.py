"""`duplex doctor`: can this machine do what the config asks, and what will it take?

Each check gives `ok`, `warn` or `fail` with what was found and what to do. Nothing is
downloaded and torch is imported only to see the device.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from duplex.config import Config
from duplex.datafiles import find_path
from duplex.errors import DuplexError
from duplex.streams import CODEBOOKS, KYUTAI_TOKENS
from duplex.tokens import SHORTEST_TOKEN
from pipeline.dialogues import estimate_cost
from pipeline.engines import pocket
from pipeline.engines.checkpoint import DEFAULT_NAMES, MODELS_FOLDER, model_identity
from pipeline.engines.engines import engine_module, engines_by_language
from pipeline.engines.listening import choose_recogniser, missing_recogniser
from pipeline.engines.neural import cached
from pipeline.engines.same_speaker import missing_same_speaker
from pipeline.engines.speaker import somebody_listens
from pipeline.needs import needed_stages
from pipeline.pods.gpus import holds, with_margin
from pipeline.run import STAGE_NAMES, STAGES
from training.estimate import MOSHI_7B, MemoryEstimate, estimate_memory, parameter_count

GB = 1e9
TURN_S = 3.5
REQUIRED = ("torch", "moshi", "peft", "accelerate", "safetensors", "aiohttp", "sphn", "soundfile")
HUB_DEP_Q = {"nvidia/personaplex-7b-v1": 16}
LICENCES = {
    "nvidia/personaplex-7b-v1": "NVIDIA Open Model License: accept it on the model's hub page",
    "kyutai/moshiko-pytorch-bf16": "CC-BY-4.0",
    "kyutai/moshika-pytorch-bf16": "CC-BY-4.0",
}


def examine(config: Config, runs_root: Path) -> list[dict[str, str]]:
    """All checks, in the order of a person's questions. What is only for work that this run
    has behind it, or does not need, is not asked for."""
    needed = needed_stages(config, runs_root)
    speaks = bool({"voices", "speech"} & needed)
    return [
        _machine(),
        *_packages(config),
        *_data(config),
        *(_engines(config) if speaks else ()),
        *(_recogniser(config) if speaks else ()),
        *(_same_speaker(config) if speaks else ()),
        _model(config),
        *_codec(config),
        *_secrets(config, needed),
        *_device(config),
        *_space(config, runs_root, needed),
        _estimate(config),
    ]


def _check(name: str, state: str, found: str) -> dict[str, str]:
    return {"check": name, "state": state, "found": found}


def _machine() -> dict[str, str]:
    memory = psutil.virtual_memory()
    return _check(
        "machine",
        "ok" if sys.version_info >= (3, 11) else "fail",
        f"Python {platform.python_version()}, {os.cpu_count()} cores, "
        f"{memory.available / GB:.1f} of {memory.total / GB:.1f} GB memory free",
    )


def _packages(config: Config) -> list[dict[str, str]]:
    needed: list[str] = list(REQUIRED)
    if config.dialogues.writer != "scripted":
        needed += ["openai", "json-repair"]
    if config.train.runtime.wandb:
        needed.append("wandb")
    if config.train.quantize == "nf4":
        needed.append("bitsandbytes")
    found, missing = [], []
    for package in needed:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        hint = "run `make setup` in the checkout"
        if "bitsandbytes" in missing:
            hint += ", and `pip install -e '.[quantize]'` for train.quantize: nf4"
        return [_check("packages", "fail", f"missing {', '.join(missing)}: {hint}")]
    return [_check("packages", "ok", ", ".join(found))]


def _engines(config: Config) -> list[dict[str, str]]:
    """Each engine that this config speaks through."""
    checks = []
    for name in sorted(_speaking(config)):
        module = engine_module(name)
        lacks, licence = module.missing(config.speech), module.CAPABILITIES.licence
        here = f"{name} has what it runs on at hand; weights that it needs come at the first use"
        if name in ("espeak", "openai-speech"):  # no weights: a library, and somebody's server
            here = f"{name} is at hand"
        text = here if lacks is None else f"{name} needs {lacks}"
        checks.append(_check("speech engine", _state(lacks), f"{text}; licence: {licence}"))
    return checks


def _speaking(config: Config) -> set[str]:
    named = {config.voices.engine, *config.speech.engines.values()}
    return named | set(engines_by_language(config).values())


def _state(lacks: str | None) -> str:
    """Weights come by themselves at the first use, where there is a network."""
    if lacks is None:
        return "ok"
    fetched = lacks.startswith("the weights") and not os.environ.get("HF_HUB_OFFLINE")
    return "warn" if fetched else "fail"


def _recogniser(config: Config) -> list[dict[str, str]]:
    """Who listens to what the engines say, where anybody is to."""
    checks = config.speech.checks
    if not somebody_listens(_speaking(config), config.speech):
        return []
    name = choose_recogniser(checks)
    if name is None:
        advice = (
            "speech.checks.recogniser: none" if checks.recogniser == "none" else "none is at hand: "
            "pip install -e '.[asr]' and set speech.checks.recogniser: faster-whisper"
        )  # fmt: skip
        text = f"nobody checks what is spoken, and words are timed by their letters; {advice}"
        return [_check("recogniser", "warn", text)]
    if lacks := missing_recogniser(checks):
        return [_check("recogniser", _state(lacks), f"{name} needs {lacks}")]
    note = " (English only, told the text)" if name == "pocketsphinx" else ""
    return [_check("recogniser", "ok", f"{name} is at hand{note}")]


def _same_speaker(config: Config) -> list[dict[str, str]]:
    """Whoever compares voices, where that is asked for."""
    checks = config.speech.checks
    if checks.same_speaker is None:
        return []
    lacks = missing_same_speaker(checks)
    found = f"{checks.same_speaker} is at hand" if lacks is None else f"needs {lacks}"
    return [_check("same speaker", _state(lacks), found)]


def _data(config: Config) -> list[dict[str, str]]:
    faults = []
    for stage in STAGES:
        try:
            stage.files(config)
        except DuplexError as error:
            faults.append(str(error))
    if faults:
        return [_check("data files", "fail", " ".join(faults))]
    return [_check("data files", "ok", "personas, scenarios and evaluation items are valid")]


def _model(config: Config) -> dict[str, str]:
    identity = model_identity(config.model)
    if config.model.base == "pocket":
        return _check(
            "model", "ok", "pocket: 12 M weights from data/pocket; speaks by synthetic voices"
        )
    if identity.startswith("folder:"):
        return _check("model", "ok", f"folder {find_path(config.model.base)}")
    licence = LICENCES.get(config.model.base, "see its hub page")
    pinned = config.model.revision is not None
    advice = "" if pinned else "; pin model.revision, or a change upstream changes your run"
    if HUB_DEP_Q.get(config.model.base, 8) != 8:
        advice += "; of its 16 depth steps the merge keeps the agent's 8, which are served"
    return _check("model", "ok" if pinned else "warn", f"{identity}, licence: {licence}{advice}")


def _codec(config: Config) -> list[dict[str, str]]:
    """Kyutai's codec, where its weights are here, must give the tokens that are published."""
    from pipeline.engines.codec import KYUTAI_CODEC

    path = None
    folder = find_path(config.model.base)
    if config.model.base == "pocket":
        return []
    if folder.is_dir():
        path = folder / KYUTAI_CODEC
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(
            config.model.base, KYUTAI_CODEC, revision=config.model.revision
        )
        path = Path(cached) if isinstance(cached, str) else None
    if path is None or not path.is_file():
        return [_check("codec", "ok", f"{KYUTAI_CODEC} is not here: its tokens are not checked")]
    return [codec_check(path)]


def codec_check(weights: Path) -> dict[str, str]:
    """Silence and sine as measured from `weights` against PersonaPlex's published constants."""
    from moshi.models.loaders import get_mimi
    from safetensors import SafetensorError

    from pipeline.engines.codec import measure_tokens

    try:
        measured = measure_tokens(get_mimi(weights, device="cpu"))
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        return _check("codec", "fail", f"{weights.name} must load as a Mimi: {reason}")
    if measured == KYUTAI_TOKENS:
        return _check("codec", "ok", "silence and sine are the published tokens")
    return _check(
        "codec",
        "fail",
        f"{weights.name} must give silence {list(KYUTAI_TOKENS.silence)} and sine "
        f"{list(KYUTAI_TOKENS.sine)} as published, found {list(measured.silence)} and "
        f"{list(measured.sine)}: other weights, or another version of moshi. Prompts made with "
        "them are not those that the model was trained on",
    )


def _secrets(config: Config, needed: frozenset[str]) -> list[dict[str, str]]:
    checks = []
    if model_identity(config.model).startswith("hub:"):
        held = bool(os.environ.get("HF_TOKEN"))
        text = "HF_TOKEN is set" if held else "HF_TOKEN is not set: gated models need it"
        checks.append(_check("hub token", "ok" if held else "warn", text))
    if config.dialogues.writer != "scripted":
        held = bool(config.dialogues.runtime.api_key)
        text = "given" if held else "missing: set the variable that dialogues.runtime.api_key names"
        if not held and "dialogues" not in needed:
            text = "missing, and not needed: what is made from dialogues is there"
        state = "fail" if not held and "dialogues" in needed else "ok"
        checks.append(_check("LLM key", state, text))
    if config.serve.runtime.host not in ("127.0.0.1", "localhost", "::1"):
        token = config.serve.runtime.token or ""
        held = len(token) >= SHORTEST_TOKEN
        need = f"a server off loopback needs serve.runtime.token, {SHORTEST_TOKEN} characters of it"
        text = "given" if held else f"found {len(token) or 'none'}: {need}"
        checks.append(_check("server token", "ok" if held else "fail", text))
    return checks


def _device(config: Config) -> list[dict[str, str]]:
    import torch

    is_pocket = config.model.base == "pocket"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        checks = [_memory(config, properties.name, properties.total_memory)]
        count, train = torch.cuda.device_count(), config.train
        if (asked := train.processes // train.runtime.nodes) != count:
            checks.append(_gpus(count, asked))
        return checks
    if is_pocket and config.train.processes == 1:
        threads = torch.get_num_threads()
        return [_check("device", "ok", f"CPU, {threads} threads: enough for pocket")]
    if is_pocket:
        return [_check("device", "ok", f"CPU, {config.train.processes} processes for pocket")]
    need = _describe_memory(training_memory(config))
    text = f"no CUDA device: a 7B model does not train on a CPU; a GPU would hold {need}"
    return [_check("device", "fail", text)]


def _gpus(count: int, asked: int) -> dict[str, str]:
    text = f"train.processes is {asked} on a node, here {'is' if count == 1 else 'are'} {count}"
    if asked > count:
        return _check("gpus", "fail", f"{text}: each process needs one; set it to {count}")
    return _check("gpus", "warn", f"{text}: the others stay idle")


def _memory(config: Config, name: str, held: float) -> dict[str, str]:
    """Whether a GPU of `held` bytes holds what each process trains with, by the margin that also
    chooses a pod's GPU."""
    memory = training_memory(config)
    need = f"{with_margin(memory.total / GB):.1f} GB with a margin for what that leaves out"
    text = f"{name}, {held / GB:.0f} GB; training takes {_describe_memory(memory)}; {need}"
    if holds(held / GB, memory.total / GB):
        return _check("device", "ok", text)
    if holds(held / GB, memory.fixed / GB):
        advice = "raise train.accumulate, set train.runtime.checkpointing: full, or lower "
        advice += "train.crop_frames"
        return _check("device", "warn", f"{text}; the activations may not fit: {advice}")
    if config.train.dtype == "float32":
        advice = "set train.dtype: bfloat16"
    elif memory.free_run > memory.gathered:
        advice = "set train.guards.free_seconds: 0, since a free run needs the whole base"
    else:
        advice = "set train.quantize: nf4, or train.processes to the number of GPUs"
    return _check("device", "fail", f"{text}; the weights do not fit: {advice}")


def training_memory(config: Config) -> MemoryEstimate:
    """What each process of the config's training holds, computed."""
    return estimate_memory(_lm_config(config), config.train)


def _describe_memory(memory: MemoryEstimate) -> str:
    parts = {
        "weights": memory.weights,
        "adapters and optimizer": memory.adapters,
        "gathered layers": memory.gathered,
        "activations": memory.activations,
        "logits": memory.logits,
        "or, in a free run, the whole base": memory.free_run,
    }
    listing = ", ".join(f"{name} {size / GB:.1f}" for name, size in parts.items() if size)
    return f"about {memory.total / GB:.1f} GB a process ({listing}; computed, never measured)"


def _lm_config(config: Config) -> dict[str, Any]:
    """The model's sizes: of its config.json where it is here, else of the 7B model it names."""
    if config.model.base == "pocket":
        return pocket.LM_CONFIG
    path = find_path(config.model.base) / "config.json"
    named = {}
    if path.is_file():
        try:
            named = json.loads(path.read_text())
        except ValueError:
            named = {}  # `_model` and training say what is wrong with it
    # A config.json without sizes is PersonaPlex's, which predicts the user too.
    dep_q = 16 if path.is_file() else HUB_DEP_Q.get(config.model.base, 8)
    return {**MOSHI_7B, "dep_q": dep_q, **named}


def _space(
    config: Config, runs_root: Path, needed: frozenset[str] = frozenset(STAGE_NAMES)
) -> list[dict[str, str]]:
    """Room for what is still to come: a base that is not here, its cut copy, the merge."""
    place = runs_root
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    need = 0.5 * GB
    if config.model.base != "pocket":
        parameters = parameter_count(_lm_config(config))
        written = parameter_count({**_lm_config(config), "dep_q": CODEBOOKS})
        need += 4.5 * GB if needed else 0
        need += 0 if _base_is_here(config) else parameters * 2
        if "merge" in needed:
            need += written * (4 if config.merge.dtype == "float32" else 2)
        cut = any((runs_root / MODELS_FOLDER).glob("cut-*"))
        need += written * 2 if written != parameters and not cut else 0  # the base as it is served
    text = (
        f"{free / GB:.1f} GB free at {place.resolve()}, about {need / GB:.1f} GB needed (computed)"
    )
    return [_check("disk", "ok" if free > need else "fail", text)]


def _base_is_here(config: Config) -> bool:
    base, revision = config.model.base, config.model.revision
    return find_path(base).is_dir() or cached(base, DEFAULT_NAMES["moshi"], revision)


def model_sizes(config: Config) -> dict[str, Any]:
    """The sizes that `training.estimate` counts by."""
    return _lm_config(config)


def set_size(config: Config, keys: Iterable[str]) -> tuple[int, int, float]:
    """Personas, dialogues and minutes of speech of a config; `keys` as of the personas' files."""
    personas = sum(key.startswith("Persona:") for key in keys)
    dialogues = personas * config.dialogues.per_persona
    turns = (config.dialogues.min_turns + config.dialogues.max_turns) / 2
    return personas, dialogues, dialogues * turns * TURN_S / 60


def _estimate(config: Config) -> dict[str, str]:
    try:
        keys = STAGES[0].files(config)
    except DuplexError:
        return _check("estimate", "warn", "not possible before the data files are valid")
    personas, dialogues, minutes = set_size(config, keys)
    try:
        cost = estimate_cost(config)
    except DuplexError as error:
        return _check("estimate", "fail", str(error))
    paid = cost.describe() if cost else "none"
    return _check(
        "estimate",
        "ok",
        f"{personas} personas, {dialogues} dialogues, about {minutes:.0f} minutes of speech "
        f"(computed at {TURN_S} s a turn); paid calls: {paid}",
    )
