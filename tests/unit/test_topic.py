"""Content words, off-topic replies and drift, on texts whose answers are known."""

import pytest

from duplex.topic import STOPWORDS, abstains, content_words, drift, normal_form, off_topic

PROMPT = "You are June, a friendly customer in a coffee shop. You want a large mocha."


@pytest.mark.parametrize(
    "forms",
    [
        "stop stops stopped stopping",
        "make makes making",
        "spell spells spelled spelling",
        "coffee coffees coffee's",
        "berry berries",
        "box boxes",
        "dish dishes",
        "order orders ordered ordering Order",
        "allergy allergies",
        "house houses",
        "grind grinds grinding",
        "tea teas",
        "free freed",
    ],
)
def test_forms_of_a_word_are_one(forms):
    assert len({normal_form(word) for word in forms.split()}) == 1


@pytest.mark.parametrize(
    ("word", "form"),
    [
        ("bus", "bus"),
        ("glass", "glas"),
        ("tennis", "tennis"),
        ("thing", "thing"),  # "th" is no word
        ("string", "string"),  # nor is "str"
        ("need", "need"),
        ("bed", "bed"),
        ("is", "is"),
        ("ties", "tie"),
        ("25", "25"),
        ("咖", "咖"),
    ],
)
def test_what_only_looks_like_an_ending_stays(word, form):
    assert normal_form(word) == form


def test_content_words_are_what_a_text_is_about():
    text = "Well, I don't think that June's two mochas are ready, and I can't stop worrying!"
    assert content_words(text) == {"jun", "mocha", "ready", "stop", "worry"}
    assert content_words("Yes, it is. I'd say so, thank you.") == set()
    assert all(word == word.lower() and "'" not in word for word in STOPWORDS)


@pytest.mark.parametrize(
    ("reply", "given", "topic", "off"),
    [
        ("My dog chased the neighbour's cat.", (PROMPT,), (), True),
        ("My dog chased the neighbour's cat.", (PROMPT, "Do you have a cat?"), (), False),
        ("My dog chased the neighbour's cat.", (PROMPT,), ("dogs",), False),
        ("My dog chased the neighbour's cat.", (PROMPT,), ("chasing dinner",), False),
        ("The dog barks.", (PROMPT,), (), False),  # two content words say too little
        ("Dogs, dog, the dog's dog.", (PROMPT,), (), False),  # and one said four times is one
        ("A large dog chased the cat.", (PROMPT,), (), False),
        ("Mochas. The weather turned cold overnight.", (PROMPT,), (), False),
        ("I want one, you are so good, thanks.", (PROMPT,), (), False),
        ("The weather turned cold overnight.", (), (), True),
        ("", (PROMPT,), (), False),
    ],
)
def test_off_topic(reply, given, topic, off):
    assert off_topic(reply, given, topic) is off


def test_how_many_content_words_are_asked_for_can_be_set():
    assert off_topic("The dog barks.", [PROMPT], least=2)
    assert not off_topic("The grey dog barks.", [PROMPT], least=4)


def flags(text: str) -> list[bool]:
    return [c == "x" for c in text]


@pytest.mark.parametrize(
    ("replies", "value"),
    [
        ("..xxx", None),
        ("....xx", 1.0),
        ("xx....", -1.0),
        ("x...xx", 0.5),
        ("......", 0.0),
        ("xxxxxx", 0.0),
        ("..xxx.xx", 1.0),  # two, four in the middle, two
        ("...xxx.xx", 2 / 3),
    ],
)
def test_drift(replies, value):
    assert drift(flags(replies)) == pytest.approx(value)


def test_abstaining_is_saying_so():
    wordings = ["I don't know", "no idea"]
    assert abstains("Well, I don’t know that.", wordings)
    assert not abstains("I know that I don't.", wordings)
    assert not abstains("", wordings)
    assert not abstains("I don't know", [])
