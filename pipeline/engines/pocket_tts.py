"""Kyutai's pocket-tts through its package: six languages on a CPU, any voice from a sample.

A voice is a sample, which is heard once and kept as the model's state, or one of the package's
own by name. There is one set of weights for each language; the last one used is held.

The package runs on the CPU alone. What it does to the process is undone: importing it sets
torch's threads to one. It decodes whatever frames are ready, as the clock has it, and a batch of
another size rounds differently: here one frame at a time, so that a seed gives the same bytes.
Speech that does not end within its own bound (a third of a second a token, and two) is an error.
Source: pocket_tts/models/tts_model.py (4.0.1).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from duplex.config_data import SpeechSection
from duplex.errors import MissingInputError, RequestError
from duplex.frames import SAMPLE_RATE
from pipeline.engines import neural
from pipeline.engines.speaking import Capabilities, SpeechRequest, Utterance

NAME, MODULE = "pocket-tts", "pocket_tts"
REPOSITORY = "kyutai/pocket-tts"
LICENCE, SIZE = "CC-BY-4.0, gated for cloning", "under 500 MB a language"
CONFIGS = {
    "en": "english", "fr": "french", "de": "german", "pt": "portuguese", "it": "italian",
    "es": "spanish",
}  # fmt: skip
CAPABILITIES = Capabilities(
    languages=frozenset(CONFIGS),
    licence="MIT (code), CC-BY-4.0 (weights)",
    cloning=True,
    weights=REPOSITORY,
)
# parameter of a voice -> (default, least, most)
NUMBERS = {"temperature": (0.3, 0.0, 2.0), "decode_steps": (1, 1, 32)}
KNOWN = frozenset({"voice", *NUMBERS})
LONGEST_SAMPLE_S, HEARD_S = 60.0, 30
STATES = 4  # voices whose state is held
WITHOUT_END = "KPOCKET_TTS_ERROR_WITHOUT_EOS"


def revision(section: SpeechSection) -> str:
    packages = neural.versions(NAME, "torch")
    path = _weights(section).folder
    # The package names the commit of its own weights for each language.
    files = ", ".join(map(neural.folder_identity, _named(path))) if path else "its own weights"
    return f"{NAME} 1, {packages}, {files}"


def missing(section: SpeechSection) -> str | None:
    package = neural.missing_package(MODULE, "tts")
    weights = _weights(section)
    if package or weights.folder:
        return package
    if any(neural.cached(*place) for config in CONFIGS.values() for place in _places(config)):
        return None
    return f"the weights {REPOSITORY} ({SIZE}), which it downloads when it first speaks"


def make(section: SpeechSection) -> PocketTts:
    return PocketTts(_weights(section))


def _weights(section: SpeechSection) -> neural.Weights:
    return neural.weights_of(NAME, section, REPOSITORY, LICENCE, SIZE)


class PocketTts:
    """A `SpeechEngine`. `speech.models` may name a YAML file as the package describes its own
    weights: it then speaks every language."""

    capabilities = CAPABILITIES

    def __init__(self, weights: neural.Weights):
        self._weights = weights
        self._config: str | None = None
        self._model: Any = None
        self._states: OrderedDict[str, Any] = OrderedDict()

    def synthesize(self, request: SpeechRequest) -> Utterance:
        import torch

        settings = request.settings
        neural.check_names(NAME, settings, KNOWN)
        numbers = neural.numbers(NAME, settings, NUMBERS)
        neural.require_words(request.text)
        model = self._loaded(request.language)
        model.temp, model.sampler_decode_steps = (
            numbers["temperature"], int(numbers["decode_steps"]),
        )  # fmt: skip
        with one_thread():
            state = self._state(model, request)
            try:
                with neural.seeded(request.seed, "cpu"), _error_without_end():
                    parts = list(model.generate_audio_stream(state, request.text))
            except RuntimeError as error:
                if "without EOS" in str(error):
                    raise neural.endless(NAME, request.text) from error
                raise
            sound = torch.cat(parts) if parts else torch.zeros(0)
        if len(sound) > neural.longest_s(request.text) * model.sample_rate:
            raise neural.endless(NAME, request.text)
        return Utterance(neural.finished(sound.numpy(), model.sample_rate, NAME), None)

    def close(self) -> None:
        self._model = self._config = None
        self._states.clear()
        neural.free("cpu")

    def _loaded(self, language: str) -> Any:
        problem = neural.missing_package(MODULE, "tts")
        if problem:
            raise self._weights.missing(problem)
        if language not in CONFIGS:
            raise RequestError(f"{NAME} speaks {', '.join(CONFIGS)}, asked for {language}")
        config = str(self._weights.folder or CONFIGS[language])
        if config != self._config:
            self.close()
            with one_thread(), self._weights.loading():
                from pocket_tts import TTSModel

                if self._weights.folder:
                    model = TTSModel.load_model(config=config)
                else:
                    model = TTSModel.load_model(language=config)
            model.max_decoder_frames_per_call = 1
            self._model, self._config = model, config
        return self._model

    def _state(self, model: Any, request: SpeechRequest) -> Any:
        """The model's state after hearing the voice. Making it draws random numbers, not
        the utterance's: that would depend on whether it was the voice's first."""
        import torch

        name = request.settings.get("voice")
        if name is None:
            sample = neural.read_sample(request.sample, SAMPLE_RATE, LONGEST_SAMPLE_S, NAME)
            if not model.has_voice_cloning:
                raise MissingInputError(
                    f"{NAME} must have its weights with cloning to sound like a sample, and got "
                    f"those without. Accept the terms at https://huggingface.co/{REPOSITORY} and "
                    "set HF_TOKEN, or give the voice one of the package's own names"
                )
            key = hashlib.sha256(sample.tobytes()).hexdigest()
            heard: Any = torch.from_numpy(sample[: HEARD_S * SAMPLE_RATE])[None]
        else:
            key = heard = self._own_voice(name)
        if key not in self._states:
            with self._weights.loading():
                self._states[key] = model.get_state_for_audio_prompt(heard)
            if len(self._states) > STATES:
                self._states.popitem(last=False)
        self._states.move_to_end(key)
        return self._states[key]

    def _own_voice(self, name: object) -> str:
        """A name of the package's list: it would download whatever address it is given."""
        from pocket_tts.utils.utils import _ORIGINS_OF_PREDEFINED_VOICES as VOICES

        if name not in VOICES:
            raise RequestError(
                f"a voice of {NAME} must have a sample, or one of the names {', '.join(VOICES)}; "
                f"found {name!r}"
            )
        if self._weights.folder:
            raise RequestError(
                f"the voice {name} is made for the package's own weights: with others, give the "
                "voice a sample"
            )
        return str(name)


def _named(path: Path) -> list[Path]:
    """A YAML description and the local files that it names."""
    found = re.findall(r"^\s*\w+_path: *[\"']?([^\s\"']+)", path.read_text(), re.MULTILINE)
    return [path, *(file for file in map(Path, sorted(found)) if file.is_file())]


def _places(config: str) -> list[tuple[str, str, str | None]]:
    """Where a language's weights are: (repository, path, commit), with cloning and without."""
    spec = importlib.util.find_spec(MODULE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    path = Path(folders[0]) / "config" / f"{config}.yaml" if folders else Path(config)
    found = re.findall(r"^weights_path\w*: hf://([^/]+/[^/]+)/([^@\s]+)(?:@(\w+))?",
                       path.read_text(), re.MULTILINE) if path.is_file() else []  # fmt: skip
    return [(repository, file, commit or None) for repository, file, commit in found]


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, which the package's import would make it for good."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _error_without_end() -> Iterator[None]:
    """The package's own switch: speech that reaches its bound is an error, not a warning."""
    before = os.environ.get(WITHOUT_END)
    os.environ[WITHOUT_END] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[WITHOUT_END]
        else:
            os.environ[WITHOUT_END] = before
