"""`python -m training.pocket base`: the pocket base from nothing, on one machine, resumable.

    1. the grammar's utterances are spoken and encoded        WORK/codes/
    2. a tokenizer is trained on the grammar's and the coffee corpus' text
    3. an `LMModel` is trained on dialogues of them           WORK/checkpoints/, WORK/losses.jsonl
    4. the weights are written                                OUT/base.*, tokenizer.model, BASE.md

Each step takes up what an earlier, killed run has done. Where `--hours` stands for `--steps`, the
number of steps is set once, from the time that the first ones take, and kept in WORK/plan.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from duplex.base import canonical_json
from duplex.files import write_atomic, write_json
from training.fast import FastForward
from training.pocket.base_bank import Bank
from training.pocket.base_card import Made, write_card
from training.pocket.base_clips import ClipMaker
from training.pocket.base_data import (
    Places,
    load_pocket_codec,
    speak_and_encode,
    train_tokenizer,
)
from training.pocket.base_loop import LoopSettings, Source, Trained, means, score, train
from training.pocket.base_units import Amounts, inventory
from training.pocket.base_voices import voices_digest
from training.pocket.base_weights import POCKET, load_base, save_base
from training.pocket.roles import Grammar, load_grammar
from training.prompt_swap import plan_swaps, score_swaps

SMALL = Amounts(6, 2, 1, 12, 1, 2, 3)
VALID_CLIPS = 48
PLAN_STEPS = 6
SWAPS = 2


def main(argv: list[str]) -> int:
    """Train the base as the arguments say; 0 when it is done.

    Raises:
        RequestError, MissingInputError, CorruptFileError: a folder that is not what it should be.
    """
    import torch

    arguments = _parse(argv)
    torch.set_num_threads(arguments.threads)
    places = Places(arguments.work)
    started_s = time.monotonic()
    grammar = load_grammar()
    units = inventory(grammar, SMALL if arguments.small else Amounts(), arguments.seed)
    codec, _ = load_pocket_codec(arguments.codec)
    bank = speak_and_encode(units, grammar, codec, places, print)
    encoded_s = time.monotonic() - started_s
    tokenizer = train_tokenizer(grammar, bank.units, arguments.seed)
    run = _Run(arguments, places, grammar, bank, tokenizer, codec.digest)
    run.write(run.train(), encoded_s)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.pocket base",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=POCKET, help="where the weights go")
    add("--work", type=Path, required=True, help="where a run keeps what it has")
    add("--codec", type=Path, help="folder of the pocket codec; default: OUT")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--hours", type=float, default=1.0, help="of training, without encoding")
    length.add_argument("--steps", type=int, help="updates, instead of hours")
    add("--reading-steps", type=int, default=200, help="first steps, of text alone")
    add("--seed", type=int, default=1)
    add("--threads", type=int, default=2)
    add("--batch-size", type=int, default=8)
    add("--learning-rate", type=float, default=1.2e-3)
    add("--small", action="store_true", help="a third of the utterances, to try it out")
    arguments = parser.parse_args(argv)
    arguments.codec = arguments.codec or arguments.out
    return arguments


@dataclass
class _Run:
    """The training of one set of arguments."""

    arguments: argparse.Namespace
    places: Places
    grammar: Grammar
    bank: Bank
    tokenizer: bytes
    codec_digest: str

    def __post_init__(self) -> None:
        import sentencepiece

        from pipeline.engines.pocket import LM_CONFIG, build_lm

        processor = sentencepiece.SentencePieceProcessor(model_proto=self.tokenizer)
        self.maker = ClipMaker(self.bank, processor)
        self.lm_config = LM_CONFIG
        self.lm = build_lm(LM_CONFIG, self.arguments.seed)
        self.settings = self._settings()
        self.source = Source(self.grammar, self.maker, self.settings)
        self.valid = self.source.held_out(VALID_CLIPS)

    def train(self) -> Trained:
        """Train to the last step; the log lies in the work folder."""
        trained = train(
            self.lm,
            self.source,
            self.settings,
            self.places.checkpoints,
            self._identity(),
            valid=self.valid,
            report=print,
        )
        write_atomic(self.places.log, ("\n".join(trained.log) + "\n").encode())
        return trained

    def write(self, trained: Trained, encoded_s: float) -> None:
        """All files of the base, and its card."""
        out = self.arguments.out
        facts = {
            "steps": self.settings.steps,
            "seed": self.settings.seed,
            "grammar": self.grammar.digest,
            "codec": self.codec_digest,
            "tokenizer": hashlib.sha256(self.tokenizer).hexdigest(),
        }
        save_base(out, self.lm, self.lm_config, facts, self.tokenizer)
        stored = FastForward(load_base(out))
        clips = [one.clip for one in self.valid]
        swaps = score_swaps(stored, plan_swaps(clips, [clips], SWAPS, 0), self.lm.device)
        made = Made(
            settings=self.settings,
            grammar=self.grammar,
            bank=self.bank,
            num_weights=sum(parameter.numel() for parameter in self.lm.parameters()),
            trained=trained,
            stored=means(score(stored, self.valid), "held"),
            margin=swaps.words,
            encoded_s=encoded_s,
            threads=self.arguments.threads,
        )
        write_card(out, made)

    def _settings(self) -> LoopSettings:
        """Of this run, `--hours` as a number of steps."""
        arguments, plan = self.arguments, self.places.plan
        if arguments.steps:
            return self._settings_of(arguments.steps)
        if plan.exists():
            kept = json.loads(plan.read_text())
            if kept["hours"] == arguments.hours:
                return self._settings_of(kept["steps"])
        steps = max(1, round(arguments.hours * 3600 / self._seconds_a_step()))
        write_json(plan, {"hours": arguments.hours, "steps": steps})
        return self._settings_of(steps)

    def _settings_of(self, steps: int) -> LoopSettings:
        return LoopSettings(
            steps,
            self.arguments.batch_size,
            self.arguments.learning_rate,
            warmup_steps=min(60, max(1, steps // 10)),
            reading_steps=min(self.arguments.reading_steps, steps // 2),
            seed=self.arguments.seed,
        )

    def _seconds_a_step(self) -> float:
        """Timed on a model of its own, which is thrown away."""
        from pipeline.engines.pocket import build_lm

        settings = self._settings_of(1000)
        source = Source(self.grammar, self.maker, settings)
        with tempfile.TemporaryDirectory() as name:
            started_s = time.monotonic()
            lm = build_lm(self.lm_config, 0)
            train(lm, source, settings, Path(name), "timing", until=PLAN_STEPS)
            return (time.monotonic() - started_s) / PLAN_STEPS

    def _identity(self) -> str:
        """Digest of all that decides the weights."""
        material = [
            self.grammar.digest,
            voices_digest(),
            self.codec_digest,
            hashlib.sha256(self.tokenizer).hexdigest(),
            asdict(self.settings),
            self.lm_config,
            [part.shape[1] for part in self.bank.codes],
        ]
        return hashlib.sha256(canonical_json(material).encode()).hexdigest()
