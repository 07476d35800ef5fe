"""Adapters between PEFT's layout and moshi's: every bit there and back, and moshi's own loader
computes what PEFT computes."""

import json

import pytest
import torch
from moshi.models.loaders import CheckpointInfo
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from duplex.config_train import LoraSection
from duplex.errors import MergeError, MissingInputError, RequestError
from pipeline import convert
from pipeline.engines.checkpoint import Checkpoint
from tests.stages.conftest import write_tiny_checkpoint
from tests.stages.training_factories import changed_adapter, make_adapter
from training.adapter import BASE_KEY, Adapter
from training.adapter_formats import attach_base, to_moshi, to_peft
from training.merge import merge_checkpoint
from training.verify import all_logits, seeded_codes

FILES = ("adapter_model.safetensors", "adapter_config.json")
RSLORA = LoraSection(rank=4, alpha=6, dropout=0.1, rslora=True)


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return Checkpoint.open(tiny_checkpoint)


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint, tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("a") / "adapter", tiny_checkpoint)


def assert_same_files(first, second):
    for name in FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def load_by_moshi(base, form, fuse):
    """The model as `moshi.server --lora-weight F --config-path C` loads it."""
    files = base.files()
    info = CheckpointInfo.from_hf_repo(
        "local", moshi_weights=files["moshi"], mimi_weights=files["mimi"],
        tokenizer=files["tokenizer"], config_path=form / "config.json",
        mimi_config_path=files["mimi_config"], lora_weights=form / "lora.safetensors",
    )  # fmt: skip
    return info.get_moshi(device="cpu", dtype=torch.float32, fuse_lora=fuse)


def peft_logits(base, adapter, codes):
    from peft import PeftModel

    lm = base.load_lm()
    return all_logits(PeftModel.from_pretrained(lm, str(adapter)).eval(), codes)


CASES = {"all": {}, "some": {"groups": ("mlp", "text")}, "rslora": {"section": RSLORA}}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_keeps_every_bit_and_moshi_agrees_with_peft(
    base, tiny_checkpoint, tmp_path, case
):
    adapter = make_adapter(tmp_path / "adapter", tiny_checkpoint, **CASES[case])
    done = to_moshi(adapter, base, tmp_path / "moshi")
    assert (done.adapted, done.filled) == ((5, 52) if case == "some" else (57, 0))
    back = to_peft(tmp_path / "moshi", tmp_path / "back")
    assert (back.adapted, back.filled) == (done.adapted, done.filled)
    assert_same_files(adapter, tmp_path / "back")
    config = json.loads((tmp_path / "moshi" / "config.json").read_text())
    assert config["lora"] is True and config["lora_rank"] == 4
    assert config["lora_scaling"] == (3.0 if case == "rslora" else 2.0)
    codes = seeded_codes(base.load_lm())
    expected = peft_logits(base, adapter, codes)
    for fuse in (False, True):
        found = all_logits(load_by_moshi(base, tmp_path / "moshi", fuse), codes)
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    untuned = all_logits(base.load_lm(), codes)
    assert (untuned - expected).abs().max() > 0.01 * expected.abs().max()


def test_a_layer_left_out_is_what_moshis_loader_does_not_take(base, adapter, tmp_path):
    """Why zeros are filled in."""
    to_moshi(adapter, base, tmp_path / "moshi")
    path = tmp_path / "moshi" / "lora.safetensors"
    state = {k: v.clone() for k, v in load_file(path).items() if not k.startswith("text_linear")}
    save_file(state, path)
    with pytest.raises(NotImplementedError, match="meta tensor"):
        load_by_moshi(base, tmp_path / "moshi", fuse=False)


def test_at_dep_q_16_the_users_half_is_filled(tmp_path):
    wide = write_tiny_checkpoint(tmp_path / "wide", dep_q=16)
    base = Checkpoint.open(wide)
    adapter = make_adapter(tmp_path / "adapter", wide)
    done = to_moshi(adapter, base, tmp_path / "moshi")
    assert (done.adapted, done.filled) == (57, 48)  # 8 steps x (4 depth + 1 into it + 1 head)
    assert load_by_moshi(base, tmp_path / "moshi", fuse=True).dep_q == 16
    to_peft(tmp_path / "moshi", tmp_path / "back")
    assert_same_files(adapter, tmp_path / "back")


# -- files that we did not write


def foreign(adapter, base, folder):
    """As moshi-finetune writes it: no header, bfloat16."""
    to_moshi(adapter, base, folder)
    state = load_file(folder / "lora.safetensors")
    save_file({k: v.bfloat16() for k, v in state.items()}, folder / "lora.safetensors")
    return folder


def test_a_file_without_our_header_becomes_a_plain_adapter(base, adapter, tmp_path):
    source = foreign(adapter, base, tmp_path / "moshi")
    done = to_peft(source, tmp_path / "peft")
    lora = Adapter.open(tmp_path / "peft")
    assert done.base_sha256 is None and lora.base_sha256 is None
    assert (lora.rank, lora.scale, len(lora.shapes)) == (4, 2.0, 57)
    named = to_peft(source, tmp_path / "named", base)
    assert named.base_sha256 == base.digest("moshi") == Adapter.open(tmp_path / "named").base_sha256
    assert attach_base(tmp_path / "peft", base, tmp_path / "n2").base_sha256 == named.base_sha256
    assert_same_files(tmp_path / "named", tmp_path / "n2")
    merge_checkpoint(base.folder, tmp_path / "named", tmp_path / "merged", "float32")
    a, b = (load_file(source / "lora.safetensors")[f"linears.3.lora_{s}.weight"] for s in "AB")
    before = load_file(base.files()["moshi"])["linears.3.weight"]
    after = load_file(tmp_path / "merged" / "model.safetensors")["linears.3.weight"]
    assert torch.equal(after, before + 2.0 * (b.float() @ a.float()))


def test_fused_names_are_cut_as_moshi_cuts_them(base, adapter, tmp_path):
    source = foreign(adapter, base, tmp_path / "moshi")
    path = source / "lora.safetensors"
    state = load_file(path)
    expected = {key: tensor.clone() for key, tensor in state.items()}  # the file is overwritten
    for stem, count in (("depformer.layers.0.self_attn", 8), ("transformer.layers.0.self_attn", 1)):
        for kind in ("in_proj", "out_proj"):
            for side in "AB":
                keys = [f"{stem}.{kind}s.{i}.lora_{side}.weight" for i in range(count)]
                for key in keys:
                    del state[key]
                fused = torch.cat([expected[key] for key in keys])
                state[f"{stem}.{kind}.lora_{side}.weight"] = fused
    save_file({key: tensor.clone() for key, tensor in state.items()}, path)
    to_peft(source, tmp_path / "peft")
    found = load_file(tmp_path / "peft" / FILES[0])
    assert found.keys() == {f"base_model.model.{key}" for key in expected}
    differ = [k for k, v in expected.items() if not torch.equal(found[f"base_model.model.{k}"], v)]
    assert differ == []


# -- refusals


def test_what_is_refused(base, adapter, tiny_checkpoint, tmp_path):
    section = LoraSection(rank=4, alpha=8, embeddings=True)
    on_embeddings = make_adapter(tmp_path / "e", tiny_checkpoint, section=section)
    with pytest.raises(MergeError, match=r"found 25 on embeddings(.|\n)*duplex merge"):
        to_moshi(on_embeddings, base, tmp_path / "out")
    other = write_tiny_checkpoint(tmp_path / "other", lm_seed=8)
    with pytest.raises(MergeError, match="must go into the base that it was trained on"):
        to_moshi(adapter, Checkpoint.open(other), tmp_path / "out")
    with pytest.raises(MissingInputError, match=r"has no lora\.safetensors"):
        to_peft(tmp_path, tmp_path / "out")
    source = foreign(adapter, base, tmp_path / "m")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"lora": False}))
    with pytest.raises(MergeError, match="no `lora: true`"):
        to_peft(source, tmp_path / "out")
    (source / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.ones(2)}, source / "lora.safetensors")
    with pytest.raises(MergeError, match="found the key x"):
        to_peft(source, tmp_path / "out")
    zeros = {f"text_linear.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"}
    save_file(zeros, source / "lora.safetensors")
    with pytest.raises(MergeError, match="zero throughout"):
        to_peft(source, tmp_path / "out")
    (source / "lora.safetensors").write_bytes(b"rubbish")
    with pytest.raises(MergeError, match="must hold moshi's form"):
        to_peft(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", [None, 0, -4, float("inf"), "4", 10**400])
def test_a_rank_that_is_none_is_refused(base, adapter, tmp_path, rank):
    source = foreign(adapter, base, tmp_path / "m")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"lora_rank": rank}))
    with pytest.raises(MergeError):
        to_peft(source, tmp_path / "out")
    (source / "config.json").write_text(json.dumps(config))
    save_file({"text_linear.lora_A.weight": torch.tensor(1.0)}, source / "lora.safetensors")
    with pytest.raises(MergeError, match="must be a matrix"):
        to_peft(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_config_that_is_not_its_own_is_refused(base, adapter, tmp_path):
    to_moshi(adapter, base, tmp_path / "moshi")
    path = tmp_path / "moshi" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_scaling": 1.0}))
    with pytest.raises(MergeError, match=r"found rank 4 and scaling 1 against rank 4 and alpha 8"):
        to_peft(tmp_path / "moshi", tmp_path / "out")


def test_the_command(base, adapter, tiny_checkpoint, tmp_path, capsys):
    def run(source, out, form, base=None):
        convert.adapter(source, out, form, base, runs=tmp_path / "runs", as_json=True)
        return json.loads(capsys.readouterr().out)

    said = run(adapter, tmp_path / "moshi", "moshi", str(tiny_checkpoint))
    assert said["written"] == 1 and "57 modules adapted, 0 filled" in said["notes"][0]
    run(tmp_path / "moshi", tmp_path / "back", "peft")
    assert_same_files(adapter, tmp_path / "back")
    loose = changed_adapter(adapter, tmp_path / "loose", lambda state: None, names_base=False)
    run(loose, tmp_path / "named", "peft", str(tiny_checkpoint))
    with safe_open(tmp_path / "named" / FILES[0], "pt") as file:
        assert file.metadata()[BASE_KEY] == base.digest("moshi")
    for arguments, reason in (
        ((adapter, tmp_path / "x", "onnx"), "moshi or peft"),
        ((adapter, tmp_path / "x", "moshi"), "needs --base"),
        ((adapter, tmp_path / "x", "peft"), "PEFT's form already"),
        ((adapter, tmp_path / "moshi", "moshi", str(tiny_checkpoint)), "must not exist"),
    ):
        with pytest.raises(RequestError, match=reason):
            run(*arguments)


def test_a_folder_that_is_no_adapter_is_told_what_it_is(base, adapter, tmp_path):
    stage = tmp_path / "06-train-00000000"
    stage.mkdir()
    (stage / "adapter").symlink_to(adapter)
    to_moshi(adapter, base, tmp_path / "moshi")
    for folder, said in (
        (stage, f"found a train stage: give {stage / 'adapter'}"),
        (tmp_path / "moshi", r"found moshi's form: `duplex convert adapter"),
        (tmp_path / "nowhere", "found no folder there"),
        (tmp_path, "found none"),
    ):
        with pytest.raises(MissingInputError, match=said):
            Adapter.open(folder)
    with pytest.raises(MissingInputError, match="found no folder there"):
        to_peft(tmp_path / "nowhere", tmp_path / "out")
