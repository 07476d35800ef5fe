"""A conversation -> measures, and the measures of many conversations -> rows of a table.

Text belongs to the user turn in whose window its word begins; a window runs from one turn's
start to the next one's. What is said before the first turn is the opening. Rates are pooled
over turns, facts or replies, not averaged over conversations, and stand with their counts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from duplex.metrics import (
    Timing,
    is_echo,
    proportion_interval,
    repeated_share,
    says_any,
    speech_activity,
    timing,
    words_of,
)
from duplex.verdict import Better
from pipeline.evaluation.client import Conversation
from pipeline.evaluation.grounding import invented
from pipeline.evaluation.items import SpokenItem


class PromptProof(NamedTuple):
    """Whether the model was fed the prompt; `note` says what was found when it was not."""

    proven: bool
    note: str


class Exchange(NamedTuple):
    """A user turn and what came back. delay_s: None when no speech answered it; out_of_role: it
    says a line of the other side's; invented: details that nobody gave (`grounding`)."""

    user: str
    reply: str
    delay_s: float | None
    echo: bool
    out_of_role: bool = False
    invented: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """One item played to one model, with all that was found."""

    spoken: SpokenItem
    model: str
    conversation: Conversation
    proof: PromptProof
    timing: Timing
    opening: str
    exchanges: tuple[Exchange, ...]
    facts: dict[str, bool]

    @property
    def replies(self) -> list[Exchange]:
        return [exchange for exchange in self.exchanges if words_of(exchange.reply)]

    @property
    def num_words(self) -> int:
        return len(words_of(self.conversation.transcript))

    def metrics(self) -> dict[str, float | int | None]:
        """The flat numbers of a `Score`; None where there is nothing to measure."""
        delays = answered_delays(self)
        speech_s = self.timing.agent_speech_s
        repeated = repeated_share(self.conversation.transcript)
        found: dict[str, float | int | None] = {
            "user_turns": len(self.exchanges),
            "responses": self.timing.responses,
            "response_delay_median_s": statistics.median(delays) if delays else None,
            "overlap_s": self.timing.overlap_s,
            "dead_air_s": self.timing.dead_air_s,
            "agent_speech_s": speech_s,
            "agent_speech_share": self.timing.agent_share,
            "words": self.num_words,
            "words_per_s": self.num_words / speech_s if speech_s else None,
            "facts": len(self.facts),
            "facts_said": sum(self.facts.values()),
            "replies": len(self.replies),
            "echoes": sum(exchange.echo for exchange in self.exchanges),
            "out_of_role": sum(exchange.out_of_role for exchange in self.exchanges),
            "ungrounded": sum(bool(exchange.invented) for exchange in self.exchanges),
            "repeated_share": repeated,
        }
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in found.items()}


def measure(
    spoken: SpokenItem, model: str, conversation: Conversation, proof: PromptProof
) -> Measured:
    found = timing(
        speech_activity(conversation.agent), speech_activity(spoken.samples), spoken.turns
    )
    opening, replies = split_replies(conversation.text, [turn.start for turn in spoken.turns])
    item, exchanges = spoken.item, []
    for turn, (user, reply, delay_s) in enumerate(
        zip(spoken.texts, replies, found.delays_s, strict=True)
    ):
        exchange = Exchange(
            user, reply, delay_s, is_echo(user, reply), says_any(reply, item.must_not_say),
            invented(reply, (item.text_prompt, *spoken.texts[: turn + 1])),
        )  # fmt: skip
        exchanges.append(exchange)
    transcript = conversation.transcript
    facts = {fact.key: says_any(transcript, fact.says) for fact in item.facts}
    return Measured(spoken, model, conversation, proof, found, opening, tuple(exchanges), facts)


def prove_prompt(said: dict[str, Any] | None, digest: str, count: int) -> PromptProof:
    """Compare what the server read from the model's input with our own tokenization."""
    if said is None:
        return PromptProof(False, "the server said nothing about the prompt")
    if said.get("count") != count:
        return PromptProof(False, f"{said.get('count')} tokens were fed, {count} were due")
    if said.get("digest") != digest:
        found = str(said.get("digest"))[:12]
        return PromptProof(False, f"other tokens were fed: digest {found}…, due {digest[:12]}…")
    return PromptProof(True, f"{count} tokens, digest {digest[:12]}…")


def timed_words(text: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    """Pieces -> words: (frame of a word's first piece, word). A space begins a word."""
    words: list[tuple[int, str]] = []
    ended = True
    for frame, piece in text:
        for index, part in enumerate(piece.replace("\n", " ").split(" ")):
            if index > 0:
                ended = True
            if not part:
                continue
            if ended or not words:
                words.append((frame, part))
            else:
                words[-1] = (words[-1][0], words[-1][1] + part)
            ended = False
    return words


def split_replies(
    text: Sequence[tuple[int, str]], starts: Sequence[int]
) -> tuple[str, tuple[str, ...]]:
    """The opening, and the text in each turn's window, by the frame where a word begins."""
    windows: list[list[str]] = [[] for _ in range(len(starts) + 1)]
    for frame, word in timed_words(text):
        windows[sum(start <= frame for start in starts)].append(word)
    opening, *replies = (" ".join(window) for window in windows)
    return opening, tuple(replies)


# -- the table


class Measure(NamedTuple):
    """A row: how it is pooled over the conversations of one model, and what it means.

    kind: `rate` (values are (hits, trials) pairs), `mean` or `median` (values are numbers).
    better: which way is; "" where that depends on the persona.
    """

    key: str
    label: str
    unit: str
    kind: str
    values: Callable[[Measured], list[Any]]
    meaning: str
    better: Better = ""


def answered_delays(measured: Measured) -> list[float]:
    return [delay for delay in measured.timing.delays_s if delay is not None]


def _some(value: float | None) -> list[float]:
    return [] if value is None else [value]


MEASURES = (
    Measure(
        "prompt_proven", "Prompts proven", "conversations", "rate",
        lambda m: [(int(m.proof.proven), 1)],
        "The tokens read from the model's own input equal our tokenization of the prompt.",
    ),
    Measure(
        "response_rate", "Turns answered", "user turns", "rate",
        lambda m: [(m.timing.responses, len(m.exchanges))],
        "The agent begins to speak after the turn's start, before the next turn, and still "
        "speaks after the turn's end.",
        "high",
    ),
    Measure(
        "response_delay_s", "Response delay", "s", "median", answered_delays,
        "Agent onset minus user end, over answered turns, not clamped: negative is early "
        "(floor-transfer offset, Heldner & Edlund 2010). Known to one frame, 0.08 s.",
    ),
    Measure(
        "overlap_s", "Both speak", "s", "mean", lambda m: [m.timing.overlap_s],
        "Seconds of a conversation in which both channels hold speech.",
    ),
    Measure(
        "dead_air_s", "Dead air", "s", "mean", lambda m: [m.timing.dead_air_s],
        "Seconds of a conversation in silences of both of over 1 s (Jefferson 1989), each "
        "counted whole; the user's script leaves pauses for the answer.",
        "low",
    ),
    Measure(
        "agent_speech_share", "Agent speaks", "share", "mean", lambda m: [m.timing.agent_share],
        "Frames with agent speech / all frames.",
    ),
    Measure(
        "words", "Agent words", "words", "mean", lambda m: [m.num_words],
        "Words of the agent's text stream in a conversation.",
    ),
    Measure(
        "words_per_s", "Words a second", "1/s", "mean",
        lambda m: _some(m.num_words / m.timing.agent_speech_s if m.timing.agent_speech_s else None),
        "Agent words / seconds of agent speech, over conversations with agent speech.",
    ),
    Measure(
        "facts_said", "Facts said", "facts", "rate",
        lambda m: [(sum(m.facts.values()), len(m.facts))],
        "Facts of the prompt of which the agent's text holds one of the listed wordings, whole "
        "words, any case. A fact that nobody asked for counts in the total too.",
        "high",
    ),
    Measure(
        "echo_rate", "Echoed replies", "replies", "rate",
        lambda m: [(sum(e.echo for e in m.exchanges), len(m.replies))],
        "Replies that say the user's words back: equal, or four words and more with WER <= .35 "
        "or LCS >= .8 of the reply with at most .2 new words.",
        "low",
    ),
    Measure(
        "out_of_role", "Out of role", "replies", "rate",
        lambda m: [(sum(e.out_of_role for e in m.exchanges), len(m.replies))],
        "Replies that hold a line of the other side's, of the items file's must_not_say: whole "
        "words, any case.",
        "low",
    ),
    Measure(
        "ungrounded", "Invented details", "replies", "rate",
        lambda m: [(sum(bool(e.invented) for e in m.exchanges), len(m.replies))],
        "Replies that name a number or a name which neither the prompt nor the user up to then "
        "has given. Of scripted dialogues without a fault it blames some too: "
        "docs/results/grounding.md says how many.",
        "low",
    ),
    Measure(
        "repeated_share", "Repeated 4-grams", "share", "mean",
        lambda m: _some(repeated_share(m.conversation.transcript)),
        "1 - different runs of four words / runs of four words (seq-rep-4, Welleck et al. "
        "2020), over conversations with four words and more.",
        "low",
    ),
)  # fmt: skip


def summarize(conversations: Sequence[Measured], models: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each measure: `by_model` holds value, n and spread for each model.

    `value` is None where n is 0. A rate's `low` and `high` are its exact 95 % bounds, those of
    a mean or median the least and greatest value.
    """
    return [
        {
            "key": measure.key,
            "label": measure.label,
            "unit": measure.unit,
            "kind": measure.kind,
            "meaning": measure.meaning,
            "by_model": {
                model: _pool(
                    measure.kind,
                    [v for m in conversations if m.model == model for v in measure.values(m)],
                )
                for model in models
            },
        }
        for measure in MEASURES
    ]


def _pool(kind: str, values: list[Any]) -> dict[str, Any]:
    if kind == "rate":
        hits, trials = (sum(column) for column in zip(*values, strict=True)) if values else (0, 0)
        low, high = proportion_interval(hits, trials) if trials else (None, None)
        found = {"value": hits / trials if trials else None, "n": trials, "hits": hits}
    else:
        pool = statistics.median if kind == "median" else math.fsum
        value = pool(values) if values else None
        if value is not None and kind == "mean":
            value /= len(values)
        low, high = (min(values), max(values)) if values else (None, None)
        found = {"value": value, "n": len(values)}
    found |= {"low": low, "high": high}
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in found.items()}
