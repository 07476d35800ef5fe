"""`duplex compare`: settings that differ, validation, speed and size of several runs."""

import json

import pytest

from duplex.errors import MissingInputError, RequestError
from pipeline.compare import _styles, compare, find_runs, rows_of, show
from pipeline.train import TrainStage
from tests.stages.training_factories import make_config, run_stage, write_tensors_stage


@pytest.fixture(scope="module")
def run_folder(tiny_checkpoint, tmp_path_factory):
    """Two runs of one config, and the tensors they are of."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    tensors = write_tensors_stage(
        folder / "05-tensors-00000000", tiny_checkpoint, {"train": [40, 50, 30], "valid": [33]}
    )
    for name, changes in (("aaaaaaaa", {"steps": 2}), ("bbbbbbbb", {"learning_rate": 1e-3})):
        config = make_config(tiny_checkpoint, **({"steps": 3} | changes))
        run_stage(TrainStage(), config, folder / f"06-train-{name}", tensors=tensors)
    return folder


def test_a_run_folder_and_its_stages_name_the_same_runs(run_folder):
    stages = sorted(str(path) for path in run_folder.glob("06-train-*"))
    whole, single = find_runs([str(run_folder)], run_folder), find_runs(stages, run_folder)
    assert [run.label for run in whole] == [run.label for run in single]
    assert [run.label for run in find_runs([*stages, str(run_folder)], run_folder)] == [
        "06-train-aaaaaaaa",
        "06-train-bbbbbbbb",
    ]


def test_what_differs_and_what_came_of_it(run_folder):
    result = compare(find_runs([str(run_folder)], run_folder))
    assert result["differ"] == {"steps": [2, 3], "learning_rate": [5e-3, 1e-3]}
    first, second = result["runs"]
    assert (first["steps"], second["steps"]) == (2, 3)
    folder = run_folder / "06-train-aaaaaaaa"
    log = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    last = [line for line in log if line["kind"] == "valid"][-1]
    assert first["validation"]["final"]["semantic"] == last["streams"]["semantic"]
    assert first["validation"]["initial"] == second["validation"]["initial"]
    assert first["adapter_bytes"] == (folder / "adapter/adapter_model.safetensors").stat().st_size
    assert first["frames_per_s"] > 0 and 0 <= first["padding"] < 1 and first["memory_bytes"] > 1e6
    rows = dict(rows_of(result))
    assert rows["learning_rate"] == ["0.005", "0.001"]
    assert rows["valid final: loss"][0] == f"{last['loss']:.4g}"


def test_the_page_is_one_file_with_the_runs_over_each_other(run_folder, tmp_path, capsys):
    show([str(run_folder)], run_folder, page=tmp_path / "page.html", as_json=True)
    assert json.loads(capsys.readouterr().out)["differ"]["steps"] == [2, 3]
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 17 and "http" not in page and "src=" not in page
    first = page[page.index("<svg") : page.index("</svg>")]
    assert first.count("<polyline") == 2 and "class='run0'" in first and "class='run1'" in first


def test_no_two_of_many_runs_look_the_same():
    styles = _styles(24)
    assert len(set(styles)) == 24 and len({(colour, sign) for colour, _, sign in styles}) == 24


def test_what_is_no_run_is_refused_by_name(run_folder, tmp_path):
    with pytest.raises(RequestError, match=r"must be a train stage, found the stage tensors"):
        find_runs([str(run_folder / "05-tensors-00000000")], run_folder)
    with pytest.raises(MissingInputError, match=r"finished train stage.*found none"):
        find_runs([str(tmp_path)], tmp_path)
    with pytest.raises(RequestError, match=r"found nothing at .*nowhere"):
        find_runs([str(tmp_path / "nowhere")], tmp_path)


def test_a_run_that_failed_is_left_out_and_named(run_folder, capsys):
    failed = run_folder / "06-train-cccccccc"
    (failed / "work").mkdir(parents=True)
    try:
        runs = find_runs([str(path) for path in sorted(run_folder.glob("06-train-*"))], run_folder)
        assert len(runs) == 2 and "06-train-cccccccc" in capsys.readouterr().err
        with pytest.raises(MissingInputError, match="finished train stage"):
            find_runs([str(failed)], run_folder)
    finally:
        (failed / "work").rmdir()
        failed.rmdir()
