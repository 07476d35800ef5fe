"""Sesame's conversational speech model (CSM) through transformers: English, no word times.

The model hears before it speaks: the voice's sample with its transcript first, which is what
keeps the voice the same, then the last utterances of both sides, then the text.

    speakers    the agent is `[0]`, the user `[1]`, in samples, context and text
    sampling    top-k 50, temperature 0.9, backbone and depth decoder alike; the cache is kept
    end         the first frame of zeros. The library stops when all but the last codebook are
                zero but cuts only where all are: one stray frame, here cut off too
    codes       the model's vocabulary has three more than the codec's: clipped to its codebook
    codebooks   as many as the model has (32) are set on the codec: it encodes with all that it
                has itself, and more would not fit the embeddings
    decoding    all frames in one pass

Room: prompt and speech share `max_position_embeddings` (2 048) positions, one for a token of
text or a frame of 80 ms; the oldest context goes first when it is full.
Source: transformers/models/csm (4.57.6).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from duplex.base import Role
from duplex.config_data import SpeechSection
from duplex.errors import RecordError
from duplex.frames import SAMPLE_RATE, frames_covering_seconds
from pipeline.engines import neural
from pipeline.engines.speaking import Capabilities, SpeechRequest, Utterance

if TYPE_CHECKING:
    import torch

NAME = "csm"
REPOSITORY = "sesame/csm-1b"
LICENCE, SIZE = "Apache-2.0, gated", "about 7 GB"
CAPABILITIES = Capabilities(
    languages=frozenset({"en"}),
    licence="Apache-2.0 (weights; its makers forbid impersonation without consent)",
    cloning=True,
    context=True,
    weights=REPOSITORY,
)
# parameter of a voice -> (default, least, most); temperature 0 takes the likeliest
NUMBERS = {"temperature": (0.9, 0.0, 2.0), "top_k": (50, 1, 2051)}
SPEAKERS: dict[Role, int] = {"agent": 0, "user": 1}
CONTEXT_UTTERANCES, CONTEXT_S = 4, 30.0
LONGEST_SAMPLE_S = 30.0
SPECIAL = re.compile(r"<\|.*?\|>")

Said = tuple[int, str, np.ndarray]  # speaker, text, float32 [S] at 24 kHz


def revision(section: SpeechSection) -> str:
    packages = neural.versions("transformers", "torch")
    return f"{NAME} 1, {packages}, {_weights(section).identity()}"


def missing(section: SpeechSection) -> str | None:
    package = neural.missing_package("transformers", "tts")
    return package or neural.missing_weights(_weights(section))


def make(section: SpeechSection) -> Csm:
    return Csm(_weights(section), section.runtime.device)


def _weights(section: SpeechSection) -> neural.Weights:
    return neural.weights_of(NAME, section, REPOSITORY, LICENCE, SIZE)


class Csm:
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
        sample = neural.read_sample(request.sample, SAMPLE_RATE, LONGEST_SAMPLE_S, NAME)
        self._load()
        own = SPEAKERS[request.voice.role]
        inputs, most = self._inputs((own, transcript, sample), context_of(request), request)
        with neural.seeded(request.seed, self._device):
            codes = self._generate(inputs, most, numbers)  # [T, K]
            length = first_end(codes, self._model.config.codebook_eos_token_id)
            if length is None:
                raise neural.endless(NAME, request.text)
            sound = self._decode(codes[:length])
        samples = neural.finished(sound, SAMPLE_RATE, NAME)
        return Utterance(samples, None)

    def close(self) -> None:
        self._model = self._processor = None
        neural.free(self._device)

    def _load(self) -> None:
        if self._model is not None:
            return
        problem = neural.missing_package("transformers", "tts")
        if problem:
            raise self._weights.missing(problem)
        from transformers import CsmForConditionalGeneration, CsmProcessor

        self._device = neural.pick_device(self._device_asked)
        with self._weights.loading():
            source = str(self._weights.folder or self._weights.source)
            revision = self._weights.revision or "main"
            processor = CsmProcessor.from_pretrained(source, revision=revision)
            model = neural.from_pretrained(CsmForConditionalGeneration, self._weights)
            codebooks, codec = model.config.num_codebooks, model.codec_model
            if codec.config.num_quantizers < codebooks:
                raise self._weights.corrupt(
                    f"its codec must have {codebooks} codebooks, "
                    f"found {codec.config.num_quantizers}"
                )
            codec.config.num_quantizers = codebooks
            self._model, self._processor = model.to(self._device), processor

    def _inputs(
        self, anchor: Said, context: Sequence[Said], request: SpeechRequest
    ) -> tuple[dict[str, torch.Tensor], int]:
        """The model's inputs, with as much context as fits, and how many frames may follow.

        Raises:
            RecordError: sample and text alone are too long.
        """
        room = self._model.config.max_position_embeddings
        most = frames_covering_seconds(neural.longest_s(request.text))
        for skipped in range(len(context) + 1):
            said = [anchor, *context[skipped:]]
            prompt = "".join(f"{_line(speaker, text)}<|AUDIO|><|audio_eos|>"
                             for speaker, text, _ in said)  # fmt: skip
            prompt += _line(anchor[0], request.text)
            inputs = self._processor(text=[prompt], audio=[sound for _, _, sound in said])
            length = inputs["input_ids"].shape[1]
            if length + most <= room:
                # The tokenizer may give more than the model takes.
                names = ("input_ids", "attention_mask", "input_values", "input_values_cutoffs")
                return {name: inputs[name].to(self._device) for name in names}, most
        raise RecordError(
            f"{NAME} has room for {room} tokens and frames, and needs {length} for the voice's "
            f"sample and the text and {most} to speak: shorten the text, or the sample"
        )

    def _generate(
        self, inputs: dict[str, torch.Tensor], most: int, numbers: dict[str, float]
    ) -> torch.Tensor:
        """int64 [T, K], T <= most."""
        sampling: dict[str, Any] = {"do_sample": numbers["temperature"] > 0}
        if sampling["do_sample"]:
            sampling |= {"temperature": numbers["temperature"], "top_k": int(numbers["top_k"])}
        depth = {f"depth_decoder_{name}": value for name, value in sampling.items()}
        return self._model.generate(
            **inputs, **sampling, **depth, max_new_tokens=most, use_cache=True
        )[0]

    def _decode(self, codes: torch.Tensor) -> np.ndarray:
        """float32 [S] of codes [T, K]."""
        if not len(codes):
            return np.zeros(0, dtype=np.float32)
        codec = self._model.codec_model
        clipped = codes.clamp(0, codec.config.codebook_size - 1)
        return codec.decode(clipped.T[None]).audio_values[0, 0].float().cpu().numpy()


def first_end(codes: torch.Tensor, end: int) -> int | None:
    """Frames before the first one that ends the speech, of codes [T, K]; None: there is none."""
    ends = (codes[:, :-1] == end).all(dim=-1).nonzero()
    return int(ends[0]) if len(ends) else None


def context_of(request: SpeechRequest) -> list[Said]:
    """The last utterances of which it is known who said them, the oldest first."""
    own = SPEAKERS[request.voice.role]
    kept: list[Said] = []
    seconds = 0.0
    for text, utterance in reversed(request.context):
        seconds += len(utterance.samples) / SAMPLE_RATE
        if len(kept) == CONTEXT_UTTERANCES or seconds > CONTEXT_S:
            break
        if utterance.speaker is None:
            continue
        speaker = own if utterance.speaker == request.voice.id else 1 - own
        kept.append((speaker, text, utterance.samples))
    return kept[::-1]


def _line(speaker: int, text: str) -> str:
    plain = " ".join(SPECIAL.sub(" ", text).split())
    return f"<|begin_of_text|>[{speaker}]{plain}<|end_of_text|>"
