"""Training a codec: what is kept, what is resumed, what is written. A tiny one, on noise."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from moshi.models.loaders import get_mimi
from moshi.utils.compile import no_compile

from duplex.datafiles import CHECKOUT
from duplex.errors import CorruptFileError, MissingInputError
from duplex.files import sha256_file
from pipeline.engines.pocket import MIMI_CONFIG
from training.pocket import codec_command
from training.pocket.__main__ import main
from training.pocket.codec_labels import PhoneSet
from training.pocket.codec_loop import CodecRecipe, CodecTrainer, build
from training.pocket.codec_losses import mel_distance
from training.pocket.quantizer import codebooks, stop_leak
from training.pocket.speech_pool import Tape, record_tape, speak
from training.pocket.weights import WEIGHTS, load_codec, save_codec

POCKET = CHECKOUT / "data" / "pocket"


def tiny_config():
    config = copy.deepcopy(MIMI_CONFIG)
    config["seanet"] |= {"n_filters": 2, "dimension": 16}
    config["quantizer"] = {
        "dimension": 8, "n_q": 4, "bins": 16, "input_dimension": 16, "output_dimension": 16,
    }  # fmt: skip
    config["transformer"] |= {
        "d_model": 16, "num_heads": 2, "num_layers": 1, "dim_feedforward": 32,
        "input_dimension": 16, "output_dimensions": [16],
    }  # fmt: skip
    return config


def tiny_recipe(**changes):
    return CodecRecipe(
        **{"steps": 6, "decoder_steps": 6, "seed": 3, "crops": ((3, 3), (2, 4)), "valid": (2, 4),
           "config": tiny_config()} | changes
    )  # fmt: skip


@pytest.fixture(scope="module")
def tape():
    """Ten seconds of bursts; their loudness is the class."""
    rng = np.random.default_rng(0)
    labels = np.repeat(rng.integers(0, 2, 50), 20).astype(np.int16)
    noise = rng.normal(0, 3000, len(labels) * 240) * np.repeat(labels, 240)
    return Tape(noise.astype(np.int16), labels, PhoneSet(("_", "a")))


def trainer(tape, work, recipe=None):
    return CodecTrainer(recipe or tiny_recipe(), tape, tape, work)


def run(trainer, **options):
    with no_compile():
        return trainer.run(every=4, report=lambda line: None, **options)


# -- the leak


@pytest.mark.parametrize("stopped", [True, False])
def test_codebooks_keep_no_graph_and_the_package_alone_keeps_one(stopped):
    with no_compile():
        torch.manual_seed(0)
        mimi = get_mimi(None, tiny_config(), num_codebooks=4).train()
        if stopped:
            stop_leak(mimi)
        for _ in range(12):  # the last codebook starts in the fourth and looks every fifth
            mimi(torch.randn(2, 1, 3 * 1920))
    kept = [codebook.embedding_sum.grad_fn is not None for codebook in codebooks(mimi)]
    assert kept == [not stopped] * 4


def test_unused_codes_are_still_replaced():
    with no_compile():
        torch.manual_seed(0)
        mimi = get_mimi(None, tiny_config(), num_codebooks=4).train()
        stop_leak(mimi)
        first = next(codebooks(mimi))
        mimi(torch.randn(2, 1, 3 * 1920))
        first.embedding_sum[5] = 1e4  # far from every latent
        first.cluster_usage[5] = 1e-4
        for _ in range(first.check_unused_every):
            mimi(torch.randn(2, 1, 3 * 1920))
    assert first.embedding[5].abs().max() < 1e3


def test_with_its_first_weights_the_decoder_hears_its_latents(tape, tmp_path):
    """As the library draws them, replacing the latents by zeros changes next to nothing."""
    sound = torch.from_numpy(tape.samples[: 20 * 1920].astype(np.float32) / 32768)[None, None]

    def effect(mimi):
        latent = mimi.quantizer.rvq_first.output_proj(
            mimi.quantizer.rvq_first.input_proj(mimi.encode_to_latent(sound, quantize=False))
        )
        with_it, without = (mimi.decoder(mimi.upsample(one)) for one in (latent, 0 * latent))
        return float((with_it - without).std() / with_it.std())

    with torch.no_grad(), no_compile():
        fresh, _ = build(tiny_recipe(), 2)
        assert effect(fresh) < 0.05
        assert effect(trainer(tape, tmp_path).mimi) > 0.5


# -- resuming


def test_a_run_that_was_stopped_ends_with_the_same_bytes(tape, tmp_path):
    whole = trainer(tape, tmp_path / "whole")
    assert run(whole) == 0
    first = trainer(tape, tmp_path / "parts")
    assert run(first, until=8) == 0
    second = trainer(tape, tmp_path / "parts")
    assert run(second) == 8
    expected, found = whole.mimi.state_dict(), second.mimi.state_dict()
    assert {name for name in expected if not torch.equal(expected[name], found[name])} == set()
    assert second.log == whole.log


@torch.no_grad()
def test_in_the_second_part_the_codes_stand_still_and_the_decoder_learns(tape, tmp_path):
    one = trainer(tape, tmp_path)
    sound = torch.from_numpy(tape.samples[: 20 * 1920].astype(np.float32) / 32768)[None, None]
    with torch.enable_grad():
        run(one, until=6)
    codes = one.mimi.encode(sound)
    decoded = one.mimi.decode(codes)
    with torch.enable_grad():
        run(one)
    assert torch.equal(one.mimi.encode(sound), codes)
    assert not torch.equal(one.mimi.decode(codes), decoded)


def test_another_seed_is_another_run(tape, tmp_path):
    run(trainer(tape, tmp_path), until=4)
    assert run(trainer(tape, tmp_path, tiny_recipe(seed=4)), until=4) == 0


@pytest.mark.slow  # the command trains, too
def test_another_tape_is_another_run(tape):
    recipe, louder = tiny_recipe(), replace(tape, samples=tape.samples // 2)
    renamed = replace(tape, phones=PhoneSet(("_", "b")))
    found = {recipe.identity(tape, other) for other in (tape, louder, renamed)}
    assert len(found) == 3 and recipe.identity(tape, tape) in found


def test_training_lowers_the_losses(tape, tmp_path):
    one = trainer(tape, tmp_path, tiny_recipe(steps=60, decoder_steps=0, warmup_steps=5))
    with no_compile():
        one.run(every=20, report=lambda line: None)
    assert one.log[-1]["magnitude"] < 0.85 * one.log[0]["magnitude"]
    assert one.log[-1]["mel"] < 0.85 * one.log[0]["mel"]


def test_the_phone_head_teaches_the_first_codebook_alone(tape, tmp_path):
    """The gradient of the phone loss reaches the first codebook's projection and no other's."""
    one = trainer(tape, tmp_path, tiny_recipe(weights={
        "mel": 0.0, "magnitude": 0.0, "wave": 0.0, "commitment": 0.0, "phone": 1.0,
    }))  # fmt: skip
    with no_compile():
        one.train_step(0)
    quantizer = one.mimi.quantizer
    assert quantizer.rvq_first.input_proj.weight.grad.abs().max() > 0
    assert quantizer.rvq_rest.input_proj.weight.grad.abs().max() == 0


# -- files


def test_what_is_written_is_read_again_in_half_precision(tape, tmp_path):
    one = trainer(tape, tmp_path / "work")
    run(one, until=4)
    save_codec(one.mimi, tiny_config(), tmp_path)
    read = load_codec(tmp_path)
    for name, tensor in one.mimi.state_dict().items():
        stored = tensor if "._codebook." in name else tensor.half().float()
        assert torch.equal(read.state_dict()[name], stored), name
    assert (tmp_path / WEIGHTS).stat().st_size < 3 * sum(p.numel() for p in read.parameters())


def test_a_weight_beyond_half_precision_is_refused(tape, tmp_path):
    one = trainer(tape, tmp_path / "work")
    next(one.mimi.parameters()).data.fill_(1e6)
    with pytest.raises(ValueError, match="below 65504"):
        save_codec(one.mimi, tiny_config(), tmp_path)
    assert not (tmp_path / WEIGHTS).exists()


def test_missing_and_foreign_weights_say_so(tape, tmp_path):
    with pytest.raises(MissingInputError, match="train it first"):
        load_codec(tmp_path)
    one = trainer(tape, tmp_path / "work")
    other = tiny_config()
    other["seanet"]["n_filters"] = 3
    save_codec(one.mimi, other, tmp_path)
    with pytest.raises(CorruptFileError, match="must fit"):
        load_codec(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"no safetensors")
    with pytest.raises(CorruptFileError, match="must be safetensors"):
        load_codec(tmp_path)


# -- speech


def test_the_tape_is_the_same_again_and_names_what_sounds():
    one, again = record_tape(5, 0.2), record_tape(5, 0.2)
    assert np.array_equal(one.samples, again.samples) and np.array_equal(one.labels, again.labels)
    assert len(one.samples) == 240 * len(one.labels)
    levels = np.sqrt(np.mean(np.square(one.samples.reshape(-1, 240).astype(float)), axis=1))
    silent = one.labels == 0
    assert np.median(levels[silent]) < 0.05 * np.median(levels[~silent])


def test_held_out_texts_are_no_training_texts():
    def texts(held_out):
        spoken = speak(0, held_out=held_out)
        return {next(spoken).text for _ in range(40)}

    assert texts(True) & texts(False) == set()


# -- the command


def test_the_command_writes_codec_and_card_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("training.pocket.codec_loop.MIMI_CONFIG", tiny_config())
    monkeypatch.setattr(codec_command, "EVERY", 2)
    arguments = ["codec", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    arguments += ["--steps", "2", "--decoder-steps", "1", "--minutes", "0.1"]
    assert main(arguments) == 0
    card = (tmp_path / "out/CODEC.md").read_text()
    assert "2 steps of" in card and "then 1 for the decoder" in card
    assert "0.1 minutes of English" in card
    before = (tmp_path / "out" / WEIGHTS).read_bytes()
    assert main(arguments) == 0  # nothing left to do
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == before
    config = json.loads((tmp_path / "out/codec.json").read_text())
    assert config["quantizer"]["n_q"] == 4


def test_an_unknown_command_is_refused(capsys):
    assert main(["voice"]) == 2
    assert "must be codec or base" in capsys.readouterr().err


# -- the codec that is shipped


@pytest.fixture(scope="module")
def shipped():
    return load_codec(POCKET)


@torch.no_grad()
def test_frame_by_frame_gives_the_codes_of_the_whole_file(shipped):
    spoken = next(speak(0, held_out=True))
    frames = len(spoken.samples) // 1920
    audio = torch.from_numpy(spoken.samples[: frames * 1920])[None, None]
    whole = shipped.encode(audio)
    with shipped.streaming(1):
        streamed = torch.cat([shipped.encode(part) for part in audio.split(1920, dim=2)], dim=2)
    assert torch.equal(streamed, whole)


@torch.no_grad()
def test_what_is_decoded_is_nearer_to_its_original_than_another_utterance_is(shipped):
    spoken = speak(0, held_out=True)
    one, other = (torch.from_numpy(next(spoken).samples[: 12 * 1920])[None, None] for _ in "ab")
    decoded = shipped.decode(shipped.encode(one))
    assert mel_distance(decoded, one) < 0.5 * mel_distance(other, one)


def test_the_card_is_that_of_the_weights():
    card = (POCKET / "CODEC.md").read_text()
    assert sha256_file(POCKET / WEIGHTS) in card
    assert (POCKET / WEIGHTS).stat().st_size < 8e6
