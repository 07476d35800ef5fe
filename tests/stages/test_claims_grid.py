"""A claim measured for real at a small size: `python -m benchmarks.claims`, cut off and gone on."""

import json

import pytest

from benchmarks.claims import __main__ as command
from benchmarks.claims import cells, page, plan

SMALL = {
    "personas.only": "[angry-marcus, nervous-mei, friendly-june]",
    "dialogues.per_persona": "1",
    "dialogues.min_turns": "4",
    "dialogues.max_turns": "4",
    "tensors.valid_fraction": "0.34",
    "train.steps": "2",
    "train.batch_size": "1",
    "train.crop_frames": "200",
    "evaluate.items": "[data/prompts/seeds.yaml]",
    "evaluate.seconds": "8",
    "evaluate.base_clips": "null",
    "evaluate.clips": "2",
}


def small(name, folder):
    places = ["--work", str(folder / "work"), "--out", str(folder / "out")]
    settings = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
    return [name, "--seeds", "1", *places, *settings]


@pytest.mark.slow
def test_a_small_grid_goes_on_where_it_was_cut_off(tmp_path, monkeypatch, capsys):
    arguments = small("prompt-loss", tmp_path)
    evaluated = []
    real = cells.evaluate

    def cut_off_at_the_second(config, *more):
        evaluated.append(config.train.loss.prompt)
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        return real(config, *more)

    monkeypatch.setattr(cells, "evaluate", cut_off_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        command.main(arguments)
    assert not (tmp_path / "out" / "prompt-loss.json").exists()
    assert command.main(arguments) == 0
    assert evaluated == [False, True, True]  # the first cell was not evaluated again

    result = json.loads((tmp_path / "out" / "prompt-loss.json").read_text())
    claim = plan.load_claim("prompt-loss")
    text = (tmp_path / "out" / "prompt-loss.md").read_text()
    assert text == page.describe("prompt-loss", claim, result)
    answered = next(one for one in result["measures"] if one["key"] == "response_rate")
    assert {row["arm"] for row in answered["rows"]} == {"masked", "with-loss"}
    assert all(row["trials"] > 0 for row in answered["rows"])
    # Both are trained models, and not the same one.
    nll = next(one for one in result["measures"] if one["key"] == "nll_words")
    assert nll["rows"][0]["value"] != nll["rows"][1]["value"]
    assert list((tmp_path / "work" / "pocket").glob("07-merge-*")) == []


@pytest.mark.slow
def test_a_merge_that_is_refused_is_a_result(tmp_path):
    """Two steps at 1e-5: what rounding to bfloat16 does to the logits is more than they did."""
    assert command.main(small("merge-dtype", tmp_path)) == 0
    result = json.loads((tmp_path / "out" / "merge-dtype.json").read_text())
    refused = {arm["arm"]: arm["refused"] for arm in result["arms"]}
    assert {arm for arm, why in refused.items() if why} == {"1e-5, bfloat16", "2e-6, bfloat16"}
    assert (
        "| refused with 1 of 1 seeds: its rounding error is "
        in (tmp_path / "out" / "merge-dtype.md").read_text()
    )
    rounding = {arm["arm"]: arm["rounding"] for arm in result["arms"]}
    assert rounding["2e-3, float32"] == rounding["2e-3, bfloat16"]  # of the same adapters
    low, high = rounding["2e-6, bfloat16"], rounding["2e-3, bfloat16"]
    assert low["changed"] < 0.5 * high["changed"] and low["error"] > 2 * high["error"] > 0
    nll = next(one for one in result["measures"] if one["key"] == "nll_words")
    words = {row["arm"]: row.get("word") for row in nll["rows"]}
    assert words["1e-5, bfloat16"] == "not measured" != words["2e-3, bfloat16"]
