"""What the pocket base does when it speaks freely with people it has never heard.

    python -m benchmarks.pocket_base                      # prints; data/pocket
    python -m benchmarks.pocket_base --runs 40 --write    # and writes docs/results/pocket_base.*

`--runs` conversations of 30 s: a prompt that training never saw, a user's voice that it never
heard, up to five questions on a fixed timetable (training/pocket/base_probe.py). In half of the
runs the prompt is worded as none of training was, and so are most of the questions; up to half of
the facts have values that no prompt of it had. All three are told apart below. Half as many further
runs ask by voices of training, in the very recordings that training used (those voices have no new
questions): what falls between the two is voice, recording and, in part, wording together. Text is
sampled at .1 / top 10, audio at .1 / top 50. Definitions: training/pocket/base_measures.py; in
short:

    answers           questions behind which the agent's text row says something before the next
    fact right        of the answered ones whose fact the prompt holds: its text says it, word for
                      word. How much of its text one hears is `speech says text`
    refuses           of the answered ones whose fact the prompt lacks: it says that it doesn't
                      know; and of those whose fact it holds, where it should not
    premature         questions over which the agent starts to speak, more than a backchannel
    yields            of the agent's turns that would have gone on for 1.1 s and more when the user
                      cut in (the same run without the cut shows it): silent within .8 s
    collapsed         runs without a word, or without one from the last but one question on
    speech says text  word errors of pocketsphinx on the decoded speech against the text row, with
                      one language model of all that was said; beside it, the same for the same
                      turns by the synthesiser, encoded and decoded, which is the floor. And of the
                      facts that the text has right, those whose value is heard, the same way
    margin            how much likelier a held-out dialogue's words are under its own prompt than
                      under another character's, teacher-forced (training/prompt_swap.py)
    voice             of the runs with a voice sample: the agent's pitch is that of the sample's sex

Intervals of shares are exact and take questions as independent, which those of one run are not.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch

from benchmarks.pocket_base_page import describe
from benchmarks.pocket_base_speech import Fact, Turn, speech_says_text
from duplex.datafiles import CHECKOUT
from duplex.files import write_atomic, write_json
from duplex.frames import FRAME_S, FRAME_SAMPLES, SAMPLE_RATE
from duplex.metrics import proportion_interval, says_any, segments, speech_activity
from pipeline.engines.codec import decode
from pipeline.engines.vad import VAD_RATE
from pipeline.engines.voice_sound import gender_of_pitch
from training.device import cpu_name
from training.fast import FastForward
from training.pocket.base_bank import Bank
from training.pocket.base_clips import ClipMaker
from training.pocket.base_data import Places, load_pocket_codec, speak_and_encode
from training.pocket.base_measures import (
    EARLY_FRAMES,
    Answer,
    collapsed,
    judge,
    spoken_turns,
    yields,
)
from training.pocket.base_probe import SAMPLING, Probe, choose_cut, draw_probe, run_probes
from training.pocket.base_source import LoopSettings, Source
from training.pocket.base_units import (
    ALOUD_ACT,
    NEUTRAL,
    SMALL,
    Amounts,
    Unit,
    UnitIndex,
    inventory,
)
from training.pocket.base_voices import Speaker, gender_of, users
from training.pocket.base_weights import base_config, load_base, load_tokenizer
from training.pocket.roles import Grammar, load_grammar
from training.prompt_swap import plan_swaps, score_swaps

RESULTS = CHECKOUT / "docs" / "results"
BATCH, SEED, SWAP_CLIPS, SWAPS = 20, 4242, 40, 3
EXAMPLES = 6
# As many voices of training as are held out.
KNOWN_USERS = tuple(
    users("train")[:: len(users("train")) // len(users("held"))][: len(users("held"))]
)


@dataclass(frozen=True)
class Run:
    """One run. text: int [T]; samples: float32 [S], what the agent said; speaking: bool [T]."""

    probe: Probe
    text: np.ndarray
    samples: np.ndarray
    speaking: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, default=CHECKOUT / "data/pocket")
    parser.add_argument("--codec", type=Path, help="default: BASE")
    parser.add_argument("--work", type=Path, help="keeps the utterances' codes for another time")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--write", action="store_true", help="docs/results/pocket_base.{json,md}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        places = Places(arguments.work or Path(name))
        result = measure(arguments.base, arguments.codec or arguments.base, places, arguments.runs)
    page = describe(result)
    print(page)
    if arguments.write:
        write_json(RESULTS / "pocket_base.json", result)
        write_atomic(RESULTS / "pocket_base.md", page.encode())


def measure(base: Path, codec_folder: Path, places: Places, count: int) -> dict[str, Any]:
    grammar = load_grammar()
    lm, tokenizer = load_base(base), load_tokenizer(base)
    codec = load_pocket_codec(codec_folder)
    drawn_by = base_config(base)["utterances"]
    seed = drawn_by["seed"]
    units = held_out_units(inventory(grammar, SMALL if drawn_by["small"] else Amounts(), seed))
    bank = speak_and_encode(units, grammar, codec, places, print)
    started_s = time.monotonic()
    alone, cut_in = free_runs(lm, grammar, bank, tokenizer, codec.mimi, count, users("held"))
    spent_s = time.monotonic() - started_s
    known, _ = free_runs(lm, grammar, bank, tokenizer, codec.mimi, count // 2, KNOWN_USERS)

    def answers_of(runs: Sequence[Run]) -> list[list[Answer]]:
        refusals = grammar.talk.refusal
        return [judge(run.probe.questions, run.text, tokenizer.decode, refusals) for run in runs]

    answers = answers_of(alone)
    return {
        "runs": count,
        "machine": cpu_name(),
        "seconds_a_run": round(spent_s / count, 1),
        "base": base_config(base),
        "sampling": SAMPLING.model_dump(mode="json"),
        "shares": shares(alone, answers, cut_in, grammar.talk.refusal),
        "known_voices": fact_shares(answers_of(known)),
        "speech": speech_says_text(turns_of(alone, tokenizer), told_facts(alone, answers), codec),
        "margin": margins(lm, grammar, bank, tokenizer, seed),
        "topics": by_topic(answers),
        "examples": [example(*pair) for pair in zip(alone[:EXAMPLES], answers, strict=False)],
    }


def held_out_units(units: Sequence[Unit]) -> list[Unit]:
    """Users that training never heard, and some that it did; of the neutral agents what dialogues
    with them need."""
    return [
        unit
        for unit in units
        if unit.speaker.is_held_out
        or unit.speaker in KNOWN_USERS
        or (
            unit.speaker.state == NEUTRAL
            and unit.act != ALOUD_ACT
            and (unit.side == "held" or not unit.act.startswith("answer/"))
        )
    ]


def free_runs(
    lm: Any,
    grammar: Grammar,
    bank: Bank,
    tokenizer: Any,
    mimi: Any,
    count: int,
    asking: Sequence[Speaker],
) -> tuple[list[Run], list[bool]]:
    """All runs without interruptions, and for each turn that was cut in on, whether it yielded."""
    index = UnitIndex(bank.units)
    alone: list[Run] = []
    yielded: list[bool] = []
    for first in range(0, count, BATCH):
        rng = random.Random(f"{SEED}/{first}")
        size = min(BATCH, count - first)
        probes = [draw_probe(grammar, bank, index, rng, asking) for _ in range(size)]
        runs = _runs(lm, probes, bank, tokenizer, mimi, SEED + first, None)
        cuts = [choose_cut(run.probe, run.speaking, index, rng) for run in runs]
        again = _runs(lm, probes, bank, tokenizer, mimi, SEED + first, cuts)
        for run, other, cut in zip(runs, again, cuts, strict=True):
            if cut is not None:
                same = (run.text[: cut[0]] == other.text[: cut[0]]).all()
                assert same, "both runs are equal until the user cuts in"
                stopped = yields(run.speaking, other.speaking, cut[0])
                yielded += [] if stopped is None else [stopped]
        alone += runs
        print(f"{len(alone)} of {count} runs")
    return alone, yielded


def _runs(
    lm: Any,
    probes: Sequence[Probe],
    bank: Bank,
    tokenizer: Any,
    mimi: Any,
    seed: int,
    cuts: Any,
) -> list[Run]:
    found = run_probes(lm, probes, bank, tokenizer, seed, cuts)
    made = []
    for probe, run in zip(probes, found, strict=True):
        samples = decode(mimi, np.maximum(run.codes, 0))
        speaking = speech_activity(samples)[: len(run.text)]
        made.append(Run(probe, run.text, samples, speaking))
    return made


# -- measures over all runs


def shares(
    runs: Sequence[Run],
    answers: Sequence[Sequence[Answer]],
    yielded: Sequence[bool],
    refusals: Sequence[str],
) -> dict[str, Any]:
    """Each share as hits, trials and its interval."""
    every = [answer for row in answers for answer in row]
    lacking = [a for a in every if a.answered and a.question.says is None]
    holding = [a for a in every if a.answered and a.question.says is not None]
    collapses = [collapsed(run.probe.questions, run.text) for run in runs]
    counted = {
        "answers": [a.answered for a in every],
        "refuses what the prompt lacks": [a.right for a in lacking],
        "refuses what the prompt holds": [says_any(a.text, refusals) for a in holding],
        "premature": [a.premature for a in every],
        "yields": list(yielded),
        "collapsed": collapses,
        "voice": _voices(runs),
    }
    found = {name: _share([bool(hit) for hit in hits]) for name, hits in counted.items()}
    return {"answers": found.pop("answers"), **fact_shares(answers), **found}


def fact_shares(answers: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    """Of the answered questions whose fact the prompt holds: in all, by wording and by value."""
    facts = [a for row in answers for a in row if a.answered and a.question.says]
    counted = {"fact right": facts}
    for prompts in ("known", "new"):
        for questions in ("known", "new"):
            for values in ("known", "new"):
                wanted = tuple(kind == "new" for kind in (prompts, questions, values))
                some = [
                    a
                    for a in facts
                    if (a.question.prompt_held, a.question.asked_held, a.question.value_held)
                    == wanted
                ]
                if some:
                    name = f"{prompts} prompt wording, {questions} question, {values} value"
                    counted[name] = some
    return {name: _share([bool(a.right) for a in some]) for name, some in counted.items()}


def _share(hits: Sequence[bool]) -> dict[str, Any]:
    low, high = proportion_interval(sum(hits), len(hits)) if hits else (None, None)
    return {"hits": sum(hits), "of": len(hits), "low": low, "high": high}


def _voices(runs: Sequence[Run]) -> list[bool]:
    """Whether the agent's speech has the pitch of its voice sample's sex; those that tell."""
    found = []
    for run in runs:
        if run.probe.sample is None:
            continue
        samples = soxr.resample(run.samples, SAMPLE_RATE, VAD_RATE)
        spans = [(span.start * FRAME_S, span.end * FRAME_S) for span in segments(run.speaking)]
        heard = gender_of_pitch(samples, spans)
        found += [] if heard is None else [heard == gender_of(run.probe.agent_voice)]
    return found


def by_topic(answers: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    rows: dict[str, list[bool]] = {}
    for answer in (answer for row in answers for answer in row):
        if answer.question.says is not None:
            rows.setdefault(answer.question.topic, []).append(bool(answer.right))
    return {topic: [sum(hits), len(hits)] for topic, hits in sorted(rows.items())}


def turns_of(runs: Sequence[Run], tokenizer: Any) -> list[Turn]:
    """All turns of the agents."""
    return [
        (
            tokenizer.decode(tokens),
            run.samples[start * FRAME_SAMPLES : end * FRAME_SAMPLES],
            run.probe.agent_voice,
        )
        for run in runs
        for start, end, tokens in spoken_turns(run.text, run.speaking)
        if tokens
    ]


def told_facts(runs: Sequence[Run], answers: Sequence[Sequence[Answer]]) -> list[Fact]:
    """The answers whose text has their fact right, as they sound from the question's end on."""
    found: list[Fact] = []
    for run, row in zip(runs, answers, strict=True):
        ends = [*(answer.question.start for answer in row[1:]), len(run.text)]
        for answer, end in zip(row, ends, strict=True):
            if answer.right and answer.question.says:
                part = slice(
                    (answer.question.end - EARLY_FRAMES) * FRAME_SAMPLES, end * FRAME_SAMPLES
                )
                turn = (answer.text, run.samples[part], run.probe.agent_voice)
                found.append((answer.question.says, turn))
    return found


def margins(lm: Any, grammar: Grammar, bank: Bank, tokenizer: Any, seed: int) -> dict[str, Any]:
    """Prompt-swap margins on held-out dialogues, and their own likelihoods.

    seed: of the utterances, by which BASE.md's held-out dialogues are drawn, which these are not.
    """
    source = Source(grammar, ClipMaker(bank, tokenizer), LoopSettings(1, seed=seed + 1))
    clips = [one.clip for one in source.held_out(SWAP_CLIPS)]
    tasks = plan_swaps(clips, [clips], SWAPS, SEED)
    result = score_swaps(FastForward(lm), tasks, torch.device("cpu"))
    own = result.own.nll / result.own.count.clamp(min=1)
    return {
        "words": result.words and result.words.as_dict(),
        "semantic": result.semantic and result.semantic.as_dict(),
        "own_words": float(own[0]),
        "own_semantic": float(own[2]),
    }


def example(run: Run, answers: Sequence[Answer]) -> dict[str, Any]:
    return {
        "prompt": run.probe.prompt,
        "questions": [
            {
                "topic": answer.question.topic,
                "wanted": answer.question.says,
                "said": answer.text,
                "right": answer.right,
            }
            for answer in answers
        ],
    }


if __name__ == "__main__":
    main()
