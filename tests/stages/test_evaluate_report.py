"""The report's page: hostile text, players, what it claims; its audio and its drawings."""

import base64
import io
import re
import wave
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile

from duplex.files import sha256_bytes
from duplex.metrics import Segment
from pipeline.evaluation import report
from pipeline.evaluation.audio import opus_bytes, wav_bytes
from pipeline.evaluation.drawing import Track, curves, timeline
from pipeline.evaluation.found import training_curves
from pipeline.evaluation.play import PlaySettings, evaluate_urls
from pipeline.evaluation.report import page_files, show
from tests.stages.planted_server import Plan, planted, spoken, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)"> {{ 7 * 7 }} ]]> &amp;'
PROTOCOL = {"seed": 0, "seconds": 6.4, "sampling": {"text_topk": 25}}
LOG = [
    {"kind": kind, "step": step, "loss": 9.0 - step, "streams":
     {"text": 3.0, "text_nonpad": None, "semantic": 2.0, "acoustic_1": 4.0, "acoustic_2": 6.0}}
    for step in range(3) for kind in ("train", "valid")
]  # fmt: skip


class Page(HTMLParser):
    """What a browser would find: elements with their attributes, and the text around them."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def played_by(plans, items):
    settings = PlaySettings(tokenizer=tiny_tokenizer())
    played = []
    for label, plan in plans.items():
        with planted(plan) as url:
            played += evaluate_urls({label: url}, items, settings, lambda line: None)
    return played


@pytest.fixture(scope="module")
def hostile():
    """Two models' conversations in which whoever can write something writes markup."""
    items = [
        spoken(text_prompt=HOSTILE, user_turns=[f"one {HOSTILE}", "two"]),
        spoken(item_id="angry-bob", seconds=2, first_speaker="agent"),
    ]
    plans = {
        "base": Plan(
            tokenizer=tiny_tokenizer(), says={3: HOSTILE, 30: f" {HOSTILE}"}, proves=False
        ),
        "merged": Plan(
            tokenizer=tiny_tokenizer(), echo=2, digest="<b>digest", model_digest=HOSTILE
        ),
    }
    return played_by(plans, items)


def render(played, about=None, log=LOG):
    about = {"name": HOSTILE, "base": "pocket", "items": HOSTILE} | (about or {})
    fixed, loose = page_files(played, {}, about=about, protocol=PROTOCOL, training=log)
    return {name: content.decode() for name, content in {**fixed, **loose}.items()}


# -- the page


def test_nothing_that_was_written_becomes_markup(hostile):
    for name in ("report.html", "index.html"):
        page = Page(render(hostile)[name])
        assert len(page.all("script")) == (name == "report.html")
        assert page.all("img") == page.all("b onerror") == []
        for _, attributes in page.elements:
            assert not any(key.startswith("on") for key in attributes)
        assert "<script>alert(1)</script>" in page.text
        assert "{{ 7 * 7 }}" in page.text


def test_the_page_needs_nothing_from_elsewhere_and_lets_no_foreign_script_run(hostile):
    source = render(hostile)["report.html"]
    page = Page(source)
    for _, attributes in page.elements:
        for key in ("src", "href", "action", "poster"):
            assert (attributes.get(key) or "data:").startswith("data:")
    assert "@import" not in source and "url(" not in source
    policy = next(m["content"] for m in page.all("meta") if "http-equiv" in m)
    script = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)[-1]
    digest = base64.b64encode(bytes.fromhex(sha256_bytes(script.encode()))).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")


def test_every_conversation_has_a_player_with_its_own_audio(hostile):
    page = Page(render(hostile)["report.html"])
    players = page.all("audio")
    assert len(players) == 4
    assert all("controls" in player for player in players)
    durations = []
    for player in players:
        kind, _, content = player["src"].partition(",")
        assert kind == "data:audio/ogg;base64"
        info = soundfile.info(io.BytesIO(base64.b64decode(content)))
        assert (info.format, info.subtype, info.channels) == ("OGG", "OPUS", 2)
        durations.append(info.duration)
    assert durations == pytest.approx([6.4, 6.4, 2, 2], abs=0.05)


def test_audio_past_the_budget_is_named_instead(hostile, monkeypatch):
    monkeypatch.setattr(report, "AUDIO_BUDGET_BYTES", 1000)
    page = Page(render(hostile)["report.html"])
    assert page.all("audio") == []
    assert "conversations/angry-ann.s0.base.wav" in page.text


def test_the_page_says_what_is_not_proven_not_played_and_not_shown(hostile):
    text = Page(render(hostile)["report.html"]).text
    assert "4 of 4 prompts are not proven" in text
    assert "the server said nothing about the prompt" in text
    assert "other tokens were fed: digest <b>digest" in text
    assert "2 of 4 user turns are not played" in text
    assert "2 of 2" in text  # conversations that differ
    assert "Loss that was minimised: 9 → 7" in text
    assert "Training" not in Page(render(hostile, log=[])["report.html"]).text


def test_the_pocket_model_is_named_and_only_what_was_shown_is_claimed(hostile):
    changed = " ".join(Page(render(hostile)["report.html"]).text.split())
    assert "This is the pocket model" in changed and "seldom tells the right fact" in changed
    assert "it says that the path works, from the prompt to these numbers." in changed
    same = [hostile[0], hostile[0]]
    unchanged = " ".join(Page(render(same)["report.html"]).text.split())
    assert "these conversations do not show" in unchanged
    assert "pocket model" not in Page(render(hostile, {"base": "owner/name"})["report.html"]).text


def test_one_server_by_itself_has_a_page_too(hostile):
    page = Page(render(hostile[:1])["report.html"])
    assert len(page.all("audio")) == 2
    assert "−" not in [cell.get("data-name") for cell in page.all("td")]


def test_the_protocol_stands_on_the_page(hostile):
    text = Page(render(hostile)["report.html"]).text
    for part in ("seed", "text topk 25", "speech threshold, dBFS", "−45"):
        assert part in text


def test_eight_conversations_stay_under_ten_megabytes():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=24_000 * 12) * 0.1  # what random weights say; the worst for Opus
    embedded = 2 * 8 * len(base64.b64encode(opus_bytes(noise, noise)))
    assert embedded < report.AUDIO_BUDGET_BYTES < 9_000_000


# -- audio and drawings


def test_recordings_hold_the_agent_to_the_left_and_the_user_to_the_right():
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(48_000) / 24_000)
    agent, user = tone.copy(), tone.copy()
    agent[24_000:], user[:24_000] = 0, 0
    with wave.open(io.BytesIO(wav_bytes(agent, user))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24_000, 2, 2)
        pcm = np.frombuffer(file.readframes(48_000), dtype="<i2").reshape(-1, 2) / 32768
    assert pcm[:, 0] == pytest.approx(agent, abs=1e-4)
    assert pcm[:, 1] == pytest.approx(user, abs=1e-4)
    heard, rate = soundfile.read(io.BytesIO(opus_bytes(agent, user)))
    assert (rate, heard.shape[1]) == (24_000, 2)
    first, second = np.sqrt((heard[:24_000] ** 2).mean(0)), np.sqrt((heard[24_000:] ** 2).mean(0))
    assert first[0] > 2 * first[1] and second[1] > 2 * second[0]


def test_a_timeline_shows_each_word_at_its_frame_and_each_segment():
    words = [(0, "a"), (1, "<b>"), (40, "c" * 50), (79, "end")]
    silence = np.zeros(80 * 1920)
    track = Track(silence, silence, [Segment(8, 16)], [Segment(2, 4)], [Segment(2, 4)], words)
    svg = ElementTree.fromstring(timeline(track, 'a "label" & more'))
    texts = [e for e in svg.iter("text") if e.get("class") == "word"]
    assert {e.text for e in texts} == {"a", "<b>", "c" * 23 + "…", "end"}
    boxes = list(svg.iter("rect"))
    assert [e.get("class") for e in boxes] == ["speech user", "speech agent"]
    width = (float(svg.get("data-end")) - float(svg.get("data-start"))) / 80
    assert float(boxes[1].get("width")) == pytest.approx(8 * width, abs=0.1)
    assert float(boxes[1].get("x")) == pytest.approx(46 + 8 * width, abs=0.1)


def test_words_that_find_no_row_are_counted_not_lost_in_silence():
    crowd = [(0, f"word{i}") for i in range(20)]
    silence = np.zeros(80 * 1920)
    drawing = timeline(Track(silence, silence, [], [], [], crowd), "x")
    assert "+ 12 more words" in drawing


def test_curves_hold_every_point_and_survive_a_flat_or_empty_one():
    svg = ElementTree.fromstring(curves({"train": [(1, 9.0), (2, 3.0)], "valid": [(0, 5.0)]}, "x"))
    assert len(list(svg.iter("circle"))) == 1
    assert len(list(svg.iter("path"))) == 1
    for points in ([(1, 2.0)], [(1, 0.0), (2, 0.0)], []):
        ElementTree.fromstring(curves({"train": points}, "x"))
    found = training_curves(LOG)
    assert set(found) == {"loss", "text", "semantic", "acoustic"}  # no words: no curve
    assert found["acoustic"]["valid"] == [[0, 5.0], [1, 5.0], [2, 5.0]]
    assert found["loss"]["train"] == [[0, 9.0], [1, 8.0], [2, 7.0]]


@pytest.mark.parametrize(
    ("value", "signed", "shown"),
    [
        (None, False, "–"), (0.0, True, "0"), (-0.001, True, "0"), (1.5, True, "+1.5"),
        (-12.0, True, "−12"), (3, False, "3"), (100, False, "100"), (-45.0, False, "−45"),
        (True, False, "yes"), ("text", False, "text"), (0.075, False, "0.07"),
    ],
)  # fmt: skip
def test_numbers_for_reading(value, signed, shown):
    assert show(value, signed) == shown


def test_the_verdict_stands_first_in_its_direction():
    """A silent model and one that answers, twelve times each."""
    items = [spoken(item_id=f"item-{number}") for number in range(12)]
    played = played_by({"silent": Plan(), "answers": Plan(echo=13)}, items)
    for pair, word in ((played, "improved"), (played[::-1], "regressed")):
        page = Page(render_of(pair))
        assert f"Turns answered {word}" in page.text
        rows = [cell["class"] for cell in page.all("td") if cell.get("data-name") == "verdict"]
        assert word in rows and "inconclusive" in rows
        assert page.text.index("Verdict:") < page.text.index("What was run")
    few = Page(render_of([replace(one, conversations=one.conversations[:4]) for one in played]))
    assert "Nothing can be concluded" in few.text and "A verdict takes 6 items at least" in few.text


def render_of(played):
    _, loose = page_files(played, {}, about={"name": "n"}, protocol=PROTOCOL, training=[])
    return loose["report.html"].decode()
