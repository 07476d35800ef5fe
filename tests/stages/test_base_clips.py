"""Base clips come from outside: what is read of them, and what is refused by name."""

import pickle

import numpy as np
import pytest
import torch

from duplex.config import Config, EvaluateSection
from duplex.errors import CorruptFileError, MissingInputError, RequestError
from duplex.streams import TEXT_ROW, CodecTokens, build_prompt
from pipeline.evaluate import EvaluateStage
from pipeline.evaluation.likelihood import base_clip_digests, protocol_of_clips, teacher_force
from pipeline.evaluation.likelihood_worker import read_base_clips
from tests.stages.conftest import TINY_CARD, TINY_TEXT_CARD
from tests.stages.training_factories import make_codes, tensor_bytes, write_tensors_stage

SIZES = {"card": TINY_CARD, "text_card": TINY_TEXT_CARD}


def base_folder(folder, count):
    """Clips of 30, 31 … frames."""
    folder.mkdir()
    for number in range(count):
        codes = make_codes(50 + number, 30 + number)
        (folder / f"clip-{number:02d}.pt").write_bytes(tensor_bytes(codes))
    return folder


def prompted(num_frames=30):
    tokens = CodecTokens(tuple(range(8)), tuple(range(8, 16)))
    prompt = build_prompt([21, 22, 23, 21], tokens).training_codes()
    return np.concatenate([prompt, make_codes(1, num_frames)], axis=1), prompt.shape[1]


def test_a_prompt_of_a_base_clip_carries_no_loss(tmp_path):
    codes, prompt_frames = prompted()
    (tmp_path / "a.pt").write_bytes(tensor_bytes(codes))
    (tmp_path / "b.pt").write_bytes(tensor_bytes(make_codes(2, 20).astype(np.int16)))
    bare = make_codes(3, 20)
    bare[TEXT_ROW, 4:9] = -1
    (tmp_path / "c.pt").write_bytes(tensor_bytes(bare))
    one, other, last = read_base_clips(tmp_path, 3000, **SIZES)
    assert (one.prompt_frames, one.loss_from) == (prompt_frames, prompt_frames)
    assert np.array_equal(one.codes, codes) and one.id == "a"
    assert (other.prompt_frames, other.num_frames, last.num_frames) == (0, 20, 20)
    assert read_base_clips(tmp_path, 25, **SIZES)[0].num_frames == 25
    with pytest.raises(RequestError, match=r"a\.pt must have frames after its prompt"):
        read_base_clips(tmp_path, prompt_frames, **SIZES)


class Hostile:
    def __reduce__(self):
        return (print, ("it ran",))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (pickle.dumps(Hostile()), "pickled objects"),
        (b"", "it is empty"),
        (b"PK\x03\x04 and rubbish", "no file of torch.save"),
        (tensor_bytes(torch.zeros(17, 9)), "real numbers"),
        (tensor_bytes(torch.zeros(9, 9, dtype=torch.int64)), r"shape must be \[17, T\]"),
        (tensor_bytes(np.full((17, 9), TINY_CARD)), "audio codes must be in"),
        (tensor_bytes(torch.zeros(17, 1, dtype=torch.int64).expand(17, 1 << 30)), "more than any"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_clip_is_refused_by_name(tmp_path, content, why, capsys):
    (tmp_path / "fine.pt").write_bytes(tensor_bytes(make_codes(0, 9)))
    (tmp_path / "odd.pt").write_bytes(content)
    with pytest.raises(CorruptFileError, match=rf"evaluate\.base_clips: .*odd\.pt: .*{why}"):
        read_base_clips(tmp_path, 3000, **SIZES)
    assert capsys.readouterr().out == ""


def test_a_damaged_base_clip_ends_the_evaluation_with_its_name(tiny_checkpoint, tmp_path):
    tensors = write_tensors_stage(tmp_path / "tensors", tiny_checkpoint, {"valid": [30]})
    folder = base_folder(tmp_path / "base", 2)
    (folder / "clip-01.pt").write_bytes(pickle.dumps(Hostile()))
    section = EvaluateSection.model_validate(
        {"base_clips": str(folder), "runtime": {"device": "cpu"}}
    )
    with pytest.raises(CorruptFileError, match=r"clip-01\.pt"):
        teacher_force({"base": tiny_checkpoint}, tensors, section, 3, lambda line: None)


def test_a_folder_that_is_not_there_or_holds_nothing_is_told_before_anything_runs(tmp_path):
    for folder, why in ((tmp_path / "nowhere", "no such folder"), (tmp_path, r"no \.pt in it")):
        evaluate = {"base_clips": str(folder)}
        config = Config.model_validate({"name": "tiny", "evaluate": evaluate})
        with pytest.raises(MissingInputError, match=why):
            EvaluateStage().files(config)
        off = Config.model_validate({"name": "tiny", "evaluate": evaluate | {"clips": 0}})
        EvaluateStage().files(off)


def test_the_key_follows_the_bytes_of_base_clips(tmp_path):
    folder = base_folder(tmp_path / "base", 2)
    config = Config.model_validate({"name": "tiny", "evaluate": {"base_clips": str(folder)}})
    before = EvaluateStage().files(config)
    protocol = protocol_of_clips(config.evaluate)
    assert EvaluateStage().files(config) == before and len(base_clip_digests(str(folder))) == 2
    (folder / "clip-01.pt").write_bytes(tensor_bytes(make_codes(9, 50)))
    assert EvaluateStage().files(config) != before
    after = protocol_of_clips(config.evaluate)
    assert after["base_clips"] != protocol["base_clips"] is not None
    assert protocol_of_clips(EvaluateSection(clips=0))["base_clips"] is None
