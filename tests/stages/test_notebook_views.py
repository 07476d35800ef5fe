"""What the notebooks draw: whole pictures that hold any text and run nothing."""

import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile

from duplex.errors import CorruptFileError
from duplex.frames import SAMPLE_RATE
from duplex.metrics import Segment
from duplex.records import Speech, SpokenTurn, Word
from pipeline.evaluation.audio import wav_bytes
from pipeline.notebook_views import (
    SVG,
    agent_words,
    curve_pictures,
    picture,
    read_channels,
    timeline_picture,
    user_turns,
)


def svg_in(html):
    """The SVG within an `<img>`, which is all that there is."""
    found = re.fullmatch(
        r'<img src="data:image/svg\+xml;base64,([\w+/=]+)" alt="([^"]*)" style="width: 100%">', html
    )
    assert found
    return ElementTree.fromstring(base64.b64decode(found[1])), found[2]


def tone(seconds, from_s, to_s):
    time_s = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    sounds = (time_s >= from_s) & (time_s < to_s)
    return (0.3 * np.sin(2 * np.pi * 220 * time_s) * sounds).astype(np.float32)


def test_a_timeline_shows_speech_turns_and_words_where_they_are():
    channels = np.stack([tone(4, 2, 3), tone(4, 0.5, 1.5)])
    html = timeline_picture(channels, "one", turns=[Segment(6, 18)], words=[(25, "Coffee.")])
    svg, label = svg_in(html)
    assert label == "one"
    at = {
        rect.get("class"): (float(rect.get("x")), float(rect.get("width")))
        for rect in svg.iter(f"{{{SVG}}}rect")
    }
    assert at["speech user"][0] < at["speech agent"][0]
    assert "Coffee." in [text.text for text in svg.iter(f"{{{SVG}}}text")]


def test_what_a_model_wrote_stays_text():
    words = [(1, "</text><script>alert(1)</script>"), (9, "a\x00\x08b"), (20, "&<>\"'")]
    html = timeline_picture(np.zeros((2, 48000), np.float32), 'x" onerror="y', words=words)
    svg, label = svg_in(html)
    assert label == "x&quot; onerror=&quot;y"
    assert list(svg.iter(f"{{{SVG}}}script")) == []
    assert any("<script>" in (text.text or "") for text in svg.iter(f"{{{SVG}}}text"))


def test_a_picture_carries_its_own_style_and_is_svg_throughout():
    svg, _ = svg_in(picture("<svg viewBox='0 0 1 1'><line x1='0'/></svg>", "a > b {}", "two"))
    assert {element.tag.partition("}")[0] for element in svg.iter()} == {f"{{{SVG}"}
    assert svg[0].tag == f"{{{SVG}}}style" and svg[0].text.startswith("a > b {}")


def test_every_curve_has_a_picture():
    log = [
        {"kind": "train", "step": 1, "loss": 2.0, "grad_norm": 1.0},
        {"kind": "train", "step": 2, "loss": 1.0, "grad_norm": 0.5},
        {"kind": "valid", "step": 2, "loss": 1.5},
    ]
    drawn = dict(curve_pictures(log))
    assert list(drawn) == ["loss", "gradient norm"]
    svg, label = svg_in(drawn["loss"])
    assert label == "loss" and len(list(svg.iter(f"{{{SVG}}}polyline"))) == 2


def test_channels_come_back_as_they_were_written():
    agent, user = tone(1, 0, 0.5), tone(1, 0.5, 1)
    channels = read_channels(wav_bytes(agent, user))
    assert channels.shape == (2, SAMPLE_RATE)
    assert np.abs(channels - np.stack([agent, user])).max() < 1 / 32768


@pytest.mark.parametrize(("shape", "rate"), [((4800, 1), SAMPLE_RATE), ((4800, 2), 16000)])
def test_another_recording_is_refused(shape, rate):
    content = io.BytesIO()
    soundfile.write(content, np.zeros(shape), rate, format="WAV")
    with pytest.raises(CorruptFileError, match=f"found {shape[1]} at {rate} Hz"):
        read_channels(content.getvalue())
    with pytest.raises(CorruptFileError, match="must be a WAV file"):
        read_channels(b"no sound")


def test_words_and_turns_stand_in_their_frames():
    spoken = {"role": "agent", "voice_id": "v", "words": (), "text": "x"}
    hello = Word(text="hello", start_s=1.61, end_s=1.9)
    turns = (
        SpokenTurn(**spoken | {"role": "user", "start_s": 0.08, "end_s": 0.8}),
        SpokenTurn(**spoken | {"start_s": 1.6, "end_s": 2.4, "words": (hello,)}),
        SpokenTurn(
            **spoken | {"role": "user", "kind": "backchannel", "start_s": 1.8, "end_s": 2.0}
        ),
    )
    speech = Speech(
        id="a", dialogue_id="a", persona_id="p", scenario_id="s", system_prompt="x",
        first_speaker="user", audio="0" * 64, num_samples=48000, turns=turns,
    )  # fmt: skip
    assert agent_words(speech) == [(20, "hello")]
    assert user_turns(speech) == [Segment(1, 10)]
