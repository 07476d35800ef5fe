"""A conversation -> what is found in it: exchanges, timing, facts, faults, the prompt's proof.

Text belongs to the user turn in whose window its word begins; a window runs from one turn's
start to the next one's. What is said before the first turn is the opening.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from duplex.base import rounded
from duplex.degeneration import (
    Silence,
    compression_ratio,
    foreign_share,
    loops,
    silence_collapse,
    unspoken_share,
    unwritten_share,
)
from duplex.metrics import (
    Timing,
    is_echo,
    repeated_share,
    says_any,
    segments,
    timing,
    words_of,
)
from duplex.sound_quality import SoundQuality, sound_quality
from duplex.topic import abstains, off_topic
from duplex.turn_taking import Interruption, backchannels, interruptions
from pipeline.evaluation.client import Conversation
from pipeline.evaluation.grounding import invented
from pipeline.evaluation.items import PlaceWords, QuestionKind, SpokenItem, UserTurn
from pipeline.evaluation.listening import Listener
from pipeline.serving.grades import GradeName

POOR_SHARE = 0.25  # of the replies, with something made up
SILENT_SHARE = 0.5  # of the turns, without a word in return
LEAST_DUE, LEAST_FACTS = 2, 3  # to tell that a prompt is ignored
ANSWER_WORDS = 3  # fewer than these to a question that nobody can answer are no answer


class PromptProof(NamedTuple):
    """Whether the model was fed the prompt; `note` says what was found when it was not."""

    proven: bool
    note: str


class Exchange(NamedTuple):
    """A user turn and what came back.

    delay_s: None when no speech answered it. out_of_role: it says a line of the other side's.
    invented: details that nobody gave (`grounding`). due: what it had to say, and whether it says
    it; wrong: it says what it must not; may_be_wrong: there is such a list. abstains: it says that
    it can't tell; can_abstain: there are wordings for that. off_topic: see `duplex.topic`; of a
    question that has nothing to do with the place the reply has not, either.
    """

    user: str
    reply: str
    delay_s: float | None
    echo: bool
    kind: QuestionKind = "talk"
    out_of_role: bool = False
    invented: tuple[str, ...] = ()
    due: tuple[str, ...] = ()
    says_due: bool = False
    wrong: bool = False
    may_be_wrong: bool = False
    abstains: bool = False
    can_abstain: bool = False
    off_topic: bool = False

    @property
    def num_words(self) -> int:
        return len(words_of(self.reply))

    @property
    def made_up(self) -> bool:
        """A hallucination: details that nobody gave, talk of something else, or an answer to what
        nobody has said."""
        unanswerable = self.can_abstain and self.kind == "unspecified"
        answers = unanswerable and self.num_words >= ANSWER_WORDS and not self.abstains
        return bool(self.invented) or self.off_topic or answers

    @property
    def faults(self) -> tuple[str, ...]:
        found = {
            "no words": self.num_words == 0,
            "echo": self.echo,
            "out of role": self.out_of_role,
            "made up": self.made_up,
            "not what was due": bool(self.due) and self.num_words > 0 and not self.says_due,
            "wrong": self.wrong,
        }
        return tuple(name for name, is_so in found.items() if is_so)


def ignores_prompt(exchanges: Sequence[Exchange], facts: Mapping[str, bool]) -> bool:
    """Whether less than half is said of what was due, of two and more; or where nothing was due,
    not one of three facts and more."""
    due = [exchange.says_due for exchange in exchanges if exchange.due]
    if due:
        return len(due) >= LEAST_DUE and sum(due) < len(due) / 2
    return len(facts) >= LEAST_FACTS and not any(facts.values())


def grade_of(exchanges: Sequence[Exchange], facts: Mapping[str, bool]) -> GradeName | None:
    """As people grade on the server's page; None where there was nothing to reply to.

    poor: it changed sides or repeated the user, ignores its prompt, fell silent (no word to half of
    the turns and more), or made things up in over a quarter of its replies. perfect: no fault at
    all.

    Args:
        facts: of the prompt, whether each is said; empty where they are not known.
    """
    if not exchanges:
        return None
    replies = [exchange for exchange in exchanges if exchange.num_words]
    silent = len(exchanges) - len(replies)
    made_up = sum(exchange.made_up for exchange in replies)
    if (
        any(exchange.echo or exchange.out_of_role for exchange in exchanges)
        or ignores_prompt(exchanges, facts)
        or silent >= SILENT_SHARE * len(exchanges)
        or made_up > POOR_SHARE * len(replies)
    ):
        return "poor"
    return "good" if any(exchange.faults for exchange in exchanges) else "perfect"


@dataclass(frozen=True)
class Measured:
    """One item played to one model with one seed, with all that was found.

    prompt: the text that the model was prompted with; error_rate: of the agent's audio, recognised,
    against its text; rating: DNSMOS; activity: bool [T], where the agent speaks.
    """

    spoken: SpokenItem
    model: str
    seed: int
    prompt: str
    conversation: Conversation
    proof: PromptProof
    timing: Timing
    opening: str
    exchanges: tuple[Exchange, ...]
    facts: dict[str, bool]
    interruptions: tuple[Interruption, ...]
    backchannels: int
    silence: Silence | None
    sound: SoundQuality
    unspoken: float | None
    unwritten: float | None
    error_rate: float | None
    rating: float | None
    activity: np.ndarray

    @property
    def name(self) -> str:
        return f"{self.spoken.item.id}.s{self.seed}"

    @property
    def num_faults(self) -> int:
        return sum(bool(exchange.faults) for exchange in self.exchanges)

    @property
    def replies(self) -> list[Exchange]:
        return [exchange for exchange in self.exchanges if exchange.num_words]

    @property
    def num_words(self) -> int:
        return len(words_of(self.conversation.transcript))

    @cached_property
    def grade(self) -> GradeName | None:
        return grade_of(self.exchanges, self.facts)

    def metrics(self) -> dict[str, float | int | None]:
        """The flat numbers of a `Score`; None where there is nothing to measure."""
        delays = answered_delays(self)
        speech_s = self.timing.agent_speech_s
        text = self.conversation.transcript
        due = [exchange for exchange in self.exchanges if exchange.due]
        found: dict[str, float | int | None] = {
            "user_turns": len(self.exchanges),
            "responses": self.timing.responses,
            "response_delay_median_s": statistics.median(delays) if delays else None,
            "overlap_s": self.timing.overlap_s,
            "dead_air_s": self.timing.dead_air_s,
            "interruptions": len(self.interruptions),
            "yields": sum(cut.yield_s is not None for cut in self.interruptions),
            "backchannels": self.backchannels,
            "agent_speech_s": speech_s,
            "agent_speech_share": self.timing.agent_share,
            "words": self.num_words,
            "words_per_s": self.num_words / speech_s if speech_s else None,
            "facts": len(self.facts),
            "facts_said": sum(self.facts.values()),
            "due": len(due),
            "due_said": sum(exchange.says_due for exchange in due),
            "replies": len(self.replies),
            "echoes": sum(exchange.echo for exchange in self.exchanges),
            "out_of_role": sum(exchange.out_of_role for exchange in self.exchanges),
            "ungrounded": sum(bool(exchange.invented) for exchange in self.exchanges),
            "off_topic": sum(exchange.off_topic for exchange in self.exchanges),
            "made_up": sum(exchange.made_up for exchange in self.exchanges),
            "repeated_share": repeated_share(text),
            "compression_ratio": compression_ratio(text),
            "loops": len(loops(text)),
            "foreign_share": foreign_share(text),
            "unspoken_share": self.unspoken,
            "unwritten_share": self.unwritten,
            "word_error_rate": self.error_rate,
            "dnsmos": self.rating,
            "clipped_share": self.sound.clipped_share,
            "speech_dbfs": self.sound.speech_dbfs,
            "floor_dbfs": self.sound.floor_dbfs,
            "dc_offset": self.sound.dc_offset,
        }
        return rounded(found)


def measure(
    spoken: SpokenItem,
    model: str,
    seed: int,
    prompt: str,
    conversation: Conversation,
    proof: PromptProof,
    listener: Listener | None = None,
) -> Measured:
    listener = listener or Listener()
    agent = listener.activity(conversation.agent)
    found = timing(agent, listener.activity(spoken.samples), spoken.turns)
    opening, replies = split_replies(conversation.text, [turn.start for turn in spoken.turns])
    transcript, words = conversation.transcript, timed_words(conversation.text)
    heard = segments(agent)
    return Measured(
        spoken=spoken,
        model=model,
        seed=seed,
        prompt=prompt,
        conversation=conversation,
        proof=proof,
        timing=found,
        opening=opening,
        exchanges=_exchanges(spoken, prompt, replies, found.delays_s),
        facts={fact.key: says_any(transcript, fact.says) for fact in spoken.item.facts},
        interruptions=interruptions(heard, spoken.turns),
        backchannels=backchannels(heard, spoken.turns),
        silence=silence_collapse(agent, spoken.turns),
        sound=sound_quality(conversation.agent, agent),
        unspoken=unspoken_share(words, agent),
        unwritten=unwritten_share(words, agent),
        error_rate=listener.error_rate(words, conversation.agent, agent),
        rating=listener.rating(conversation.agent),
        activity=agent,
    )


def _exchanges(
    spoken: SpokenItem,
    prompt: str,
    replies: Sequence[str],
    delays_s: Sequence[float | None],
) -> tuple[Exchange, ...]:
    return tuple(
        exchange_of(turn, reply, (prompt, *spoken.texts[: index + 1]), spoken.item, delay_s)
        for index, (turn, reply, delay_s) in enumerate(
            zip(spoken.kept, replies, delays_s, strict=True)
        )
    )


def exchange_of(
    turn: UserTurn,
    reply: str,
    given: Sequence[str],
    words: PlaceWords,
    delay_s: float | None = None,
) -> Exchange:
    """What is found in the reply to one turn. `given`: the prompt, and what the user has said so
    far, this turn too."""
    drifts = turn.kind != "unrelated" and off_topic(reply, given, words.topic)
    can_not_tell = abstains(reply, words.abstains)
    return Exchange(
        user=turn.say,
        reply=reply,
        delay_s=delay_s,
        echo=is_echo(turn.say, reply),
        kind=turn.kind,
        out_of_role=says_any(reply, words.must_not_say),
        invented=invented(reply, given),
        due=turn.must_say,
        says_due=bool(turn.must_say) and says_any(reply, turn.must_say),
        wrong=says_any(reply, turn.must_not_say),
        may_be_wrong=bool(turn.must_not_say),
        abstains=can_not_tell,
        can_abstain=bool(words.abstains),
        off_topic=drifts and not can_not_tell,
    )


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


def answered_delays(measured: Measured) -> list[float]:
    return [delay for delay in measured.timing.delays_s if delay is not None]
