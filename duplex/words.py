"""The words of a text, in any script: the one place that says where a word begins and ends. Pure.

A word is letters, marks and digits, with apostrophes inside. Vowel signs (Hindi, Tamil) are marks
and belong to their letter. Scripts without spaces (Chinese, Japanese, Thai) have no words that a
program sees without a dictionary: there each character is one, with its marks. Korean has spaces.

Nothing is known of endings: where a noun takes some (Korean, Tamil, Finnish), `latte` is not found
in `latteN`, and the wordings of a fact have to list the forms that count.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import cache, lru_cache

# Languages whose words no spaces part, and how many characters of theirs are about a word.
UNSPACED = frozenset({"ja", "zh", "th", "km", "lo", "my"})
CHARACTERS_A_WORD = 2

# Thai, Lao, Burmese, Khmer; kana, bopomofo, ideographs with their iteration mark.
_SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u312f\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_IS_SPACELESS = re.compile(f"[{_SPACELESS}]")
_ASCII_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
# Signs that change how a letter is drawn and not which word it is: joiners, soft hyphens,
# variation selectors. A curly apostrophe is a straight one.
_INVISIBLE: dict[int, str | None] = {
    **dict.fromkeys((0xAD, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF)),
    **dict.fromkeys((*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))),
    0x2019: "'",
}


@lru_cache(maxsize=1024)
def plain(text: str) -> str:
    """The text in one spelling: NFKC, straight apostrophes, nothing invisible; case is kept."""
    if text.isascii():
        return text
    return unicodedata.normalize("NFKC", text.translate(_INVISIBLE))


def written_words(text: str) -> list[str]:
    """The words of a text in the case in which they are written."""
    if text.isascii():
        return _ASCII_WORD.findall(text)
    return _any_word().findall(plain(text).replace("_", " "))


def words_of(text: str) -> list[str]:
    """The words of a text for comparison: case folded, digits included, punctuation not."""
    return written_words(plain(text).casefold())


def has_words(text: str, wording: str) -> bool:
    """Whether `wording` occurs in `text` as whole words, in any case, punctuation included."""
    text, wording = plain(text), plain(wording)
    if wording.lower() not in text.lower():  # most are not: no pattern is compiled for them
        return False
    return next(_places(text, wording), None) is not None


def without_words(text: str, wording: str) -> str:
    """`text` (as `plain` has it) less each place at which `has_words` finds the wording."""
    text, wording = plain(text), plain(wording)
    if wording.lower() not in text.lower():
        return text
    kept, start = [], 0
    for begin, end in _places(text, wording):
        kept.append(text[start:begin])
        start = end
    return " ".join([*kept, text[start:]])


def _places(text: str, wording: str) -> Iterator[tuple[int, int]]:
    pattern = re.compile(re.escape(wording), re.IGNORECASE)
    match = pattern.search(text)
    while match:
        begin, end = match.span()
        whole = not _is_inside(text, begin) and not _is_inside(text, end)
        if whole:
            yield begin, end
        match = pattern.search(text, end if whole and end > begin else begin + 1)


def _is_inside(text: str, index: int) -> bool:
    """Whether a word goes on across the place before `text[index]`."""
    if not 0 < index < len(text):
        return False
    before, after = text[index - 1], text[index]
    if unicodedata.category(after)[0] == "M":
        return True
    if not (_is_of_a_word(before) and _is_of_a_word(after)):
        return False
    return not (_IS_SPACELESS.match(before) or _IS_SPACELESS.match(after))


def _is_of_a_word(character: str) -> bool:
    is_letter = character == "_" or character.isalnum()
    return is_letter or unicodedata.category(character)[0] == "M"


@cache
def _any_word() -> re.Pattern[str]:
    """A word of any script. Built for the first text that is not ASCII: some 20 ms."""
    codes = [c for c in range(0x300, 0x1F000) if unicodedata.category(chr(c))[0] == "M"]
    marks = "".join(map(chr, codes))
    part = rf"(?![{_SPACELESS}])[\w{marks}]"
    spaced = rf"(?![{_SPACELESS}])\w(?:{part})*(?:'(?:{part})+)*"
    return re.compile(rf"[{_SPACELESS}][{marks}]*|{spaced}")
