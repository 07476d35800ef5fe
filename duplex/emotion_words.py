"""The emotion of a text by its words: happy, sad, angry, excited or neutral. Pure.

A dictionary with negation and intensifiers, no model: it finds what is named, not what is meant.
How it does on dialogues whose emotions are known: `python -m benchmarks.emotion_words`
(docs/results/emotion_words.md).

    hit         a word of `KEYWORDS`. Its weight is 1 + .5 for each intensifier among the
                `INTENSIFIER_WINDOW` words before it: 1, 1.5 or 2.
    negated     a negator among the `NEGATION_WINDOW` words before it: happy becomes sad with weight
                .5 ("not happy"); any other emotion is taken back and counts for nothing ("not
                angry" leaves no anger).
    windows     end at punctuation: in "No, I love it" nothing is negated.
    emotion     the one with the most weight, of equals the one met first. Neutral words never
                outweigh others; neutral is the default as well.
    intensity   mean weight of that emotion's hits, .5 to 2; 1 where nothing was found.
    confidence  W / (all weight) · n / (n + 1), with W the emotion's weight and n the number of all
                hits that count: no hit gives 0, one alone .5, and a text of two minds at most .5.

Sources:
    The five emotions, the range of intensity, negators, intensifiers and the first keywords of each
        emotion are the predecessor's list. More words were added by what they mean, before they
        were tried on the dialogues, and none after; fear is sad, as nervous characters are here.
    Taboada et al. 2011, "Lexicon-based methods for sentiment analysis": windows, and a negated word
        is shifted instead of turned round, since "not good" is less bad than "bad".
"""

from __future__ import annotations

import re
from typing import NamedTuple

from duplex.base import Emotion
from duplex.words import plain, words_of

NEGATORS = frozenset({"not", "no", "never", "neither", "nobody", "nor", "cannot"})  # and -n't
INTENSIFIERS = frozenset({"very", "extremely", "incredibly", "absolutely", "really"})
NEGATION_WINDOW = 3
INTENSIFIER_WINDOW = 2
BOOST = 0.5
NEGATED_WEIGHT = 0.5

_WORDS: dict[Emotion, str] = {
    "happy": """happy happily happiness wonderful fantastic love loved loving lovely beautiful
        excellent awesome glad delighted delightful pleased pleasure joy joyful cheerful great good
        nice perfect smile smiling enjoy enjoyed enjoying grateful thankful welcome sweet kind
        blessed content fun""",
    "sad": """sad sadly sadness terrible awful disappointed disappointing disappointment lonely
        depressed depressing miserable unhappy sorry sorrow unfortunately grief cry crying cried
        tears hopeless heartbroken hurt hurts upset regret miss gloomy ashamed afraid worried
        scared""",
    "angry": """angry angrily anger furious mad hate hated disgusted disgusting outraged outrageous
        hostile annoyed annoying irritated irritating rage ridiculous unacceptable nonsense stupid
        idiot damn pathetic useless rude sick insulting insult""",
    "excited": """excited exciting excitement thrilled thrilling amazing amazed energetic pumped
        passionate passion dynamic incredible eager fascinating fascinated wow brilliant stunning
        spectacular stoked marvellous marvelous obsessed""",
    "neutral": """okay ok fine normal calm calmly peaceful regular standard usual ordinary
        alright""",
}
KEYWORDS: dict[str, Emotion] = {
    word: emotion for emotion, words in _WORDS.items() for word in words.split()
}
_CLAUSE = re.compile(r"[.,;:!?…()\"—–]+|\s-+\s")


class EmotionFinding(NamedTuple):
    """counts: hits of each emotion, as they count after negation; those of weight 0 are not in."""

    emotion: Emotion
    intensity: float
    confidence: float
    counts: dict[Emotion, int]


def emotion_of(text: str) -> EmotionFinding:
    """The emotion that the words of a text name; see the head of this file."""
    weights: dict[Emotion, list[float]] = {}
    for clause in _CLAUSE.split(plain(text)):
        words = words_of(clause)
        for place, word in enumerate(words):
            if word in KEYWORDS:
                hit = _weighed(KEYWORDS[word], words[:place])
                if hit is not None:
                    weights.setdefault(hit[0], []).append(hit[1])
    counts: dict[Emotion, int] = {e: len(hits) for e, hits in weights.items()}
    felt: list[Emotion] = [e for e in weights if e != "neutral"]
    emotion: Emotion = max(felt, key=lambda e: sum(weights[e])) if felt else "neutral"
    own = weights.get(emotion)
    if not own:
        return EmotionFinding("neutral", 1.0, 0.0, counts)
    n = sum(counts.values())
    share = sum(own) / sum(map(sum, weights.values()))
    return EmotionFinding(
        emotion,
        intensity=round(sum(own) / len(own), 4),
        confidence=round(share * n / (n + 1), 4),
        counts=counts,
    )


def _weighed(emotion: Emotion, before: list[str]) -> tuple[Emotion, float] | None:
    """What a keyword counts for after the words `before` it in its clause; None for nothing."""
    if any(word in NEGATORS or word.endswith("n't") for word in before[-NEGATION_WINDOW:]):
        return ("sad", NEGATED_WEIGHT) if emotion == "happy" else None
    boosts = sum(word in INTENSIFIERS for word in before[-INTENSIFIER_WINDOW:])
    return emotion, 1 + BOOST * boosts
