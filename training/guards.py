"""What is watched while training, because the loss does not show it.

At each check, on the same held-out clips with the same seeds:

    margin      does the model read its prompt?              `training/prompt_swap.py`
    free run    does it speak, and not in circles?           `training/free_running.py`,
                                                             `training/collapse.py`
    budget      does text still get its share of gradient?   `training/budget.py`

**Score**, by which the best checkpoint is chosen; lower is better:

    score = NLL of word tokens, nats a token + NLL of the semantic codes, nats a code
    none  where the free run has collapsed at this check, and before the first step

Both NLLs are of held-out dialogue under its own prompt: over all validation clips where the
caller passes their means, else over the clips watched here. Words, since padding makes up most
of a text row and is likely whatever the model does, silence included; semantic codes, since
they carry what is audible of words and timing while the other codebooks follow from them; one
to one, since each is a mean in nats and neither weight of the loss has to do with what is good.
The margin is no part of it: a model that reads its prompt has the lower NLL already. A collapse
is no matter of degree, so it is not traded against nats. The base itself is never the best of
a training run, whatever its score would be: it is not something that was trained.

Nothing here changes the run: modes, random numbers, gradients and flags come back as they were
(`free_running.untouched`), so losses are the same with guards and without.

Cost of a check: clips x (1 + swaps) forward passes of one clip, a free run (see there), and four
forward and backward passes of two training clips for the budget.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from torch import nn

from duplex.config import SamplingSection
from duplex.config_train import TrainSection
from duplex.frames import FRAME_S, frames_covering_seconds
from duplex.stage import record_seed
from duplex.streams import AGENT_ROWS, TEXT_ROW
from training.batches import Clip, make_batch
from training.budget import Budget, loss_budget
from training.collapse import SpeechMeasures, Verdict, is_word, judge, measure_speech
from training.free_running import FreeRun, run_freely, untouched
from training.log import StopTraining
from training.loss import stream_means
from training.prompt_swap import (
    Forward,
    SwapResult,
    held_out_clips,
    plan_swaps,
    prompt_tokens,
    score_swaps,
)

BUDGET_CLIPS = 2  # each is passed through four times, forward and back
TRANSCRIPT_CHARACTERS = 200


class Guards:
    """Called with the number of updates done, returns what is to be logged.

    Args:
        lm: the `LMModel` that trains, with its adapters.
        forward: contract of `training/forward.py`, over `lm`.
        valid_clips: held-out clips; without any there is the budget alone.
        train_clips: prompts to swap in are taken from here where the held-out clips have too
            few, and the clips of the budget.
        report: is told one line a check, and each warning.
        decode: token ids to text, for what the model said; None: left out.
        whole: entered around free runs, which are not done by `forward`: sharded weights must be
            gathered there.
    """

    def __init__(
        self,
        lm: Any,
        forward: Forward,
        section: TrainSection,
        *,
        seed: int,
        valid_clips: Sequence[Clip],
        train_clips: Sequence[Clip] = (),
        report: Callable[[str], None] = lambda message: None,
        decode: Callable[[list[int]], str] | None = None,
        whole: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        guards = section.guards
        self._lm, self._forward, self._section = lm, forward, section
        self._seed, self._report, self._decode, self._whole = seed, report, decode, whole
        self._clips = held_out_clips(valid_clips, guards.clips, seed)
        pools = [valid_clips, train_clips]
        self._tasks = plan_swaps(self._clips, pools, guards.swaps, seed)
        held_out = {clip.id for clip in valid_clips}
        self._foreign_training = sum(
            other.id not in held_out for task in self._tasks for other in task.others
        )
        budget_clips = BUDGET_CLIPS if guards.budget else 0
        self._budget_clips = held_out_clips(train_clips, budget_clips, seed)
        self._free_frames = frames_covering_seconds(guards.free_seconds)

    def __call__(
        self, step: int, streams: Mapping[str, float | None] | None = None
    ) -> dict[str, Any]:
        """The check after `step` updates.

        Args:
            streams: `stream_means` of the validation at this step over all of its clips, where
                there was one: the score is made of these.

        Returns:
            `score` (None: not to be chosen), `nll`, `margin`, `free`, `collapse`, `budget`;
            None for what was not measured.

        Raises:
            StopTraining: collapsed after training began, and `guards.on_collapse` is stop.
        """
        swaps, runs, budget = self._measure()
        references = [self._reference(run) for run in runs]
        measures = [_measures(run.clip, run.text, run.codes) for run in runs]
        verdict = judge(measures, references) if runs else None
        means = dict(streams) if streams else stream_means(swaps.own) if swaps else {}
        collapsed = verdict.collapse if verdict else None
        line = {
            "score": score(means) if step and not collapsed else None,
            "nll": {name: means.get(name) for name in ("text_nonpad", "semantic")},
            "margin": self._margin_line(swaps),
            "free": self._free_line(runs, measures, references),
            "collapse": collapsed,
            "reason": verdict.reason if verdict else None,
            "budget": budget.as_line() if budget else None,
        }
        self._say(step, swaps, measures, references, verdict, budget)
        if collapsed and step and self._section.guards.on_collapse == "stop":
            assert verdict is not None
            raise StopTraining(
                f"the model must speak freely, found a collapse ({collapsed}) after {step} "
                f"updates: {verdict.reason}. Train from fewer steps or with a lower "
                "train.learning_rate, look at the loss budget, or set train.guards.on_collapse "
                "to warn.",
                line,
            )
        return line

    # -- measuring

    def _measure(self) -> tuple[SwapResult | None, list[FreeRun], Budget | None]:
        device = next(self._lm.parameters()).device
        swaps, runs, budget = None, [], None
        with untouched(self._lm), untouched(self._module()):
            self._set_training(False)
            if self._tasks:
                swaps = score_swaps(self._forward, self._tasks, device)
            if self._clips and self._free_frames:
                seed = record_seed(self._seed, "guards", "free run")
                with self._whole():
                    runs = run_freely(
                        self._lm, self._clips, self._free_frames, SamplingSection(), seed
                    )
            if self._budget_clips:
                self._set_training(True)
                user_streams = self._section.loss.user_streams
                # A clip at a time: no more at once than the smallest step has.
                clips = [make_batch([clip], user_streams) for clip in self._budget_clips]
                budget = loss_budget(
                    self._forward,
                    [clip.to(device) for clip in clips],
                    self._section.loss,
                    [p for p in self._lm.parameters() if p.requires_grad],
                    record_seed(self._seed, "guards", "budget"),
                )
        return swaps, runs, budget

    def _module(self) -> nn.Module:
        return self._forward if isinstance(self._forward, nn.Module) else self._lm

    def _set_training(self, training: bool) -> None:
        self._module().train(training)
        self._lm.train(training)

    def _reference(self, run: FreeRun) -> SpeechMeasures:
        """The held-out dialogue itself, in the frames of `run`."""
        clip = run.clip
        frames = slice(clip.prompt_frames, clip.prompt_frames + len(run.text))
        return _measures(clip, clip.codes[TEXT_ROW, frames], clip.codes[AGENT_ROWS, frames])

    # -- what is logged and said

    def _margin_line(self, swaps: SwapResult | None) -> dict[str, Any] | None:
        if swaps is None or swaps.num_swaps == 0:
            return None
        words, semantic = swaps.words, swaps.semantic
        return {
            "words": words.as_dict() if words else None,
            "semantic": semantic.as_dict() if semantic else None,
            "swaps": swaps.num_swaps,
            "prompts_of_training": self._foreign_training,
        }

    def _free_line(
        self,
        runs: list[FreeRun],
        measures: list[SpeechMeasures],
        references: list[SpeechMeasures],
    ) -> dict[str, Any] | None:
        if not runs:
            return None
        line = []
        for run, found, reference in zip(runs, measures, references, strict=True):
            entry = {
                "clip": run.clip.id,
                **found.as_dict(),
                "reference": reference.as_dict(),
            }
            if self._decode:
                said = self._decode(run.text[is_word(run.text)].tolist())
                entry["said"] = said[:TRANSCRIPT_CHARACTERS]
            line.append(entry)
        return {"summary": summary(measures), "reference": summary(references), "runs": line}

    def _say(
        self,
        step: int,
        swaps: SwapResult | None,
        measures: list[SpeechMeasures],
        references: list[SpeechMeasures],
        verdict: Verdict | None,
        budget: Budget | None,
    ) -> None:
        parts = []
        if swaps and swaps.words:
            parts.append(f"prompt margin {swaps.words} a text token")
        if verdict:
            found, usual = summary(measures), summary(references)
            delay = found["first_word_s"]
            parts.append(
                f"speaks {found['tokens_per_s']:.1f} text tokens/s freely "
                f"(held out {usual['tokens_per_s']:.1f}), first after "
                + (f"{delay:.1f} s" if delay is not None else "never")
            )
        if budget:
            parts.append(str(budget))
        if parts:
            self._report(f"guards at step {step}: {'; '.join(parts)}")
        if (
            step == 0
            and self._section.guards.swaps
            and self._clips
            and not (swaps and swaps.num_swaps)
        ):
            self._report(f"guards: the prompt is not checked: {self._why_no_swap()}")
        if verdict and verdict.collapse:
            self._report(f"warning: collapse ({verdict.collapse}) at step {step}: {verdict.reason}")
        for warning in budget.warnings() if budget else ():
            self._report(f"warning: loss budget at step {step}: {warning}")

    def _why_no_swap(self) -> str:
        if not any(prompt_tokens(clip) for clip in self._clips):
            return "the held-out clips have no prompt text"
        return "there must be clips with another prompt text to swap in, found none"


def score(means: Mapping[str, float | None]) -> float | None:
    """The module's docstring says what it is; None where a stream is missing or not finite.

    Data without a single word token (audio alone) are scored by their semantic codes.
    """
    semantic, words = means.get("semantic"), means.get("text_nonpad")
    if semantic is None:
        return None
    total = semantic + (words or 0.0)
    return total if math.isfinite(total) else None


def summary(measures: Sequence[SpeechMeasures]) -> dict[str, Any]:
    """Over all runs: rates pooled over their frames, the median delay of those that spoke."""
    frames = sum(m.num_frames for m in measures)
    silent = [(m.silent_share, m.num_frames) for m in measures if m.silent_share is not None]
    delays = [m.first_word_frames for m in measures if m.first_word_frames is not None]
    repeated = [m.repeated_share for m in measures if m.repeated_share is not None]
    return {
        "runs": len(measures),
        "speaking_runs": len(delays),
        "tokens_per_s": sum(m.text_tokens for m in measures) / (frames * FRAME_S),
        "silent_share": sum(s * n for s, n in silent) / sum(n for _, n in silent)
        if silent
        else None,
        "repeated_share": statistics.fmean(repeated) if repeated else None,
        "loop_tokens": max(m.loop_tokens for m in measures),
        "first_word_s": statistics.median(delays) * FRAME_S if delays else None,
    }


def due_frame(clip: Clip) -> int:
    """From where the agent's first word is due, in frames after the prompt: the end of the
    user's first turn where the user speaks first, else 0; 0 too where no turns are known."""
    turns = [turn for turn in clip.turns if turn[2] > clip.prompt_frames]
    if not turns:
        return 0
    role, _, end = min(turns, key=lambda turn: turn[1])
    return end - clip.prompt_frames if role == "user" else 0


def prompt_silence(clip: Clip) -> np.ndarray | None:
    """int [8]: what the codec makes of silence, read from the agent's rows at the prompt's end,
    where it always is silent; None without a prompt."""
    if not clip.prompt_frames:
        return None
    return clip.codes[AGENT_ROWS, clip.prompt_frames - 1]


def _measures(clip: Clip, text: np.ndarray, codes: np.ndarray) -> SpeechMeasures:
    return measure_speech(text, codes, due_frame=due_frame(clip), silence=prompt_silence(clip))
