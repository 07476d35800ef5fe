"""What the profiles change in training: which frames carry loss, -1 in the text row, epochs."""

import numpy as np
import pytest
import torch

from duplex.config_train import TrainSection
from duplex.errors import CorruptFileError, RequestError
from duplex.records import TensorClip
from duplex.streams import TEXT_PAD, ZERO_TOKEN
from pipeline.train import TrainStage, check_split, with_steps
from pipeline.training_data import check_base_split
from tests.stages.training_factories import (
    PROMPT_FRAMES,
    make_codes,
    make_config,
    run_stage,
    tensor_bytes,
    write_tensors_stage,
)  # fmt: skip
from training.batches import make_batch, read_clips


def clips_of(folder, *, on_prompt):
    return read_clips(
        folder, folder.records(), crop_frames=100, card=64, text_card=340, loss_on_prompt=on_prompt
    )


def test_prompt_frames_carry_loss_only_when_asked(tmp_path, tiny_checkpoint):
    folder = write_tensors_stage(tmp_path / "t", tiny_checkpoint, {"train": [30]})
    masked, free = (make_batch(clips_of(folder, on_prompt=on)) for on in (False, True))
    assert not masked.loss_mask[0, :, :PROMPT_FRAMES].any()
    assert free.loss_mask[0, :, :PROMPT_FRAMES].all()
    after = slice(PROMPT_FRAMES, None)
    assert torch.equal(masked.loss_mask[..., after], free.loss_mask[..., after])
    assert torch.equal(masked.codes, free.codes)


def test_a_crop_has_to_leave_dialogue_all_the_same(tmp_path, tiny_checkpoint):
    folder = write_tensors_stage(tmp_path / "t", tiny_checkpoint, {"train": [30]})
    with pytest.raises(RequestError, match="frames after its prompt"):
        read_clips(
            folder, folder.records(), crop_frames=PROMPT_FRAMES, card=64, text_card=340,
            loss_on_prompt=True,
        )  # fmt: skip


def test_the_predecessors_padding_is_read_where_the_record_says_so(tmp_path, tiny_checkpoint):
    codes = make_codes(1, 30)
    codes[0, codes[0] == TEXT_PAD] = ZERO_TOKEN
    contents = {"train-0": tensor_bytes(codes)}
    folder = write_tensors_stage(
        tmp_path / "zero", tiny_checkpoint, {"train": [30]}, contents, padding="zero"
    )
    (clip,) = clips_of(folder, on_prompt=False)
    assert np.array_equal(clip.codes, codes)
    refused = write_tensors_stage(tmp_path / "pad", tiny_checkpoint, {"train": [30]}, contents)
    with pytest.raises(CorruptFileError, match="found -1 in row 0"):
        clips_of(refused, on_prompt=False)


@pytest.mark.parametrize(
    ("epochs", "clips", "batch", "steps"), [(2, 10, 1, 20), (2, 10, 4, 5), (0.1, 3, 4, 1)]
)
def test_epochs_take_the_place_of_steps(epochs, clips, batch, steps):
    section = TrainSection(epochs=epochs, batch_size=batch, steps=999)
    assert with_steps(section, clips).steps == steps
    assert with_steps(TrainSection(steps=7), clips).steps == 7


def test_a_run_in_the_predecessors_way(tmp_path, tiny_checkpoint):
    """-1 in the text row, loss on the prompt, its unnormalised loss, one epoch of three clips."""
    lengths = {"train": [50, 60, 40], "valid": [40]}
    contents = {}
    for number, length in enumerate(lengths["train"]):
        codes = make_codes(number, length)
        codes[0, codes[0] == TEXT_PAD] = ZERO_TOKEN
        contents[f"train-{number}"] = tensor_bytes(codes)
    folder = write_tensors_stage(
        tmp_path / "tensors", tiny_checkpoint, lengths, contents, padding="zero"
    )
    loss = {"normalize": "none", "prompt": True, "text_padding_weight": 1}
    config = make_config(tiny_checkpoint, epochs=1, batch_size=1, loss=loss)
    trained = run_stage(TrainStage(), config, tmp_path / "train", tensors=folder)
    facts = {record.id: record for record in trained.records()}["adapter"].facts
    assert facts["steps"] == 3
    initial = facts["valid_initial"]
    expected = initial["text"] + 100 * initial["semantic"]
    expected += sum(initial[f"acoustic_{k}"] for k in range(1, 8)) / 7
    assert initial["loss"] == pytest.approx(expected, rel=1e-5)


def clip_record(name, split, **changes):
    fields = {
        "id": name, "speech_id": name, "persona_id": name, "tensor": f"{ord(name[0]):064x}",
        "num_frames": 9, "prompt": (), "turns": (), "text_tokens": 1, "dropped_tokens": 0,
        "alignment": "onset", "split": split, "codec_digest": "0" * 64,
        "tokenizer_digest": "0" * 64,
    }  # fmt: skip
    return TensorClip.model_validate(fields | changes)


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({}, False),
        ({"tensor": f"{ord('a'):064x}"}, True),
        ({"text_digest": "1" * 64}, True),
        ({"dialogue_id": "a"}, True),
        ({"persona_id": "a"}, False),  # bound to be so in a split by conversation
        ({"persona_id": "a", "split_by": "persona"}, True),
        ({"voices": ("v",), "split_by": "persona"}, True),
    ],
)
def test_nothing_is_trained_on_that_is_validated_on(change, refused):
    shared = {k: v for k, v in change.items() if k in ("text_digest", "voices", "split_by")}
    records = [clip_record("a", "train", **shared), clip_record("b", "valid", **change)]
    if refused:
        with pytest.raises(RequestError, match="must share nothing"):
            check_split(records)
    else:
        check_split(records)


@pytest.mark.parametrize("own", [[], [("a", "train"), ("b", "valid")]])
def test_base_data_does_not_validate_what_it_trains_on(own):
    """Two base folders may have cut the same dialogues another way."""
    clips = [clip_record(*one) for one in own]
    base = [clip_record("c", "train"), clip_record("d", "valid")]
    check_base_split(clips, base)
    for split, name in (("train", "d"), ("valid", "c")):
        again = clip_record(name, split, id="other", speech_id="other")
        with pytest.raises(RequestError, match="1 text"):
            check_base_split(clips, [*base, again])
        if clips:
            with pytest.raises(RequestError, match="base data included"):
                check_base_split([again], base)
