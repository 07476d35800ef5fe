"""What the scripted writer's grammar needs to know of a persona: its facts as slots, its money."""

from __future__ import annotations

import re
from dataclasses import dataclass

from duplex.characters import Persona
from duplex.errors import DataFileError
from duplex.wording import facts_told
from pipeline.engines.scripted_grammar import FACT_SLOTS, Grammar
from pipeline.engines.scripted_menu import SIZES, Item, budget_cents, price_words


@dataclass
class Customer:
    """What the grammar needs to know of a persona."""

    slots: dict[str, str]
    item: Item
    budget: int  # cents
    avoids: str  # a key of the menu's substances
    has_allergy: bool


def read_persona(persona: Persona, grammar: Grammar) -> Customer:
    """Raises DataFileError for facts that are missing or that do not fit together."""
    facts = {fact.key: fact for fact in persona.facts}
    missing = [key for key in ("name", "order", "budget") if key not in facts]
    if "allergy" not in facts and "diet" not in facts:
        missing.append("allergy or diet")
    if missing:
        raise DataFileError(
            f"persona {persona.id}: the scripted writer needs the facts name, order, budget, and "
            f"allergy or diet; missing: {', '.join(missing)}"
        )
    unsaid = sorted(
        key for key, fact in facts.items() if key not in facts_told(persona, fact.value)
    )
    if unsaid:
        raise DataFileError(
            f"persona {persona.id}: the value of a fact must hold one of its `says`, because the "
            f"value is what is spoken; not so: {', '.join(unsaid)}"
        )
    order = facts["order"].value
    avoid = facts.get("allergy") or facts["diet"]
    item, avoids = grammar.menu.item(order), grammar.menu.substance(avoid.value)
    budget = budget_cents(facts["budget"].value)
    if avoids in item.holds:
        raise DataFileError(
            f"persona {persona.id} avoids {avoid.value}, and {order} holds {avoids}"
        )
    if item.cents > budget:
        raise DataFileError(
            f"persona {persona.id}: {order} costs {price_words(item.cents)}, over the budget of "
            f"{facts['budget'].value}"
        )
    if "food" in facts and grammar.menu.find_food(facts["food"].value) is None:
        raise DataFileError(
            f"persona {persona.id}: food must be on the menu ({', '.join(grammar.menu.foods)}), "
            f"found {facts['food'].value!r}"
        )
    slots = {slot: facts[key].value for slot, key in FACT_SLOTS.items() if key in facts}
    bare = re.sub(rf"^(?:an?|the) |\b(?:{'|'.join(SIZES)}) ", "", order)
    slots |= {"avoid": avoid.value, "drink": bare, "drinks": f"{bare}s"}
    return Customer(slots, item, budget, avoids, has_allergy="allergy" in facts)
