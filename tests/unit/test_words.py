"""Words in every script that the project speaks: facts, patterns and subjects are found in all."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from duplex.characters import Domain, Fact
from duplex.metrics import says_any
from duplex.records import Turn
from duplex.talk_checks import off_topic, prompt_leak, repeated_turn
from duplex.turn_checks import Seen, foreign_script
from duplex.wording import facts_told, has_phrase, patterns_used, without_facts
from duplex.words import has_words, words_of
from tests.factories import persona, scenario


class Sample(NamedTuple):
    """`prompt` and `said` hold the fact and `said` the pattern; `near` only looks like the fact."""

    fact: str
    prompt: str
    said: str
    pattern: str
    near: str


# fmt: off
SAMPLES = {
    "en": Sample("latte", "You are June. You want a latte.", "Well now, a latte, please.",
                 "Well now", "The latteria is closed."),
    "hi": Sample("कॉफ़ी", "तुम जून हो। तुम्हें कॉफ़ी चाहिए।", "अरे भाई, मुझे कॉफ़ी चाहिए।", "अरे भाई",
                 "कॉफ़ीघर कहाँ है?"),
    "es": Sample("café", "Eres Inés. Quieres un café.", "¡Mira, un café, por favor!", "mira",
                 "La cafétera está allí."),
    "fr": Sample("thé glacé", "Tu es Zoé. Tu veux un thé glacé.", "Eh bien, un thé glacé !",
                 "Eh bien", "Des thé glacées."),
    "de": Sample("Süßkaffee", "Du bist Jörg. Du willst einen Süßkaffee.",
                 "Na ja, einen Süßkaffee bitte.", "na ja", "Die Süßkaffeetasse."),
    "it": Sample("caffè", "Sei Noè. Vuoi un caffè.", "Allora, un caffè per me.", "Allora",
                 "Il caffèlatte, grazie."),
    "pt": Sample("pão", "Você é João. Você quer pão.", "Então, quero pão.", "Então",
                 "Um pãozinho, por favor."),
    "ja": Sample("ラテ", "あなたはジュンです。ラテがほしいです。", "ええと、ラテをください。",
                 "ええと", "コーヒーをください。"),
    "ko": Sample("라떼", "당신은 준입니다. 라떼 한 잔을 원합니다.", "글쎄요, 라떼 주세요.",
                 "글쎄요", "카페라떼 주세요."),
    "zh": Sample("拿铁", "你是小明。你想要拿铁咖啡。", "那个,我要拿铁。", "那个", "我要一杯红茶。"),
    "ms": Sample("kopi", "Anda Siti. Anda mahu kopi.", "Alamak, saya mahu kopi.", "Alamak",
                 "Kedai kopitiam di sana."),
    "ta": Sample("காபி", "நீ ஜூன். உனக்கு காபி வேண்டும்.", "ஐயோ, எனக்கு காபி வேண்டும்.", "ஐயோ",
                 "காபியை எடு."),
    "te": Sample("కాఫీ", "నువ్వు జూన్. నీకు కాఫీ కావాలి.", "అయ్యో, నాకు కాఫీ కావాలి.", "అయ్యో",
                 "కాఫీలు ఉన్నాయా?"),
    "kn": Sample("ಕಾಫಿ", "ನೀನು ಜೂನ್. ನಿನಗೆ ಕಾಫಿ ಬೇಕು.", "ಅಯ್ಯೋ, ನನಗೆ ಕಾಫಿ ಬೇಕು.", "ಅಯ್ಯೋ",
                 "ಕಾಫಿಯನ್ನು ಕೊಡಿ."),
    "mr": Sample("चहा", "तू जून आहेस. तुला चहा हवा आहे.", "अरे देवा, मला चहा हवा.", "अरे देवा",
                 "चहाची टपरी."),
    "ml": Sample("കാപ്പി", "നീ ജൂൺ ആണ്. നിനക്ക് കാപ്പി വേണം.", "അയ്യോ, എനിക്ക് കാപ്പി വേണം.", "അയ്യോ",
                 "കാപ്പിയുടെ വില?"),
    "bn": Sample("কফি", "তুমি জুন। তোমার কফি চাই।", "আরে ভাই, আমার কফি চাই।", "আরে ভাই",
                 "কফির দাম কত?"),
}
# fmt: on


def somebody(language: str, **changes: Any) -> Any:
    sample = SAMPLES[language]
    fields: dict[str, Any] = {
        "language": language,
        "facts": (Fact(key="order", value=sample.fact, says=(sample.fact,)),),
        "prompts": (sample.prompt,),
        "speech_patterns": (sample.pattern,),
    }
    return persona("x", **fields | changes)


def seen(language: str, *texts: str, topic: str = "", **changes: Any) -> Seen:
    fields: dict[str, Any] = {"id": "d", "title": "d", "place": "a shop", "agent_role": "customer"}
    fields |= {"user_role": "barista", "types": {"angry": {}}, "kinds": {"routine": "all"}}
    fields |= {"topic": (topic or SAMPLES[language].fact,), "user_lines": ("xyz",)}
    turns = tuple(Turn(role="agent" if i % 2 else "user", text=t) for i, t in enumerate(texts))
    who = somebody(language, **changes)
    return Seen(who, scenario(), Domain.model_validate(fields), turns, 1, 9, 1, 1)


@pytest.mark.parametrize("language", SAMPLES)
def test_a_fact_is_told_and_a_pattern_used_in_every_language(language: str) -> None:
    sample, who = SAMPLES[language], somebody(language)
    assert facts_told(who, sample.said) == {"order"} and facts_told(who, sample.near) == set()
    assert patterns_used(who, sample.said) == {sample.pattern}
    assert patterns_used(who, sample.near) == set()
    assert says_any(sample.said, [sample.fact]) and not says_any(sample.near, [sample.fact])
    assert not has_words(without_facts(who, sample.said), sample.fact)
    assert foreign_script(seen(language, sample.said, sample.near)) is None


@pytest.mark.parametrize("language", SAMPLES)
def test_a_prompt_without_the_fact_is_refused_in_every_language(language: str) -> None:
    with pytest.raises(ValueError, match="prompt 2 does not say order"):
        somebody(language, prompts=(SAMPLES[language].prompt, SAMPLES[language].near))


@pytest.mark.parametrize("language", SAMPLES)
def test_the_subject_is_found_in_every_language(language: str) -> None:
    sample = SAMPLES[language]
    other = (Fact(key="name", value="jx", says=("jx",)),)  # not what makes a turn count
    no_fact: dict[str, Any] = {"facts": other, "prompts": (f"{sample.prompt} jx",)}
    assert off_topic(seen(language, sample.said, sample.said, **no_fact)) is None
    assert off_topic(seen(language, sample.near, sample.near, **no_fact)) is not None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("拿铁 ok 2杯", ["拿", "铁", "ok", "2", "杯"]),
        ("ﾗﾃ、人々", ["ラ", "テ", "人", "々"]),  # half width is full width
        ("กาแฟ", ["กา"[0], "กา"[1], "แ", "ฟ"]),
        ("ക്\u200dഷ snake_case", ["ക്ഷ", "snake", "case"]),  # a joiner is no end of a word
        ("cafe\u0301 ❤\ufe0f", ["café"]),
        ("l’été d'Inés", ["l'été", "d'inés"]),
    ],
)
def test_words_of_many_scripts(text: str, expected: list[str]) -> None:
    assert words_of(text) == expected


def test_signs_of_japanese_writing_are_no_foreign_letters() -> None:
    assert foreign_script(seen("ja", "人々とﾗﾃ、コーヒー")) is None
    assert foreign_script(seen("ja", "кофе をください")) is not None


def test_two_spellings_of_one_letter_are_one() -> None:
    assert has_words("cafe\u0301, bitte", "café") and has_words("caf\u00e9", "cafe\u0301")
    assert has_words("कॉ\u095eी", "कॉफ\u093cी")  # a letter with its dot, and as two
    assert not has_words("कमी है", "कम")  # a vowel sign goes on with the word
    assert has_phrase("好 的,谢谢", "好的")


@pytest.mark.parametrize("language", ["ja", "zh"])
def test_a_few_characters_are_no_long_run_of_words(language: str) -> None:
    """Ten characters are about five words: no leak of the prompt, and no long turn said twice."""
    run = "".join(chr(0x4E00 + i) for i in range(20))
    prompt = SAMPLES[language].prompt + run
    assert prompt_leak(seen(language, "好", run[:10], prompts=(prompt,))) is None
    assert prompt_leak(seen(language, "好", run, prompts=(prompt,))) is not None
    assert repeated_turn(seen(language, "好", run[:10], "一", run[:10])) is None
    assert repeated_turn(seen(language, "好", run, "一", run)) is not None
