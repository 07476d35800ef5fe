"""The pocket base's files: what comes back, what is refused, what fits together."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from duplex.errors import CorruptFileError, MissingInputError, WorkError
from pipeline.engines.checkpoint import Checkpoint
from pipeline.engines.pocket import build_lm
from tests.stages.conftest import TINY_LM_CONFIG, TINY_TEXT_CARD
from training.pocket import base_weights
from training.pocket.base_pack import Pack, load_pack, save_pack
from training.pocket.weights import codes_digest, load_codec, save_codec

FACTS = {"steps": 9, "seed": 1, "codec": "c", "utterances": {"seed": 1, "small": False}}


def test_weights_come_back_within_half_a_step_of_eight_bits(tmp_path):
    lm = build_lm(TINY_LM_CONFIG, 3)
    base_weights.save_base(tmp_path, lm, TINY_LM_CONFIG, FACTS, b"tokens")
    loaded = base_weights.load_base(tmp_path)
    for name, weight in lm.state_dict().items():
        back = loaded.state_dict()[name]
        if weight.dim() == 2 and weight.numel() >= base_weights.SMALLEST:
            step = weight.abs().amax(1, keepdim=True) / 127
            assert ((back - weight).abs() <= 0.51 * step + 1e-6).all(), name
        else:
            assert torch.equal(back, weight), name
    assert not torch.equal(
        loaded.state_dict()["text_linear.weight"], lm.state_dict()["text_linear.weight"]
    )


def test_files_that_are_not_there_or_damaged_are_named(tmp_path):
    with pytest.raises(MissingInputError, match=r"base.json"):
        base_weights.load_base(tmp_path)
    write_tiny_base(tmp_path)
    (tmp_path / base_weights.WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(CorruptFileError, match=r"goes with weights of sha256"):
        base_weights.load_base(tmp_path)
    write_tiny_base(tmp_path)
    (tmp_path / base_weights.TOKENIZER).write_bytes(b"of another base")
    with pytest.raises(CorruptFileError, match=r"goes with tokenizer of sha256"):
        base_weights.load_base(tmp_path)
    for content in ("[]", "{", "{}"):
        (tmp_path / base_weights.CONFIG).write_text(content)
        with pytest.raises(CorruptFileError, match=r"base.json"):
            base_weights.load_base(tmp_path)
    write_tiny_base(tmp_path)
    (tmp_path / base_weights.TOKENIZER).unlink()
    with pytest.raises(MissingInputError, match=r"tokenizer.model"):
        base_weights.load_base(tmp_path)


def write_tiny_base(folder, tokens=b"tokens", codec="c"):
    lm, facts = build_lm(TINY_LM_CONFIG, 3), FACTS | {"codec": codec}
    base_weights.save_base(folder, lm, TINY_LM_CONFIG, facts, tokens)


def test_eight_bits_without_their_scale_are_refused():
    tensors = base_weights.packed(build_lm(TINY_LM_CONFIG, 3).state_dict())
    assert base_weights.unpacked(tensors)
    name = next(name for name in tensors if name.endswith(base_weights.SCALE))
    with pytest.raises(ValueError, match="pairs"):
        base_weights.unpacked({n: t for n, t in tensors.items() if n != name})


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    lm = build_lm(TINY_LM_CONFIG, 3)
    with torch.no_grad():
        lm.text_linear.weight[0, 0] = torch.nan
    with pytest.raises(WorkError, match="text_linear"):
        base_weights.save_base(tmp_path, lm, TINY_LM_CONFIG, {}, b"")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_trained_weights_opens_like_any_other(tmp_path, tiny_checkpoint, codec):
    source, folder = tmp_path / "base", tmp_path / "checkpoint"
    folder.mkdir()
    mimi_config = json.loads((tiny_checkpoint / "mimi_config.json").read_text())
    save_codec(codec.mimi, mimi_config, tmp_path / "codec")
    tokens = (tiny_checkpoint / "tokenizer.model").read_bytes()
    write_tiny_base(source, tokens, codes_digest(load_codec(tmp_path / "codec")))
    base_weights.write_pocket_checkpoint(folder, source, tmp_path / "codec")
    opened = Checkpoint.open(folder)
    assert opened.load_tokenizer().get_piece_size() == TINY_TEXT_CARD
    loaded = opened.load_lm("cpu", torch.float32).state_dict()
    assert all(
        torch.equal(loaded[name], weight)
        for name, weight in base_weights.load_base(source).state_dict().items()
    )
    assert load_codec(tmp_path / "codec").cardinality == opened.load_mimi().cardinality


def test_a_base_is_not_joined_to_a_codec_of_other_codes(tmp_path, tiny_checkpoint, codec):
    mimi_config = json.loads((tiny_checkpoint / "mimi_config.json").read_text())
    save_codec(codec.mimi, mimi_config, tmp_path / "codec")
    write_tiny_base(tmp_path / "base", codec="of another")
    with pytest.raises(CorruptFileError, match="has other codes"):
        base_weights.write_pocket_checkpoint(tmp_path, tmp_path / "base", tmp_path / "codec")
    assert not list(tmp_path.glob("*.*"))


def test_what_decides_the_codes_is_all_but_the_decoder(codec):
    mimi = copy.deepcopy(codec.mimi)
    before = codes_digest(mimi)
    with torch.no_grad():
        mimi.decoder.model[0].conv.conv.weight.add_(1)
        mimi.quantizer.rvq_first.output_proj.weight.add_(1)
    assert codes_digest(mimi) == before
    with torch.no_grad():
        mimi.quantizer.rvq_first.input_proj.weight.add_(1)
    assert codes_digest(mimi) != before


def test_a_pack_gives_back_what_was_put_into_it(tmp_path, bank, phones):
    path = tmp_path / "work" / "bank.safetensors"
    save_pack(path, Pack(bank, phones, b"pieces", "codec", "grammar", "voices", 1.5, 4, True))
    found = load_pack(path)
    assert found.bank.units == bank.units and found.bank.tokens == bank.tokens
    assert all(np.array_equal(a, b) for a, b in zip(found.bank.codes, bank.codes, strict=True))
    assert found.bank.rooms.keys() == bank.rooms.keys()
    assert all(np.array_equal(found.bank.rooms[name], bank.rooms[name]) for name in bank.rooms)
    assert found.phones.names == phones.names and found.phones.sounds.keys() == phones.sounds.keys()
    for place, sounds in phones.sounds.items():
        assert np.array_equal(found.phones.sounds[place].phones, sounds.phones)
        assert found.phones.sounds[place].word_ends == sounds.word_ends
    assert (found.tokenizer, found.codec) == (b"pieces", "codec")
    assert (found.grammar, found.voices) == ("grammar", "voices")
    assert found.seconds == 1.5 and found.drawn_by == {"seed": 4, "small": True}


def test_a_damaged_pack_is_named(tmp_path, bank, phones):
    path = tmp_path / "bank.safetensors"
    with pytest.raises(MissingInputError, match="codes-only"):
        load_pack(path)
    save_pack(path, Pack(bank, phones, b"", "codec", "grammar", "voices", 0, 1, False))
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole.replace(b'"names"', b'"nomes"', 1), b""):
        path.write_bytes(damaged)
        with pytest.raises(CorruptFileError, match=r"bank\.safetensors"):
            load_pack(path)
    tensors = load_file(path_of(tmp_path, whole))
    for name, wrong in (
        ("codes", tensors["codes"] + np.int16(30_000)),
        ("codes", tensors["codes"].astype(np.float32)),
        ("codes", tensors["codes"][0]),
        ("phones", tensors["phones"] + np.int16(900)),
        ("frames", np.append(tensors["frames"], np.int32(0))),
        ("room.quiet", tensors["room.quiet"][:3]),
    ):
        with safe_open(tmp_path / "whole.safetensors", framework="np") as file:
            save_file(tensors | {name: wrong}, path, metadata=file.metadata())
        with pytest.raises(CorruptFileError, match="must hold"):
            load_pack(path)
    for key, wrong in (
        ("tokens", "[1]"),
        ("units", "[3]"),
        ("names", "[" * 5000),
        ("seconds", "x"),
    ):
        with safe_open(tmp_path / "whole.safetensors", framework="np") as file:
            save_file(tensors, path, metadata=file.metadata() | {key: wrong})
        with pytest.raises(CorruptFileError, match=r"bank\.safetensors"):
            load_pack(path)
    with pytest.raises(CorruptFileError):
        load_pack(tmp_path)
    tensors = load_file(path_of(tmp_path, whole))
    tensors["frames"] = tensors["frames"] + 1
    with safe_open(path_of(tmp_path, whole), framework="np") as file:
        save_file(tensors, path, metadata=file.metadata())
    with pytest.raises(CorruptFileError, match="lengths add up"):
        load_pack(path)


def path_of(folder, content):
    path = folder / "whole.safetensors"
    path.write_bytes(content)
    return path
