"""A conversation as a file: WAV to keep (its bytes repeat), Ogg/Opus to embed in a page.

An Ogg stream carries a random serial number, so its bytes differ from run to run: it never
enters a digest. 12 s of stereo: 1.15 MB as WAV, about 0.04 MB as Opus of speech with its pauses.
"""

from __future__ import annotations

import io
import wave

import numpy as np
import soundfile

from duplex.frames import SAMPLE_RATE

PAN = 0.8  # how far each side stands from the middle: wide, but not in one ear only
_BLOCK = SAMPLE_RATE  # libsndfile's Ogg encoders overflow the stack on long single writes
_COMPRESSION = 0.95  # of libsndfile's scale, 0 large to 1 small: 27 kbit/s on the demo's talk


def wav_bytes(agent: np.ndarray, user: np.ndarray) -> bytes:
    """Stereo 16-bit WAV at 24 kHz, left agent, right user."""
    pcm = np.clip(np.rint(np.stack([agent, user], axis=1) * 32768.0), -32768, 32767)
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(pcm.astype("<i2").tobytes())
    return content.getvalue()


def opus_bytes(agent: np.ndarray, user: np.ndarray) -> bytes:
    """Stereo Ogg/Opus at 24 kHz, the agent to the left and the user to the right."""
    near, far = (1 + PAN) / 2, (1 - PAN) / 2
    mix = np.stack([near * agent + far * user, far * agent + near * user], axis=1)
    content = io.BytesIO()
    with soundfile.SoundFile(
        content, "w", samplerate=SAMPLE_RATE, channels=2, format="OGG", subtype="OPUS",
        compression_level=_COMPRESSION,
    ) as file:  # fmt: skip
        for start in range(0, len(mix), _BLOCK):
            file.write(np.clip(mix[start : start + _BLOCK], -1, 1).astype(np.float32))
    return content.getvalue()
