"""Configs: all faults at once, nearest names, no secret in a key, overrides."""

from pathlib import Path

import pytest

from duplex.base import canonical_json
from duplex.config import Config
from duplex.configfile import load_config
from duplex.errors import ConfigError
from tests.factories import write_yaml

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


# All but how it trains is as in the other: one run folder serves both.
SAME_RUN_FOLDER = {"coffee-multi": "coffee"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_and_named_as_its_file(path):
    assert load_config(path).name == SAME_RUN_FOLDER.get(path.stem, path.stem)


def test_all_faults_are_reported_at_once_with_the_nearest_key(tmp_path):
    path = write_yaml(
        tmp_path / "bad.yaml",
        {
            "name": "Bad Name",
            "train": {"lerning_rate": 1, "steps": "many", "lora": {"rnk": 2}},
            "dialogues": {"min_turns": 9, "max_turns": 3},
            "nonsense": {},
        },
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    text = str(caught.value)
    assert len(caught.value.faults) == 6
    assert "train.lerning_rate: unknown key; did you mean train.learning_rate?" in text
    assert "train.lora.rnk: unknown key; did you mean train.lora.rank?" in text
    assert "train.steps" in text and "'many'" in text
    assert "min_turns must not exceed max_turns, found 9 > 3" in text
    assert "nonsense: unknown key" in text and "name:" in text
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("- a\n- b\n", "must hold a mapping, found list"),
        ("name: [", "must be YAML"),
        ("", "must hold a mapping, found NoneType"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, content, said):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=said):
        load_config(path)


def test_a_missing_file_names_the_nearest(tmp_path):
    write_yaml(tmp_path / "pocket.yaml", {"name": "pocket"})
    with pytest.raises(ConfigError, match=r"did you mean .*pocket\.yaml\?"):
        load_config(tmp_path / "poket.yaml")


def test_overrides_are_yaml_and_are_checked_like_the_file(tmp_path):
    path = write_yaml(tmp_path / "c.yaml", {"name": "c"})
    config = load_config(path, ["train.steps=7", "personas.only=[a, b]", "model.base=x/y"])
    assert (config.train.steps, config.personas.only, config.model.base) == (7, ("a", "b"), "x/y")
    with pytest.raises(ConfigError, match=r"must read section\.key=value"):
        load_config(path, ["train.steps"])
    with pytest.raises(ConfigError, match=r"name must be a section"):
        load_config(path, ["name.steps=1"])


def test_a_secret_reaches_runtime_and_nothing_that_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "hush-hush")
    dialogues = {"writer": "openai", "llm": "m", "runtime": {"api_key": "${SOME_KEY}"}}
    path = write_yaml(tmp_path / "c.yaml", {"name": "c", "dialogues": dialogues})
    config = load_config(path)
    assert config.dialogues.runtime.api_key == "hush-hush"
    assert "hush-hush" not in canonical_json(config.keyed("dialogues"))
    assert "hush-hush" not in repr(config)


def test_a_variable_that_is_not_set_is_a_fault_outside_of_secrets(tmp_path, monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    path = write_yaml(tmp_path / "c.yaml", {"name": "c", "model": {"base": "${NOT_SET}"}})
    with pytest.raises(ConfigError, match="needs the environment variable NOT_SET"):
        load_config(path)
    runtime = {"name": "c", "serve": {"runtime": {"token": "${NOT_SET}"}}}
    assert load_config(write_yaml(tmp_path / "d.yaml", runtime)).serve.runtime.token is None


def test_a_secret_of_the_wrong_type_is_not_printed(tmp_path, monkeypatch):
    path = write_yaml(tmp_path / "c.yaml", {"name": "c", "serve": {"runtime": {"token": [123456]}}})
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "123456" not in str(caught.value)


def test_configs_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config(name="c").seed = 3  # type: ignore[misc]


def profile_config(tmp_path, profile, **sections):
    path = write_yaml(tmp_path / "p.yaml", {"name": "p", "profile": profile, **sections})
    return load_config(path)


def test_the_default_profile_is_workbench(tmp_path):
    plain = load_config(write_yaml(tmp_path / "d.yaml", {"name": "p"}))
    assert plain == profile_config(tmp_path, "workbench")
    tensors, loss = plain.tensors, plain.train.loss
    assert (tensors.alignment, tensors.overflow, tensors.padding) == ("onset", "continue", "pad")
    assert (loss.semantic_weight, loss.acoustic_weight) == (100, 1)
    assert loss.normalize == "terms" and not loss.prompt


def test_personaplex_has_its_papers_weights_and_a_voice_prompt(tmp_path):
    config = profile_config(tmp_path, "personaplex")
    loss = config.train.loss
    assert config.tensors.alignment == "word" and config.tensors.voice_prompt_s > 0
    weights = (loss.semantic_weight, loss.acoustic_weight, loss.text_padding_weight)
    assert weights == (1, 0.02, 0.3) and loss.normalize == "all"


def test_moshi_has_no_prompt_and_words_at_their_times(tmp_path):
    config = profile_config(tmp_path, "moshi")
    loss = config.train.loss
    assert config.tensors.alignment == "word" and not config.tensors.prompt
    weights = (loss.semantic_weight, loss.acoustic_weight, loss.text_padding_weight)
    assert weights == (100, 1, 0.5)


def test_coffee_compat_is_the_predecessor_to_the_letter(tmp_path):
    config = profile_config(tmp_path, "coffee-compat")
    tensors, train = config.tensors, config.train
    assert (tensors.alignment, tensors.onset_fraction, tensors.overflow) == ("onset", 0.3, "drop")
    assert (tensors.padding, tensors.layout, tensors.encoding) == ("zero", "coffee", "turn")
    assert (tensors.split, tensors.valid_fraction) == ("conversation", 0.1)
    assert (train.lora.rank, train.lora.alpha, train.lora.dropout) == (16, 32, 0.1)
    assert (train.learning_rate, train.weight_decay, train.clip_norm) == (2e-6, 0.01, 1)
    assert (train.batch_size, train.epochs, config.seed) == (1, 2, 42)
    loss = train.loss
    assert (loss.semantic_weight, loss.text_padding_weight) == (100, 1)
    assert loss.normalize == "none" and loss.prompt


def test_what_the_file_says_wins_over_its_profile(tmp_path):
    config = profile_config(
        tmp_path,
        "coffee-compat",
        tensors={"padding": "pad"},
        train={"steps": 7, "lora": {"rank": 4}},
    )
    assert (config.tensors.padding, config.tensors.layout) == ("pad", "coffee")
    assert (config.train.lora.rank, config.train.lora.alpha) == (4, 32)
    # Steps in the file and epochs of the profile would contradict each other.
    assert (config.train.steps, config.train.epochs) == (7, None)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"overflow": "drop", "alignment": "word"}, "needs alignment: onset"),
        ({"voice_prompt_s": 3, "prompt": False}, "prompt: true"),
        ({"greeting": True, "layout": "coffee"}, "neither"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, section, said):
    path = write_yaml(tmp_path / "c.yaml", {"name": "c", "tensors": section})
    with pytest.raises(ConfigError, match=said):
        load_config(path)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"forward": "library", "compile": True}, "need forward: fast"),
        ({"forward": "library", "runtime": {"checkpointing": "selective"}}, "need forward: fast"),
        (
            {
                "forward": "library",
                "runtime": {"checkpointing": "full"},
                "lora": {"dropout": 0.1},
            },
            "must have lora.dropout 0, found 0.1",
        ),
        ({"quantize": "nf4", "processes": 2, "batch_size": 2}, "found processes 2"),
        ({"batch_size": 6, "accumulate": 2, "processes": 2}, "multiple of accumulate"),
        ({"compile": True, "processes": 2, "batch_size": 2}, "compile must be of one process"),
        ({"validate_every": 20, "guards": {"every": 15}}, "found 15 and 20: the best adapter"),
    ],
)
def test_training_settings_that_exclude_each_other_are_refused(tmp_path, section, said):
    path = write_yaml(tmp_path / "c.yaml", {"name": "c", "train": section})
    with pytest.raises(ConfigError, match=said):
        load_config(path)


@pytest.mark.parametrize("name", ["no", "on", "off", "yes", "y", "n", "No"])
def test_a_key_that_old_yaml_reads_as_a_truth_value_stays_a_name(tmp_path, name):
    path = tmp_path / "toy.yaml"
    path.write_text(f"name: toy\nserve: &all {{{name}: 1}}\n")
    with pytest.raises(ConfigError, match=rf"serve\.{name}: unknown key"):
        load_config(path)


def test_norwegian_has_an_engine(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text("name: toy\nspeech:\n  engines: {no: chatterbox}\n  instructions: no\n")
    speech = load_config(path).speech
    assert speech.engines == {"no": "chatterbox"} and speech.instructions is False
    path.write_text("name: toy\n")
    assert load_config(path, ["speech.engines={no: csm}"]).speech.engines == {"no": "csm"}
