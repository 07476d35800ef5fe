"""What checkpoints are asked without talking: known likelihoods, a planted regression, reports."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from moshi.utils.compile import no_compile
from safetensors.torch import load_file, save_file

from duplex.config import EvaluateSection
from duplex.config_train import LossSection
from duplex.streams import TEXT_ROW
from duplex.verdict import least_items
from pipeline.engines.checkpoint import Checkpoint
from pipeline.evaluation.comparison import Report, compare_reports
from pipeline.evaluation.found import measures_csv, report_data
from pipeline.evaluation.likelihood import (
    BASE_CLIPS,
    HELD_OUT,
    LIKELIHOODS,
    likelihood_data,
    teacher_force,
)
from pipeline.evaluation.likelihood_worker import (
    plan_tasks,
    scoring_forward,
    values_of,
)
from pipeline.evaluation.verdicts import failures, verdicts
from tests.stages.conftest import TINY_CARD, TINY_TEXT_CARD
from tests.stages.test_base_clips import base_folder
from tests.stages.test_prompt_swap import persona_clip
from tests.stages.training_factories import (
    make_clip,
    tensor_bytes,
    write_tensors_stage,
)
from training.batches import make_batch
from training.forward import LibraryForward
from training.loss import PADDING, WORDS, StreamSums, coefficients, part_counts
from training.prompt_swap import plan_swaps, score_task

CPU = torch.device("cpu")


def changed(checkpoint, folder, change):
    """A copy of a checkpoint with `change(name, tensor)` in place of each of its LM's tensors."""
    shutil.copytree(checkpoint, folder)
    path = Checkpoint.open(folder).files()["moshi"]
    state = {name: change(name, tensor) for name, tensor in load_file(path).items()}
    save_file(state, path)
    return folder


def uniform(name, tensor):
    """Heads of zeros: each token is as likely as the others."""
    is_head = name.startswith("linears.") or name == "text_linear.weight"
    return torch.zeros_like(tensor) if is_head else tensor


def noisy(seed, share):
    generator = torch.Generator().manual_seed(seed)

    def change(name, tensor):
        noise = torch.randn(tensor.shape, generator=generator)
        return tensor + share * tensor.std() * noise if tensor.dim() == 2 else tensor

    return change


@pytest.fixture(scope="module")
def trained(tiny_checkpoint, tmp_path_factory):
    """The tiny model after some steps on what the clips of these tests repeat."""
    lm = Checkpoint.open(tiny_checkpoint).load_lm().requires_grad_(True).train()
    forward = LibraryForward(lm)
    adam = torch.optim.AdamW(lm.parameters(), lr=3e-3)
    with no_compile():
        for step in range(12):
            clips = [make_clip(f"{n}", 40, seed=1000 + 8 * step + n) for n in range(8)]
            batch = make_batch(clips)
            weights = coefficients(part_counts(batch.codes, batch.loss_mask), LossSection())
            forward(batch.codes, batch.loss_mask, weights)[0].backward()
            adam.step()
            adam.zero_grad()
    state = {name: tensor.detach() for name, tensor in lm.state_dict().items()}
    folder = tmp_path_factory.mktemp("trained") / "model"
    return changed(tiny_checkpoint, folder, lambda name, tensor: state.get(name, tensor))


def by_key(entries, model):
    """Key -> values over the clips of a model."""
    found = {}
    for entry in entries:
        if entry["model"] == model:
            for key, value in entry["values"].items():
                found.setdefault(key, []).append(value)
    return found


# -- values that are known


@pytest.mark.parametrize("library", [False, True])
def test_a_model_that_finds_all_alike_gives_the_log_of_their_number(
    tiny_checkpoint, tmp_path, monkeypatch, library
):
    if library:
        reasons = ["it is another make"]
        monkeypatch.setattr("pipeline.evaluation.likelihood_worker.unsupported", lambda _: reasons)
    folder = changed(tiny_checkpoint, tmp_path / "uniform", uniform)
    forward = scoring_forward(Checkpoint.open(folder).load_lm().eval())
    clips = [persona_clip(f"p{i}", i, num_frames=20 + 3 * i) for i in range(3)]
    for task in plan_swaps(clips, [clips], 2, 0):
        with no_compile():
            values = values_of(HELD_OUT, score_task(forward, task, CPU))
        text, audio = math.log(TINY_TEXT_CARD), math.log(TINY_CARD)
        assert values == {
            "nll_words": pytest.approx(text, abs=1e-5),
            "nll_text": pytest.approx(text, abs=1e-5),
            "nll_semantic": pytest.approx(audio, abs=1e-5),
            "nll_acoustic": pytest.approx(audio, abs=1e-5),
            "margin_words": pytest.approx(0, abs=1e-5),
            "margin_semantic": pytest.approx(0, abs=1e-5),
        }


def test_words_are_told_from_padding_and_the_acoustic_codes_are_a_mean():
    """2 nats a word, 1 a padding, k a code of codebook k; 5 more a word under other prompts."""

    def forward(codes, loss_mask, weights):
        count = part_counts(codes, loss_mask)
        prompt, said = int(codes[0, TEXT_ROW, 1]), int(codes[0, TEXT_ROW, -1])
        nll = count * torch.tensor([0.0, 0, *range(1, 9)])
        nll[PADDING] = count[PADDING]
        nll[WORDS] = count[WORDS] * (2 + 5 * (prompt != said))
        return nll.sum(), StreamSums(nll, count)

    # Of 16 frames of dialogue every fourth is padding.
    clips = [persona_clip(f"p{i}", i, said=200 + i) for i in range(2)]
    for i, clip in enumerate(clips):
        clip.codes[TEXT_ROW, 1 : clip.prompt_frames] = 200 + i
    tasks = plan_swaps(clips, [clips], 3, 0)
    for task in tasks:
        values = values_of(HELD_OUT, score_task(forward, task, CPU))
        assert values == {
            "nll_words": 2.0, "nll_text": 1.75, "nll_semantic": 1.0, "nll_acoustic": 5.0,
            "margin_words": 5.0, "margin_semantic": 0.0,
        }  # fmt: skip
    values = values_of(BASE_CLIPS, score_task(forward, tasks[0], CPU))
    assert set(values) == {m.key for m in LIKELIHOODS if m.group == BASE_CLIPS}
    assert values["base_nll_acoustic"] == 5.0


# -- the stage's part


@pytest.fixture(scope="module")
def scored(trained, tiny_checkpoint, tmp_path_factory):
    """Base: trained; merged: the same with noise on its weights. Sixteen base clips, five held
    out."""
    folder = tmp_path_factory.mktemp("scored")
    worse = changed(trained, folder / "worse", noisy(1, 0.6))
    tensors = write_tensors_stage(
        folder / "tensors", tiny_checkpoint, {"train": [30, 40], "valid": [30, 34, 38, 42, 46]}
    )
    section = EvaluateSection.model_validate(
        {"base_clips": str(base_folder(folder / "base", 20)), "runtime": {"device": "cpu"}}
    )
    checkpoints = {"base": trained, "merged": worse}
    entries = teacher_force(checkpoints, tensors, section, 3, lambda line: None, processes=2)
    return checkpoints, tensors, section, entries


def test_a_planted_regression_is_found_where_there_are_clips_enough(scored):
    *_, entries = scored
    (one,) = verdicts([], ["base", "merged"], entries)
    rows = {row["key"]: row for row in one["rows"]}
    for stream in ("words", "text", "semantic", "acoustic"):
        row = rows[f"base_nll_{stream}"]
        assert (row["word"], row["n"]) == ("regressed", 16), row
        assert row["low"] > 0 and row["p_holm"] <= 0.05
        held_out = rows[f"nll_{stream}"]
        assert held_out["n"] == 5 and held_out["difference"] > 0
        assert held_out["word"] == "inconclusive", "five clips can't show it"
    assert failures([one], ["regressed:base_nll_words"]) == [
        "base_nll_words regressed: base -> merged"
    ]
    # In one family with all that conversations are asked.
    asked = sum(row["p"] is not None for row in one["rows"])
    alone = rows["base_nll_words"]
    assert asked >= 8 and alone["p_holm"] > alone["p"]
    assert least_items(asked) <= 16


def test_the_same_model_twice_shows_no_regression(scored):
    checkpoints, tensors, section, entries = scored
    twice = teacher_force(
        {"base": checkpoints["base"], "merged": checkpoints["base"]}, tensors, section, 3,
        lambda line: None, processes=1,
    )  # fmt: skip
    (one,) = verdicts([], ["base", "merged"], twice)
    measured = [row for row in one["rows"] if row["n"]]
    assert measured and {row["word"] for row in measured} == {"inconclusive"}
    assert {row["difference"] for row in measured} == {0}
    # One process or two, beside another model or not: each value is the same, to its last digit.
    assert by_key(twice, "merged") == by_key(twice, "base") == by_key(entries, "base")


def test_all_models_score_the_same_clips_under_the_same_prompts(scored):
    *_, section, entries = scored
    asked = [
        [{k: v for k, v in e.items() if k not in ("model", "values")} for e in entries
         if e["model"] == model]
        for model in ("base", "merged")
    ]  # fmt: skip
    assert asked[0] == asked[1]
    groups = [entry["group"] for entry in asked[0]]
    assert groups == [HELD_OUT] * 5 + [BASE_CLIPS] * section.clips
    assert all(entry["prompts"] == [] for entry in asked[0] if entry["group"] == BASE_CLIPS)
    frames = {e["clip"]: e["frames"] for e in asked[0] if e["group"] == BASE_CLIPS}
    assert all(number == 30 + int(clip.removeprefix("clip-")) for clip, number in frames.items())


def test_the_clips_taken_follow_the_seed_and_others_prompts_come_from_training_last(
    tiny_checkpoint, tmp_path
):
    """Each held-out clip has a prompt of its own; of a training persona one clip is read."""
    contents = {}
    for number in range(6):
        contents[f"valid-{number}"] = tensor_bytes(
            persona_clip("", number, seed=number).codes.astype(np.int64)
        )
        contents[f"train-{number}"] = tensor_bytes(
            persona_clip("", 10 + number, seed=number).codes.astype(np.int64)
        )
    tensors = write_tensors_stage(
        tmp_path / "tensors", tiny_checkpoint, {"train": [24] * 6, "valid": [24] * 6}, contents
    )
    job = {"tensors": str(tensors.path), "base_clips": None, "clips": 3, "swaps": 9, "seed": 1}
    checkpoint = Checkpoint.open(tiny_checkpoint)
    first = plan_tasks(job, checkpoint)
    assert [group for group, _ in first] == [HELD_OUT] * 3
    for _, task in first:
        names = [other.id for other in task.others]
        assert len(names) == 6 and task.own.id not in names
        assert [name.split("-")[0] for name in names] == ["valid"] * 5 + ["train"]
    chosen = {seed: {task.own.id for _, task in plan_tasks({**job, "seed": seed}, checkpoint)}
              for seed in range(6)}  # fmt: skip
    assert len(set(map(frozenset, chosen.values()))) > 1
    assert chosen[1] == {task.own.id for _, task in first}


# -- what is written


def test_the_report_holds_them_the_same_on_every_run(scored):
    *_, entries = scored
    data = report_data([], about={"name": "x"}, protocol={}, likelihood=entries)
    assert data["likelihood"]["clips"] == entries
    again = report_data([], about={"name": "x"}, protocol={}, likelihood=entries)
    assert json.dumps(data) == json.dumps(again)
    found = likelihood_data(entries, ["base", "merged"])
    assert found is not None
    rows = {row["key"]: row["by_model"] for row in found["summary"]}
    values = by_key(entries, "base")["base_nll_words"]
    base = rows["base_nll_words"]["base"]
    assert base["n"] == 16 and base["value"] == pytest.approx(np.mean(values), abs=1e-6)
    assert base["low"] < base["value"] < base["high"]
    assert rows["margin_words"]["base"]["n"] == 5
    assert rows["margin_words"]["base"]["low"] > 0, "a prompt tells where the figure stands"
    lines = measures_csv({"summary": [], "groups": [], "likelihood": found}).splitlines()
    assert lines[1].startswith("held_out,nll_words,base,")
    assert any(line.startswith("base_clips,base_nll_words,merged,") for line in lines)
    assert likelihood_data([], ["base"]) is None
    bare = [{**e, "values": {**e["values"], "margin_words": None}} for e in entries]
    found = likelihood_data(bare, ["base", "merged"])
    assert found is not None
    (row,) = [row for row in found["summary"] if row["key"] == "margin_words"]
    assert row["by_model"]["base"] == {"value": None, "n": 0, "low": None, "high": None}
    (one,) = verdicts([], ["base", "merged"], bare)
    assert {r["word"] for r in one["rows"] if r["key"] == "margin_words"} == {"not measured"}


def test_reports_are_compared_on_the_clips_that_both_have_scored(scored):
    """Another run holds out others: those are left out, though they bear the same name."""
    *_, entries = scored

    def report(model, spoilt=()):
        clips = [
            {**e, "content": "other"} if e["clip"] in spoilt else e
            for e in entries
            if e["model"] == model
        ]
        return Report.model_validate({
            "models": [{"label": model}], "protocol": {}, "items": [], "conversations": [],
            "likelihood": {"clips": clips},
        })  # fmt: skip

    reports = {"one": report("base"), "two": report("merged", {"valid-0", "valid-1"})}
    (one,) = compare_reports(reports)
    rows = {row["key"]: row for row in one["rows"]}
    assert (rows["nll_words"]["n"], rows["base_nll_words"]["n"]) == (3, 16)
    assert rows["base_nll_words"]["word"] == "regressed"
    talk = {"item": "one", "seed": 0, "model": "base", "sums": {"response_rate": [1, 2]}}
    old = Report.model_validate({
        "models": [{"label": "base"}], "protocol": {}, "items": [{"item": "one"}],
        "conversations": [talk],
    })  # fmt: skip
    (one,) = compare_reports({"one": old, "two": old})
    assert "nll_words" not in {row["key"] for row in one["rows"]}
