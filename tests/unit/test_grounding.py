"""Numbers and names that nobody gave are found; those that somebody gave are not."""

import pytest

from pipeline.evaluation.grounding import invented, names_in, numbers_in


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("I have twenty five dollars.", {25}),
        ("I have 25 dollars, or twenty-five.", {25}),
        ("Two or three, maybe four.", {2, 3, 4}),
        ("two three", {2, 3}),
        ("twenty thirty", {20, 30}),
        ("One hundred and five, two hundred.", {105, 200}),
        ("At half past six.", {6}),
        ("The one I like, once more.", set()),
        ("twenty one", {21}),
        ("zero", {0}),
        ("", set()),
        ("Nineteen ninety.", {19, 90}),
    ],
)
def test_numbers_in_words_and_digits(text, numbers):
    assert numbers_in(text) == numbers


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("My name is Marcus. Marcus is waiting for Priya's tea.", {"marcus", "priya"}),
        ("Hi. I'm here on Monday in May, I think.", set()),
        ("Winston.", set()),
        ("I live in New York!", {"new", "york"}),
    ],
)
def test_names_are_words_with_a_capital_inside_a_sentence(text, names):
    assert names_in(text) == names


def test_what_prompt_or_user_said_is_not_invented():
    prompt = "You are Marcus, a customer. You have five dollars."
    user = "That comes to three dollars, is that all right? I'm June."
    assert invented("Thanks June, I'm Marcus. I have five, so three is fine.", [prompt, user]) == ()
    assert invented("Well, Priya said it is 7 dollars.", [prompt, user]) == ("7", "priya")
    assert invented("I have five.", []) == ("5",)
