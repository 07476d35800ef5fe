"""The checks of a merge hold only as far as the streamed model does: it is moshi's own, layer by
layer, and its unmerged adapter is PEFT's."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from duplex.errors import CorruptFileError
from pipeline.engines.checkpoint import Checkpoint
from tests.stages.conftest import write_tiny_checkpoint
from tests.stages.training_factories import changed_adapter, fused, make_adapter
from training.streamed import Unmerged, streamed_lm
from training.verify import all_logits, base_and_unmerged, seeded_codes


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint, tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("a") / "adapter", tiny_checkpoint)


def by_peft(checkpoint, adapter):
    """Logits of the base and of base + adapter: PEFT's loader, moshi's forward, all at once."""
    from peft import PeftModel

    lm = Checkpoint.open(checkpoint).load_lm()
    codes = seeded_codes(lm)
    base = all_logits(lm, codes)
    return base, all_logits(PeftModel.from_pretrained(lm, str(adapter)).eval(), codes)


def assert_close(found, expected):
    assert found.shape == expected.shape
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 1e-5, error


@pytest.mark.parametrize("form", ["split", "fused"])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"lora_alpha": 3}])
def test_it_gives_what_peft_gives(tiny_checkpoint, adapter, tmp_path, form, config):
    base = fused(tiny_checkpoint, tmp_path / "fused") if form == "fused" else tiny_checkpoint
    changed = changed_adapter(adapter, tmp_path / "a", lambda state: None, config)
    expected = by_peft(base, changed)
    for found, wanted in zip(base_and_unmerged(Checkpoint.open(base), changed), expected,
                             strict=True):  # fmt: skip
        assert_close(found, wanted)
    assert not torch.allclose(*expected, atol=0.01)


@pytest.mark.slow  # float32 and eight steps: above
def test_a_bfloat16_file_and_sixteen_steps_give_it_too(tmp_path):
    wide = write_tiny_checkpoint(tmp_path / "wide", dep_q=16)
    path = wide / "model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(path).items()}, path)
    adapter = make_adapter(tmp_path / "a", wide)
    found = base_and_unmerged(Checkpoint.open(wide), adapter)
    for one, wanted in zip(found, by_peft(wide, adapter), strict=True):
        assert_close(one, wanted)


def test_one_part_stands_in_memory_at_a_time(tiny_checkpoint, adapter, monkeypatch):
    """But for the first embedding, which the model asks for its device."""
    held = []
    with streamed_lm(Checkpoint.open(tiny_checkpoint), adapter) as lm:
        total = sum(p.numel() for p in lm.parameters())

        def count(module, inputs):
            held.append(sum(p.numel() for p in lm.parameters() if not p.is_meta))

        for module in lm.modules():
            if not list(module.children()):
                module.register_forward_pre_hook(count)
        all_logits(lm, seeded_codes(lm).repeat(2, 1, 1))
        assert [name for name, p in lm.named_parameters() if not p.is_meta] == ["emb.0.weight"]
        assert all(m.a is None for m in lm.modules() if isinstance(m, Unmerged))
    largest = max(sum(p.numel() for p in layer.parameters())
                  for layer in [*lm.transformer.layers, *lm.depformer.layers])  # fmt: skip
    assert max(held) <= largest + lm.emb[0].weight.numel() < total / 3


def damage(folder, change):
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda s: s.pop("linears.3.weight"), "linears.3"),
        (lambda s: s.update({"linears.9.weight": torch.zeros(2)}), "found others: linears.9"),
        (lambda s: s.update({"text_linear.weight": torch.zeros(2, 2)}), "text_linear"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, change, fault):
    folder = write_tiny_checkpoint(tmp_path / "base")
    damage(folder, change)
    with pytest.raises(CorruptFileError, match=fault) as caught, \
         streamed_lm(Checkpoint.open(folder)) as lm:  # fmt: skip
        all_logits(lm, seeded_codes(lm))
    assert "model.safetensors" in str(caught.value)


def test_the_whole_layer_list_is_streamed(tiny_checkpoint):
    """Codebooks, layers and heads by the config, not by a number written here."""
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    with streamed_lm(Checkpoint.open(tiny_checkpoint)) as lm:
        assert all_logits(lm, seeded_codes(lm)).isfinite().all()
        assert len(lm.transformer.layers) == config["num_layers"]
