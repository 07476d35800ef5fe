"""Reports compared with each other: only under one protocol; tables and exports beside them."""

import csv
import io
import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from duplex.cli import app
from duplex.errors import ConfigError, RequestError
from pipeline.evaluate_targets import EvaluateOptions, section_of
from pipeline.evaluation.comparison import Report, compare_reports, differences, read_report
from pipeline.evaluation.found import conversations_csv, failures, measures_csv, report_data
from pipeline.evaluation.play import PlaySettings, evaluate_urls
from pipeline.evaluation.verdicts import check_conditions
from pipeline.evaluation.verdicts import failures as failed
from tests.stages.planted_server import Plan, planted, spoken, tiny_tokenizer

PROTOCOL = {"seeds": [0], "lead_in_s": 0.32, "sampling": {"text_topk": 25}}
RUNNER = CliRunner()


def played_by(plan, label, count=12, seeds=(0,)):
    items = [spoken(item_id=f"item-{number:02}") for number in range(count)]
    settings = PlaySettings(tokenizer=tiny_tokenizer(), seeds=seeds, again=False)
    with planted(plan) as url:
        return evaluate_urls({label: url}, items, settings, lambda line: None)[0]


@pytest.fixture(scope="module")
def played():
    """A silent model and one that answers."""
    return played_by(Plan(), "silent"), played_by(Plan(echo=13), "answers")


def write(path, data, **changes):
    path.write_text(json.dumps(data | changes))
    return path


@pytest.fixture
def reports(played, tmp_path):
    """A report for each of the two models, as two evaluations of two days would leave them."""
    found = [report_data([one], about={}, protocol=PROTOCOL) for one in played]
    return [write(tmp_path / f"{n}.json", one) for n, one in enumerate(found)]


def run(*arguments):
    return RUNNER.invoke(app, ["evaluate", *map(str, arguments)])


def test_two_reports_of_one_protocol_are_compared_as_one_evaluation_is(played, reports):
    one = report_data(list(played), about={}, protocol=PROTOCOL)["verdicts"][0]["rows"]
    apart = compare_reports({str(path): read_report(path) for path in reports})
    assert apart[0]["rows"] == one
    assert {row["key"]: row["word"] for row in one}["response_rate"] == "improved"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"protocol": PROTOCOL | {"lead_in_s": 1.0}}, "lead_in_s: 0.32 and 1.0"),
        ({"protocol": PROTOCOL | {"sampling": {"text_topk": 1}}}, "sampling:"),
        ({"protocol": {"seeds": [0]}}, "lead_in_s"),
    ],
)
def test_other_protocols_are_refused_and_said_how(reports, changes, said):
    write(reports[1], json.loads(reports[1].read_text()), **changes)
    with pytest.raises(RequestError, match=said) as caught:
        compare_reports({str(path): read_report(path) for path in reports})
    assert "--allow" in str(caught.value)


@pytest.mark.parametrize("key", ["prompt", "user_audio", "user", "first_speaker"])
def test_items_that_were_asked_otherwise_are_refused(reports, key):
    data = json.loads(reports[1].read_text())
    data["items"][3][key] = "another"
    write(reports[1], data)
    read = {str(path): read_report(path) for path in reports}
    with pytest.raises(RequestError, match=rf"{key}: differs in item-03"):
        compare_reports(read)
    assert compare_reports(read, allow=[key])[0]["rows"]


def test_items_that_only_one_report_has_are_left_out_when_that_is_allowed(reports):
    data = json.loads(reports[1].read_text())
    data["items"] = data["items"][:10]
    write(reports[1], data)
    read = {str(path): read_report(path) for path in reports}
    with pytest.raises(RequestError, match="only one has item-10, item-11"):
        compare_reports(read)
    rows = compare_reports(read, allow=["items"])[0]["rows"]
    assert {row["key"]: row["n"] for row in rows}["response_rate"] == 10


def test_a_report_whose_conversations_are_cut_off_is_refused(reports):
    data = json.loads(reports[1].read_text())
    data["conversations"] = data["conversations"][:-2]
    write(reports[1], data)
    with pytest.raises(RequestError, match="found none of item-10, item-11"):
        compare_reports({str(path): read_report(path) for path in reports})


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_report_with_what_is_no_number_is_refused(reports, number):
    content = reports[1].read_text()
    sums = '"response_rate": [2.0, 2.0]'
    assert sums in content
    reports[1].write_text(content.replace(sums, f'"response_rate": [{number}, 2.0]', 1))
    with pytest.raises(RequestError, match=r"must be a report\.json"):
        read_report(reports[1])


def test_items_that_are_judged_otherwise_are_refused(played):
    """The same prompt and audio, another list of right answers."""
    one = report_data([played[0]], about={}, protocol=PROTOCOL)
    spoken_item = played[0].conversations[0].spoken
    (turn, *rest) = spoken_item.item.user_turns
    item = spoken_item.item.model_copy(
        update={"user_turns": (turn.model_copy(update={"must_say": ("latte",)}), *rest)}
    )
    first = replace(played[0].conversations[0], spoken=replace(spoken_item, item=item))
    other = replace(played[0], conversations=(first, *played[0].conversations[1:]))
    two = report_data([other], about={}, protocol=PROTOCOL)
    found = differences(Report.model_validate(one), Report.model_validate(two))
    assert found == {"judged_by": "differs in item-00"}


def test_what_is_no_report_is_refused(tmp_path):
    for content in ("{", "[]", '{"models": []}', '{"models": [], "protocol": {}, "items": 1}'):
        path = tmp_path / "report.json"
        path.write_text(content)
        with pytest.raises(RequestError, match=r"must be a report\.json"):
            read_report(path)
    with pytest.raises(RequestError, match="must be there"):
        read_report(tmp_path / "none.json")


# -- the command


def test_the_command_compares_and_fails_as_it_is_told(reports, tmp_path):
    folders = []
    for number, path in enumerate(reports):
        folder = tmp_path / f"day-{number}"
        folder.mkdir()
        path.rename(folder / "report.json")
        folders.append(folder)
    shown = run(*folders)
    assert shown.exit_code == 0 and "Turns answered" in shown.output
    found = json.loads(run(*folders, "--json").stdout)
    words = {row["key"]: row["word"] for row in found["verdicts"][0]["rows"]}
    assert words["response_rate"] == "improved"
    for condition, code in (
        ("improved", 1),
        ("improved:response_rate", 1),
        ("regressed:response_rate", 0),
        ("not-improved:response_rate", 0),
        ("not-improved:facts_said", 1),
        ("inconclusive:facts_said", 1),
    ):
        result = run(*folders, "--fail-on", condition)
        assert result.exit_code == code, condition
        assert ("--fail-on: " in result.stderr) == (code == 1)
    assert run(folders[1], "--against", folders[0], "--fail-on", "improved").exit_code == 1
    assert run(folders[0], "--against", folders[1], "--fail-on", "improved").exit_code == 0


@pytest.mark.parametrize("condition", ["worse", "regressed:speed", "not-"])
def test_conditions_that_there_are_not_are_refused(condition):
    with pytest.raises(RequestError, match="--fail-on must be a verdict"):
        check_conditions([condition], num_models=2)


def test_a_condition_that_nothing_was_measured_for_does_not_pass(reports):
    with pytest.raises(RequestError, match="needs two models"):
        check_conditions(["regressed"], num_models=1)
    compared = compare_reports({str(path): read_report(path) for path in reports})
    assert failed(compared, ["not-improved:base_nll_words"])  # there were no base clips
    assert failed(compared, ["not-measured:base_nll_words"])
    assert not failed(compared, ["regressed:base_nll_words"])


def test_one_report_alone_and_what_is_nothing_are_told(reports, tmp_path):
    for arguments, said in (
        ([reports[0].rename(tmp_path / "report.json")], "give two"),
        ([tmp_path / "nothing"], "must be a config"),
        (["configs/pocket.yaml", "--seeds", "3"], "evaluate.seeds"),
        (["configs/pocket.yaml", "--against", "other"], "--against base"),
    ):
        raised = run(*arguments).exception
        assert isinstance(raised, RequestError) and said in str(raised)


# -- tables and exports


def test_seeds_of_an_item_are_added_and_weigh_as_one():
    few, many = Plan(), Plan(echo=13)
    one = report_data([played_by(few, "a", 3)], about={}, protocol=PROTOCOL)
    two = report_data([played_by(many, "a", 3, seeds=(0, 1, 2))], about={}, protocol=PROTOCOL)
    assert len(two["conversations"]) == 9 and len(two["items"]) == 3
    sums = [c["sums"]["response_rate"] for c in two["conversations"]]
    assert (
        sums == [[2, 2]] * 9
        and [c["seed"] for c in two["conversations"]] == [0] * 3 + [1] * 3 + [2] * 3
    )
    assert one["conversations"][0]["sums"]["response_rate"] == [0, 2]


def test_the_tables_hold_what_the_report_does(played):
    data = report_data(list(played), about={}, protocol=PROTOCOL, trained=frozenset())
    rows = list(csv.DictReader(io.StringIO(measures_csv(data))))
    answered = [r for r in rows if r["measure"] == "response_rate" and r["group"] == "all"]
    assert [(r["model"], r["value"], r["n"]) for r in answered] == [
        ("silent", "0.0", "24"), ("answers", "1.0", "24"),
    ]  # fmt: skip
    assert {row["group"] for row in rows} == {"all", "angry", "persona held out"}
    lines = list(csv.DictReader(io.StringIO(conversations_csv(data))))
    assert len(lines) == 24 and lines[0]["item"] == "item-00" and lines[0]["grade"] == "poor"
    assert {len(line) for line in lines} == {len(lines[0])}


def test_no_cell_calculates():
    nothing = dict.fromkeys(("value", "n", "low", "high"))
    hostile = {
        "groups": [],
        "likelihood": [],
        "summary": [{"key": "=1+1", "by_model": {"@m": nothing}}],
    }
    assert "'=1+1,'@m,,,," in measures_csv(hostile)


def test_a_failure_is_exported_with_all_that_was_said_before_it():
    plan = Plan(says={0: "Hi. ", 17: "What would you like", 50: " Ann, a large latte."})
    (conversation,) = report_data([played_by(plan, "m", 1)], about={}, protocol={})["conversations"]
    (line,) = failures([conversation])
    assert line["user"] == line["reply"] == "What would you like"
    assert line["faults"] == ["echo"] and line["turn"] == 0
    assert line["history"] == [{"role": "agent", "text": "Hi.", "faults": []}]
    assert line["system_prompt"].startswith("You are Ann, an angry customer.")
    assert conversation["grade"] == "poor"


def test_set_holds_for_what_is_played_and_nothing_is_passed_over(reports, tmp_path):
    options = EvaluateOptions(overrides=("evaluate.seconds=12", "evaluate.sampling.text_topk=3"))
    section = section_of(options)
    assert (section.seconds, section.sampling.text_topk, section.seeds) == (12, 3, 1)
    assert section_of(EvaluateOptions(items=("a.yaml",), seeds=2, weak=True)).seeds == 2
    for wrong in ("train.steps=3", "evaluate.secnds=3", "evaluate.seconds"):
        with pytest.raises(ConfigError):
            section_of(EvaluateOptions(overrides=(wrong,)))
    folders = []
    for number, path in enumerate(reports):
        folders.append(tmp_path / f"day-{number}")
        folders[-1].mkdir()
        path.rename(folders[-1] / "report.json")
    for more, said in (
        (["--out", tmp_path / "x"], "only compared"),
        (["--set", "evaluate.seconds=3"], "only compared"),
        (["--allow", "promtp"], "found promtp"),
        (["--fail-on", "regressed:"], "must be a verdict"),
    ):
        raised = run(*folders, *more).exception
        assert isinstance(raised, RequestError) and said in str(raised), more
    twice = run(folders[0], folders[0]).exception
    assert isinstance(twice, RequestError) and "found one twice" in str(twice)
    data = json.loads((folders[1] / "report.json").read_text())
    for item in data["items"]:
        item["item"] += "-other"
    (folders[1] / "report.json").write_text(json.dumps(data))
    apart = run(*folders, "--allow", "items").exception
    assert isinstance(apart, RequestError) and "in common, found none" in str(apart)


def test_the_table_says_when_nothing_can_be_concluded(played, tmp_path):
    folders = []
    for number, one in enumerate(played):
        few = replace(one, conversations=one.conversations[:4])
        folders.append(tmp_path / f"few-{number}")
        folders[-1].mkdir()
        write(folders[-1] / "report.json", report_data([few], about={}, protocol=PROTOCOL))
    assert "Nothing can be concluded; a verdict takes 6 items" in run(*folders).output


def test_sound_without_words_is_told_from_an_answer(played):
    """A server that plays the user's sound back and writes nothing answers every turn."""
    (row,) = [
        row
        for row in report_data([played[1]], about={}, protocol={})["summary"]
        if row["key"] == "answered_in_words"
    ]
    assert row["by_model"]["answers"]["hits"] == 0 and row["by_model"]["answers"]["n"] == 24
