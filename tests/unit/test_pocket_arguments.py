"""`python -m training.pocket base` is two trainings by one command."""

from pathlib import Path

import pytest

from duplex.errors import MissingInputError
from training.pocket import base_command, regression
from training.pocket.__main__ import main as commands
from training.pocket.base_arguments import parse, trainings
from training.pocket.base_command import main
from training.pocket.base_weights import POCKET


def test_a_second_training_goes_on_from_the_first_on_speech_alone(tmp_path):
    def of(*options):
        argv = ["--work", str(tmp_path), *options]
        return [parse(one) for one in trainings(argv, parse(argv))]

    first, second = of("--out", str(tmp_path / "mine"), "--seed", "4", "--learning-rate", "3e-3")
    assert (first.steps, first.word_steps, first.seed) == (3150, 1400, 4)
    assert (second.steps, second.reading_steps, second.word_steps) == (2200, 0, 0)
    assert (second.seed, second.learning_rate) == (5, pytest.approx(2e-3))
    assert second.start == first.out == tmp_path / "first" and second.out == tmp_path / "mine"
    assert first.work == tmp_path and second.work == tmp_path / "again"
    assert first.bank is None and second.bank == tmp_path / "bank.safetensors"
    assert [one.again for one in (first, second)] == [0, 0]
    assert [one.bank for one in of("--bank", "given")] == [Path("given")] * 2
    assert len(of("--codes-only")) == 1, "it ends before either"
    (alone,) = of("--start", str(tmp_path / "mine"))
    assert alone.steps == 3150 and alone.out == POCKET


@pytest.mark.parametrize("options", [("--out",), ("--again", "3", "--start")])
def test_the_folder_of_the_first_is_its_own(tmp_path, capsys, options):
    """Refused before anything is spoken or trained: the second would meet it hours later."""
    argv = ["--work", str(tmp_path), *options, str(tmp_path / "first")]
    with pytest.raises(SystemExit):
        main(argv)
    assert "must be other folders than" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_codes_alone_are_made_and_nothing_is_trained(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(base_command, "_make_pack", lambda arguments, *_: made.append(arguments))
    monkeypatch.setattr(base_command, "run_workers", lambda *_: pytest.fail("it trains"))
    for more in ([], ["--start", str(POCKET)]):
        assert main(["--codes-only", "--work", str(tmp_path), *more]) == 0
    assert [one.start for one in made] == [None, POCKET]


def test_who_asks_for_help_gets_it_with_the_defaults(capsys):
    assert commands(["--help"]) == 0
    assert "codec | base | regression" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "(default: 3150)" in said and "None" not in said


def test_regression_without_utterances_names_what_makes_those_that_fit(tmp_path):
    with pytest.raises(MissingInputError, match="--codes-only --start data/pocket"):
        regression.main(["--work", str(tmp_path)])
