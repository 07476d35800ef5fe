"""failures.jsonl and back: a person mends replies, and they become dialogues to train on."""

import json

import pytest
from typer.testing import CliRunner

from duplex.base import canonical_json
from duplex.cli import app
from duplex.configfile import load_config
from duplex.errors import RequestError, StageFailedError
from duplex.files import read_lines
from duplex.records import Dialogue, TensorClip
from pipeline.converters.failures import convert_failures, mend, read_failures
from pipeline.evaluation.play import PlaySettings, evaluate_urls
from pipeline.evaluation.report import page_files
from pipeline.imports import import_stage
from pipeline.run import Selection, plan, run
from tests.factories import persona, write_yaml
from tests.stages.planted_server import Plan, planted, spoken, tiny_tokenizer

ASKED = ["What would you like", "What size", "Your name", "Anything else"]
PROMPT = "You are Ann, an angry customer. You want a large latte & a chair."


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """failures.jsonl of a model that repeats the user, answers, says nothing, and invents."""
    item = spoken(seconds=30, user_turns=ASKED, persona="angry-ann")
    replies = [" What would you like", " A large latte", "", " Ninety nine chairs"]
    script = [
        (turn.end + 2, reply, 4) for turn, reply in zip(item.turns, replies, strict=True) if reply
    ]
    with planted(Plan(scripts={PROMPT: script})) as url:
        settings = PlaySettings(tokenizer=tiny_tokenizer())
        played = evaluate_urls({"tuned": url}, [item], settings, lambda line: None)
    fixed, _ = page_files(played, {}, about={"name": "x"}, protocol={"seconds": 30}, training=[])
    path = tmp_path_factory.mktemp("report") / "failures.jsonl"
    path.write_bytes(fixed["failures.jsonl"])
    return path


@pytest.fixture
def mended(exported, tmp_path):
    """`mended(turn -> better, **changes)`: the file with these filled in."""

    def fill(better, /, **changes):
        path = tmp_path / "failures.jsonl"
        lines = [line | {"better": better.get(line["turn"])} for line in read_lines(exported)]
        lines[0] |= changes
        path.write_text("".join(canonical_json(line) + "\n" for line in lines))
        return path

    return fill


ALL = {0: "A large latte!", 2: "I am Ann.", 3: "A chair, now."}


def said(dialogue):
    return [(turn.role, turn.text) for turn in dialogue.turns]


def test_each_fault_is_exported_once_with_a_place_for_a_better_reply(exported):
    lines = list(read_lines(exported))
    assert [(line["turn"], line["faults"]) for line in lines] == [
        (0, ["echo"]), (2, ["no words"]), (3, ["made up"]),
    ]  # fmt: skip
    assert all(line["better"] is None for line in lines)
    history = [(said["role"], said["text"], said.get("faults")) for said in lines[2]["history"]]
    assert history == [
        ("user", ASKED[0], None), ("agent", "What would you like", ["echo"]),
        ("user", ASKED[1], None), ("agent", "A large latte", []),
        ("user", ASKED[2], None), ("agent", "", ["no words"]),
    ]  # fmt: skip


def test_a_conversation_becomes_one_dialogue_with_every_fault_replaced(mended, tmp_path):
    report = convert_failures(mended(ALL), tmp_path / "out.jsonl")
    (line,) = read_lines(tmp_path / "out.jsonl")
    dialogue = Dialogue.model_validate({k: v for k, v in line.items() if k != "record"})
    assert said(dialogue) == [
        ("user", ASKED[0]), ("agent", "A large latte!"),
        ("user", ASKED[1]), ("agent", "A large latte"),
        ("user", ASKED[2]), ("agent", "I am Ann."),
        ("user", ASKED[3]), ("agent", "A chair, now."),
    ]  # fmt: skip
    assert (dialogue.system_prompt, dialogue.persona_id, dialogue.mood) == (
        PROMPT, "angry-ann", "angry",
    )  # fmt: skip
    assert report.written == 1 and "other items" in report.notes[-1]
    convert_failures(mended(ALL), tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    convert_failures(mended(ALL | {3: "A chair."}), tmp_path / "other.jsonl")
    assert next(iter(read_lines(tmp_path / "other.jsonl")))["id"] != dialogue.id


def test_nothing_rests_on_a_fault_that_is_not_mended(mended, tmp_path):
    """The first two are mended, the third is not: the conversation ends with the first."""
    path = mended({0: "A large latte!", 3: "A chair, now."})
    with pytest.raises(StageFailedError, match=r"turn 4: .*turn 3 is not \(no words\)"):
        convert_failures(path, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    report = convert_failures(path, tmp_path / "out.jsonl", skip_refused=True)
    (line,) = read_lines(tmp_path / "out.jsonl")
    assert [turn["text"] for turn in line["turns"]] == [ASKED[0], "A large latte!"]
    assert report.written == 1 and report.notes[0] == "lines without `better`, left out: 1"
    # A line that was deleted is a fault that is not mended, not a right reply.
    path.write_text(path.read_text().split("\n", 1)[1])
    with pytest.raises(StageFailedError, match=r"turn 1 is not \(echo\)"):
        convert_failures(path, tmp_path / "third.jsonl", skip_refused=True)


def test_a_better_reply_that_our_rules_would_blame_is_told_and_kept(mended):
    found = mend(read_failures(mended({0: "What would you like", 2: "I am Bob Smith."})), {})
    assert found.refused[0][1] == "`better` of turn 1 must be another reply, found the same words"
    found = mend(read_failures(mended({0: "You would like what?", 2: "I am Bob Smith."})), {})
    assert len(found.dialogues) == 1
    # A mend that is refused is no history of a later one either.
    found = mend(read_failures(mended({0: "What would you like", 3: "A chair, now."})), {})
    assert not found.dialogues and len(found.refused) == 2
    found = mend(read_failures(mended({0: "You would like what?", 2: "I am Bob Smith."})), {})
    assert "nobody has given: bob, smith" in " ".join(found.doubts)


def test_personas_give_names_and_pauses_and_a_stranger_is_refused(mended, tmp_path):
    folder = tmp_path / "personas"
    ann = persona("angry-ann", name="Ann Lee")
    write_yaml(folder / "angry-ann.yaml", ann.model_dump(mode="json"))
    convert_failures(mended(ALL), tmp_path / "out.jsonl", personas=[folder])
    (line,) = read_lines(tmp_path / "out.jsonl")
    assert line["persona_name"] == "Ann Lee"
    assert line["gap_after_user"] == ann.gap_after_user.model_dump()
    with pytest.raises(StageFailedError, match="must be one of --personas, found angry-zoe"):
        convert_failures(
            mended({0: "Now!"}, persona="angry-zoe"), tmp_path / "b.jsonl", personas=[folder]
        )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"item": "../../etc/passwd"}, "record 1 .*item"),
        ({"persona": "Ann\n"}, "record 1 .*persona"),
        ({"beter": "A latte."}, "record 1 .*beter"),
        ({"better": 7}, "record 1 .*better"),
        ({"turn": -1}, "record 1 .*turn"),
        ({"turn": 2}, "there once, found .* in records 1 and 2"),
    ],
)
def test_a_line_that_is_none_is_refused_with_its_place(mended, tmp_path, change, why):
    with pytest.raises(RequestError, match=why):
        convert_failures(mended(ALL, **change), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_without_a_better_reply_there_is_nothing_to_convert(exported, mended, tmp_path):
    for path in (exported, mended({0: "  "})):
        with pytest.raises(RequestError, match="at least one line must have `better`"):
            convert_failures(path, tmp_path / "out.jsonl")
    with pytest.raises(StageFailedError, match="must hold words"):
        convert_failures(mended({0: "…"}), tmp_path / "out.jsonl")
    with pytest.raises(StageFailedError, match="history must hold the 5 turns before it, found 0"):
        convert_failures(mended({0: "Now!"}, turn=5), tmp_path / "out.jsonl")
    taken = mended(ALL)
    with pytest.raises(RequestError, match="must not exist"):
        convert_failures(taken, taken)
    with pytest.raises(RequestError, match=r"ends in \.jsonl"):
        convert_failures(taken, tmp_path / "out.json")


def test_a_line_separator_within_a_reply_ends_no_line(mended, tmp_path):
    path = mended(ALL | {3: "A chair,\u2028now."})
    assert "\u2028" in path.read_text(encoding="utf-8")
    assert convert_failures(path, tmp_path / "out.jsonl").written == 1


@pytest.mark.slow
def test_mended_failures_are_imported_beside_a_runs_own_dialogues_and_become_tensors(
    mended, tiny_checkpoint, tmp_path
):
    """By the command, then as docs/evaluation.md says: with the run's own in one file."""
    source, out = mended(ALL), tmp_path / "mended.jsonl"
    result = CliRunner().invoke(app, ["convert", "failures", str(source), str(out), "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["written"] == 1
    config_path = write_yaml(
        tmp_path / "again.yaml",
        {
            "name": "again",
            "model": {"base": str(tiny_checkpoint)},
            "dialogues": {"per_persona": 1},
            "personas": {"only": ["angry-marcus"]},
            "tensors": {"split": "conversation", "valid_fraction": 0.5,
                        "runtime": {"device": "cpu"}},
        },
    )  # fmt: skip
    config, runs = load_config(config_path), tmp_path / "runs"

    def run_to(stage):
        selection = Selection.of(None, stage, None, ())
        run(config, config_path, runs, selection, overrides=[], report=lambda line: None)

    run_to("dialogues")
    own = plan(config, runs)[1].folder.path
    together = tmp_path / "together.jsonl"
    parts = sorted((own / "parts").glob("*.jsonl"))
    together.write_bytes(b"".join(path.read_bytes() for path in [*parts, out]))
    _, imported = import_stage(config, runs, "dialogues", together)
    assert len(imported.records) == 2 and not imported.refused
    run_to("tensors")
    tensors = plan(config, runs)[4].folder
    clips = [record for record in tensors.records() if isinstance(record, TensorClip)]
    (name,) = [line["id"] for line in read_lines(out)]
    (clip,) = [clip for clip in clips if clip.dialogue_id == name]
    assert [span.label for span in clip.turns] == ["user", "agent"] * 4
    assert len(clips) == 2 and clip.text_tokens > 0
