"""Adapters on embeddings, rsLoRA, and going on from an adapter."""

import json
import math
import shutil

import pytest
import torch
from moshi.models.lm_utils import ScaledEmbedding
from safetensors.torch import load_file

from duplex.config_train import LoraSection, LossSection
from duplex.errors import DeadAdapterError, MissingInputError, RequestError
from pipeline.engines.checkpoint import Checkpoint
from pipeline.train import TrainStage, start_files
from tests.stages.conftest import write_tiny_checkpoint
from tests.stages.test_lora import SEED, adapted, loss_of
from tests.stages.training_factories import (
    changed_adapter,
    make_adapter,
    make_clip,
    make_config,
    run_stage,
    write_tensors_stage,
)
from training.adapter import Adapter, load_adapter_weights
from training.batches import make_batch
from training.embedding import register, scaled_embedding_lora
from training.fast import FastForward
from training.forward import LibraryForward
from training.lora import (
    EMBEDDINGS,
    adapter_parameters,
    adapter_state,
    add_adapters,
    count_trainable,
    liveness,
    target_modules,
)
from training.loss import coefficients, part_counts
from training.merge import merge_checkpoint
from training.quantized import quantize_linears
from training.verify import all_logits

ON_EMBEDDINGS = LoraSection(rank=4, alpha=8, embeddings=True)
RSLORA = LoraSection(rank=4, alpha=8, rslora=True)


# -- one embedding


def adapted_embedding(**kind):
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(3)
    model = torch.nn.ModuleDict({"emb": ScaledEmbedding(20, 8, zero_idx=-1, **kind)})
    config = register(LoraConfig(r=3, lora_alpha=6, target_modules=["emb"]))
    inject_adapter_in_model(config, model)
    with torch.no_grad():
        model["emb"].lora_embedding_A["default"].normal_()
    return model["emb"]


IDS = torch.tensor([[0, 5, -1, 19], [-1, -1, 3, 3]])


@pytest.mark.parametrize("kind", [{}, {"norm": True}, {"low_rank": 4}])
def test_an_adapted_embedding_is_the_embedding_of_the_merged_weight(kind):
    layer = adapted_embedding(**kind)
    assert type(layer) is scaled_embedding_lora()
    base = layer.get_base_layer()
    found = layer(IDS)
    assert (found[IDS == -1] == 0).all() and found[IDS != -1].abs().min() > 0
    before = base(IDS)
    a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    with torch.no_grad():
        base.weight += 2.0 * (b @ a).T
    assert torch.allclose(found, base(IDS), atol=1e-6)
    assert not torch.allclose(found, before, atol=0.1)


def test_peft_alone_would_look_minus_one_up():
    """Why the layer is our own."""
    from peft.tuners.lora.layer import Embedding

    layer = adapted_embedding()
    with pytest.raises(IndexError):
        Embedding.forward(layer, IDS)


def test_no_input_gives_no_gradient():
    layer = adapted_embedding()
    layer(IDS).sum().backward()
    gradient = layer.lora_embedding_A["default"].grad  # [rank, ids]
    used = set(gradient.abs().sum(0).nonzero().flatten().tolist())
    assert used == {0, 3, 5, 19}, "-1 is clamped to 0 for the lookup, and must not count there"
    only_nothing = adapted_embedding()
    only_nothing(torch.full((2, 3), -1)).sum().backward()
    assert not only_nothing.lora_embedding_A["default"].grad.any()


def test_two_streams_in_one_embedding_are_refused(tmp_path):
    model = torch.nn.Module()
    model.text_emb = ScaledEmbedding(20, 8, demux_second_stream=True)
    with pytest.raises(RequestError, match="two in text_emb"):
        target_modules(model, embeddings=True)


# -- the model


def test_every_embedding_is_alive_and_the_rest_too(tiny_checkpoint):
    model, targets = adapted(tiny_checkpoint, section=ON_EMBEDDINGS)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    alive = liveness(model, targets, loss_of(model), SEED)
    assert alive[EMBEDDINGS] == 16 + 1 + 7 + 1 and sum(alive.values()) == 82
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    counts = count_trainable(model, targets)
    assert counts[EMBEDDINGS].parameters == 4 * (
        16 * (65 + 64) + (341 + 64) + 7 * (65 + 32) + (341 + 32)
    )


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_the_fast_forward_takes_them_too(tiny_checkpoint, packed):
    """With a 4-bit base as well: the loss is that of the library's forward."""
    model = Checkpoint.open(tiny_checkpoint).load_lm()
    targets = target_modules(model, embeddings=True)
    if packed:
        pytest.importorskip("bitsandbytes")
        quantize_linears(model, targets)
    add_adapters(model, ON_EMBEDDINGS, targets, SEED)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            if not parameter.any():
                parameter.normal_(std=0.05, generator=generator)
    batch = make_batch([make_clip("a", 40, 1), make_clip("b", 30, 2)])
    weights = coefficients(part_counts(batch.codes, batch.loss_mask), LossSection())

    def loss_by(forward):
        return forward(batch.codes, batch.loss_mask, weights)[0]

    fast = FastForward(model.train())
    expected = loss_by(LibraryForward(model)).item()
    assert loss_by(fast).item() == pytest.approx(expected, rel=1e-5)
    alive = liveness(model, targets, lambda: loss_by(fast), SEED)
    assert sum(alive.values()) == 82


def test_a_dead_embedding_is_found(tiny_checkpoint, monkeypatch):
    model, targets = adapted(tiny_checkpoint, section=ON_EMBEDDINGS)
    base = model.emb[3].get_base_layer()
    monkeypatch.setattr(model.emb[3], "forward", lambda x: base(x))
    with pytest.raises(DeadAdapterError, match=r"found 1 that do not(.|\n)*emb\.3: its lora_emb"):
        liveness(model, targets, loss_of(model), SEED)


def test_at_dep_q_16_embeddings_of_steps_without_loss_are_no_targets(tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "wide", dep_q=16)
    model = Checkpoint.open(folder).load_lm()
    names = target_modules(model, embeddings=True)[EMBEDDINGS]
    assert "depformer_emb.6" in names and "depformer_emb.7" not in names
    both = target_modules(model, embeddings=True, codebooks=16)
    assert "depformer_emb.14" in both[EMBEDDINGS] and "linears.15" in both["heads"]
    assert sum(map(len, both.values())) == 57 + 8 * 6 + 33


@pytest.mark.parametrize("section", [ON_EMBEDDINGS, RSLORA])
def test_the_merge_is_the_formula(tiny_checkpoint, tmp_path, section):
    adapter = make_adapter(tmp_path / "a", tiny_checkpoint, section=section)
    certificate = merge_checkpoint(tiny_checkpoint, adapter, tmp_path / "out", "float32")
    assert certificate["logits"]["error"] < 1e-5 < 0.1 < certificate["logits"]["effect"]
    scale = 8 / math.sqrt(4) if section.rslora else 2.0
    assert certificate["scale"] == scale
    assert certificate["modules_changed"] == (82 if section.embeddings else 57)
    state = load_file(adapter / "adapter_model.safetensors")
    base = load_file(tiny_checkpoint / "model.safetensors")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    a, b = (state[f"base_model.model.linears.3.lora_{side}.weight"] for side in "AB")
    assert torch.equal(merged["linears.3.weight"], base["linears.3.weight"] + scale * (b @ a))
    a, b = (state.get(f"base_model.model.text_emb.lora_embedding_{side}") for side in "AB")
    delta = merged["text_emb.weight"] - base["text_emb.weight"]
    if section.embeddings:
        assert torch.allclose(delta, scale * (b @ a).T, atol=1e-5)
        # With tokens that mean no input: what the seeded batch of the certificate does not hold.
        model = Checkpoint.open(tiny_checkpoint).load_lm()
        add_adapters(model, section, target_modules(model, embeddings=True), seed=3)
        start = Adapter.open(adapter)
        load_adapter_weights(model, adapter, section, start.base_sha256)
        codes = torch.randint(0, 64, (2, 17, 20), generator=torch.Generator().manual_seed(1))
        codes[:, :, 5:9] = -1
        codes[1, 9:] = -1
        unmerged = all_logits(model.eval(), codes)
        found = all_logits(Checkpoint.open(tmp_path / "out").load_lm(), codes)
        assert torch.allclose(found, unmerged, atol=1e-4)
    else:
        assert not delta.any()


# -- going on


def start_of(checkpoint, section=LoraSection(rank=4, alpha=8)):  # noqa: B008
    model = Checkpoint.open(checkpoint).load_lm()
    targets = target_modules(model, section.targets, embeddings=section.embeddings)
    add_adapters(model, section, targets, seed=99)
    return model, Checkpoint.open(checkpoint).digest("moshi")


def test_weights_become_the_start(tiny_checkpoint, tmp_path):
    for section in (LoraSection(rank=4, alpha=8), ON_EMBEDDINGS):
        folder = make_adapter(tmp_path / str(section.embeddings), tiny_checkpoint, section=section)
        model, digest = start_of(tiny_checkpoint, section)
        load_adapter_weights(model, folder, section, digest)
        state = load_file(folder / "adapter_model.safetensors")
        found = adapter_state(model)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], state[key]) for key in state)


def test_each_difference_is_named(tiny_checkpoint, tmp_path):
    adapter = make_adapter(tmp_path / "a", tiny_checkpoint, groups=("mlp", "text"))
    section = LoraSection(rank=8, alpha=4, rslora=True, targets=("mlp", "heads"))
    model, _ = start_of(tiny_checkpoint, section)
    before = {key: value.clone() for key, value in adapter_state(model).items()}
    with pytest.raises(RequestError) as caught:
        load_adapter_weights(model, adapter, section, "f" * 64)
    message = str(caught.value)
    for part in (
        "rank is 4 there and 8 here",
        "alpha is 8.0 there and 4.0 here",
        "rslora is False there and True here",
        "it was trained on the base ",
        "only there adapted: text_linear",
        "only here adapted: linears.0, linears.1, linears.2 and 5 more",
    ):
        assert part in message
    assert all(torch.equal(value, before[key]) for key, value in adapter_state(model).items())
    whole = make_adapter(tmp_path / "w", tiny_checkpoint)
    model, digest = start_of(tiny_checkpoint)
    loose = changed_adapter(whole, tmp_path / "loose", lambda state: None, names_base=False)
    with pytest.raises(RequestError, match=r"does not name the base(.|\n)*duplex convert adapter"):
        load_adapter_weights(model, loose, LoraSection(rank=4, alpha=8), digest)

    def spoil(state):
        state["base_model.model.text_linear.lora_A.weight"][0] = math.nan

    broken = changed_adapter(whole, tmp_path / "broken", spoil)
    with pytest.raises(RequestError, match=r"must be finite, found otherwise in .*text_linear"):
        load_adapter_weights(model, broken, LoraSection(rank=4, alpha=8), digest)


@pytest.fixture(scope="module")
def tensors(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t") / "tensors"
    return write_tensors_stage(folder, tiny_checkpoint, {"train": [50, 40], "valid": [45]})


def test_a_run_goes_on_where_another_ended(tiny_checkpoint, tensors, tmp_path):
    lora = {"rank": 4, "alpha": 8, "embeddings": True, "rslora": True}
    first = make_config(tiny_checkpoint, lora=lora, steps=2)
    done = run_stage(TrainStage(), first, tmp_path / "first", tensors=tensors)
    folder = done.path / "adapter"
    said = []
    second = make_config(tiny_checkpoint, lora=lora, steps=1,
                         continue_from=str(folder))  # fmt: skip
    gone_on = run_stage(TrainStage(), second, tmp_path / "second", said.append, tensors=tensors)
    assert any("going on from the adapter" in line for line in said)
    assert any("embeddings" in line and "25 modules" in line for line in said)
    ends = [json.loads(line) for line in (done.path / "metrics.jsonl").read_text().splitlines()]
    starts = [
        json.loads(line) for line in (gone_on.path / "metrics.jsonl").read_text().splitlines()
    ]
    last, initial = (
        [line for line in lines if line["kind"] == "valid"][place]
        for lines, place in ((ends, -1), (starts, 0))
    )
    assert (last["kind"], initial["kind"], initial["step"]) == ("valid", "valid", 0)
    assert initial["loss"] == last["loss"], "the same weights, bit for bit"


def test_the_adapter_is_part_of_the_key(tiny_checkpoint, tmp_path):
    adapter = make_adapter(tmp_path / "a", tiny_checkpoint, groups=("text",))
    config = make_config(tiny_checkpoint, continue_from=str(adapter))
    stage = TrainStage()
    key = stage.folder_key(config, {"tensors": "0"})
    assert key == stage.folder_key(config, {"tensors": "0"})
    other = changed_adapter(adapter, tmp_path / "b", lambda s: next(iter(s.values())).add_(1))
    shutil.copy(other / "adapter_model.safetensors", adapter)
    assert stage.folder_key(config, {"tensors": "0"}) != key
    assert start_files(make_config(tiny_checkpoint).train) == {}


def test_a_folder_that_is_none_is_told(tiny_checkpoint, tmp_path):
    adapter = make_adapter(tmp_path / "run" / "adapter", tiny_checkpoint, groups=("text",))
    config = make_config(tiny_checkpoint, continue_from=str(tmp_path / "run"))
    with pytest.raises(MissingInputError, match=rf"no adapter_model(.|\n)*Give {adapter}\."):
        start_files(config.train)


def test_without_weight_in_the_loss_the_users_steps_stay_dead(tmp_path):
    """Why 16 codebooks are adapted only with train.loss.user_streams."""
    folder = write_tiny_checkpoint(tmp_path / "wide", dep_q=16)
    model = Checkpoint.open(folder).load_lm()
    targets = {"heads": target_modules(model, ["heads"], codebooks=16)["heads"]}
    add_adapters(model, LoraSection(rank=2), targets, SEED)
    with pytest.raises(DeadAdapterError, match="found 8 that do not"):
        liveness(model.train(), targets, loss_of(model, LossSection()), SEED)
