"""Does an utterance sound like its voice? Speaker embeddings of WavLM, compared by their cosine.

    model       `WavLMForXVector` of transformers, from safetensors alone:
                `speech.checks.same_speaker: microsoft/wavlm-base-plus-sv`, a folder, or
                `owner/name@revision`
    reference   the voice's sample; of a voice without one the sentence that proved it
    limit       `speech.checks.min_similarity`, .86: what the model card of
                microsoft/wavlm-base-plus-sv compares with, and says that it depends on the data
    judged      from 1.5 s of speech on, on both sides, pauses at the edges cut off

Nobody has measured here how well it tells voices apart: the weights were not at hand.
Source: transformers/models/wavlm (4.57.6); huggingface.co/microsoft/wavlm-base-plus-sv.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from duplex.config_data import UtteranceChecks
from duplex.datafiles import find_path
from duplex.errors import CorruptFileError
from duplex.frames import SAMPLE_RATE
from pipeline.engines import neural
from pipeline.engines.script_words import STEP_S, active_steps

if TYPE_CHECKING:
    import torch

MODEL_RATE = 16_000
MIN_SPEECH_S = 1.5
LONGEST_S = 20.0  # that is looked at
LONGEST_REFERENCE_S = 120.0
SETTING = "speech.checks.same_speaker"
# What the speakers of its training were told apart by; an embedding is made before it.
UNUSED = ("classifier.", "objective.", "wavlm.masked_spec_embed")


def same_speaker_revision(checks: UtteranceChecks) -> str | None:
    """For keys; None where voices are not compared."""
    if checks.same_speaker is None:
        return None
    weights = _weights(checks.same_speaker)
    return f"compared by {weights.identity()}, {neural.versions('transformers', 'torch')}"


def missing_same_speaker(checks: UtteranceChecks) -> str | None:
    """What the comparison lacks on this machine, and how to get it."""
    if checks.same_speaker is None:
        return None
    package = neural.missing_package("transformers", "tts")
    return package or neural.missing_weights(_weights(checks.same_speaker))


def _weights(name: str) -> neural.Weights:
    """owner/name, owner/name@revision, or a path."""
    repository, _, revision = (name, "", "") if find_path(name).exists() else name.partition("@")
    return neural.Weights(
        "the comparison of voices", repository, revision or None, "licence: see its card",
        "about 400 MB for the base models", SETTING,
    )  # fmt: skip


class SameSpeaker:
    """The model is loaded at its first use. Not for several threads at once.

    Args:
        name: `speech.checks.same_speaker`.
        device: auto, cpu or cuda.
    """

    def __init__(self, name: str, device: str = "auto"):
        self._weights, self._device_asked = _weights(name), device
        self._device = "cpu"
        self._model: Any = None
        self._features: Any = None
        self._references: dict[Path, np.ndarray | None] = {}

    def similarity(self, samples: np.ndarray, reference: Path) -> float | None:
        """Cosine of the speakers of an utterance and of a recording, in [-1, 1]; None: one of
        them has too little speech to tell.

        Args:
            samples: float32 [S] at 24 kHz.

        Raises:
            MissingInputError: the package or the weights are not here; says how to get them.
            CorruptFileError: the weights are not such a model's.
            RequestError: the recording cannot be used.
        """
        spoken = speech_of(samples)
        if spoken is None:
            return None
        if reference not in self._references:
            sound = neural.read_sample(reference, SAMPLE_RATE, LONGEST_REFERENCE_S, SETTING)
            own = speech_of(sound)
            self._references[reference] = None if own is None else self.embedding(own)
        wanted = self._references[reference]
        if wanted is None:
            return None
        return float(np.clip(np.dot(self.embedding(spoken), wanted), -1.0, 1.0))

    def embedding(self, samples: np.ndarray) -> np.ndarray:
        """float64 [D] of length 1: the speaker of float32 [S] at 24 kHz.

        Raises:
            MissingInputError, CorruptFileError: as `similarity`.
        """
        import soxr

        self._load()
        sound = soxr.resample(samples.astype(np.float32), SAMPLE_RATE, MODEL_RATE, quality="HQ")
        inputs = self._features(sound, sampling_rate=MODEL_RATE, return_tensors="pt")
        # The encoder draws a number for each layer, though it skips none when it is not trained.
        with neural.seeded(0, self._device):
            values: torch.Tensor = inputs["input_values"].to(self._device)  # [1, S]
            found = self._model(values).embeddings[0]  # [D]
        vector = found.double().cpu().numpy()
        length = float(np.linalg.norm(vector))
        if not np.isfinite(length) or length == 0:
            raise CorruptFileError(
                f"{self._weights.source}: must give an embedding of a voice, found "
                f"one of length {length}: other weights, perhaps"
            )
        return vector / length

    def close(self) -> None:
        self._model = self._features = None
        self._references = {}
        neural.free(self._device)

    def _load(self) -> None:
        if self._model is not None:
            return
        if problem := neural.missing_package("transformers", "tts"):
            raise self._weights.missing(problem)
        from transformers import Wav2Vec2FeatureExtractor, WavLMForXVector

        self._device = neural.pick_device(self._device_asked)
        with self._weights.loading():
            self._features = Wav2Vec2FeatureExtractor.from_pretrained(
                str(self._weights.folder or self._weights.source),
                revision=self._weights.revision or "main",
            )
            if self._features.sampling_rate != MODEL_RATE:
                raise self._weights.corrupt(
                    f"it must take {MODEL_RATE} Hz, found {self._features.sampling_rate}"
                )
            model = neural.from_pretrained(WavLMForXVector, self._weights, UNUSED)
            self._model = model.to(self._device)


def speech_of(samples: np.ndarray) -> np.ndarray | None:
    """float32 [S] at 24 kHz from the first to the last sound, `LONGEST_S` of it at most; None
    where less than `MIN_SPEECH_S` of it is speech."""
    steps = np.flatnonzero(active_steps(samples))
    if len(steps) * STEP_S < MIN_SPEECH_S:
        return None
    step = round(STEP_S * SAMPLE_RATE)
    start, end = int(steps[0]) * step, (int(steps[-1]) + 1) * step
    return samples[start : min(end, start + round(LONGEST_S * SAMPLE_RATE))]
