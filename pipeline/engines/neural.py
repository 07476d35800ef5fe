"""What the neural speech engines share: weights, device, seed, the voice's sample, the last step.

None of it imports torch before an engine speaks.

    weights     of a local folder, or of the hub, downloaded by the model's own loader
    revision    packages, weights and settings; the device is left out, so that a run folder may
                move. GPU and CPU, or another number of threads, round differently: the same
                seed gives the same samples on the same kind of machine.
    bound       `LONGEST_BASE_S` + `LONGEST_S_PER_CHARACTER` x characters: three times as long as
                slow speech. What reaches it has lost its end: nobody would use it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from duplex.config_data import SpeechSection
from duplex.datafiles import find_path
from duplex.errors import (
    CorruptFileError,
    DuplexError,
    MissingInputError,
    RecordError,
    RequestError,
)
from duplex.files import known_sha256
from duplex.frames import SAMPLE_RATE

LONGEST_BASE_S, LONGEST_S_PER_CHARACTER = 4.0, 0.2
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
MAX_SAMPLE_BYTES = 64 << 20
MIN_SAMPLE_S = 0.5

Numbers = Mapping[str, tuple[float, float, float]]  # name -> (default, least, most)


@dataclass(frozen=True)
class Weights:
    """Where a model is: `source` is a hub name owner/name, or a path that exists.

    `size` and `licence` are for the message that says how to get it, `setting` is the one that
    names it.
    """

    engine: str
    source: str
    revision: str | None
    licence: str
    size: str
    setting: str = ""

    @property
    def place(self) -> str:
        return self.setting or f"speech.models.{self.engine}.weights"

    @property
    def folder(self) -> Path | None:
        """The local folder, or file; None on the hub."""
        path = find_path(self.source)
        return path if path.exists() else None

    def check(self) -> None:
        """
        Raises:
            MissingInputError: neither a path that exists nor a hub name.
        """
        if self.folder is None and not HUB_NAME.match(self.source):
            raise MissingInputError(
                f"{self.place} must be a folder that exists or a hub name owner/name, found "
                f"{self.source}"
            )

    def identity(self) -> str:
        """For keys: the hub's revision, or the files' names and content."""
        if self.folder is not None:
            return f"folder:{folder_identity(self.folder)}"
        return f"hub:{self.source}@{self.revision or 'main'}"

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Errors of a loader, told as what is missing and how to get it.

        Models are drawn at random before their weights are read: not from the program's numbers.
        """
        from safetensors import SafetensorError

        self.check()
        try:
            with seeded(0, "cpu"):
                yield
        except DuplexError:
            raise
        except (SafetensorError, KeyError, AssertionError, TypeError) as error:
            raise self.corrupt(error) from error
        except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
            raise self.missing(error) from error
        except RuntimeError as error:
            if "out of memory" in str(error):
                raise
            raise self.corrupt(error) from error

    def missing(self, error: Exception | str) -> MissingInputError:
        if self.folder is not None:
            return MissingInputError(
                f"{self.source}: must hold all files of {self.engine}: {first_line(error)}. Take "
                f"the whole repository, or name another one in {self.place}"
            )
        offline = " HF_HUB_OFFLINE is set: unset it." if os.environ.get("HF_HUB_OFFLINE") else ""
        return MissingInputError(
            f"{self.engine} needs the weights {self.source} ({self.size}, {self.licence}), and "
            f"the download failed: {first_line(error)}.{offline} Accept the licence at "
            f"https://huggingface.co/{self.source} and set HF_TOKEN, or download it elsewhere "
            f"and give its folder in {self.place}"
        )

    def corrupt(self, error: Exception | str) -> CorruptFileError:
        return CorruptFileError(
            f"{self.source}: must hold the weights of {self.engine} as its config describes "
            f"them: {first_line(error)}. Download it again"
        )


def weights_of(
    engine: str, section: SpeechSection, default: str, licence: str, size: str
) -> Weights:
    """What `speech.models` says, or the engine's own. `speech.revision` is that of
    `speech.engine`."""
    model = section.models.get(engine)  # pyright: ignore[reportArgumentType, reportCallIssue]
    source = (model.weights if model else None) or default
    revision = model.revision if model else None
    if revision is None and section.engine == engine:
        revision = section.revision
    return Weights(engine, source, revision, licence, size)


def folder_identity(path: Path) -> str:
    """Digest of the files' names and content. Each file is read once in a process, unless it
    changes: keys are asked for again and again."""
    state = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        state.update(f"{name}\0{known_sha256(file)}\0".encode())
    return state.hexdigest()[:16]


def versions(*packages: str) -> str:
    """`moshi 0.2.13, torch 2.9.1`; "missing" where one is not installed."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} missing")
    return ", ".join(found)


def missing_package(module: str, extra: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return f"the package {module.replace('_', '-')}: pip install -e '.[{extra}]'"
    return None


def missing_weights(weights: Weights) -> str | None:
    """What to fetch before an engine is at hand, looked up in the hub's cache on this machine."""
    if weights.folder is not None:
        return None
    if HUB_NAME.match(weights.source) and cached(weights.source, "config.json", weights.revision):
        return None
    return f"the weights {weights.source} ({weights.size}): hf download {weights.source}"


def cached(repository: str, file: str, revision: str | None) -> bool:
    """Whether the hub's cache on this machine has the file."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, file, revision=revision), str)


def pick_device(device: str) -> str:
    """
    Raises:
        RequestError: a GPU is asked for and there is none.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise RequestError(
            "speech.runtime.device: cuda needs a GPU, torch finds none; use cpu, or auto"
        )
    return device


@contextmanager
def seeded(seed: int, device: str) -> Iterator[None]:
    """torch's generators from `seed` within, and as they were after. No gradients."""
    import torch

    devices = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would reach all GPUs
        if devices:
            torch.cuda.manual_seed(seed)
        yield


def numbers(engine: str, settings: Mapping[str, object], ranges: Numbers) -> dict[str, float]:
    """The engine's numbers among a voice's parameters, the others at their defaults.

    Raises:
        RequestError: one is no number, or out of its range.
    """
    found = {}
    for name, (default, least, most) in ranges.items():
        value = settings.get(name, default)
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if not fits or not least <= value <= most:  # pyright: ignore[reportOperatorIssue]
            raise RequestError(
                f"a voice of {engine} must have {name} in {least:g} to {most:g}, found {value!r}"
            )
        found[name] = float(value)  # pyright: ignore[reportArgumentType]
    return found


def check_names(engine: str, settings: Mapping[str, object], known: frozenset[str]) -> None:
    """
    Raises:
        RequestError: a parameter that the engine does not have.
    """
    unknown = sorted(set(settings) - known)
    if unknown:
        raise RequestError(
            f"a voice of {engine} has the parameters {', '.join(sorted(known))}; "
            f"found {', '.join(unknown)}"
        )


def longest_s(text: str) -> float:
    """Speech of `text` that is longer than this has gone wrong."""
    return LONGEST_BASE_S + LONGEST_S_PER_CHARACTER * len(text)


def require_words(text: str) -> None:
    """
    Raises:
        RecordError: nothing in it can be spoken.
    """
    if not any(character.isalnum() for character in text):
        raise RecordError(f"a text must have a word to say, found {text!r}")


def endless(engine: str, text: str) -> RecordError:
    return RecordError(
        f"{engine} must end its speech within {longest_s(text):.1f} s for {len(text)} characters, "
        "and did not: another seed may"
    )


def finished(samples: np.ndarray, rate: int, engine: str) -> np.ndarray:
    """A model's output, float [S] at `rate`, as an utterance's: float32 [S] at 24 kHz in [-1, 1].

    What is beyond full scale is cut off flat, not scaled down: the checks shall see it.

    Raises:
        RecordError: no samples, or not numbers.
    """
    if samples.ndim != 1 or not len(samples):
        raise RecordError(f"{engine} must give samples, found none: another seed may")
    if not np.isfinite(samples).all():
        raise RecordError(f"{engine} must give finite samples, found NaN or infinity")
    if rate != SAMPLE_RATE:
        import soxr

        samples = soxr.resample(samples.astype(np.float32), rate, SAMPLE_RATE, quality="HQ")
    return np.clip(samples, -1.0, 1.0).astype(np.float32)


def read_sample(path: Path | None, rate: int, longest_s: float, engine: str) -> np.ndarray:
    """float32 [S] at `rate`: the voice's recording, which the engine is to sound like.

    Raises:
        RequestError: there is none, or none that can be used.
    """
    import soundfile
    import soxr

    if path is None or not path.is_file():
        raise RequestError(
            f"{engine} must have a recording of the voice to sound like, found {path or 'none'}: "
            "give the voice a sample"
        )
    if path.stat().st_size > MAX_SAMPLE_BYTES:
        raise RequestError(f"{path.name}: a voice's sample must be under 64 MB")
    try:
        sound, own_rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise RequestError(f"{path.name}: a voice's sample must be a WAV file: {error}") from None
    seconds = len(sound) / own_rate
    if not MIN_SAMPLE_S <= seconds <= longest_s or not np.isfinite(sound).all():
        raise RequestError(
            f"{path.name}: the voice's sample for {engine} must be {MIN_SAMPLE_S:g} to "
            f"{longest_s:g} s of finite samples, found {seconds:.2f} s"
        )
    mono = sound.mean(axis=1)
    return mono if own_rate == rate else soxr.resample(mono, own_rate, rate, quality="HQ")


def require_transcript(transcript: str | None, voice_id: str, engine: str) -> str:
    """
    Raises:
        RequestError: nobody said what is said in the voice's sample.
    """
    if not transcript:
        raise RequestError(
            f"voice {voice_id} must have a transcript of its sample for {engine}, found none: "
            "import the voice again with what is said in it"
        )
    return transcript


def first_line(error: Exception | str) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300].rstrip(".")


def free(device: str) -> None:
    """Give back the memory of models that nobody holds any more."""
    import gc

    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def from_pretrained(kind: Any, weights: Weights, unused: tuple[str, ...] = ()) -> Any:
    """A model of transformers, from safetensors alone, on the CPU.

    Args:
        unused: how the names of weights begin that may be missing.

    Raises:
        CorruptFileError: weights are missing from the files. transformers would fill them with
            random numbers, and warn.
    """
    model, report = kind.from_pretrained(
        str(weights.folder or weights.source),
        revision=weights.revision or "main", use_safetensors=True, output_loading_info=True,
    )  # fmt: skip
    absent, odd = (
        sorted(name for name in map(str, report[k]) if not name.startswith(unused))
        for k in ("missing_keys", "mismatched_keys")
    )
    if absent or odd:
        names = ", ".join((absent + odd)[:3])
        raise weights.corrupt(f"{len(absent)} weights are missing, {len(odd)} misshapen: {names}")
    return model.eval()
