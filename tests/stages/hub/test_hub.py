"""`duplex push` and `duplex pull` with the real client, against a hub on this machine."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from duplex.config import Config
from pipeline.hubs.cards import adapter_card, data_card
from pipeline.hubs.index import HubFile, HubIndex, HubStage
from pipeline.hubs.scan import strip_provenance
from pipeline.imports import forget_import
from tests.stages.hub.helpers import (
    BLOBS,
    CONFIG,
    DATA,
    assert_unseen,
    blobs_in,
    config_of,
    digests,
    duplex,
    elsewhere,
    environment,
    steps_of,
    work,
)

# -- the way there and back


@pytest.mark.slow
def test_what_was_pulled_is_found_finished_and_training_goes_on(trained, shelf, tmp_path):
    place = elsewhere(trained, tmp_path)
    result = duplex("pull", "me/data", "small.yaml", cwd=place, hub=shelf)
    assert result.returncode == 0, result.stderr
    own = digests(trained)
    assert {name: own[name] for name in DATA} == digests(place)
    for name in ("voices", "speech", "tensors"):
        assert blobs_in(place, name) == blobs_in(trained, name) != {}
    assert "tensors: restored in" in result.stdout
    assert not (place / "runs" / "small" / "imports").exists()  # the keys are those of the config
    assert not list((place / "runs" / "small" / "hub").iterdir())
    work("train", place)
    assert digests(place) == own
    assert_unseen(result, shelf)


def test_another_config_gets_it_put_in_place_until_it_says_otherwise(trained, shelf, tmp_path):
    other = CONFIG["dialogues"] | {"max_turns": 6}
    place = elsewhere(trained, tmp_path, dialogues=other)
    result = duplex("pull", "me/data", "small.yaml", "--json", cwd=place, hub=shelf)
    rows = {row["stage"]: row for row in json.loads(result.stdout)["stages"]}
    assert {name: digests(trained)[name] for name in DATA} == digests(place)
    assert steps_of(place)["tensors"].done
    assert [name for name in DATA if rows[name]["how"] == "put in place"] == ["dialogues"]
    assert forget_import(config_of(place), place / "runs", "dialogues")
    assert not steps_of(place)["dialogues"].done


def test_pulled_work_is_adopted_and_not_made_again(trained, shelf, tmp_path):
    personas = CONFIG["personas"] | {"only": ["friendly-june"]}
    place = elsewhere(trained, tmp_path, personas=personas)
    assert duplex("pull", "me/data", "small.yaml", cwd=place, hub=shelf).returncode == 0
    shutil.rmtree(place / "runs" / "small" / "imports")
    for name in ("personas", "dialogues", "voices", "speech"):
        work(name, place)
    manifest = steps_of(place)["speech"].folder.manifest()
    assert manifest["counts"] == {"tasks": 1, "records": 1, "rejected": 0}
    assert manifest["provenance"]["adopted"] == 1


def test_a_push_is_private_complete_and_says_what_it_is(trained, hub):
    result = duplex("push", "small.yaml", "--to", "me/data", cwd=trained, hub=hub)
    assert result.returncode == 0 and "private" in result.stdout, result.stderr
    repo = hub.repos["me/data"]
    assert repo.private
    assert set(repo.commits[-2][1]) & {"duplex.json", "README.md"} == set()  # they come last
    card = repo.tree["README.md"][0].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head["language"] == ["en"] and len(head["configs"]) == 2
    assert "The speech is synthetic too." in card and "GPL-3.0-or-later (the engine)" in card
    assert "2 recordings" in card and "1 train, 1 valid, by persona" in card
    for name, (content, _) in repo.tree.items():
        assert str(trained).encode() not in content, name
    index = json.loads(repo.tree["duplex.json"][0])
    assert index["base"] == "a local folder" and "host" not in json.dumps(index)
    assert_unseen(result, hub)


def test_a_second_push_sends_nothing_and_a_changed_run_takes_its_old_files_away(trained, hub):
    push = ("push", "small.yaml", "--to", "me/data", "--no-view")
    assert duplex(*push, cwd=trained, hub=hub).returncode == 0
    repo = hub.repos["me/data"]
    before, hub.log = len(repo.commits), []
    again = duplex(*push, cwd=trained, hub=hub)
    assert again.returncode == 0 and len(repo.commits) == before
    assert hub.asked("PUT", "/lfs/") == []
    hub.put("me/data", "notes.md", b"mine")
    hub.put("me/data", f"blobs/00/{'0' * 64}.wav", b"of an older run")
    result = duplex(*push, cwd=trained, hub=hub)
    assert "1 old ones removed" in result.stderr
    assert "notes.md" in repo.tree and f"blobs/00/{'0' * 64}.wav" not in repo.tree


def test_a_public_repository_is_not_written_to_unasked(trained, hub):
    push = ("push", "small.yaml", "--to", "me/data", "--no-view")
    assert duplex(*push, "--public", cwd=trained, hub=hub).returncode == 0
    assert not hub.repos["me/data"].private
    result = duplex(*push, cwd=trained, hub=hub)
    assert result.returncode == 2 and "everybody can read it" in result.stderr


def test_a_dry_run_shows_everything_and_asks_nobody(trained, hub):
    push = ("push", "small.yaml", "--to", "me/data", "--dry-run")
    result = duplex(*push, cwd=trained, hub=hub)
    assert result.returncode == 0 and "would go to me/data (dataset, private)" in result.stdout
    assert "# small: full-duplex conversations" in result.stdout and hub.log == []
    value = json.loads(duplex(*push, "--json", cwd=trained).stdout)  # offline, and no token
    names = {file["path"] for file in value["files"]}
    assert {"README.md", "duplex.json", "records/speech.jsonl"} < names
    assert sum(name.startswith("blobs/") for name in names) == BLOBS


# -- adapters


def test_an_adapter_goes_up_and_comes_back_for_merging(trained, hub, tmp_path):
    push = ("push", "small.yaml", "--to", "me/voice", "--what", "adapter")
    result = duplex(*push, cwd=trained, hub=hub)
    assert result.returncode == 0, result.stderr
    tree = hub.repos["me/voice"].tree
    card = tree["README.md"][0].decode()
    lines = [json.loads(line) for line in tree["metrics.jsonl"][0].splitlines()]
    train = [line["loss"] for line in lines if line["kind"] == "train"]
    assert f"{train[0]:.4g} at step 1, {train[-1]:.4g} at step 2" in card
    assert "base's licence, which binds the adapter too | not known here" in card
    assert str(trained) not in json.dumps({k: v[0].decode("latin-1") for k, v in tree.items()})
    out = tmp_path / "adapter"
    result = duplex("pull", "me/voice", out, cwd=tmp_path, hub=hub)
    assert result.returncode == 0, result.stderr
    own = steps_of(trained)["train"].folder.artifact("adapter")
    assert (out / "adapter_model.safetensors").read_bytes() == own.read_bytes()
    base = trained / "models" / "tiny"
    merged = duplex("merge", base, out, tmp_path / "merged", cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    place = elsewhere(trained, tmp_path)
    into = duplex("pull", "me/voice", "small.yaml", "--what", "adapter", cwd=place, hub=hub)
    assert into.returncode == 0 and "train: put in place" in into.stdout, into.stderr
    assert digests(place)["train"] == digests(trained)["train"]


@pytest.mark.parametrize(
    ("base", "licence", "name"),
    [
        ("kyutai/moshiko-pytorch-bf16", "cc-by-4.0", None),
        ("nvidia/personaplex-7b-v1", "other", "nvidia-open-model-license"),
        ("somebody/else", None, None),
    ],
)
def test_an_adapters_card_names_the_licence_of_its_base(base, licence, name):
    none = "0" * 64
    stage = HubStage(stage="train", key=none, digest=none, counts={"records": 3})
    file = HubFile(path="records/train.jsonl", sha256=none, bytes=1)
    index = HubIndex(
        format=1, kind="adapter", name="c", base=base, stages=(stage,), files=(file,)
    )  # fmt: skip
    facts = {"rank": 2, "alpha": 4, "trainable_parameters": 9, "steps": 1}
    card = adapter_card("me/x", index, facts, [], Config(name="c"))
    head = yaml.safe_load(card.split("---")[1])
    assert (head.get("license"), head.get("license_name")) == (licence, name)
    assert head.get("base_model") == (base if licence else None) and "not recorded" in card


def test_a_card_says_what_was_not_kept_and_what_a_model_took_and_not_where():
    llm = {"models": ["tiny"], "requests": 4, "tokens_in": 900, "tokens_out": 80,
           "base_url": "http://10.0.0.7/v1", "endpoint_takes": {"at": "10.0.0.7"}}  # fmt: skip
    funnel = {"written": 5, "kept": 2, "reasons": {"near-duplicate": 2, "refused": 1}}
    provenance = strip_provenance({"funnel": funnel, "llm": llm, "host": "attic"})
    none = "0" * 64
    stage = HubStage(
        stage="dialogues", key=none, digest=none, counts={"records": 2}, provenance=provenance
    )
    file = HubFile(path="records/dialogues.jsonl", sha256=none, bytes=1)
    index = HubIndex(format=1, kind="data", name="c", base="x", stages=(stage,), files=(file,))
    card = data_card("me/x", index, [], [], None)
    assert "- candidates: 5 written, 2 kept" in card
    assert "- not kept, by reason: 2 near-duplicate, 1 refused" in card
    assert "- 4 requests by `tiny`: 900 tokens in, 80 out" in card
    assert "10.0.0.7" not in card + index.to_bytes().decode() and "attic" not in card


# -- failures on the way


def test_an_answer_of_500_and_a_dropped_upload_are_tried_again(trained, hub):
    hub.fail_once("POST", "/commit/", "500")
    hub.fail_once("PUT", "/lfs/", "drop")
    hub.fail_once("POST", "/objects/batch", "500")
    result = duplex("push", "small.yaml", "--to", "me/data", "--no-view", cwd=trained, hub=hub)
    assert result.returncode == 0, result.stderr
    assert "duplex.json" in hub.repos["me/data"].tree
    puts = hub.asked("PUT", "/lfs/")
    assert len(puts) == len(set(puts)) + 1  # the dropped one alone went twice
    assert_unseen(result, hub)


def test_a_killed_push_goes_on_without_sending_finished_files_again(trained, hub):
    gate = {"open": False}
    hub.faults.append(
        lambda verb, path: None if gate["open"] or "/commit/" not in path else "500"
    )  # fmt: skip
    command = [sys.executable, "-m", "duplex.cli", "push", "small.yaml", "--to", "me/data",
               "--no-view"]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=trained, env=environment(hub), stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not hub.asked("POST", "/commit/") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    sent = set(hub.asked("PUT", "/lfs/"))
    assert len(sent) == BLOBS and hub.repos["me/data"].tree == {}
    gate["open"], hub.log = True, []
    result = duplex("push", "small.yaml", "--to", "me/data", "--no-view", cwd=trained, hub=hub)
    assert result.returncode == 0, result.stderr
    assert hub.asked("PUT", "/lfs/") == [] and "duplex.json" in hub.repos["me/data"].tree


def test_a_killed_pull_asks_only_for_what_is_missing(trained, shelf, tmp_path):
    place = elsewhere(trained, tmp_path)
    files = json.loads(shelf.repos["me/data"].tree["duplex.json"][0])["files"]
    wav = next(file["path"] for file in files if file["path"].endswith(".wav"))
    gate = {"open": False}
    shelf.faults.append(
        lambda verb, path: "500" if not gate["open"] and verb == "GET" and wav in path else None
    )
    command = [sys.executable, "-m", "duplex.cli", "pull", "me/data", "small.yaml"]
    process = subprocess.Popen(
        command, cwd=place, env=environment(shelf), stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 100
    while len(set(shelf.asked("GET", "/resolve/"))) < len(files) + 1:  # and the index
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    time.sleep(1)  # what was asked for arrives
    process.kill()
    process.wait()
    assert digests(place) == {}
    gate["open"], shelf.log = True, []
    second = duplex("pull", "me/data", "small.yaml", cwd=place, hub=shelf)
    assert second.returncode == 0, second.stderr
    assert [path.partition("/blobs/")[2] for path in shelf.asked("GET", "/resolve/")] == [
        wav.removeprefix("blobs/")
    ]
    assert {name: digests(trained)[name] for name in DATA} == digests(place)


def test_a_wrong_token_is_refused_at_once_and_never_printed(trained, hub):
    wrong = "hf_WrongTokenThatMustNotBeSeenEither99"
    result = duplex(
        "push", "small.yaml", "--to", "me/data", "--no-view", cwd=trained, hub=hub, HF_TOKEN=wrong
    )
    assert result.returncode == 2 and "refused me/data with 401" in result.stderr
    assert wrong not in result.stdout + result.stderr and len(hub.log) <= 2
    result = duplex("push", "small.yaml", "--to", "me/data", cwd=trained, hub=hub, HF_TOKEN="")
    assert result.returncode == 2 and "HF_TOKEN must hold a token" in result.stderr
    result = duplex("pull", "me/none", "small.yaml", cwd=trained, hub=hub)
    assert result.returncode == 2 and "404" in result.stderr
