"""The closed formulas of sizes, against the models themselves on the meta device."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import _lm_kwargs

from duplex.config_train import GuardsSection, LoraSection, TrainSection
from pipeline.engines.pocket import LM_CONFIG
from tests.factories import slow
from training import attention
from training.estimate import (
    MOSHI_7B,
    NF4_BYTES,
    activation_bytes,
    estimate_memory,
    layer_kinds,
    parameter_count,
    trainable_counts,
)
from training.forward import make_forward
from training.lora import add_adapters, count_trainable, target_modules
from training.loss import coefficients, part_counts
from training.quantized import BLOCK

ROOT = Path(__file__).resolve().parents[2]
SEVEN = {8: {**_lm_kwargs}, 16: {**_lm_kwargs, "dep_q": 16}}
VARIANTS = {
    "pocket": LM_CONFIG,
    "shared depth weights": {**LM_CONFIG, "depformer_weights_per_step": False},
    "schedule": {**LM_CONFIG, "depformer_weights_per_step_schedule": [0, 1, 2, 3, 3, 3, 3, 3]},
    "one projection": {**LM_CONFIG, "depformer_multi_linear": False},
    "layer norm, biases": {**LM_CONFIG, "norm": "layer_norm", "bias_proj": True},
    "widths": {**LM_CONFIG, "depformer_dim_feedforward": [396, 384, 300, 300, 300, 300, 300, 297]},
    "others": {**LM_CONFIG, "kv_repeat": 2, "depformer_norm": "rms_norm_f32",
               "depformer_low_rank_embeddings": 16, "extra_heads_num_heads": 2,
               "text_card_out": 5},
}  # fmt: skip


def on_meta(config):
    return LMModel(device="meta", dtype=torch.bfloat16, **config)


def check_counts(config, model):
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())
    lora = LoraSection(rank=3, embeddings=True)
    targets = target_modules(model, lora.targets, embeddings=True)
    sizes = {n: sum(model.get_submodule(n).weight.shape) for names in targets.values()
             for n in names}  # fmt: skip
    expected = {group: (len(names), 3 * sum(sizes[n] for n in names))
                for group, names in targets.items()}  # fmt: skip
    assert trainable_counts(config, lora) == expected


@pytest.mark.parametrize("name", VARIANTS)
def test_counts_are_those_of_the_model(name):
    check_counts(VARIANTS[name], on_meta(VARIANTS[name]))


@pytest.mark.parametrize(("dep_q", "billions", "linears"), [(8, 7.688, 337), (16, 8.371, 545)])
def test_the_7b_model(dep_q, billions, linears):
    config = {**MOSHI_7B, "dep_q": dep_q}
    assert parameter_count(config) / 1e9 == pytest.approx(billions, abs=5e-4)
    kinds = [kind for kind in layer_kinds(config) if kind.group != "embeddings"]
    assert sum(kind.count for kind in kinds) == linears
    assert sum(kind.adapted for kind in kinds) == 337
    assert MOSHI_7B.items() <= SEVEN[8].items()
    assert {kind.columns % BLOCK for kind in kinds} == {0}, "nf4 packs all of them"


@pytest.mark.parametrize(("dep_q", "codebooks"), [(8, 8), slow(16, 16)])
def test_adapters_of_the_7b_model_are_put_on_and_counted(dep_q, codebooks):
    """PEFT itself, on the meta device: each name is found, and each group has the size computed."""
    lora = LoraSection(rank=16, embeddings=True)
    model = on_meta(SEVEN[dep_q])
    check_counts(SEVEN[dep_q], model)
    targets = target_modules(model, lora.targets, embeddings=True, codebooks=codebooks)
    add_adapters(model, lora, targets, seed=1)
    found = {g: (c.modules, c.parameters) for g, c in count_trainable(model, targets).items()}
    assert found == trainable_counts(SEVEN[dep_q], lora, codebooks)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(parameters for _, parameters in found.values()) == trained
    wide = dep_q == 16
    assert {group: number for group, (number, _) in found.items()} == {
        "attention": 64, "mlp": 64, "depth": 400 if wide else 200,
        "heads": 16 if wide else 8, "text": 1, "embeddings": 33 if wide else 25,
    }  # fmt: skip


# -- memory


def section(**changes):
    return TrainSection.model_validate({"batch_size": 2, "crop_frames": 64} | changes)


SMALL = {
    **LM_CONFIG, "dim": 128, "num_heads": 2, "num_layers": 3, "card": 64, "text_card": 340,
    "context": 3000, "depformer_dim": 64, "depformer_num_heads": 2, "depformer_num_layers": 2,
    "depformer_dim_feedforward": 264,
}  # fmt: skip


def saved_bytes(config, train):
    """Bytes a frame that autograd keeps in a forward pass, parameters apart."""
    from moshi.utils.compile import no_compile

    from tests.stages.training_factories import make_clip
    from training.batches import make_batch

    lm = LMModel(device="cpu", dtype=getattr(torch, train.dtype), **config)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.normal_(std=0.02)
    add_adapters(lm, train.lora, target_modules(lm), 1)
    held = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    storages, kept = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # or its place may be given to another
        return tensor

    batch = make_batch([make_clip(str(i), train.crop_frames, i) for i in range(train.batch_size)])
    everywhere = torch.ones_like(batch.codes[:, : 17 if train.loss.user_streams else 9]).bool()
    weights = coefficients(part_counts(batch.codes, everywhere), train.loss)
    forward = make_forward(lm.train(), train)
    with no_compile(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if train.forward == "fast":
            forward(batch.codes, everywhere, weights)
        else:
            lm(batch.codes)
    return sum(storages.values()) / batch.num_frames


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activations_are_what_autograd_keeps(dtype, dropout):
    train = section(dtype=dtype, lora={"rank": 8, "dropout": dropout}, forward="library")
    assert activation_bytes(SMALL, train) == pytest.approx(saved_bytes(SMALL, train), rel=0.035)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, {"num_layers": 6}, {"depformer_num_layers": 5}])
def test_activations_of_our_own_forward(monkeypatch, dtype, changes):
    """By the kernel that a GPU takes: the CPU's own keeps less."""
    monkeypatch.setattr(attention, "_is_fused", lambda device: True)
    train = section(dtype=dtype, lora={"rank": 8})
    config = {**SMALL, **changes}
    assert activation_bytes(config, train) == pytest.approx(saved_bytes(config, train), rel=0.05)
    library = train.model_copy(update={"forward": "library"})
    assert activation_bytes(config, train) < 0.7 * activation_bytes(config, library)


def test_memory_falls_with_what_is_done_for_it():
    plain = section(dtype="bfloat16", batch_size=4, crop_frames=1250)
    full = estimate_memory(MOSHI_7B, plain)
    weights = parameter_count(MOSHI_7B)
    assert full.weights == 2 * weights and full.gathered == 0
    adapters = sum(n for _, n in trainable_counts(MOSHI_7B, plain.lora).values())
    assert full.adapters == 16 * adapters
    packed = estimate_memory(MOSHI_7B, plain.model_copy(update={"quantize": "nf4"}))
    assert 0.25 < packed.weights / full.weights < 0.32 and NF4_BYTES < 0.52
    spread = estimate_memory(MOSHI_7B, plain.model_copy(update={"processes": 4}))
    assert spread.weights == full.weights / 4 and spread.gathered > 0
    assert full.free_run == 0 and spread.free_run == full.weights * 3 / 4
    assert spread.fixed > full.weights, "the whole base, while the model speaks"
    silent = plain.model_copy(update={"processes": 4, "guards": GuardsSection(free_seconds=0)})
    assert estimate_memory(MOSHI_7B, silent).fixed < 0.5 * spread.fixed
    assert spread.activations == full.activations / 4
    parts = estimate_memory(MOSHI_7B, plain.model_copy(update={"accumulate": 4}))
    assert parts.activations == full.activations / 4 and parts.fixed == full.fixed
    kept = [estimate_memory(MOSHI_7B, section(dtype="bfloat16", batch_size=4, crop_frames=1250,
            runtime={"checkpointing": how})).activations
            for how in ("none", "selective", "full")]  # fmt: skip
    assert kept[0] > kept[1] > 4 * kept[2] > 0
    library = estimate_memory(MOSHI_7B, plain.model_copy(update={"forward": "library"}))
    assert library.logits > 3 * full.logits and library.activations > full.activations


def test_it_imports_no_torch():
    code = "import sys, training.estimate; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
