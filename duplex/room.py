"""What the user's microphone hears besides the user: the room, the place, the agent. Pure.

    room tone   pink noise: -3 dB an octave
    noise       of a place: brown noise, and pink noise between 300 and 3 000 Hz that swells and
                falls a few times a second, as a room full of talkers does
    leakage     the agent from a loudspeaker: some milliseconds late, 200 to 4 000 Hz

All noises are filtered white noise, scaled by what the filter does to power and not by what was
measured: a longer conversation begins with the same samples. Their levels are met within 1 dB.

Source: the pink filter is Julius O. Smith's (Spectral Audio Signal Processing, "Example:
Synthesis of 1/F Noise"), within .5 dB of -3 dB an octave from 10 Hz to half the rate.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from duplex.config_data import TimelineSection
from duplex.frames import SAMPLE_RATE

PINK = (
    (0.049922035, -0.095993537, 0.050612699, -0.004408786),
    (1.0, -2.494956002, 2.017265875, -0.522189400),
)
BROWN = ((1.0,), (1.0, -0.99))  # falls 6 dB an octave above 38 Hz
BABBLE_HZ, LOUDSPEAKER_HZ = (300.0, 3000.0), (200.0, 4000.0)
SWELL_HZ, SWELL_DEPTH = 4.0, 0.5
LEAK_DELAYS_MS = (4, 30)  # drawn: a loudspeaker on the desk, or at the far wall
LOUDEST_PEAK = 0.5  # the other half is the user's
RESPONSE_S = 2.0  # of a filter, to measure what it does to power

Filter = Any  # numerator and denominator, as scipy.signal gives and takes them


def room_of(agent: np.ndarray, section: TimelineSection, seed: int) -> np.ndarray | None:
    """float32 [S] to be added to the user's channel; None where there is nothing to add.

    Each part draws from a generator of its own, so switching one on leaves the others as they
    are.

    Args:
        agent: float32 [S], the agent's channel.
    """
    parts = []
    if section.room_tone_dbfs is not None:
        rng = np.random.default_rng([seed, 1])
        parts.append(_level(section.room_tone_dbfs) * _shaped(rng, len(agent), PINK))
    if section.noise_dbfs is not None:
        rng = np.random.default_rng([seed, 2])
        parts.append(_level(section.noise_dbfs) * _place(rng, len(agent)))
    if section.leakage_db is not None:
        rng = np.random.default_rng([seed, 3])
        parts.append(_level(section.leakage_db) * _leaked(rng, agent))
    if not parts:
        return None
    room = sum(parts[1:], start=parts[0])
    peak = float(np.abs(room).max())
    return (room * min(1.0, LOUDEST_PEAK / peak) if peak else room).astype(np.float32)


def _level(decibels: float) -> float:
    return 10 ** (decibels / 20)


def _place(rng: np.random.Generator, count: int) -> np.ndarray:
    """float64 [S] of unit power: half hum, half voices."""
    babble = _shaped(rng, count, PINK, _band(*BABBLE_HZ))
    swell = 1 + SWELL_DEPTH * _shaped(rng, count, _low_pass(SWELL_HZ))
    babble *= swell / np.sqrt(1 + SWELL_DEPTH**2)
    return (_shaped(rng, count, BROWN) + babble) / np.sqrt(2)


def _leaked(rng: np.random.Generator, agent: np.ndarray) -> np.ndarray:
    """float64 [S]: the agent, late and without its highs and lows."""
    from scipy.signal import lfilter

    late = int(rng.integers(LEAK_DELAYS_MS[0], LEAK_DELAYS_MS[1] + 1)) * SAMPLE_RATE // 1000
    delayed = np.zeros(len(agent))
    delayed[late:] = agent[: len(agent) - late]
    numerator, denominator = _band(*LOUDSPEAKER_HZ)
    return np.asarray(lfilter(numerator, denominator, delayed))


def _shaped(rng: np.random.Generator, count: int, *filters: Filter) -> np.ndarray:
    """float64 [S]: white noise through filters, of unit power."""
    from scipy.signal import lfilter

    noise = rng.standard_normal(count)
    impulse = np.zeros(round(RESPONSE_S * SAMPLE_RATE))
    impulse[0] = 1.0
    for one in filters:
        noise, impulse = lfilter(one[0], one[1], noise), lfilter(one[0], one[1], impulse)
    return np.asarray(noise) / np.sqrt(np.sum(np.square(impulse)))


def _band(low_hz: float, high_hz: float) -> Filter:
    from scipy.signal import butter

    return butter(1, [low_hz, high_hz], "bandpass", fs=SAMPLE_RATE)


def _low_pass(high_hz: float) -> Filter:
    from scipy.signal import butter

    return butter(1, high_hz, fs=SAMPLE_RATE)
