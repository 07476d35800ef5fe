"""The shop of the scripted writer: what it sells, for how much, and what is in it.

`data/grammar/menu.yaml` is the source. Amounts are whole cents here and words in a dialogue,
because speech engines disagree about how to read `$4.50`.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from duplex.base import Frozen
from duplex.errors import DataFileError
from duplex.files import parse_yaml
from duplex.wording import ONES, TENS
from duplex.words import has_words

MENU = "menu.yaml"  # in the grammar's folder
SIZES = ("small", "medium", "large")


class Drink(Frozen):
    prices: tuple[float, ...] = Field(min_length=1, max_length=3)
    holds: tuple[str, ...]


class Change(Frozen):
    price: float
    without: tuple[str, ...]
    holds: tuple[str, ...]


class Food(Frozen):
    price: float
    holds: tuple[str, ...]


class News(Frozen):
    price: float
    holds: tuple[str, ...]
    parts: str


class Group(Frozen):
    phrase: str
    price: float


class Item(Frozen):
    """A drink as somebody orders it: size and changes worked out."""

    drink: str = Field(description="its name on the menu")
    size: str | None
    cents: int
    holds: frozenset[str]


class Menu(Frozen):
    substances: dict[str, tuple[str, ...]]
    drinks: dict[str, Drink]
    changes: dict[str, Change]
    foods: dict[str, Food]
    news: dict[str, News]
    groups: tuple[Group, ...]

    def find_drink(self, text: str) -> str | None:
        """The drink that `text` names; the longest name wins, so `iced mocha` is not a mocha."""
        names = [name for name in self.drinks if has_words(text, name)]
        return max(names, key=len, default=None)

    def item(self, order: str) -> Item:
        """Price and contents of an order such as `a large oat milk latte`.

        Raises DataFileError when no drink of the menu is in it, or it lacks a size.
        """
        name = self.find_drink(order)
        if name is None:
            raise DataFileError(
                f"an order must name a drink of data/grammar/menu.yaml, found {order!r}; "
                f"the menu has: {', '.join(self.drinks)}"
            )
        drink = self.drinks[name]
        size = next((size for size in SIZES if has_words(order, size)), None)
        if (size is None) != (len(drink.prices) == 1):
            wanted = "no size" if len(drink.prices) == 1 else f"one of {', '.join(SIZES)}"
            raise DataFileError(f"an order of a {name} must have {wanted}, found {order!r}")
        price = drink.prices[SIZES.index(size)] if size else drink.prices[0]
        holds = set(drink.holds)
        for word, change in self.changes.items():
            if has_words(order, word):
                price += change.price
                holds = (holds - set(change.without)) | set(change.holds)
        return Item(drink=name, size=size, cents=to_cents(price), holds=frozenset(holds))

    def find_food(self, text: str) -> str | None:
        names = [name for name in self.foods if has_words(text, name)]
        return max(names, key=len, default=None)

    def substance(self, text: str) -> str:
        """The key of `substances` that an allergy or diet such as `tree nuts` is about."""
        found = [
            key for key, words in self.substances.items() if any(has_words(text, w) for w in words)
        ]
        if len(found) != 1:
            raise DataFileError(
                f"an allergy or diet must name one of {', '.join(self.substances)} "
                f"(data/grammar/menu.yaml, `substances`), found {text!r}"
            )
        return found[0]


def load_menu(path: Path) -> Menu:
    data: Any = parse_yaml(path.read_text(encoding="utf-8"))
    try:
        return Menu.model_validate(data)
    except ValidationError as error:
        raise DataFileError(f"{path}: {error}") from error


def digest_menu(path: Path) -> str:
    """The sha256 of the file; line ends are a matter of the checkout."""
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()


def to_cents(dollars: float) -> int:
    return round(dollars * 100)


def number_words(number: int) -> str:
    """0 to 99 in words."""
    if not 0 <= number < 100:
        raise ValueError(f"a number must lie in 0 to 99 to be spoken, found {number}")
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (f" {ONES[ones]}" if ones else "")


def price_words(cents: int) -> str:
    """An amount as a barista says it: `four dollars`, `four fifty`, `fifty cents`."""
    dollars, rest = divmod(cents, 100)
    if not rest:
        return f"{number_words(dollars)} dollar" + ("s" if dollars != 1 else "")
    if not dollars:
        return f"{number_words(rest)} cents"
    return f"{number_words(dollars)} {number_words(rest)}"


def budget_cents(text: str) -> int:
    """The cents in `seven dollars`. Raises DataFileError for any other form."""
    match = re.fullmatch(r"([a-z]+(?: [a-z]+)?) dollars?", text.strip().lower())
    values = {number_words(number): number for number in range(1, 100)}
    if match is None or match[1] not in values:
        raise DataFileError(
            f"a budget must be written in words like 'seven dollars', found {text!r}"
        )
    return values[match[1]] * 100


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
