"""What the notebooks look at: a finished run, its recordings, and drawings of both.

Drawings are HTML with one `<img>` that holds a whole SVG: its style reaches nothing else on the
page, and no script in it would run, whatever text a model wrote into it.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from duplex.base import Record
from duplex.config import Config
from duplex.configfile import load_config
from duplex.datafiles import find_path
from duplex.errors import CorruptFileError, MissingInputError, RequestError
from duplex.frames import SAMPLE_RATE, frame_at
from duplex.metrics import Segment, segments, speech_activity
from duplex.records import Speech
from duplex.store import StageFolder
from pipeline.inspecting.view import printable
from pipeline.run import STAGE_NAMES, plan

SVG = "http://www.w3.org/2000/svg"


@dataclass(frozen=True)
class FinishedRun:
    """The finished stages of a config, by name."""

    config: Config
    runs: Path
    stages: Mapping[str, StageFolder]

    def records(self, stage: str, record_type: type[Record]) -> list[Any]:
        """Records of one type of a stage, sorted by id."""
        return [r for r in self.stages[stage].records() if isinstance(r, record_type)]


def open_run(config: str, runs: str = "runs", to: str = STAGE_NAMES[-1]) -> FinishedRun:
    """The run that belongs to a config as it stands now.

    Args:
        config, runs: as seen from the working directory, else from the checkout.
        to: the last stage that must be finished.

    Raises:
        RequestError: no such stage. ConfigError: the config is wrong.
        MissingInputError: a stage up to `to` is not finished.
    """
    if to not in STAGE_NAMES:
        raise RequestError(f"to must be one of {', '.join(STAGE_NAMES)}; found {to}")
    path, root = find_path(config), find_path(runs)
    loaded = load_config(path)
    steps = plan(loaded, root)
    needed = STAGE_NAMES[: STAGE_NAMES.index(to) + 1]
    unfinished = [s.stage.name for s in steps if s.stage.name in needed and not s.done]
    if unfinished:
        raise MissingInputError(
            f"{config} must have a finished run under {runs}, found none of {unfinished[0]} and "
            f"what follows from it. `duplex run {config} --runs {runs} --to {to}` makes it."
        )
    done = {s.stage.name: s.folder for s in steps if s.done and s.folder is not None}
    return FinishedRun(loaded, root, done)


# -- recordings


def read_channels(wav: bytes) -> np.ndarray:
    """A stereo WAV at 24 kHz: float32 [2, S], agent and user.

    Raises:
        CorruptFileError: it is another kind of file.
    """
    import soundfile

    try:
        samples, rate = soundfile.read(io.BytesIO(wav), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise CorruptFileError(f"a conversation must be a WAV file: {error}") from None
    if rate != SAMPLE_RATE or samples.shape[1] != 2:
        raise CorruptFileError(
            f"a conversation must have 2 channels at {SAMPLE_RATE} Hz, "
            f"found {samples.shape[1]} at {rate} Hz"
        )
    return samples.T


def agent_words(speech: Speech) -> list[tuple[int, str]]:
    """The agent's words, each with the frame in which it starts."""
    return [
        (frame_at(word.start_s), word.text)
        for turn in speech.turns
        if turn.role == "agent"
        for word in turn.words
    ]


def user_turns(speech: Speech) -> list[Segment]:
    """The frames of the user's turns; backchannels are no turns."""
    return [
        Segment(frame_at(turn.start_s), frame_at(turn.end_s))
        for turn in speech.turns
        if turn.role == "user" and turn.kind == "turn"
    ]


# -- drawings


def timeline_picture(
    channels: np.ndarray,
    label: str,
    *,
    turns: Sequence[Segment] = (),
    words: Sequence[tuple[int, str]] = (),
) -> str:
    """Both sides over time, as on the evaluation's page.

    Args:
        channels: float [2, S] at 24 kHz, agent and user.
        turns: of the user, in frames. words: of the agent, with their frames.
    """
    from pipeline.evaluation.drawing import Track, timeline
    from pipeline.evaluation.report import TEMPLATES

    agent, user = channels
    speech = [segments(speech_activity(side)) for side in (agent, user)]
    # A model may write control characters, which no XML holds.
    shown = [(frame, printable(word)) for frame, word in words]
    svg = timeline(Track(agent, user, speech[0], speech[1], turns, shown), printable(label))
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    return picture(svg, style, label)


def curve_pictures(
    log: Sequence[dict[str, Any]], timing: Sequence[dict[str, Any]] = ()
) -> Iterator[tuple[str, str]]:
    """(title, picture) of each training curve.

    Args:
        log: lines of metrics.jsonl. timing: lines of timing.jsonl.
    """
    from training.curves import STYLE, draw, panels

    for panel in panels(log, timing):
        yield panel.title, picture(draw(panel), STYLE, panel.title)


def picture(svg: str, style: str, label: str) -> str:
    """An SVG and its style sheet as one `<img>` that needs nothing else.

    Raises:
        xml.etree.ElementTree.ParseError: it is no XML.
    """
    ElementTree.register_namespace("", SVG)
    root = ElementTree.fromstring(svg)
    if not root.tag.startswith("{"):
        for element in root.iter():
            element.tag = f"{{{SVG}}}{element.tag}"
    sheet = ElementTree.Element(f"{{{SVG}}}style")
    sheet.text = f"{style}\nsvg {{ background: var(--page, var(--paper, white)); }}"
    root.insert(0, sheet)
    content = base64.b64encode(ElementTree.tostring(root)).decode()
    source = f"data:image/svg+xml;base64,{content}"
    return f'<img src="{source}" alt="{html.escape(label)}" style="width: 100%">'
