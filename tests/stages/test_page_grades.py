"""Grades that people give on the page: what a line holds, as a browser sends it."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import soundfile

from duplex.files import read_lines
from pipeline.evaluation.items import PlaceWords
from pipeline.evaluation.people import exchanges_of, read_people
from pipeline.serving import wire
from pipeline.serving.hearing import Recognition
from tests.stages.browser_helpers import IN_BROWSER, connect, in_browser
from tests.stages.serving_helpers import PROMPT, user_pcm

PERSONAS = ({"id": "marcus", "name": "Marcus", "text_prompt": PROMPT},)

pytestmark = IN_BROWSER


def test_a_grade_is_kept_with_what_was_said(tiny_speaker, tmp_path):
    from playwright.async_api import expect

    path = tmp_path / "grades.jsonl"

    async def look(page, url):
        await page.goto(wire.page_url(url, PROMPT) + "&seed=3")
        await connect(page)
        await expect(page.locator(".transcript")).not_to_be_empty()
        await page.click("#stop")
        # What the form says by now is not what was held.
        await page.fill("#prompt", "You are somebody else entirely.")
        await page.fill("#note", "In character “throughout”.")
        await page.click("text=Good")
        await expect(page.locator("#graded")).to_have_text("Kept as good.")
        await page.click("text=Perfect")
        await expect(page.locator("#graded")).to_have_text("Kept as perfect.")
        files = []
        page.on("download", lambda download: files.append(download))
        await page.click("#save")
        await page.wait_for_timeout(800)
        (record,) = [one for one in files if one.suggested_filename.endswith(".json")]
        saved.append(json.loads(Path(await record.path()).read_text()))
        await connect(page)
        await expect(page.locator("#note")).to_have_value("")

    saved = []
    assert in_browser(tiny_speaker, look, grades=path, personas=PERSONAS) == []
    assert saved[0]["text_prompt"] == PROMPT and saved[0]["seed"] == 3
    other, kept = read_lines(path)
    assert other["conversation"] == kept["conversation"] != "" and other["grade"] == "good"
    assert (kept["grade"], kept["persona"], kept["seed"]) == ("perfect", "marcus", 3)
    assert kept["note"] == "In character “throughout”." and kept["words"][0]["text"]
    assert kept["model_digest"] == tiny_speaker.model_digest
    assert kept["text_prompt"] == PROMPT and kept["heard"] == []
    for line in kept["words"]:
        starts = line["at_s"]
        assert len(starts) == len(line["text"].split()) and starts == sorted(starts)
        assert line["start_s"] <= starts[0]


def test_a_grade_holds_what_the_server_heard_of_the_user(tiny_speaker, tmp_path):
    """A WAV as microphone and a recogniser that knows one sentence: our grade needs its words."""
    from playwright.async_api import expect

    beep = np.concatenate([user_pcm(12), np.zeros(40 * 1920, np.float32)])
    soundfile.write(tmp_path / "mic.wav", beep, 24_000)
    told = Recognition(SimpleNamespace(transcribe=lambda *_: [SimpleNamespace(text="your name")]))

    async def look(page, url):
        await page.goto(wire.page_url(url, PROMPT))
        await connect(page, "#talk")
        await expect(page.locator(".transcript")).to_contain_text("You: your name", timeout=20_000)
        await page.click("#stop")
        await expect(page.locator("#kept")).to_contain_text("yours where this page shows them")
        await page.click("text=Poor")
        await expect(page.locator("#graded")).to_have_text("Kept as poor.")

    options = {"grades": tmp_path / "grades.jsonl", "recognition": told}
    assert in_browser(tiny_speaker, look, microphone=tmp_path / "mic.wav", **options) == []
    (kept,) = read_people(tmp_path / "grades.jsonl").grades
    assert kept.heard and kept.heard[0].text == "your name"
    assert 0 <= kept.heard[0].start_s < kept.heard[0].end_s < kept.seconds
    assert exchanges_of(kept, PlaceWords())[0].user == "your name"
