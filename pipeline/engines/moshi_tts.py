"""Kyutai's text-to-speech through moshi's own `TTSModel`: English and French, with word times.

The model samples when the next word starts and is then fed that word, so the step at which each
word was taken is known. `TTSModel.generate` returns the steps; `simple_generate` drops them.

    step w          text of the word is fed; its sound is frame w of what follows the delay
    delay           audio runs `delay_steps` behind the text (16 frames, 1.28 s, in the published
                    model): so many frames at the front hold nothing
    first frames    the library's own two, in which no word may start; it cuts them off for a
                    click at the beginning, and so do we: time = (w - 2) / 12.5 s
    end             the step at which a word was asked for and there was none, and the padding

The model knows where words start, not where they end: a word ends with its last audible sample
before the next one.
Source: moshi/models/tts.py and run_tts.py (moshi 0.2.13).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from duplex.config_data import SpeechSection
from duplex.errors import CorruptFileError, MissingInputError, RequestError
from duplex.frames import FRAME_RATE, FRAME_SAMPLES, SAMPLE_RATE, frames_covering_seconds
from duplex.records import Word
from pipeline.engines import neural
from pipeline.engines.checkpoint import Checkpoint
from pipeline.engines.speaking import Capabilities, SpeechRequest, Utterance

if TYPE_CHECKING:
    from moshi.models.tts import TTSModel

NAME = "moshi-tts"
REPOSITORY, VOICES = "kyutai/tts-1.6b-en_fr", "kyutai/tts-voices"
LICENCE, SIZE = "CC-BY-4.0", "about 4 GB"
CAPABILITIES = Capabilities(
    languages=frozenset({"en", "fr"}),
    licence=f"{LICENCE} (weights; each folder of {VOICES} has its own)",
    word_times=True,
    weights=REPOSITORY,
)
CLICK_FRAMES = 2  # the library's `initial_padding`
# parameter of a voice -> (default, least, most)
NUMBERS = {
    "cfg_coef": (2.0, 1.0, 4.0),
    "temperature": (0.6, 0.0, 2.0),
    "padding_bonus": (0.0, -2.0, 2.0),  # above zero slower
    "padding_between": (1, 0, 10),  # steps after each word; 1 articulates better
    "n_q": (32, 1, 32),  # codebooks
}
KNOWN = frozenset({"voice", *NUMBERS})
# Each part of a name starts with a letter or digit: no path leads out of the repository.
VOICE_NAME = re.compile(r"^(?:\w[\w.@+-]*/){0,4}\w[\w.@+-]*\.(?:wav|mp3|flac|ogg|safetensors)$")
EMBEDDING = "speaker_wavs"
MAX_EMBEDDING_BYTES = 32 << 20
AUDIBLE_SHARE = 0.01  # of the peak: -40 dB


def revision(section: SpeechSection) -> str:
    packages = neural.versions("moshi", "torch")
    weights, voices = _weights(section), _voices(section)
    return f"{NAME} 1, {packages}, {weights.identity()}, voices {voices.identity()}"


def missing(section: SpeechSection) -> str | None:
    return neural.missing_weights(_weights(section))


def make(section: SpeechSection) -> MoshiTts:
    return MoshiTts(_weights(section), _voices(section), section.runtime.device)


def _weights(section: SpeechSection) -> neural.Weights:
    return neural.weights_of(NAME, section, REPOSITORY, LICENCE, SIZE)


def _voices(section: SpeechSection) -> neural.Weights:
    model = section.models.get(NAME)
    return neural.Weights(
        NAME, (model.voices if model else None) or VOICES, None,
        "its folders have licences of their own", "about 1 MB a voice",
    )  # fmt: skip


class MoshiTts:
    """A `SpeechEngine`. A voice's `voice` is a name in `voices`, with or without `.safetensors`:
    `expresso/ex03-ex01_happy_001_channel1_334s.wav`."""

    capabilities = CAPABILITIES

    def __init__(self, weights: neural.Weights, voices: neural.Weights, device: str = "auto"):
        self._weights, self._voices, self._device_asked = weights, voices, device
        self._model: TTSModel | None = None
        self._device = "cpu"

    def synthesize(self, request: SpeechRequest) -> Utterance:
        import torch
        from moshi.utils.compile import no_compile

        settings = request.settings
        neural.check_names(NAME, settings, KNOWN)
        numbers = neural.numbers(NAME, settings, NUMBERS)
        name = voice_name(settings)
        text, pieces = script(request.text)
        neural.require_words(text)
        model = self._loaded()
        path = self._voice_path(name, model.voice_suffix)
        n_q = int(numbers["n_q"] if "n_q" in settings else min(32, model.lm.n_q))
        if n_q > model.lm.n_q:
            raise RequestError(f"n_q must be at most {model.lm.n_q} with these weights: {n_q}")
        check_embedding(path, model)
        # The library reads all of these from the model, at each call.
        model.n_q, model.temp = n_q, numbers["temperature"]
        model.padding_bonus = numbers["padding_bonus"]
        model.mimi.set_num_codebooks(n_q)
        attributes = _conditions(model, path, numbers["cfg_coef"])
        most = frames_covering_seconds(neural.longest_s(request.text))
        ahead = model.delay_steps + model.final_padding + max(model.lm.delays) + CLICK_FRAMES
        model.max_gen_length = most + ahead
        with neural.seeded(request.seed, self._device), no_compile():
            entries = model.prepare_script([text], padding_between=int(numbers["padding_between"]))
            distilled = bool(model.valid_cfg_conditionings)
            result = model.generate(
                [entries], [attributes],
                cfg_is_no_prefix=not distilled, cfg_is_no_text=not distilled,
            )  # fmt: skip
            end = result.end_steps[0]
            if end is None or end > most:
                raise neural.endless(NAME, request.text)
            last = model.delay_steps + end + model.final_padding
            frames = torch.cat(result.frames[model.delay_steps : last], dim=-1)  # [1, 1 + n_q, T]
            sound = model.mimi.decode(frames[:, 1:])[0, 0].float().cpu().numpy()
        samples = neural.finished(sound[CLICK_FRAMES * FRAME_SAMPLES :], SAMPLE_RATE, NAME)
        return Utterance(samples, timed(pieces, result.all_consumption_times[0], samples))

    def close(self) -> None:
        self._model = None
        neural.free(self._device)

    # -- files

    def _loaded(self) -> TTSModel:
        if self._model is None:
            import torch
            from moshi.models.tts import TTSModel

            self._device = neural.pick_device(self._device_asked)
            with self._weights.loading():
                checkpoint = self._checkpoint()
                model = TTSModel.from_checkpoint_info(
                    checkpoint.info(), initial_padding=CLICK_FRAMES, device=self._device,
                    dtype=torch.bfloat16 if self._device == "cuda" else torch.float32,
                    n_q=min(32, checkpoint.config["n_q"]),
                )  # fmt: skip
            if not model.multi_speaker:
                raise MissingInputError(
                    f"{self._weights.source}: must be a model that takes a voice's embedding "
                    f"({EMBEDDING}), found one without: {REPOSITORY} is one"
                )
            self._model = model
        return self._model

    def _checkpoint(self) -> Checkpoint:
        """The checkpoint's folder; from the hub, only the files that its config names."""
        from huggingface_hub import hf_hub_download

        source, revision = self._weights.source, self._weights.revision
        folder = self._weights.folder
        if folder is None:
            config = Path(hf_hub_download(source, "config.json", revision=revision))
            folder = config.parent
            for path in Checkpoint(folder, json.loads(config.read_text())).files().values():
                hf_hub_download(source, path.name, revision=revision)
        checkpoint = Checkpoint.open(folder)
        for role in ("moshi", "mimi"):
            if checkpoint.files()[role].suffix != ".safetensors":
                raise CorruptFileError(f"{source}: its weights must be safetensors")
        return checkpoint

    def _voice_path(self, name: str, suffix: str) -> Path:
        from huggingface_hub import hf_hub_download

        file = name if name.endswith(".safetensors") else name + suffix
        folder = self._voices.folder
        if folder is None:
            self._voices.check()
            try:
                return Path(hf_hub_download(self._voices.source, file))
            except (OSError, ValueError) as error:
                raise MissingInputError(
                    f"the voice {name} must be in {self._voices.source} as {file}, and the "
                    f"download failed: {neural.first_line(error)}. Look at its files, or give a "
                    f"folder of voices in speech.models.{NAME}.voices"
                ) from error
        path = (folder / file).resolve()
        if not path.is_file() or not path.is_relative_to(folder.resolve()):
            raise MissingInputError(
                f"the voice {name} must be in {folder} as {file}, found none of that name"
            )
        return path


def voice_name(settings: Mapping[str, Any]) -> str:
    """
    Raises:
        RequestError: no name, or a path.
    """
    name = settings.get("voice")
    if not isinstance(name, str) or not VOICE_NAME.match(name):
        raise RequestError(
            f"a voice of {NAME} must name one of {VOICES}, such as "
            "expresso/ex03-ex01_happy_001_channel1_334s.wav, "
            f"found {name!r}"
        )
    return name


def check_embedding(path: Path, model: TTSModel) -> None:
    """
    Raises:
        CorruptFileError: not a voice's embedding of this model, float [1, D, T].
    """
    from safetensors import SafetensorError, safe_open

    provider: Any = model.lm.condition_provider
    width = provider.conditioners[EMBEDDING].dim
    shape: list[int] = []
    try:
        if path.stat().st_size <= MAX_EMBEDDING_BYTES:
            with safe_open(path, framework="np") as file:
                shape = file.get_slice(EMBEDDING).get_shape() if EMBEDDING in file.keys() else []  # noqa: SIM118
    except SafetensorError as error:
        raise CorruptFileError(f"{path.name}: must be safetensors: {error}") from error
    if len(shape) != 3 or shape[:2] != [1, width] or shape[2] < 1:
        raise CorruptFileError(
            f"{path.name}: a voice must hold {EMBEDDING} of shape [1, {width}, T] for these "
            f"weights, found {shape or 'none, or more than 32 MB'}"
        )


def _conditions(model: TTSModel, voice: Path, cfg_coef: float) -> Any:
    """What the model hears of voice and guidance: guidance is a condition where it was trained
    in (distilled), else a second pass without conditions."""
    valid = model.valid_cfg_conditionings
    if valid and cfg_coef not in valid:
        raise RequestError(
            f"cfg_coef must be one of {', '.join(f'{x:g}' for x in sorted(valid))} with these "
            f"weights, found {cfg_coef:g}"
        )
    model.cfg_coef = 1.0 if valid else cfg_coef
    return model.make_condition_attributes([voice], cfg_coef if valid else None)


# -- words


def script(text: str) -> tuple[str, list[tuple[str, int]]]:
    """What the model is given, and each word of the text with the number of its pieces there.

    The library drops brackets and reads a colon as a space; `<break …>` would be a pause.
    Done here beforehand, so that a word of the text is known by its pieces.
    """
    words, given = [], []
    for word in text.split():
        plain = re.sub(r"[<>()]", "", word.replace("’", "'")).replace(":", " ")
        parts = plain.split()
        given += parts
        words.append((word, len(parts)))
    return " ".join(given), words


def timed(
    pieces: Sequence[tuple[str, int]], steps: Sequence[int], samples: np.ndarray
) -> tuple[Word, ...]:
    """Words of the text from the steps at which their pieces were taken.

    A word without pieces takes no time: it is where the one before it ends.
    """
    starts, position = [], 0
    for _, count in pieces:
        starts.append(steps[position] if count else None)
        position += count
    length = len(samples) / SAMPLE_RATE
    threshold = AUDIBLE_SHARE * float(np.abs(samples).max())
    words: list[Word] = []
    for index, (text, _) in enumerate(pieces):
        step = starts[index]
        if step is None:
            here = words[-1].end_s if words else 0.0
            words.append(Word(text=text, start_s=here, end_s=here))
            continue
        start = min(max(0.0, (step - CLICK_FRAMES) / FRAME_RATE), length)
        later = [s for s in starts[index + 1 :] if s is not None]
        limit = min((later[0] - CLICK_FRAMES) / FRAME_RATE, length) if later else length
        heard = np.flatnonzero(
            np.abs(samples[round(start * SAMPLE_RATE) : round(limit * SAMPLE_RATE)]) > threshold
        )
        end = start + (int(heard[-1]) + 1) / SAMPLE_RATE if len(heard) else limit
        words.append(Word(text=text, start_s=start, end_s=max(start, min(end, limit))))
    return tuple(words)
