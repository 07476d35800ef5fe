"""What a dialogue must show before it is kept: one list of checks, each with its code. Pure.

A candidate is read once through `CHECKS`, from its form to its sense; the first fault found is
the reason for which it is not kept. `docs/dialogue-checks.md` is this list as a table.
Cost: 3 ms for a dialogue of 20 turns on one (shared) core.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from duplex import talk_checks as talk
from duplex import turn_checks as form
from duplex.characters import Domain, Persona, Scenario
from duplex.records import Turn
from duplex.turn_checks import Seen

# Part of the key of what is checked: raise it when the checks, or the coffee shop's own rules
# (`claims` in pipeline/engines/scripted_check.py), keep or refuse another candidate.
CHECKS_VERSION = 2


@dataclass(frozen=True)
class Fault:
    """Why a candidate is not kept: a code of `CODES`, and what was found."""

    code: str
    message: str


Check = Callable[[Persona, Scenario, tuple[Turn, ...]], Fault | None]
# What a domain adds of its own: lines on what contradicts the persona.
Rule = Callable[[Persona, tuple[Turn, ...]], list[str]]


@dataclass(frozen=True)
class DialogueCheck:
    """`find` says what is wrong with what is seen, or None; `misses` what it cannot see."""

    code: str
    find: Callable[[Seen], str | None]
    catches: str
    misses: str


class Limits(Protocol):
    @property
    def min_facts(self) -> int: ...
    @property
    def min_patterns(self) -> int: ...


CHECKS: tuple[DialogueCheck, ...] = (
    DialogueCheck("unknown-role", form.unknown_role,
                  "a turn of somebody who is neither agent nor user",
                  "one side's words in the other's turn"),
    DialogueCheck("first-speaker", form.first_speaker,
                  "the scenario's other side opens", "nothing"),
    DialogueCheck("same-role-twice", form.same_role_twice,
                  "two turns of one side in a row; backchannels are no turns", "nothing"),
    DialogueCheck("too-few-turns", form.too_few_turns,
                  "fewer turns than `min_turns`", "a conversation that ends before its end"),
    DialogueCheck("too-many-turns", form.too_many_turns,
                  "more turns than `max_turns`", "one that goes on after its end"),
    DialogueCheck("empty-turn", form.empty_turn,
                  "a turn or backchannel without a word", "a turn that means nothing"),
    DialogueCheck("long-turn", form.long_turn,
                  "more than 70 words or 450 characters in a turn, 4 words in a backchannel",
                  "a lecture in several turns"),
    DialogueCheck("one-sided", form.one_sided,
                  "one side says more than 85 % of the words", "fewer than 40 words in all"),
    DialogueCheck("cut-at-the-end", form.cut_at_the_end,
                  "the last turn is cut short by nobody", "a cut at an odd place"),
    DialogueCheck("url", form.url, "web and mail addresses", "addresses spelled out"),
    DialogueCheck("stage-direction", form.stage_direction,
                  "`*sighs*`, `[door]`, `(quietly)`", "directions without brackets"),
    DialogueCheck("emoji", form.emoji, "pictures and symbols", "smileys of punctuation"),
    DialogueCheck("markup", form.markup,
                  "signs that nobody says: Markdown, tags, currency, line breaks",
                  "dashes, quotes, colons"),
    DialogueCheck("digits", form.digits, "digits of any script", "Roman numerals"),
    DialogueCheck("foreign-script", form.foreign_script,
                  "letters that are not of the persona's language",
                  "another language in the same letters"),
    DialogueCheck("other-name", talk.other_name,
                  "the agent gives another name than its own",
                  "`I'm X` where no name was asked for, names that begin as its own"),
    DialogueCheck("denied-fact", talk.denied_fact,
                  "`I'm not from …`, `I'm not allergic to …`, `I don't have …` of a fact",
                  "denials in other words, irony"),
    DialogueCheck("other-amount", talk.other_amount,
                  "`I have ten dollars` where the fact says five",
                  "digits, units that no fact has"),
    DialogueCheck("assistant-speak", talk.assistant_speak,
                  "`as an AI`, `language model`, refusals of a machine",
                  "the tone of an assistant"),
    DialogueCheck("role-inversion", talk.role_inversion,
                  "the agent says a `user_lines` of the domain, or offers its help",
                  "an inversion in other words, lines that it reports"),
    DialogueCheck("prompt-leak", talk.prompt_leak,
                  "eight words in a row of one of the persona's prompts", "a paraphrase"),
    DialogueCheck("untold-knowledge", talk.untold_knowledge,
                  "the user says a name, `your …` or `you're a …` of a fact that was not told",
                  "facts in words of the subject: who serves may guess an order"),
    DialogueCheck("repeated-turn", talk.repeated_turn,
                  "six words said twice by one side, fewer three times, an exchange twice",
                  "the same thing in other words"),
    DialogueCheck("echo", talk.echo,
                  "the agent says the user's turn again; facts do not count", "an echo of parts"),
    DialogueCheck("off-topic", talk.off_topic,
                  "fewer than 20 % of the turns have a `topic` word or a fact",
                  "chat among orders"),
    DialogueCheck("too-few-facts", talk.too_few_facts,
                  "fewer than `min_facts` facts are told, by their `says`", "facts in other words"),
    DialogueCheck("no-pattern", talk.no_pattern,
                  "fewer than `min_patterns` speech patterns", "a pattern at an odd place"),
)  # fmt: skip

# Reasons that are found elsewhere: by a domain's own rules, by a writer, over the whole set.
OTHER_CODES: dict[str, str] = {
    "contradiction": "the coffee shop's own rules: another order, allergy, job or home",
    "unreadable": "a writer's reply that is no dialogue at all",
    "refused": "the model would not write it, or a filter of the endpoint stopped it",
    "cut-short": "the reply ran into `max_tokens`",
    "prompt": "a prompt written for an existing dialogue that does not fit it",
    "critic": "a model that judges found the dialogue wanting",
    "near-duplicate": "as another dialogue of the set: three-word shingles, `near_duplicate`",
    "same-opening": "the same first three turns as another dialogue of the persona",
}
CODES: tuple[str, ...] = (*(check.code for check in CHECKS), *OTHER_CODES)


def dialogue_check(
    domain: Domain,
    limits: Limits,
    *,
    min_turns: int,
    max_turns: int,
    rules: tuple[Rule, ...] = (),
    checks: tuple[DialogueCheck, ...] = CHECKS,
) -> Check:
    """The check of one candidate by itself. `rules` are the domain's; they come last."""

    def check(persona: Persona, scenario: Scenario, turns: tuple[Turn, ...]) -> Fault | None:
        fields: dict[str, Any] = {"min_turns": min_turns, "max_turns": max_turns}
        fields |= {"min_facts": limits.min_facts, "min_patterns": limits.min_patterns}
        seen = Seen(persona, scenario, domain, turns, **fields)
        for one in checks:
            if message := one.find(seen):
                return Fault(one.code, message)
        for rule in rules:
            if lines := rule(persona, turns):
                return Fault("contradiction", "; ".join(lines))
        return None

    return check
