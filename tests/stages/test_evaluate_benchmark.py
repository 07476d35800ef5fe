"""The benchmark of evaluations: what it counts, on a tiny model."""

import json

import numpy as np
import pytest

from benchmarks import evaluate, evaluate_page
from duplex.config import EvaluateSection, SamplingSection
from pipeline.evaluation import offline
from tests.stages.planted_server import spoken

HOT = SamplingSection(text_temperature=1.2, audio_temperature=1.2)


def test_the_page_is_of_the_figures_beside_it():
    result = json.loads((evaluate.RESULTS / "evaluate.json").read_text())
    assert (evaluate.RESULTS / "evaluate.md").read_text() == evaluate_page.describe(result)


@pytest.mark.slow
def test_a_hundred_calls_are_all_different_and_of_one_length():
    items = evaluate.spoken_items(100, 20)
    assert {one.num_frames for one in items} == {250}
    assert len({one.item.id for one in items}) == 100
    assert len({one.samples.tobytes() for one in items}) == 100
    assert all(one.turns for one in items)


def test_what_was_made_is_kept_by_what_it_hangs_on(tmp_path):
    made = iter(range(9))
    for hangs_on, expected in ((1, 0), (1, 0), (2, 1), (1, 0)):
        assert evaluate.kept(tmp_path, "it", hangs_on, lambda: next(made)) == expected


@pytest.mark.slow
def test_conversations_held_both_ways_are_compared(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(offline, "SECONDS_A_PROCESS", 6)  # of twelve
    # One slot everywhere: a random model's likeliest token hangs on how sums are rounded.
    tiny = {"slots": 1, "count": 3, "seconds": 4.0, "rounds": 2, "sample": 2}
    found = evaluate.speed(tiny_checkpoint, tmp_path, **tiny)
    assert [found["equal"][way]["held"] for way in ("alone", "together")] == [3, 2]
    for equal in found["equal"].values():
        assert equal["texts"] == equal["audio"] == equal["held"] and equal["steps"] == 0
    first = found["rounds"][0]
    assert first["info"]["processes"] == 2 and first["repeats"] is True
    a_minute = 60 * 3 / first["batch"]["wall_s"]
    assert first["batch"]["a_minute"] == pytest.approx(a_minute, rel=0.01)
    assert found["ratios"]["alone"][0] == pytest.approx(a_minute / first["alone"]["a_minute"], 0.01)


@pytest.mark.slow
def test_another_conversation_is_not_called_equal(tiny_checkpoint):
    items = [spoken(item_id="a", seconds=4, user_turns=["Hm"])]
    tokenizer = evaluate.tokenizer_of(tiny_checkpoint)
    one, other = (
        evaluate.play_checkpoint(
            "x", tiny_checkpoint, items,
            evaluate.PlaySettings(seeds=(0,), sampling=sampling), print, tokenizer=tokenizer,
        )
        for sampling in (evaluate.GREEDY, HOT)
    )  # fmt: skip
    same, different = evaluate._equal(one, one), evaluate._equal(one, other)
    assert (same["held"], same["texts"], same["audio"], same["steps"]) == (1, 1, 1, 0)
    assert (different["held"], different["texts"], different["audio"]) == (1, 0, 0)
    assert different["steps"] > 0


@pytest.mark.slow
def test_every_pair_of_seeds_is_a_verdict_of_its_own(tiny_checkpoint, tmp_path, monkeypatch):
    items = [spoken(item_id=f"i{n}", seconds=4, user_turns=["Hm " * (n + 1)]) for n in range(6)]
    section = EvaluateSection(sampling=HOT, seconds=4)
    found = evaluate.false_verdicts(
        tiny_checkpoint, section, tmp_path, slots=4, pairs=2, spoken=items
    )
    assert found["pairs"] == 2 and found["items"] == 6
    words = found["measures"]["words"]
    assert words["cells"] == 2 and words["median_items"] == 6
    assert found["cells"] == sum(row["cells"] for row in found["measures"].values())
    assert found["hits"] == sum(row["hits"] for row in found["measures"].values())
    assert found["unlike"] > 0
    able = [row for row in found["measures"].values() if row["median_items"] >= 6]
    assert 0 < found["able"]["cells"] == sum(row["cells"] for row in able) < found["cells"]
    monkeypatch.setattr(evaluate, "play_checkpoint", None)  # what was played is kept
    again = evaluate.false_verdicts(
        tiny_checkpoint, section, tmp_path, slots=4, pairs=2, spoken=items
    )
    assert again == found


def test_dealing_moves_seeds_within_an_item():
    held = [{"item": i, "seed": s, "sums": (i, s)} for i in "abcdef" for s in range(4)]
    dealt = evaluate._deal(held, np.random.default_rng(0))
    assert sorted(one["sums"] for one in dealt) == sorted(one["sums"] for one in held)
    assert all(one["item"] == one["sums"][0] for one in dealt)
    assert {(one["item"], one["seed"]) for one in dealt} == {(o["item"], o["seed"]) for o in held}
    came = {tuple(o["sums"][1] for o in dealt if o["seed"] == seed) for seed in range(4)}
    assert all(len(set(seeds)) > 1 for seeds in came)  # no longer one seed for all items


def test_verdicts_that_are_there_are_counted():
    rows = [{"p": p, "p_holm": 3 * p, "n": 6} for p in (0.01, 0.05, 0.5)]
    found = evaluate._shares(rows)
    assert (found["cells"], found["hits"], found["after_holm"]) == (3, 2, 1)
    assert found["low"] < found["share"] == 2 / 3 < found["high"]


def test_power_grows_with_items_and_shrinks_among_many():
    found = evaluate.power((6, 40), draws=60)["by_trials"]
    for by_number in found.values():
        assert by_number["6"]["among"] == 0  # six items can't be sure among thirty
        assert by_number["40"]["alone"] > by_number["6"]["alone"]
        assert all(row["among"] <= row["alone"] for row in by_number.values())
    assert found["4"]["40"]["alone"] > 0.9


@pytest.mark.slow
def test_the_size_of_the_page_is_that_of_its_parts(tiny_checkpoint, tmp_path):
    models = {"base": tiny_checkpoint, "tuned": tiny_checkpoint}
    found = evaluate.page_size(
        models, EvaluateSection(sampling=HOT), tmp_path, conversations=4, seconds=4
    )
    assert found["conversations"] == 4 and found["players"] == 4
    assert 0 < found["audio_bytes"] + found["drawing_bytes"] < found["bytes"]
    assert np.isfinite(found["made_s"])
