"""The guards: what each check finds, what it says, and that training does not notice it."""

import json
import math

import numpy as np
import pytest
import torch
from moshi.utils.compile import no_compile

from duplex.config_train import TrainSection
from duplex.streams import TEXT_PAD, TEXT_ROW
from pipeline.engines.checkpoint import Checkpoint
from tests.stages.training_factories import LORA, PROMPT_FRAMES, make_codes, write_tensors_stage
from training.batches import Clip, make_batch, read_clips
from training.forward import LibraryForward
from training.guards import Guards, StopTraining, due_frame, score
from training.lora import adapter_parameters, add_adapters, target_modules
from training.loss import coefficients, part_counts

FREE_SECONDS = 1.6  # 20 frames


def persona_clip(name, persona, num_frames=36, turns=()):
    codes = make_codes(len(name), num_frames)
    codes[TEXT_ROW, :PROMPT_FRAMES] = [TEXT_PAD] + [20 + persona] * (PROMPT_FRAMES - 1)
    # Words that do not repeat: a dialogue that loops is no reference for a loop.
    codes[TEXT_ROW, PROMPT_FRAMES:] = 100 + np.arange(num_frames - PROMPT_FRAMES)
    codes[TEXT_ROW, PROMPT_FRAMES::5] = TEXT_PAD
    return Clip(name, codes.astype(np.int16), PROMPT_FRAMES, PROMPT_FRAMES, turns)


VALID = [persona_clip(f"v{i}", i) for i in range(3)]
TRAIN = [persona_clip(f"train{i}", 10 + i) for i in range(4)]


def section_of(**guards):
    guards = {"clips": 2, "swaps": 2, "free_seconds": FREE_SECONDS} | guards
    return TrainSection(steps=10, validate_every=4, guards=guards)


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    lm = Checkpoint.open(tiny_checkpoint).load_lm()
    add_adapters(lm, LORA.model_copy(update={"dropout": 0.3}), target_modules(lm), seed=3)
    return lm.train()


@pytest.fixture
def stuck(model):
    """`stuck(token)`: from now on the text head says that token and no other."""
    hooks = []

    def stick(token):
        def bias(module, args, output):
            output[..., token] += 1e4
            return output

        hooks.append(model.text_linear.register_forward_hook(bias))

    yield stick
    for hook in hooks:
        hook.remove()


def guards_of(model, said=None, valid=VALID, train=TRAIN, **guards):
    report = said.append if said is not None else lambda message: None
    return Guards(
        model, LibraryForward(model), section_of(**guards), seed=1, valid_clips=valid,
        train_clips=train, report=report, decode=lambda tokens: " ".join(map(str, tokens)),
    )  # fmt: skip


def test_a_check_of_a_model_that_speaks(model):
    said = []
    line = guards_of(model, said)(4)
    assert json.loads(json.dumps(line, allow_nan=False)) == line
    assert line["collapse"] is None
    nll = line["nll"]
    assert line["score"] == pytest.approx(nll["text_nonpad"] + nll["semantic"])
    margin = line["margin"]
    assert margin["swaps"] == 4 and margin["prompts_of_training"] == 0
    assert margin["words"]["clips"] == 2
    assert margin["words"]["low"] < margin["words"]["mean"] < margin["words"]["high"]
    runs = line["free"]["runs"]
    assert len(runs) == 2 and all(run["num_frames"] == 20 for run in runs)
    assert runs[0]["reference"]["text_tokens"] == 16
    assert len(runs[0]["said"].split()) <= runs[0]["text_tokens"]
    assert sum(line["budget"]["gradient_shares"].values()) == pytest.approx(1)
    assert len(said) == 1 and said[0].startswith("guards at step 4: prompt margin ")
    assert "text tokens/s freely (held out 10.0)" in said[0]


def test_a_check_repeats_and_the_base_has_no_score(model):
    guards = guards_of(model)
    before, again = guards(0), guards(0)
    assert before == again and before["score"] is None and before["nll"]["semantic"] > 0
    streams = {"text_nonpad": 2.0, "semantic": 3.0, "acoustic_1": 9.0}
    assert guards(4, streams)["score"] == 5.0, "the whole validation, where there was one"


@pytest.mark.parametrize(("token", "collapse"), [(TEXT_PAD, "silence"), (77, "repetition")])
def test_a_collapsed_model_is_caught_and_never_chosen(model, stuck, token, collapse):
    stuck(token)
    said = []
    line = guards_of(model, said)(4, {"text_nonpad": 0.1, "semantic": 0.1})
    assert line["collapse"] == collapse and line["score"] is None
    (warning,) = [message for message in said if message.startswith("warning: collapse")]
    assert collapse in warning and line["reason"] in warning


def test_a_collapse_stops_training_only_where_asked_and_once_it_began(model, stuck):
    stuck(TEXT_PAD)
    guards = guards_of(model, on_collapse="stop")
    assert guards(0)["collapse"] == "silence"
    with pytest.raises(StopTraining, match=r"collapse \(silence\) after 4 updates: 0 text") as stop:
        guards(4)
    assert stop.value.line["collapse"] == "silence" and stop.value.line["score"] is None


def test_without_a_hook_the_same_model_is_no_collapse(model):
    assert guards_of(model, on_collapse="stop")(4)["collapse"] is None


def test_guards_can_be_left_out_one_by_one(model):
    alone = guards_of(model, swaps=0, free_seconds=0)(4)
    assert alone["margin"] is None and alone["free"] is None and alone["collapse"] is None
    assert alone["score"] is not None and alone["budget"]
    nothing = guards_of(model, valid=[], clips=0, free_seconds=0)(4)
    assert nothing["score"] is None and nothing["nll"]["semantic"] is None
    for without in ({"train": []}, {"budget": False}):
        assert guards_of(model, free_seconds=0, swaps=0, **without)(4)["budget"] is None


def test_prompts_of_training_clips_fill_up_and_a_lack_is_said(model):
    said = []
    line = guards_of(model, said, valid=VALID[:1], free_seconds=0)(0)
    assert line["margin"]["prompts_of_training"] == line["margin"]["swaps"] == 2
    assert line["margin"]["words"]["low"] is None, "one clip has no interval"
    assert not [message for message in said if "not checked" in message]
    guards_of(model, said, valid=VALID[:1], train=VALID[:1], free_seconds=0)(0)
    assert "found none" in said[-1] and "the prompt is not checked" in said[-1]


def test_checks_are_due_where_the_section_says():
    def due(**guards):
        section = TrainSection(steps=10, validate_every=4, guards=guards)
        return [step for step in range(11) if section.guards_due(step)]

    assert due() == [0, 4, 8, 10]
    assert due(every=2) == [0, 2, 4, 6, 8, 10]
    assert due(every=8) == [0, 8, 10]


def test_the_score_takes_words_and_semantic_codes_alone():
    assert score({"text": 9.0, "text_nonpad": 1.5, "semantic": 2.0, "acoustic_1": 7.0}) == 3.5
    assert score({"text_nonpad": None, "semantic": 2.0}) == 2.0
    assert score({"text_nonpad": 1.0, "semantic": None}) is None
    assert score({}) is None and score({"semantic": math.inf}) is None


def test_an_answer_is_due_at_the_end_of_the_users_first_turn(tmp_path, tiny_checkpoint):
    user_first = (("user", 8, 15), ("agent", 17, 30))
    assert due_frame(persona_clip("a", 0, turns=user_first)) == 7
    assert due_frame(persona_clip("a", 0, turns=user_first[::-1])) == 7, "in order of time"
    assert due_frame(persona_clip("a", 0, turns=(("agent", 9, 15), ("user", 17, 30)))) == 0
    assert due_frame(persona_clip("a", 0)) == 0
    spans = [{"label": label, "start": a, "end": b} for label, a, b in user_first]
    folder = write_tensors_stage(tmp_path / "t", tiny_checkpoint, {"train": [40]}, turns=spans)
    (clip,) = read_clips(folder, folder.records(), crop_frames=60, card=64, text_card=340)
    assert clip.turns == user_first, "the clip knows what its record says"


def losses(folder, with_guards):
    """Four steps with dropout, whose random numbers go on from step to step."""
    lm = Checkpoint.open(folder).load_lm()
    add_adapters(lm, LORA.model_copy(update={"dropout": 0.3}), target_modules(lm), seed=3)
    forward = LibraryForward(lm)
    # The budget ends in training mode, so that a check without it must show that modes come back.
    checks = [guards_of(lm, train=[]), guards_of(lm)] * 2
    parameters = list(adapter_parameters(lm).values())
    adam = torch.optim.AdamW(parameters, lr=5e-3)
    torch.manual_seed(11)
    batch = make_batch(TRAIN)
    weights = coefficients(part_counts(batch.codes, batch.loss_mask), section_of().loss)
    found = []
    lm.train()
    with no_compile():
        for step in range(4):
            if with_guards:
                checks[step](4 * step if step < 2 else 10)
            loss, _ = forward(batch.codes, batch.loss_mask, weights)
            loss.backward()
            adam.step()
            adam.zero_grad(set_to_none=True)
            found.append(loss.item())
    return found, [parameter.detach().clone() for parameter in parameters]


def test_training_is_the_same_with_guards_and_without(tiny_checkpoint):
    (plain, plain_end), (watched, watched_end) = (losses(tiny_checkpoint, on) for on in (0, 1))
    assert plain == watched and len(set(plain)) == 4
    assert all(torch.equal(a, b) for a, b in zip(plain_end, watched_end, strict=True))
