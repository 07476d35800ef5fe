"""Adapters: which layers they stand on, and the proof that each one is alive."""

import pytest
import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import _lm_kwargs
from moshi.modules.gating import ActivationGating
from moshi.utils.compile import no_compile
from torch.nn import functional

from duplex.config_train import LoraSection, LossSection
from duplex.errors import DeadAdapterError
from pipeline.engines.checkpoint import Checkpoint
from tests.stages.conftest import write_tiny_checkpoint
from tests.stages.training_factories import make_clip
from training.batches import make_batch
from training.lora import (
    GROUPS,
    adapter_parameters,
    add_adapters,
    count_trainable,
    liveness,
    target_modules,
)
from training.loss import stream_sums, training_loss

LORA = LoraSection(rank=4, alpha=8)
SEED = 5


def adapted(checkpoint, groups=GROUPS, section=LORA):
    model = Checkpoint.open(checkpoint).load_lm()
    targets = target_modules(model, groups, embeddings=section.embeddings)
    add_adapters(model, section, targets, SEED)
    return model.train(), targets


def loss_of(model, weights=None):
    batch = make_batch([make_clip("a", 40, 1), make_clip("b", 30, 2)])

    def compute_loss():
        with no_compile():
            output = model(batch.codes)
        return training_loss(
            stream_sums(output, batch.codes, batch.loss_mask), weights or LossSection()
        )

    return compute_loss


def linear_names(model):
    return {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def meta_7b(dep_q):
    config = _lm_kwargs | {"dep_q": dep_q}
    return LMModel(device="meta", dtype=torch.bfloat16, **config)


def test_groups_of_the_7b_model_are_all_of_its_337_linear_layers():
    model = meta_7b(8)
    targets = target_modules(model)
    assert {group: len(names) for group, names in targets.items()} == {
        "attention": 64,
        "mlp": 64,
        "depth": 200,
        "heads": 8,
        "text": 1,
    }
    names = [name for group in targets.values() for name in group]
    assert len(names) == len(set(names)) == 337
    assert set(names) == linear_names(model)


def test_at_dep_q_16_the_users_half_of_the_depth_transformer_is_no_target():
    model = meta_7b(16)
    names = {name for group in target_modules(model).values() for name in group}
    assert len(linear_names(model)) == 545
    assert len(names) == 337
    rest = linear_names(model) - names
    assert "linears.8" in rest and "depformer_in.15" in rest
    assert "depformer.layers.5.gating.9.linear_out" in rest


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_by_itself(tiny_checkpoint, group):
    model, targets = adapted(tiny_checkpoint, [group])
    assert list(targets) == [group]
    alive = liveness(model, targets, loss_of(model), SEED)
    assert alive == {group: len(targets[group])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapter_parameters(model))


@pytest.mark.parametrize("changes", [{}, {"dep_q": 16}, {"depformer_weights_per_step": False}])
def test_every_adapter_is_alive(tmp_path, tiny_checkpoint, changes):
    folder = tiny_checkpoint
    if changes:
        folder = write_tiny_checkpoint(tmp_path / "other", **changes)
    model, targets = adapted(folder)
    alive = liveness(model, targets, loss_of(model), SEED)
    wrapped = [m for m in model.modules() if hasattr(m, "lora_A")]
    assert sum(alive.values()) == len(wrapped) > 0
    if not changes:
        # 2 layers x (2 attention + 2 mlp), 8 steps x (4 depth + 1 into it), 8 heads, text
        assert alive == {"attention": 4, "mlp": 4, "depth": 40, "heads": 8, "text": 1}


def test_the_users_depth_steps_would_be_dead(tmp_path):
    """Why they are no targets: there is no loss behind them."""
    folder = write_tiny_checkpoint(tmp_path / "wide", dep_q=16)
    model = Checkpoint.open(folder).load_lm()
    targets = target_modules(model)
    targets["heads"].append("linears.8")
    add_adapters(model, LORA, targets, SEED)
    with pytest.raises(DeadAdapterError, match=r"found 1 that do not(.|\n)*- linears\.8: "):
        liveness(model.train(), targets, loss_of(model), SEED)


def test_a_layer_whose_weight_is_read_directly_is_found(tiny_checkpoint, monkeypatch):
    """The fork's fault: `F.linear(x, self.linear_in.weight)` leaves the adapter out."""
    model, targets = adapted(tiny_checkpoint)

    def forward(self, x):
        x = functional.linear(x, self.linear_in.weight)
        gate, value = x.chunk(2, dim=-1)
        return self.linear_out(self.activation(gate) * value)

    monkeypatch.setattr(ActivationGating, "forward", forward)
    with pytest.raises(DeadAdapterError) as caught:
        liveness(model, targets, loss_of(model), SEED)
    message = str(caught.value)
    assert "found 10 that do not" in message, "2 temporal layers and 8 depth steps"
    assert "transformer.layers.0.gating.linear_in: its lora_A got no gradient" in message
    assert "depformer.layers.0.gating.7.linear_in: its lora_A got no gradient" in message
    assert "linear_out" not in message


def test_a_forward_that_reads_the_adapters_parts_keeps_them_alive(tiny_checkpoint, monkeypatch):
    """What counts is the gradient: nobody has to call the wrapped layer as a module."""
    model, targets = adapted(tiny_checkpoint)

    def apply(layer, x):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        low = functional.linear(functional.linear(x, a), b)
        return functional.linear(x, layer.base_layer.weight) + layer.scaling["default"] * low

    def forward(self, x):
        gate, value = apply(self.linear_in, x).chunk(2, dim=-1)
        return apply(self.linear_out, self.activation(gate) * value)

    monkeypatch.setattr(ActivationGating, "forward", forward)
    assert sum(liveness(model, targets, loss_of(model), SEED).values()) == 57


def test_a_module_that_runs_without_effect_is_found(tiny_checkpoint, monkeypatch):
    model, targets = adapted(tiny_checkpoint)
    head = model.text_linear
    original = head.forward
    monkeypatch.setattr(head, "forward", lambda x: original(x).detach())
    with pytest.raises(DeadAdapterError, match=r"text_linear: its lora_A got no gradient"):
        liveness(model, targets, loss_of(model), SEED)


def test_a_stream_without_weight_leaves_its_head_dead(tiny_checkpoint):
    """Honest about the config: what the loss leaves out cannot be trained."""
    model, targets = adapted(tiny_checkpoint)
    weights = LossSection(semantic_weight=0)
    with pytest.raises(DeadAdapterError, match=r"linears\.0: the gradient of its lora_A is zero"):
        liveness(model, targets, loss_of(model, weights), SEED)


def test_the_check_changes_no_bit(tiny_checkpoint):
    model, targets = adapted(tiny_checkpoint)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    random_state = torch.get_rng_state()
    liveness(model, targets, loss_of(model), SEED)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None
    assert torch.equal(torch.get_rng_state(), random_state)
    zeros = [p for name, p in adapter_parameters(model).items() if "lora_B" in name]
    assert zeros and not any(p.any() for p in zeros)
    assert not any(m._forward_hooks for m in model.modules())


def test_without_the_noise_a_would_look_dead(tiny_checkpoint, monkeypatch):
    model, targets = adapted(tiny_checkpoint)
    monkeypatch.setattr("training.lora.PREFLIGHT_STD", 0.0)
    with pytest.raises(DeadAdapterError, match="found 57 that do not"):
        liveness(model, targets, loss_of(model), SEED)


def test_adapters_follow_from_the_seed_and_count_right(tiny_checkpoint):
    torch.manual_seed(1)
    first, targets = adapted(tiny_checkpoint)
    torch.manual_seed(2)
    second, _ = adapted(tiny_checkpoint)
    for name, parameter in adapter_parameters(first).items():
        assert torch.equal(parameter, adapter_parameters(second)[name])
    counts = count_trainable(first, targets)
    text = first.get_submodule("text_linear")
    assert text.in_features == 64 and counts["text"].parameters == 4 * (64 + 340)
    assert counts["heads"].parameters == 8 * 4 * (32 + 64)
    total = sum(p.numel() for p in first.parameters() if p.requires_grad)
    assert sum(count.parameters for count in counts.values()) == total


def test_adapters_on_a_bfloat16_base_are_float32(tiny_checkpoint):
    model = Checkpoint.open(tiny_checkpoint).load_lm(dtype=torch.bfloat16)
    targets = target_modules(model)
    add_adapters(model, LORA, targets, SEED)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    alive = liveness(model.train(), targets, loss_of(model), SEED)
    assert sum(alive.values()) == 57
