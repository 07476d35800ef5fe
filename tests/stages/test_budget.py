"""The loss budget: shares by hand, drowned groups are named, and nothing is changed."""

import pytest
import torch
from moshi.utils.compile import no_compile
from torch import nn

from duplex.config import PROFILES
from duplex.config_train import LossSection
from duplex.errors import WorkError
from pipeline.engines.checkpoint import Checkpoint
from tests.stages.training_factories import LORA, make_clip
from training import budget as budget_module
from training.batches import make_batch
from training.budget import loss_budget
from training.forward import LibraryForward
from training.lora import adapter_parameters, add_adapters, target_modules
from training.loss import StreamSums, coefficients, part_counts

BATCH = make_batch([make_clip("a", 60, 1), make_clip("b", 80, 2)])


def section_of(profile):
    return LossSection(**PROFILES[profile].get("train", {}).get("loss", {}))


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    """Fresh adapters on random weights, as at the start of a run."""
    lm = Checkpoint.open(tiny_checkpoint).load_lm()
    add_adapters(lm, LORA.model_copy(update={"dropout": 0.3}), target_modules(lm), seed=3)
    return lm.train()


def budget_of(model, section, batches=(BATCH,)):
    with no_compile():
        return loss_budget(
            LibraryForward(model), batches, section, adapter_parameters(model).values(), seed=1
        )


class KnownGradients(nn.Module):
    """S_k = a_k + g_k · w: the gradient of c·S is c·g, whatever w is."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(10))
        self.a, self.g = torch.arange(10.0), torch.arange(1.0, 11.0)

    def forward(self, codes, loss_mask, weights):
        nll = self.a + self.g * self.w
        count = part_counts(codes, loss_mask)
        return (weights * nll).sum(), StreamSums(nll.detach(), count)


@pytest.mark.parametrize("normalize", ["terms", "all", "none"])
def test_shares_of_known_gradients(normalize):
    forward = KnownGradients()
    section = LossSection(normalize=normalize, semantic_weight=3, acoustic_weight=2)
    found = loss_budget(forward, [BATCH], section, [forward.w])
    c = coefficients(part_counts(BATCH.codes, BATCH.loss_mask), section)
    losses = c * (forward.a + forward.g)
    norms = {
        "words": c[0] * 1,
        "padding": c[1] * 2,
        "semantic": c[2] * 3,
        "acoustic": (c[3:] * forward.g[3:]).norm(),
    }
    total = sum(float(norm) for norm in norms.values())
    for name, part in (("words", losses[0]), ("padding", losses[1]), ("semantic", losses[2])):
        assert found.loss_shares[name] == pytest.approx(float(part / losses.sum()))
    for name, norm in norms.items():
        assert found.gradient_norms[name] == pytest.approx(float(norm), rel=1e-5)
        assert found.gradient_shares[name] == pytest.approx(float(norm) / total, rel=1e-5)
    assert sum(found.loss_shares.values()) == pytest.approx(1)
    assert found.loss == pytest.approx(float(losses.sum()))


def test_the_predecessors_loss_drowns_text_and_ours_does_not(model):
    found = {name: budget_of(model, section_of(name)) for name in PROFILES}
    drowned = found.pop("coffee-compat")
    assert drowned.gradient_shares["words"] < 0.01 and drowned.loss_shares["semantic"] > 0.95
    warnings = drowned.warnings()
    assert len(warnings) == 2
    assert warnings[0].startswith("words must have at least 1% of the gradient, found 0.")
    assert "train.loss.semantic_weight" in warnings[0] and "normalize to terms" in warnings[0]
    assert "semantic with 9" in warnings[1] and "Lower train.loss.semantic_weight" in warnings[1]
    for name, budget in found.items():
        assert budget.warnings() == [], name
        assert budget.gradient_shares["words"] > 0.2
    assert drowned.as_line()["warnings"] == warnings


def test_a_loss_that_is_not_normalised_is_noticed(model, monkeypatch):
    """The breaking test: the section says `terms`, the coefficients are those of `none`."""
    section = section_of("workbench")
    assert budget_of(model, section).weight_sum == pytest.approx(2)

    def broken(count, section):
        return coefficients(count, section.model_copy(update={"normalize": "none"}))

    monkeypatch.setattr(budget_module, "coefficients", broken)
    warnings = budget_of(model, section).warnings()
    assert "must add up to 2" in warnings[0] and "found 102" in warnings[0]
    assert any(warning.startswith("words must have") for warning in warnings)


def test_drowned_speech_names_its_own_weight(model):
    quiet = budget_of(model, LossSection(semantic_weight=0.01, acoustic_weight=100))
    (warning,) = [w for w in quiet.warnings() if w.startswith("semantic must")]
    assert "Raise train.loss.semantic_weight" in warning and "normalize" not in warning
    padded = budget_of(model, LossSection(text_padding_weight=1e4))
    assert any("Lower train.loss.text_padding_weight" in w for w in padded.warnings())


def test_a_group_without_a_prediction_is_not_judged(model):
    clip = make_clip("silent", 40, 1)
    codes = clip.codes.copy()
    codes[0] = 3
    batch = make_batch([type(clip)("silent", codes, 8, 8)])
    found = budget_of(model, section_of("workbench"), [batch])
    assert found.counts["words"] == 0 and found.gradient_norms["words"] == 0
    assert found.warnings() == []
    no_text = batch.loss_mask.clone()
    no_text[:, 0] = False
    alone = type(batch)(batch.codes, no_text, batch.num_frames)
    found = budget_of(model, section_of("workbench"), [alone])
    assert found.num_means == 1 and found.weight_sum == pytest.approx(1)


def test_the_parts_of_a_batch_have_the_budget_of_the_whole(model):
    model.eval()  # dropout would differ
    clips = [make_clip("a", 60, 1), make_clip("b", 80, 2)]
    parts = budget_of(model, section_of("moshi"), [make_batch([clip]) for clip in clips])
    whole = budget_of(model, section_of("moshi"))
    model.train()
    for name, share in whole.gradient_shares.items():
        assert parts.gradient_shares[name] == pytest.approx(share, rel=1e-3)
        assert parts.loss_shares[name] == pytest.approx(whole.loss_shares[name], rel=1e-4)


def test_no_parameter_gradient_or_random_number_is_changed(model):
    parameters = list(adapter_parameters(model).values())
    before = [parameter.detach().clone() for parameter in parameters]
    kept = torch.ones_like(parameters[0])
    parameters[0].grad = kept
    random_state = torch.get_rng_state()
    first = budget_of(model, section_of("workbench"))
    assert parameters[0].grad is kept and kept.eq(1).all()
    assert all(parameter.grad is None for parameter in parameters[1:])
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert budget_of(model, section_of("workbench")) == first
    parameters[0].grad = None


def test_a_loss_that_is_not_finite_is_an_error_and_leaves_no_gradient():
    forward = KnownGradients()
    forward.a[2] = float("nan")
    with pytest.raises(WorkError, match="must be finite"):
        loss_budget(forward, [BATCH], LossSection(), [forward.w])
    assert forward.w.grad is None
