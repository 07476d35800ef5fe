"""Nari Labs' Dia through transformers: English dialogue speech, 44.1 kHz, no word times.

It goes on speaking after a recording. The text is `[S1]`, what the voice's sample says, and what
is to be said, all of one speaker (its makers advise against a second `[S1]` in a row); the sound
begins with the sample, encoded by DAC, and the sample's part is cut off what comes out.

    tags        none but the first: `(laughs)` in a text would be laughed, and its word missing,
                so brackets are dropped and the words in them are spoken
    end         channel 0 gives it, the others follow by their delays; the library forces it at
                the bound, so speech of that very length has not ended by itself
    bound       frames wanted + the greatest delay + 1, which is how the library counts
    sampling    guidance 3, temperature 1.8, top-p 0.9, top-k 45: as its makers' example

Room: sample and speech share 3 072 positions, 86 a second: 35 s. A sample of 5 to 10 s is best.
Source: transformers/models/dia (4.57.6) and the makers' guidelines.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from duplex.config_data import SpeechSection
from duplex.errors import RecordError
from pipeline.engines import neural
from pipeline.engines.speaking import Capabilities, SpeechRequest, Utterance

if TYPE_CHECKING:
    import torch

NAME = "dia"
REPOSITORY, CODEC = "nari-labs/Dia-1.6B-0626", "descript/dac_44khz"
CODEC_FOLDER = "codec"  # beside local weights
LICENCE, SIZE = "Apache-2.0; the codec MIT", "about 7 GB"
CAPABILITIES = Capabilities(
    languages=frozenset({"en"}),
    licence="Apache-2.0 (weights), MIT (codec)",
    cloning=True,
    weights=REPOSITORY,
)
# parameter of a voice -> (default, least, most)
NUMBERS = {
    "guidance": (3.0, 1.0, 10.0),
    "temperature": (1.8, 0.1, 3.0),
    "top_p": (0.9, 0.01, 1.0),
    "top_k": (45, 1, 1024),
}
LONGEST_SAMPLE_S = 15.0
SPEAKER = "[S1]"


def revision(section: SpeechSection) -> str:
    packages = neural.versions("transformers", "torch", "soxr")
    weights = _weights(section)
    return f"{NAME} 1, {packages}, {weights.identity()}, codec {_codec(weights).identity()}"


def missing(section: SpeechSection) -> str | None:
    weights = _weights(section)
    package = neural.missing_package("transformers", "tts")
    return package or neural.missing_weights(weights) or neural.missing_weights(_codec(weights))


def make(section: SpeechSection) -> Dia:
    return Dia(_weights(section), section.runtime.device)


def _weights(section: SpeechSection) -> neural.Weights:
    return neural.weights_of(NAME, section, REPOSITORY, LICENCE, SIZE)


def _codec(weights: neural.Weights) -> neural.Weights:
    """The codec is a repository of its own; beside local weights, their folder `codec`."""
    local = weights.folder / CODEC_FOLDER if weights.folder else None
    source = str(local) if local and local.is_dir() else CODEC
    return neural.Weights(NAME, source, None, "MIT", "about 300 MB")


class Dia:
    """A `SpeechEngine`. A voice needs its sample and the transcript of that."""

    capabilities = CAPABILITIES

    def __init__(self, weights: neural.Weights, device: str = "auto"):
        self._weights, self._device_asked = weights, device
        self._model: Any = None
        self._processor: Any = None
        self._device = "cpu"

    def synthesize(self, request: SpeechRequest) -> Utterance:
        neural.check_names(NAME, request.settings, frozenset(NUMBERS))
        numbers = neural.numbers(NAME, request.settings, NUMBERS)
        neural.require_words(request.text)
        transcript = neural.require_transcript(request.voice.transcript, request.voice.id, NAME)
        self._load()
        rate = self._processor.feature_extractor.sampling_rate
        sample = neural.read_sample(request.sample, rate, LONGEST_SAMPLE_S, NAME)
        text = f"{SPEAKER} {plain(transcript)} {plain(request.text)}"
        with neural.seeded(request.seed, self._device):
            inputs = self._processor(text=[text], audio=[sample], **self._tokens())
            sound = self._speak(inputs, numbers, request.text)
        return Utterance(neural.finished(sound, rate, NAME), None)

    def close(self) -> None:
        self._model = self._processor = None
        neural.free(self._device)

    def _load(self) -> None:
        if self._model is not None:
            return
        problem = neural.missing_package("transformers", "tts")
        if problem:
            raise self._weights.missing(problem)
        from transformers import (
            DacModel,
            DiaFeatureExtractor,
            DiaForConditionalGeneration,
            DiaProcessor,
            DiaTokenizer,
        )

        self._device = neural.pick_device(self._device_asked)
        codec_weights = _codec(self._weights)
        with self._weights.loading():
            source = str(self._weights.folder or self._weights.source)
            revision = self._weights.revision or "main"
            model = neural.from_pretrained(DiaForConditionalGeneration, self._weights)
            extractor = DiaFeatureExtractor.from_pretrained(source, revision=revision)
            tokenizer = DiaTokenizer.from_pretrained(source, revision=revision)
        # Loaded here rather than by the processor: it would take pickled weights too.
        with codec_weights.loading():
            codec = neural.from_pretrained(DacModel, codec_weights)
        processor = DiaProcessor(extractor, tokenizer, codec.to(self._device))
        self._model, self._processor = model.to(self._device), processor

    def _tokens(self) -> dict[str, Any]:
        """The model's own special tokens and delays, for the processor, which has defaults."""
        config = self._model.config
        return {
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
            "delay_pattern": config.delay_pattern,
            "sampling_rate": self._processor.feature_extractor.sampling_rate,
        }

    def _speak(self, inputs: Any, numbers: dict[str, float], text: str) -> np.ndarray:
        """float32 [S] at the codec's rate, the sample's part cut off.

        Raises:
            RecordError: no room for it, or no end.
        """
        config, delay = self._model.config, max(self._model.config.delay_pattern)
        encoder, decoder = config.encoder_config, config.decoder_config
        prompt = inputs["decoder_attention_mask"].shape[1] - delay  # with its first token
        extractor = self._processor.feature_extractor
        most = int(neural.longest_s(text) * extractor.sampling_rate / extractor.hop_length)
        most = min(most, decoder.max_position_embeddings - prompt - 2 * (delay + 1))
        length = inputs["input_ids"].shape[1]
        least_s = 0.03 * len(text)  # nobody speaks so fast
        if length > encoder.max_position_embeddings or (
            most * extractor.hop_length < least_s * extractor.sampling_rate
        ):
            raise RecordError(
                f"{NAME} has room for {encoder.max_position_embeddings} bytes of text and "
                f"{decoder.max_position_embeddings} frames, and needs {length} bytes and {prompt} "
                "frames for the voice's sample: shorten the text, or the sample"
            )
        sequences = self._model.generate(
            **inputs.to(self._device), do_sample=True, guidance_scale=numbers["guidance"],
            temperature=numbers["temperature"], top_p=numbers["top_p"],
            top_k=int(numbers["top_k"]), max_new_tokens=most + delay + 1,
        )  # fmt: skip
        spoken = frames_spoken(sequences[0, :, 0], prompt, config.eos_token_id)
        if spoken is None or spoken >= most:
            raise neural.endless(NAME, text)
        if not spoken:
            return np.zeros(0, dtype=np.float32)
        tokens = {k: v for k, v in self._tokens().items() if k != "sampling_rate"}
        sound = self._processor.decode(sequences, audio_prompt_len=prompt, **tokens)
        return sound.float().numpy()


def frames_spoken(channel: torch.Tensor, prompt: int, end: int) -> int | None:
    """Frames between prompt and end, in channel 0 [T]; None: it has no end."""
    ends = (channel[prompt:] == end).nonzero()
    return int(ends[0]) if len(ends) else None


def plain(text: str) -> str:
    """A text without tags: `[S2]` is gone, `(laughs)` a word."""
    return " ".join(re.sub(r"[()\[\]<>]", " ", re.sub(r"\[S\d\]", " ", text)).split())
