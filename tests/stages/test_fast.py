"""The fast forward against the library's own, on models of every shape that it claims to cover."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moshi.utils.compile import no_compile
from torch import nn

from duplex.config_train import LoraSection, LossSection
from duplex.streams import DELAYS, TEXT_EPAD, TEXT_PAD
from pipeline.engines import pocket
from tests.stages.conftest import TINY_CARD, TINY_LM_CONFIG, TINY_TEXT_CARD
from training import fast
from training.attention import PRODUCTS_TO, causal_attention
from training.fast import FastForward, unsupported
from training.forward import LibraryForward
from training.fused_loss import weighted_nll
from training.lora import adapter_parameters, add_adapters, target_modules
from training.loss import coefficients, part_counts
from training.projection import plain_linear, project

TOLERANCE = 1e-4  # relative, in float32; what was seen is 2e-6


def build(train: str = "lora", dropout: float = 0.0, **changes: Any) -> Any:
    """A tiny random LM: its adapters trained (B is noise), or all of its weights."""
    lm = pocket.build_lm({**TINY_LM_CONFIG, **changes}, 7)
    if train == "all":
        return lm.requires_grad_(True)
    section = LoraSection(rank=4, dropout=dropout)
    add_adapters(lm, section, target_modules(lm), 3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapter_parameters(lm).items():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=generator)
    return lm


def example(
    num_frames: int = 24, rows: int = 9, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes with both paddings, missing codes and a shorter clip; a mask with prompts; weights."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, TINY_CARD, (3, 17, num_frames), generator=generator)
    codes[:, 0] = torch.randint(0, TINY_TEXT_CARD, (3, num_frames), generator=generator)
    codes[0, 0, ::3], codes[1, 0, ::4] = TEXT_PAD, TEXT_EPAD
    short = num_frames - 5
    codes[1, :, short:] = -1
    codes[2, 5, 9:12] = codes[0, 0, 5:8] = -1
    mask = torch.zeros(3, rows, num_frames, dtype=torch.bool)
    for clip, length in enumerate((num_frames, short, num_frames)):
        for row in range(rows):
            mask[clip, row, 3 * clip : length - DELAYS[row]] = True
    return codes, mask, coefficients(part_counts(codes, mask), LossSection(semantic_weight=3))


def run(forward: nn.Module, lm: Any, data: Any) -> tuple[float, Any, dict[str, torch.Tensor]]:
    lm.zero_grad(set_to_none=True)
    with no_compile():
        loss, sums = forward(*data)
        loss.backward()
    grads = {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}
    return loss.item(), sums, grads


def assert_equal(lm: Any, data: Any, **options: Any) -> None:
    expected, wanted, reference = run(LibraryForward(lm), lm, data)
    loss, sums, grads = run(FastForward(lm, **options), lm, data)
    assert loss == pytest.approx(expected, rel=TOLERANCE)
    assert torch.equal(sums.count, wanted.count)
    torch.testing.assert_close(sums.nll, wanted.nll, rtol=TOLERANCE, atol=1e-4)
    # What has no loss behind it (the user's depth steps) is left out, where the library has zeros.
    assert all(not reference.pop(name).any() for name in set(reference) - set(grads))
    assert set(grads) == set(reference)
    scale = max(float(grad.norm()) for grad in reference.values())
    for name, grad in reference.items():
        allowed = TOLERANCE * max(float(grad.norm()), 1e-3 * scale)
        assert float((grads[name] - grad).norm()) <= allowed, name


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    dep_q = draw(st.sampled_from([8, 16]))
    changes: dict[str, Any] = {
        "dep_q": dep_q,
        "num_layers": draw(st.integers(1, 2)),
        "context": draw(st.sampled_from([7, 3000])),
        "layer_scale": draw(st.sampled_from([None, 0.3])),
        "positional_embedding": draw(st.sampled_from(["rope", "none"])),
        "norm": draw(st.sampled_from(["rms_norm_f32", "rms_norm"])),
        "norm_emb": draw(st.booleans()),
        "depformer_num_layers": draw(st.integers(1, 2)),
        "depformer_multi_linear": draw(st.booleans()),
        "depformer_weights_per_step": draw(st.booleans()),
        "depformer_low_rank_embeddings": draw(st.sampled_from([None, 16])),
    }
    if changes["depformer_weights_per_step"] and draw(st.booleans()):
        steps = draw(st.lists(st.integers(0, 3), min_size=dep_q, max_size=dep_q))
        changes["depformer_weights_per_step_schedule"] = sorted(steps)
    return changes


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=models(), train=st.sampled_from(["lora", "all"]), user=st.booleans())
def test_it_equals_the_library_in_loss_and_gradients(changes, train, user):
    rows = 17 if user and changes["dep_q"] == 16 else 9
    lm = build(train, **changes)
    assert unsupported(lm) == []
    assert_equal(lm, example(rows=rows))


@pytest.mark.parametrize("rows", [slice(1, 9), slice(0, 1)], ids=["no audio", "no text"])
def test_a_batch_without_one_of_them(rows):
    codes, mask, _ = example()
    mask[:, rows] = False
    assert_equal(build(), (codes, mask, coefficients(part_counts(codes, mask), LossSection())))


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_activations_made_again_change_no_bit(checkpointing):
    lm = build(num_layers=3)
    data = example()
    plain, again = FastForward(lm), FastForward(lm, checkpointing=checkpointing)
    before, _, grads = run(plain, lm, data)
    after, _, same = run(again, lm, data)
    assert before == after and all(torch.equal(grads[name], same[name]) for name in grads)


def test_checkpointing_keeps_fewer_activations():
    lm = build(num_layers=4)
    data = example(num_frames=200)
    kept = {}
    for checkpointing in ("none", "selective", "full"):
        sizes: list[int] = []

        def count(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), no_compile():
            FastForward(lm, checkpointing=checkpointing)(*data)
        kept[checkpointing] = sum(sizes)
    assert kept["full"] < kept["selective"] < kept["none"]


def test_adapter_dropout_goes_through_pefts_own_layers():
    """Equal to the library in evaluation, random in training, and its mean is the same."""
    lm = build(dropout=0.5)
    data = example()
    lm.eval()
    assert_equal(lm, data)
    lm.train()
    layer = lm.transformer.layers[0].self_attn.in_projs[0]
    assert plain_linear(layer) is None
    forward = FastForward(lm)
    losses = [run(forward, lm, data)[0] for _ in range(2)]
    assert losses[0] != losses[1]
    x = torch.randn(1, 6, 64)
    torch.manual_seed(0)
    ours = project(x, [layer])
    torch.manual_seed(0)
    torch.testing.assert_close(ours, layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"positional_embedding": "sin"}, "positions are of kind sin"),
        ({"norm": "layer_norm"}, "norms must be RMSNorm"),
        ({"depformer_pos_emb": "sin"}, "depformer: its positions"),
        ({"gating": "none", "depformer_gating": "silu"}, "a gated MLP"),
    ],
)
def test_what_it_does_not_cover_it_says(changes, reason):
    assert any(reason in fault for fault in unsupported(build(**changes)))


def test_no_logits_are_kept():
    """Nothing as wide as a vocabulary stays in memory for the backward pass."""
    text_card, card = 5003, 1009
    lm = build(text_card=text_card, card=card)
    weights = {id(p) for p in lm.parameters()}
    wide: list[tuple[int, ...]] = []

    def look(tensor: torch.Tensor) -> torch.Tensor:
        if {text_card, card} & set(tensor.shape) and id(tensor) not in weights:
            wide.append(tuple(tensor.shape))
        return tensor

    frozen = {tuple(p.shape) for p in lm.parameters()}
    data = example()
    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor), no_compile():
        FastForward(lm)(*data)
        assert [shape for shape in wide if shape not in frozen] == []
        wide.clear()
        LibraryForward(lm)(*data)
    assert [shape for shape in wide if shape not in frozen], "the library's do: the check works"


def test_places_without_loss_cost_no_depth_step(monkeypatch):
    lm = build()
    seen = []
    project_once = fast.project

    def spy(x, modules, **options):
        seen.append(x.shape[-2])
        return project_once(x, modules, **options)

    monkeypatch.setattr(fast, "project", spy)
    codes, mask, weights = example()
    with no_compile():
        FastForward(lm)(codes, mask, weights)
    due = torch.stack([fast._shift(mask[:, 1 + k] & (codes[:, 1 + k] >= 0), DELAYS[1 + k])
                       for k in range(8)]).any(0)  # fmt: skip
    assert min(seen) == int(due.sum()) < codes.shape[0] * codes.shape[2]


def test_bfloat16_stays_near_float32():
    lm = build()
    data = example()
    loss, _, grads = run(FastForward(lm), lm, data)
    rounded = copy.deepcopy(lm).to(torch.bfloat16)
    for parameter in adapter_parameters(rounded).values():
        parameter.data = parameter.data.float()
    forward = FastForward(rounded)
    near, _, rough = run(forward, rounded, data)
    assert near == pytest.approx(loss, rel=0.02)
    ours = torch.cat([grad.flatten() for grad in grads.values()])
    theirs = torch.cat([rough[name].float().flatten() for name in grads])
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.99
    assert all(rough[name].dtype == torch.float32 for name in grads)


@pytest.mark.slow
def test_compiled_layers_give_the_same_loss(monkeypatch):
    monkeypatch.setattr("torch._dynamo.config.suppress_errors", False)
    lm = build(num_layers=1)
    data = example()
    expected, _, grads = run(FastForward(lm), lm, data)
    forward = FastForward(lm, compiled=True)
    loss, _ = forward(*data)
    lm.zero_grad(set_to_none=True)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=TOLERANCE)
    for name, parameter in lm.named_parameters():
        if name in grads:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(0, 9), adapted=st.booleans(), seed=st.integers(0, 99))
def test_the_fused_loss_is_cross_entropy(rows, adapted, seed):
    torch.manual_seed(seed)
    lm = build("lora" if adapted else "all")
    head = lm.text_linear
    h = torch.randn(rows, 64, requires_grad=True)
    targets = torch.randint(0, TINY_TEXT_CARD, (rows,))
    weights = torch.rand(rows)
    loss, nll = weighted_nll(h, head, targets, weights)
    (3 * loss).backward()
    assert h.grad is not None
    found = [h.grad.clone(), *(p.grad.clone() for p in head.parameters() if p.requires_grad)]
    head.zero_grad()
    h.grad = None
    expected = nn.functional.cross_entropy(head(h), targets, reduction="none")
    (3 * (expected * weights).sum()).backward()
    wanted = [h.grad, *(p.grad for p in head.parameters() if p.requires_grad)]
    torch.testing.assert_close(nll, expected.detach())
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not nll.requires_grad


def test_chunks_add_up(monkeypatch):
    lm = build()
    h = torch.randn(700, 64, requires_grad=True)
    targets, weights = torch.randint(0, TINY_TEXT_CARD, (700,)), torch.rand(700)
    whole, nll = weighted_nll(h, lm.text_linear, targets, weights)
    (gradient,) = torch.autograd.grad(whole, h)
    monkeypatch.setattr("training.fused_loss.CHUNK_CPU", 1)  # 256 rows, the least
    pieces, again = weighted_nll(h, lm.text_linear, targets, weights)
    (other,) = torch.autograd.grad(pieces, h)
    torch.testing.assert_close(nll, again)
    torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("num_frames", [1, 37, PRODUCTS_TO, PRODUCTS_TO + 1])
def test_attention_by_products_is_that_of_the_fused_kernel(num_frames, monkeypatch):
    """In bfloat16 on a CPU, and no frame sees a later one."""
    generator = torch.Generator().manual_seed(num_frames)
    qkv = torch.randn(2, num_frames, 3, 2, 16, generator=generator)
    half = qkv.bfloat16().requires_grad_()
    whole = qkv.bfloat16().float().requires_grad_()  # in float32 the kernel is asked
    due = causal_attention(whole, None)
    with monkeypatch.context() as patch:
        if num_frames <= PRODUCTS_TO:  # else the kernel is asked
            patch.setattr(nn.functional, "scaled_dot_product_attention", None)
        ours = causal_attention(half, None)
    torch.testing.assert_close(ours.float(), due, rtol=0.02, atol=0.02)
    along = torch.randn(due.shape, generator=generator)
    (ours.float() * along).sum().backward()
    (due * along).sum().backward()
    assert half.grad is not None and whole.grad is not None
    torch.testing.assert_close(half.grad.float(), whole.grad, rtol=0.05, atol=0.05)
    other = qkv.bfloat16()
    other[:, -1] += 1
    assert torch.equal(causal_attention(other, None)[:, :-1], ours[:, :-1])
