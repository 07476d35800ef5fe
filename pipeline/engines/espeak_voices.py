"""espeak's voices: a persona's by its traits, the user's far from all of those.

A persona's voice follows its traits: gender and age choose the variants, accent the language,
pitch and rate the numbers; a hash of its id picks among the variants and moves the numbers a
little. So it depends on nothing but id and traits: editing what a persona says, or adding
another one, changes no voice. Two ids with equal traits meet in the same voice less than once
in 20 000 times; then the later id draws again.

User voices come from variants of their own, chosen for their distance: mean log-mel spectra of
two sentences lie at least 4.6 dB from every persona variant and 5.1 dB from each other, while
a persona variant's nearest lies at 1.6 to 4.9 dB. Variants that clip (antonio, paul) or halve
the first formant (travis) are left out.
"""

from __future__ import annotations

from collections.abc import Iterable

from duplex.base import canonical_json
from duplex.characters import VoiceTraits
from pipeline.engines.draws import Draw
from pipeline.engines.espeak_speech import language_of, voice_name

Params = dict[str, str | int | float]

PERSONA_VARIANTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("female", "young"): ("f2", "f3", "f5", "Annie"),
    ("female", "adult"): ("f2", "f3", "f5", "Annie"),
    ("female", "old"): ("f1", "aunty", "grandma"),
    ("male", "young"): ("m3", "m6", "m7", "Alex"),
    ("male", "adult"): ("m3", "m4", "m6", "m7", "max", "robert"),
    ("male", "old"): ("m1", "m8", "grandpa"),
}
PITCH_SPREAD, RATE_SPREAD = 5, 8  # each way
RANGE_LOW, RANGE_HIGH = 35, 70

USER_VARIANTS = ("steph", "michel", "belinda", "Andy", "anika", "edward")
USER_ACCENTS = ("en-us", "en-gb")
USER_PITCHES = (50, 42, 58, 38, 62, 46)  # 6 variants x 2 accents x 6 pitches: 72 voices
USER_RATES = (175, 165, 185, 170, 180)


def persona_params(
    wants: Iterable[tuple[str, VoiceTraits, str]],
) -> dict[str, tuple[Params, int]]:
    """Parameters by persona, and the draw that gave them (0: the first); no two are equal.

    Args:
        wants: (persona id, traits, language), in the order in which they choose.
    """
    chosen: dict[str, tuple[Params, int]] = {}
    taken: set[str] = set()
    for persona_id, traits, language in wants:
        attempt = 0
        while (
            canonical_json(params := agent_params(persona_id, traits, attempt, language)) in taken
        ):
            attempt += 1
        taken.add(canonical_json(params))
        chosen[persona_id] = params, attempt
    return chosen


def agent_params(
    persona_id: str, traits: VoiceTraits, attempt: int = 0, language: str = "en"
) -> Params:
    draw = Draw(f"{persona_id}\x00{attempt}")
    pitch = traits.pitch + draw.between(-PITCH_SPREAD, PITCH_SPREAD)
    variants = PERSONA_VARIANTS[traits.gender, traits.age]
    own = language_of(traits.accent) == language
    return {
        "voice": traits.accent if own else voice_name(language),
        "variant": variants[draw.between(0, len(variants) - 1)],
        "pitch": min(max(pitch, 0), 99),
        "range": draw.between(RANGE_LOW, RANGE_HIGH),
        "rate_wpm": traits.rate_wpm + draw.between(-RATE_SPREAD, RATE_SPREAD),
    }


def user_params(index: int, language: str = "en") -> Params:
    """The index-th user voice. The first six differ in variant, the next six in accent, or where
    there are no accents in rate, too."""
    lap, variant = divmod(index, len(USER_VARIANTS))
    pitch, accent = divmod(lap, len(USER_ACCENTS))
    accents = USER_ACCENTS if language == "en" else (voice_name(language),) * len(USER_ACCENTS)
    return {
        "voice": accents[(accent + variant) % len(accents)],
        "variant": USER_VARIANTS[variant],
        "pitch": USER_PITCHES[pitch],
        "range": 50,
        "rate_wpm": USER_RATES[index % len(USER_RATES)],
    }
