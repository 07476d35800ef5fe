"""A speech engine in espeak's clothes that asks for recordings: for what a cloning engine is given.

It cannot clone; it checks that the sample is what cloning engines want, and speaks.
"""

import numpy as np

from pipeline.engines.espeak import EspeakEngine
from pipeline.engines.speaking import Capabilities, Utterance

CAPABILITIES = Capabilities(
    languages=frozenset({"en"}), licence="none", cloning=True, word_times=True, checked=0.0
)


def revision(section):
    return "parrot 1"


def missing(section):
    return None


def make(section):
    return Parrot()


class Parrot:
    capabilities = CAPABILITIES

    def __init__(self):
        self._engine = EspeakEngine()

    def synthesize(self, request):
        import soundfile

        samples, rate = soundfile.read(str(request.sample), dtype="float32")
        assert rate == 24_000 and samples.ndim == 1 and 4 <= len(samples) / rate <= 15.1
        pitch = 20 + int(60 * np.abs(np.fft.rfft(samples)[100:200]).mean()) % 60
        spoken = self._engine.synthesize(request.text, {"voice": "en-us", "pitch": pitch})
        return Utterance(spoken.samples, spoken.words)

    def close(self):
        self._engine.close()
