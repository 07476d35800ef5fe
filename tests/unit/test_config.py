"""Configs: all faults at once, nearest names, no secret in a key, overrides."""

from pathlib import Path

import pytest

from duplex.config import Config
from duplex.configfile import load_config
from duplex.errors import ConfigError
from duplex.records import canonical_json
from tests.factories import write_yaml

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_and_named_as_its_file(path):
    assert load_config(path).name == path.stem


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
