"""Is this utterance speech, and of this text? Pure: samples and words in, faults out.

    empty, silent     nothing to hear, or silence that is too long before, within or after
    steady            a level that never changes: a tone or noise, not speech
    clipped, offset   flat tops; a mean away from zero
    length            letters a second outside of what the language's speakers do: text that is
                      missing or doubled, a sample rate that is not what it says
    words             word error rate of a transcript (character error rate where a language sets
                      no spaces)

Letters a second of sound, measured with espeak-ng at 175 words a minute: `LETTERS_PER_S`. On 168
English utterances of 28 voices it stayed within .55 and 1.41 times that. Of 228 good utterances
none was refused for its sound, and 4 (1.8 %) for their words, at a limit of .5 and by pocketsphinx
as `listening.py` uses it; of 114 texts that were not spoken none came under .5.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

from duplex.metrics import word_error_rate, words_of
from pipeline.engines.script_words import SPACELESS, STEP_S, active_steps, script_words

LETTERS_PER_S = {
    "en": 16.0, "hi": 9.0, "es": 15.7, "fr": 19.9, "de": 18.8, "it": 16.0, "pt": 14.9, "ja": 9.8,
    "ko": 5.5, "zh": 4.4, "ms": 15.0, "ta": 10.5, "te": 7.2, "mr": 8.9, "kn": 8.4, "ml": 9.2,
    "bn": 9.1,
}  # fmt: skip
SLOWEST, FASTEST = 0.45, 1.65  # of the language's letters a second
UNKNOWN_LETTERS_PER_S = (1.5, 40.0)
SHORT_S = 0.8  # allowed on top: a short word takes its time
FEWEST_LETTERS = 8  # too few to say that they came too fast
DIGIT_LETTERS, KANJI_LETTERS = 8, 3  # "7" may be "seventy"; a kanji up to three kana
SILENT_DBFS = -60.0  # of the loudest 10 ms
LONGEST_EDGE_S, LONGEST_PAUSE_S = 1.0, 2.0
STEADY_DB = 6.0  # between loud and soft steps; speech has more than 15
STEADY_STEPS = 30
FLAT, MAX_FLAT = 0.999, 0.003  # share of samples that are at the peak, or as good as
MAX_OFFSET = 0.25  # mean over standard deviation
FORGIVEN = 4  # errors for each number that one side writes in digits


def faults_of_sound(
    samples: np.ndarray, text: str, language: str, pace: float = 1.0
) -> tuple[str, ...]:
    """What is wrong with an utterance, as far as its samples say.

    Args:
        samples: float32 [S] at 24 kHz.
        pace: how much quicker than plainly the voice was told to speak.
    """
    if not len(samples):
        return ("it is empty",)
    if not np.isfinite(samples).all():
        return ("it holds NaN or infinite samples",)
    active = active_steps(samples)
    power = np.mean(
        samples[: len(active) * 240].reshape(-1, 240).astype(np.float64) ** 2, axis=1
    )  # [N]
    if not active.any() or 10 * np.log10(power.max()) < SILENT_DBFS:
        return ("it is silent throughout",)
    faults = [*_silences(active), *_steadiness(power), *_shape(samples)]
    return (*faults, *_length(float(active.sum()) * STEP_S, text, language, pace))


def _silences(active: np.ndarray) -> list[str]:
    loud = np.flatnonzero(active)
    before, after = loud[0] * STEP_S, (len(active) - 1 - loud[-1]) * STEP_S
    pause = (np.diff(loud).max() - 1) * STEP_S if len(loud) > 1 else 0.0
    places = (
        ("before", before, LONGEST_EDGE_S), ("after", after, LONGEST_EDGE_S),
        ("within", pause, LONGEST_PAUSE_S),
    )  # fmt: skip
    return [
        f"it has {found:.1f} s of silence {place} the speech, at most {most:g} s may be"
        for place, found, most in places
        if found > most
    ]


def _steadiness(power: np.ndarray) -> list[str]:
    if len(power) < STEADY_STEPS:
        return []
    low, high = np.percentile(10 * np.log10(power + 1e-12), [10, 90])
    if high - low >= STEADY_DB:
        return []
    return [f"its level never changes (by {high - low:.1f} dB): that is a tone or noise"]


def _shape(samples: np.ndarray) -> list[str]:
    faults = []
    level = np.abs(samples)
    flat = float((level >= FLAT * level.max()).mean())
    if flat > MAX_FLAT:
        faults.append(f"it is clipped: {flat:.1%} of its samples are at the peak")
    mean, spread = float(samples.mean(dtype=np.float64)), float(samples.std(dtype=np.float64))
    if abs(mean) > MAX_OFFSET * spread:
        faults.append(f"its mean must be near zero, found {mean:.3f}: a direct-current offset")
    return faults


def _length(speech_s: float, text: str, language: str, pace: float) -> list[str]:
    least, most = letters_of(text, language)
    usual = LETTERS_PER_S.get(language)
    slow, fast = (usual * SLOWEST, usual * FASTEST) if usual else UNKNOWN_LETTERS_PER_S
    longest_s = most / (slow * pace) + SHORT_S
    shortest_s = least / (fast * pace) if least >= FEWEST_LETTERS else 0.0
    if shortest_s <= speech_s <= longest_s:
        return []
    found = "too short: words are missing" if speech_s < shortest_s else "too long: more was said"
    return [
        f"it is {found}, or its sample rate is not what it says ({speech_s:.2f} s of sound, "
        f"{shortest_s:.2f} to {longest_s:.2f} s are expected for {least} letters of {language})"
    ]


def letters_of(text: str, language: str) -> tuple[int, int]:
    """Letters of a text at least and at most: digits and kanji are short for longer words."""
    least = most = 0
    for character in text:
        category = unicodedata.category(character)
        if category[0] == "L":
            least += 1
            kanji = language == "ja" and "CJK" in unicodedata.name(character, "")
            most += KANJI_LETTERS if kanji else 1
        elif category[0] == "N" or category in ("Sc", "So") or character in "%&":
            least += 1
            most += DIGIT_LETTERS
    return least, most


def pace_of(settings: dict[str, str | int | float]) -> float:
    """How much quicker than plainly an engine was told to speak: `speed`, or `rate_wpm`."""
    speed, rate = settings.get("speed", 1.0), settings.get("rate_wpm", 175)
    if not isinstance(speed, int | float) or not isinstance(rate, int | float):
        return 1.0
    return max(float(speed) * float(rate) / 175, 0.1)


def transcript_error(text: str, heard: Sequence[str], known: set[str] | None = None) -> float:
    """Word error rate of what was heard; of characters where the text sets no spaces.

    A number that one side writes in digits and the other in words is forgiven, up to four errors.

    Args:
        known: words that the recogniser has; others are left out of the text, since it cannot
            hear them. None: all.
    """
    if SPACELESS.search(text):
        reference = [word.text for word in script_words(text)]
        hypothesis = [word.text for word in script_words(" ".join(heard))]
        return word_error_rate(reference, hypothesis)
    reference = [word for word in words_of(text) if known is None or word in known]
    hypothesis = words_of(" ".join(heard))
    if not reference:
        return 0.0
    errors = word_error_rate(reference, hypothesis) * len(reference)
    digits = sum(any(c.isdigit() for c in word) for word in (*reference, *hypothesis))
    return max(errors - FORGIVEN * digits, 0.0) / len(reference)


def fault_of_words(error: float, max_wer: float, heard: Sequence[str]) -> str | None:
    if error <= max_wer:
        return None
    said = " ".join(heard)
    said = said if len(said) <= 80 else said[:77] + "…"
    return f"its word error rate is {error:.2f}, at most {max_wer:g} may be; it says {said!r}"
