"""Chatterbox (Resemble AI, MIT): 23 languages in the voice of a recording, by an isolated script.

Its environment (torch 2.6) cannot be ours, so `uv` makes one for the script at its first start and
the script fetches the weights: some gigabytes, minutes. Every utterance carries an inaudible
watermark (Perth) that says that it is synthetic. `speech.models: {chatterbox: {revision: …}}` pins
the weights' commit.
Parameters: `exaggeration` .5-2, `cfg_weight`, `temperature`. It gives no word times.
"""

from __future__ import annotations

from duplex.config_data import SpeechSection
from duplex.errors import MissingInputError
from pipeline.engines.isolated import SCRIPTS, IsolatedEngine, uv
from pipeline.engines.speaking import Capabilities

NAME, VERSION = "chatterbox", "0.1.7"
SCRIPT = SCRIPTS / "chatterbox.py"
LANGUAGES = frozenset(
    ("ar", "da", "de", "el", "en", "es", "fi", "fr", "he", "hi", "it", "ja", "ko", "ms", "nl", "no")
) | {"pl", "pt", "ru", "sv", "sw", "tr", "zh"}  # fmt: skip
CAPABILITIES = Capabilities(
    languages=LANGUAGES,
    licence="MIT; every utterance carries an inaudible watermark (Perth)",
    cloning=True,
    emotion=True,
    weights="ResembleAI/chatterbox",
)


def revision(section: SpeechSection) -> str:
    return f"{NAME} {VERSION} weights {_pinned(section) or 'main'}"


def missing(section: SpeechSection) -> str | None:
    return None if uv() else "uv, which makes its environment: pip install uv"


def make(section: SpeechSection) -> IsolatedEngine:
    """
    Raises:
        MissingInputError: there is no `uv`.
    """
    starter = uv()
    if starter is None:
        raise MissingInputError(f"{NAME} needs {missing(section)}")
    pinned = ["--revision", commit] if (commit := _pinned(section)) else []
    return IsolatedEngine(
        [starter, "run", "--no-project", "--script", str(SCRIPT), *pinned],
        CAPABILITIES,
        engine=NAME,
        version=VERSION,
        start_s=section.runtime.start_s,
        reply_s=section.runtime.deadline_s,
    )


def _pinned(section: SpeechSection) -> str | None:
    """The hub's commit of the weights, where the config names one: `speech.revision` is that of
    `speech.engine`."""
    given = section.models.get(NAME)
    own = section.revision if section.engine == NAME else None
    return (given.revision if given else None) or own
