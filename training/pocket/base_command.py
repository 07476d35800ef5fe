"""`python -m training.pocket base`: the pocket base from nothing, resumable.

    1. the grammar's utterances are spoken and encoded        WORK/codes/
    2. a tokenizer is trained on the grammar's and the coffee corpus' text; both in one file
                                                              WORK/bank.safetensors
    3. an `LMModel` is trained on dialogues of them           WORK/checkpoints/, WORK/losses.jsonl
    4. it goes on from there, with speech from the start      WORK/first/, WORK/again/
    5. the weights are written                                OUT/base.*, tokenizer.model, BASE.md

Each step takes up what an earlier, killed run has done. Every batch is shared by `--processes`
processes of one thread each; or a GPU takes it (`--device cuda`), on a machine that need not be the
one that spoke (`--codes-only` here, `--bank` there).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from duplex.base import canonical_json
from duplex.errors import RequestError
from duplex.files import append_line, read_lines, write_atomic
from duplex.memory import keep_freed_memory
from pipeline.engines import espeak
from training.distributed import Ranks, digest_of
from training.fast import FastForward
from training.launch import run_workers
from training.pocket.base_arguments import parse, trainings
from training.pocket.base_card import Made, machine_name, write_card
from training.pocket.base_clips import FRAMES_A_GAP, LONGEST_GAP, MUFFLED, ROW_LOST, ClipMaker
from training.pocket.base_data import (
    Places,
    load_pocket_codec,
    speak_and_encode,
    train_tokenizer,
)
from training.pocket.base_ear import LOOKED_SHARE, TASKS
from training.pocket.base_initial import prepare
from training.pocket.base_loop import Trained, means, score, train
from training.pocket.base_optimizer import MUON_MOMENTUM
from training.pocket.base_pack import Pack, load_pack, save_pack
from training.pocket.base_phones import find_phones
from training.pocket.base_pointer import HEADS
from training.pocket.base_prompts import MOST_SLIPS, SLIPPED
from training.pocket.base_source import LOSS, LoopSettings, Source
from training.pocket.base_units import SMALL, Amounts, inventory
from training.pocket.base_voices import voices_digest
from training.pocket.base_weights import POCKET, TOKENIZER, base_config, load_base, save_base
from training.pocket.roles import Grammar, load_grammar
from training.prompt_swap import plan_swaps, score_swaps

VALID_CLIPS = 48
WORKER = "training.pocket.base_worker"
SWAPS = 2


def say(line: str) -> None:
    print(line, flush=True)


def main(argv: list[str]) -> int:
    """Train the base as the arguments say; 0 when it is done.

    Raises:
        MissingInputError, CorruptFileError: a folder that is not what it should be.
        WorkError: a loss that is not finite, or a process that died.
    """
    arguments = parse(argv, __doc__)
    asked = trainings(argv, arguments)
    for one in asked:
        parse(one)  # what the second is refused for, it is refused for now
    torch.set_num_threads(1)
    places = Places(arguments.work, arguments.codec)
    if arguments.bank is None:
        _make_pack(arguments, places, say)
    if arguments.codes_only:
        return 0
    for one in asked:
        if arguments.processes == 1:
            make_base(one, Ranks(0, 1, torch.device(arguments.device)), say)
        else:
            run_workers(WORKER, {"argv": one}, arguments.processes, say)
    return 0


def make_base(argv: list[str], ranks: Ranks, report: Callable[[str], None]) -> None:
    """What one process does of it, once utterances are spoken and encoded.

    Raises:
        RequestError: `--bank` is of another grammar or codec.
    """
    torch.set_num_threads(1)
    arguments = parse(argv)
    if ranks.device.type == "cpu":
        keep_freed_memory()
    grammar = load_grammar()
    path = arguments.bank or Places(arguments.work).pack
    pack = load_pack(path)
    if pack.grammar != grammar.digest:
        raise RequestError(
            f"--bank must be of the grammar in data/pocket/base ({grammar.digest[:12]}…), and "
            f"{path} is of another ({pack.grammar[:12]}…). Make it again: --codes-only"
        )
    if pack.codec != (own := load_pocket_codec(arguments.codec).digest):
        raise RequestError(
            f"--bank must be encoded by the codec in {arguments.codec} ({own[:12]}…), and "
            f"{path} is by another ({pack.codec[:12]}…). Make it again: --codes-only"
        )
    if pack.voices != voices_digest():
        raise RequestError(
            f"--bank must hold the voices in training/pocket/base_voices.py, and {path} holds "
            "others. Make it again: --codes-only"
        )
    if arguments.start is not None and (made := base_config(arguments.start)["codec"]) != own:
        raise RequestError(
            f"--start must be a base of the codec in {arguments.codec} ({own[:12]}…), and "
            f"{arguments.start} is of another ({made[:12]}…)"
        )
    if arguments.start is not None and pack.tokenizer != _tokenizer_of(arguments.start):
        raise RequestError(
            f"--start must be a base of the tokenizer in {path}, and {arguments.start} has "
            f"another. Make the file again: --codes-only --start {arguments.start}"
        )
    run = _Run(arguments, ranks, grammar, pack)
    trained = run.train(report)
    if ranks.first:
        run.write(trained)
    ranks.wait()


def _make_pack(
    arguments: argparse.Namespace, places: Places, report: Callable[[str], None]
) -> None:
    """Speak and encode all utterances, as far as earlier calls haven't."""
    started_s = time.monotonic()
    given = None if arguments.start is None else _tokenizer_of(arguments.start)
    grammar = load_grammar()
    units = inventory(grammar, SMALL if arguments.small else Amounts(), arguments.seed)
    codec = load_pocket_codec(arguments.codec)
    processes = arguments.processes
    bank = speak_and_encode(units, grammar, codec, places, report, processes)
    phones = find_phones(units, grammar, places.codes, espeak.revision(), report, processes)
    places.work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(grammar, units, arguments.seed) if given is None else given
    append_line(places.timing, json.dumps({"seconds": time.monotonic() - started_s}))
    seconds = sum(line["seconds"] for line in read_lines(places.timing))
    digests = (codec.digest, grammar.digest, voices_digest())
    pack = Pack(bank, phones, tokenizer, *digests, seconds, arguments.seed, arguments.small)
    save_pack(places.pack, pack)


def _tokenizer_of(base: Path) -> bytes:
    base_config(base)  # raises where the folder's files do not go together
    return (base / TOKENIZER).read_bytes()


@dataclass
class _Run:
    """The training of one set of arguments."""

    arguments: argparse.Namespace
    ranks: Ranks
    grammar: Grammar
    pack: Pack

    def __post_init__(self) -> None:
        import sentencepiece

        from pipeline.engines.pocket import LM_CONFIG

        processor = sentencepiece.SentencePieceProcessor(model_proto=self.pack.tokenizer)
        self.bank = self.pack.bank
        self.maker = ClipMaker(self.bank, processor, self.pack.phones)
        start = self.arguments.start
        self.lm_config = LM_CONFIG if start is None else base_config(start)["lm"]
        self.lm = first_lm(self.arguments.seed) if start is None else load_base(start)
        steps = self.arguments.steps
        self.settings = LoopSettings(
            steps,
            self.arguments.batch_size,
            self.arguments.learning_rate,
            warmup_steps=min(200, max(1, steps // 40)),
            reading_steps=self.arguments.reading_steps,
            word_steps=self.arguments.word_steps,
            seed=self.arguments.seed,
            muon_rate=self.arguments.muon_rate,
        )
        self.starts = [] if start is None else starts_of(start)
        self.source = Source(self.grammar, self.maker, self.settings)
        # By the utterances' seed: the same for every training on them.
        self.held = Source(self.grammar, self.maker, replace(self.settings, seed=self.pack.seed))
        self.valid = self.held.held_out(VALID_CLIPS)

    def train(self, report: Callable[[str], None]) -> Trained:
        """Train to the last step; the log lies in the work folder."""
        places, identity = Places(self.arguments.work, self.arguments.codec), self._identity()
        trained = train(
            self.lm,
            self.source,
            self.settings,
            places.checkpoints / identity[:12],  # another run's stay where they are
            identity,
            valid=self.valid,
            report=report,
            ranks=self.ranks,
            makers=self.arguments.ahead,
            checkpoint_every=self.arguments.checkpoint_every,
        )
        if self.ranks.first:
            write_atomic(places.log, ("\n".join(trained.log) + "\n").encode())
        return trained

    def write(self, trained: Trained) -> None:
        """All files of the base, and its card."""
        out = self.arguments.out
        facts = {
            "steps": self.settings.steps,
            "seed": self.settings.seed,
            "grammar": self.grammar.digest,
            "codec": self.pack.codec,
            "starts": self.starts,
            "utterances": self.pack.drawn_by,
        }
        final = means(score(FastForward(self.lm), self.valid), "held")
        save_base(out, self.lm, self.lm_config, facts, self.pack.tokenizer)
        stored = FastForward(load_base(out).to(self.ranks.device))
        clips = [one.clip for one in self.valid]
        swaps = score_swaps(stored, plan_swaps(clips, [clips], SWAPS, 0), self.ranks.device)
        made = Made(
            settings=self.settings,
            grammar=self.grammar,
            bank=self.bank,
            num_weights=sum(parameter.numel() for parameter in self.lm.parameters()),
            trained=trained,
            final=final,
            stored=means(score(stored, self.valid), "held"),
            lessons={
                name: means(score(stored, clips), "held")["held_words"]
                for name, clips in self.held.held_out_lessons(VALID_CLIPS // 2).items()
            },
            margin=swaps.words,
            encoded_s=self.pack.seconds,
            machine=machine_name(self.ranks),
            how=self._how(),
            starts=self.starts,
        )
        write_card(out, made)

    def _how(self) -> str:
        """The options that say where it was trained, and on which utterances."""
        arguments = self.arguments
        options = [f"--processes {self.ranks.count}"]
        if self.ranks.device.type != "cpu":
            options += ["--device cuda", f"--ahead {arguments.ahead}"]
        options += ["--bank BANK"] if arguments.bank else []
        options += ["--small"] if arguments.small and not arguments.bank else []
        options += ["--codec CODEC"] if arguments.codec.resolve() != POCKET.resolve() else []
        return " ".join(options)

    def _identity(self) -> str:
        """Digest of what decides the weights: settings, first weights, and of the data the codes
        themselves and a batch of each phase. A change of how clips are made that leaves these three
        batches as they are is not seen."""
        phases = (0, self.settings.reading_steps, self.settings.steps - 1)
        batches = {
            f"{step}.{place}.{name}": tensor
            for step in phases
            for place, one in enumerate(self.source.batches(step))
            for name, tensor in (
                ("codes", one.batch.codes),
                ("loss_mask", one.batch.loss_mask),
                ("labels", one.labels),
            )
        }
        codes = {f"unit {n}": torch.from_numpy(part) for n, part in enumerate(self.bank.codes)}
        material = [
            self.grammar.digest,
            voices_digest(),
            self.pack.codec,
            hashlib.sha256(self.pack.tokenizer).hexdigest(),
            asdict(self.settings),
            LOSS.model_dump(mode="json"),
            {name: asdict(task) for name, task in TASKS.items()},
            [HEADS, LOOKED_SHARE],
            list(self.maker.acts),
            [SLIPPED, MOST_SLIPS, MUFFLED, ROW_LOST, FRAMES_A_GAP, LONGEST_GAP, MUON_MOMENTUM],
            self.ranks.device.type,
            self.ranks.count,  # sums of shares are rounded otherwise than the whole
            self.lm_config,
            *(digest_of(tensors) for tensors in (self.lm.state_dict(), batches, codes)),
        ]
        return hashlib.sha256(canonical_json(material).encode()).hexdigest()


def starts_of(base: Path) -> list[dict[str, Any]]:
    """The bases that a training which goes on from `base` comes from, the oldest first: their
    steps and the digest of their weights."""
    config = base_config(base)
    own = {"steps": config["steps"], "weights": config["weights"]}
    return [*config.get("starts", []), own]


def first_lm(seed: int) -> Any:
    """The model that a training starts with."""
    from pipeline.engines.pocket import LM_CONFIG, build_lm

    lm = build_lm(LM_CONFIG, seed)
    prepare(lm, seed)
    return lm
