"""Pages of many thousand dialogues: what is shown is bounded, and says what it leaves out."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import pipeline.pages.dialogue_page as dialogue_page
from duplex.config import Config
from duplex.stage import StageContext
from duplex.store import StageFolder
from pipeline.engines import near_duplicates
from pipeline.engines.near_duplicates import MAX_COMPARED, mean_similarity
from pipeline.pages import speech_page
from pipeline.pages.drawing import MAX_ROWS
from tests.factories import dialogue, persona
from tests.stages.test_pages import spoken

CONFIG = Config.model_validate({"name": "toy"})


def test_the_speech_page_shows_the_first_rows_and_how_many_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = spoken(("user", 0, 2, "turn"), ("agent", 2.5, 5, "turn"))
    many = [
        one.model_copy(update={"id": f"d{i:04d}", "persona_id": f"p{i:04d}"})
        for i in range(MAX_ROWS + 7)
    ]
    faults = {str(i): {"task": f"lost-{i}", "message": "so", "error": "x"} for i in range(900)}
    monkeypatch.setattr(speech_page, "finished_speech", lambda folder: many)
    monkeypatch.setattr(StageFolder, "rejected", lambda self: faults)
    page = speech_page.render(StageFolder(tmp_path, "speech", ""), CONFIG, {}, {})
    assert page.count("Who speaks when in") == page.count("<audio") == MAX_ROWS
    assert page.count("<td>lost-") == MAX_ROWS
    assert f"{MAX_ROWS + 7} dialogues of {MAX_ROWS + 7} personas" in page
    assert "900 rejected" in page and "400 are left out here" in page
    assert page.count("7 are left out here") == 2


def test_the_dialogue_page_shows_the_first_personas_and_how_many_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"p-{i:04d}" for i in range(MAX_ROWS + 7)]
    people = [persona(name) for name in names]
    many = [dialogue(f"{name}.x.00", persona_id=name) for name in names]
    monkeypatch.setattr(dialogue_page, "finished_dialogues", lambda folder: many)
    monkeypatch.setattr(StageContext, "records", lambda self, stage, kind: iter(people))
    page = dialogue_page.render_page(
        StageFolder(tmp_path, "dialogues", ""), StageContext(CONFIG, tmp_path)
    )
    assert page and f"<b>{MAX_ROWS + 7}</b> personas" in page
    assert page.count('<div class="facts">') == MAX_ROWS and "; 7 are left out here" in page


def test_the_likeness_of_many_texts_is_that_of_a_sample_and_the_same_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = random.Random(3)
    texts = [" ".join(draw.choices("abcdef", k=30)) for _ in range(MAX_COMPARED + 60)]
    compared = []
    jaccard = near_duplicates.jaccard
    monkeypatch.setattr(
        near_duplicates, "jaccard", lambda a, b: compared.append(1) or jaccard(a, b)
    )
    found = mean_similarity(texts)
    assert len(compared) == MAX_COMPARED * (MAX_COMPARED - 1) // 2
    assert mean_similarity(texts) == found
    monkeypatch.setattr(near_duplicates, "MAX_COMPARED", len(texts))
    assert found == pytest.approx(mean_similarity(texts), rel=0.05)
