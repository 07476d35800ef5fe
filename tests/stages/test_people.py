"""People's grades: read as the server writes them, counted by model, laid beside ours."""

import json
from contextlib import nullcontext

import pytest
from typer.testing import CliRunner

from duplex.cli import app
from duplex.errors import MissingInputError
from pipeline.evaluate_targets import EvaluateOptions, evaluate_to_folder
from pipeline.evaluation.items import PlaceWords, load_place_words
from pipeline.evaluation.people import (
    FEW,
    KeptGrade,
    beside_ours,
    by_model,
    exchanges_of,
    our_grade,
    people_data,
    read_people,
    told,
)
from pipeline.evaluation.play import PlaySettings, evaluate_urls
from pipeline.evaluation.scoring import timed_words
from pipeline.serving.grades import GradeBook
from tests.stages.planted_server import (
    Plan,
    ToneEngine,
    item,
    planted,
    spoken,
    tiny_tokenizer,
)


@pytest.fixture
def book(tmp_path):
    """Writes by the server's own class. `add(conversation, grade, …)`."""
    path = tmp_path / "grades.jsonl"

    class Book:
        file = path

        def add(self, conversation, grade, label="merged", digest="d1", **held):
            content = {"grade": grade, "conversation": conversation, "seconds": 20.0, **held}
            GradeBook(path).add(content, digest, label)

    return Book()


def test_the_last_line_of_a_conversation_counts(book):
    book.add("a", "poor")
    book.add("b", "good")
    book.add("a", "perfect")
    book.add("a", "poor", label="base", digest="d0")  # another model: another conversation
    book.add("", "good")
    book.add("", "good")  # without a name each is one of its own
    with book.file.open("a") as file:
        file.write('{"grade": "splendid", "seconds": 3}\n{"grade": "poor", "seco\n[1]\n')
    people = read_people(book.file)
    given = {(one.label, one.conversation): one.grade for one in people.grades}
    assert given == {
        ("merged", "a"): "perfect", ("merged", "b"): "good", ("merged", ""): "good",
        ("base", "a"): "poor",
    }  # fmt: skip
    assert (len(people.grades), people.replaced, people.unreadable) == (5, 1, 1)


def test_each_model_is_counted_with_exact_bounds(book):
    for number in range(15):
        book.add(f"c{number}", "good")
    book.add("x", "poor", label="base", digest="d0")
    merged, base = by_model(read_people(book.file).grades)
    assert (merged["label"], merged["n"], base["label"], base["n"]) == ("merged", 15, "base", 1)
    poor = merged["grades"]["poor"]
    # No hit in 15: 1 - .025 ** (1 / 15) = .218
    assert (poor["hits"], poor["low"]) == (0, 0) and poor["high"] == pytest.approx(0.218, abs=1e-3)
    assert base["grades"]["poor"]["value"] == 1


def test_beside_ours_worked_out_by_hand(book):
    """Ours perfect, good, poor, poor; theirs perfect, good, good, poor: one of four is one apart.

    found .5 / 4; expected [(1·2 + 1·1 + 1·1 + 2·2) / 2 + 1·1 + 2·1] / 16 = 7 / 16; kappa 1 - 2/7.
    """
    for name, grade in zip("abcd", ("perfect", "good", "good", "poor"), strict=True):
        book.add(name, grade)
    book.add("e", "poor")
    ours = {"a": "perfect", "b": "good", "c": "poor", "d": "poor"}
    row = beside_ours(read_people(book.file).grades, lambda one: ours.get(one.conversation))
    assert row["table"] == ((1, 0, 0), (0, 1, 0), (0, 1, 1))
    assert (row["n"], row["raw"], row["without_ours"]) == (4, 0.75, 1)
    assert row["kappa"] == pytest.approx(1 - 2 / 7, abs=1e-6)


# -- our grade of what the page sent

WORDS = load_place_words(["data/prompts/seeds.yaml"])
PROMPT = "You are Ann, an angry customer. You want a large latte & a chair."
TALK = ["What would you like", "What size", "Your name", "Anything else", "Right you are"]


def line_of(measured, **changes):
    """A conversation as the page sends it: the model's words by lines, the user's as heard."""
    said = timed_words(measured.conversation.text)
    words = [{"start_s": 0.08 * frame, "text": word, "at_s": [0.08 * frame]}
             for frame, word in said]  # fmt: skip
    spoken = measured.spoken
    heard = [{"start_s": 0.08 * turn.start, "end_s": 0.08 * turn.end, "text": text}
             for turn, text in zip(spoken.turns, spoken.texts, strict=True)]  # fmt: skip
    fields = {"grade": "good", "seconds": 0.08 * spoken.num_frames, "words": words,
              "heard": heard, "text_prompt": measured.prompt}  # fmt: skip
    return KeptGrade.model_validate(fields | changes)


@pytest.mark.parametrize(
    ("replies", "grade"),
    [
        ([" A large latte", " Large", " Ann", " No thanks", " Bye"], "perfect"),
        ([" A large latte", " Ninety nine", " Ann", " No thanks", " Bye"], "good"),
        ([" Nine", " Ninety nine", " Ann", " No thanks", " Bye"], "poor"),
        ([" A large latte", " What size", " Ann", " No thanks", " Bye"], "poor"),
        ([" A large latte", " Anything else for you", " Ann", " No thanks", " Bye"], "poor"),
        ([" A large latte", "", "", "", " Bye"], "poor"),
        ([" A large latte", " Large", "", " No thanks", " Bye"], "good"),
    ],
)
def test_a_line_of_the_page_gets_the_grade_of_the_report(replies, grade):
    """One conversation, once as an evaluation measures it and once as a page would send it."""
    asked = spoken(seconds=40, user_turns=TALK, facts=(), **WORDS.model_dump())
    script = [(turn.end + 2, reply, 4)
              for turn, reply in zip(asked.turns, replies, strict=True) if reply]  # fmt: skip
    with planted(Plan(scripts={PROMPT: script})) as url:
        settings = PlaySettings(tokenizer=tiny_tokenizer())
        (played,) = evaluate_urls({"m": url}, [asked], settings, lambda line: None)
    (measured,) = played.conversations
    kept = line_of(measured)
    assert measured.grade == grade == our_grade(kept, WORDS)
    faults = [exchange.faults for exchange in measured.exchanges]
    assert [exchange.faults for exchange in exchanges_of(kept, WORDS)] == faults


def kept_line(**changes):
    fields = {
        "grade": "good", "seconds": 20.0, "text_prompt": PROMPT,
        "heard": [{"start_s": 1, "end_s": 2, "text": "hi what can i get you"},
                  {"start_s": 8, "end_s": 9, "text": "anything else"}],
        "words": [{"start_s": 2.5, "text": "A large latte", "at_s": [2.5, 2.7, 2.9]},
                  {"start_s": 9.5, "text": "No thanks", "at_s": [9.5, 9.7]}],
    }  # fmt: skip
    return KeptGrade.model_validate(fields | changes)


def test_without_the_prompt_or_the_users_words_there_is_no_grade_of_ours():
    assert our_grade(kept_line(), WORDS) == "perfect"
    for missing in ({"text_prompt": None}, {"heard": []}):
        assert our_grade(kept_line(**missing), WORDS) is None
    # A line of before they were kept, as it stands in files.
    old = {"grade": "poor", "seconds": 9, "words": [{"start_s": 1, "text": "Hi"}], "echoes": 2}
    assert our_grade(KeptGrade.model_validate(old), WORDS) is None


def test_what_the_user_has_said_is_not_invented():
    heard = [{"start_s": 1, "text": "that is nine dollars Bob"}, {"start_s": 8, "text": "well"}]
    said = [{"start_s": 2, "text": "Nine, fine"}, {"start_s": 9, "text": "I am not Bob"}]
    assert our_grade(kept_line(heard=heard, words=said), WORDS) == "perfect"
    said[0]["text"] = "Ten, fine"
    found = exchanges_of(kept_line(heard=heard, words=said), WORDS)
    assert [one.invented for one in found] == [("10",), ()]


def test_an_echo_that_the_server_heard_counts_and_a_turn_without_time_to_answer_does_not():
    assert our_grade(kept_line(echoes=1), WORDS) == "poor"
    first = kept_line().words[:1]
    assert our_grade(kept_line(words=first), WORDS) == "poor"  # nothing to one of two turns
    assert our_grade(kept_line(words=first, seconds=10), WORDS) == "perfect"  # hung up


def test_a_line_that_runs_into_the_next_turn_is_parted_where_its_words_begin():
    line = {"start_s": 6, "text": "A large latte no thanks", "at_s": [6, 6.5, 7, 8.5, 9]}
    replies = [one.reply for one in exchanges_of(kept_line(words=[line]), WORDS)]
    assert replies == ["A large latte", "no thanks"]
    del line["at_s"]  # a page that did not say: all of it where the line begins
    replies = [one.reply for one in exchanges_of(kept_line(words=[line]), WORDS)]
    assert replies == ["A large latte no thanks", ""]


def test_what_is_told_says_when_it_is_too_few(book):
    def add(number, grade, **held):
        content = json.loads(kept_line(**held).model_dump_json(exclude={"grade", "seconds"}))
        for key in ("conversation", "model_digest", "label", "at"):
            content.pop(key)
        book.add(f"c{number}", grade, **content)

    for number in range(FEW - 1):
        add(number, "perfect")
    add("other", "poor", heard=[])
    few = people_data(book.file, WORDS)
    assert (few["agreement"]["n"], few["agreement"]["without_ours"]) == (FEW - 1, 1)
    assert "19 conversations with both grades are too few" in " ".join(told(few))
    assert "not defined: one grade throughout" in told(few)[0]
    assert "1 have no grade of ours" in " ".join(told(few))
    add("last", "poor", echoes=3)
    enough = people_data(book.file, WORDS)
    assert "too few" not in " ".join(told(enough)) and enough["agreement"]["kappa"] == 1


def test_the_command_counts_and_compares(book):
    book.add("a", "poor", text_prompt=PROMPT, heard=[{"start_s": 1, "text": "your name"}])
    found = CliRunner().invoke(app, ["grades", str(book.file)])
    assert found.exit_code == 0, found.output
    assert "merged d1" in found.output and "1 (2–100 %)" in found.output
    book.add("b", "good", label="[/b] [red]")
    again = CliRunner().invoke(app, ["grades", str(book.file)])
    assert again.exit_code == 0 and "[/b] [red]" in again.output
    assert "The same grade in 1 of 1" in found.output and "too few" in found.output
    as_json = CliRunner().invoke(app, ["grades", str(book.file), "--json"])
    assert json.loads(as_json.stdout)["models"][0]["grades"]["poor"]["hits"] == 1


def test_a_report_shows_peoples_grades_of_its_models(book, tmp_path, monkeypatch):
    book.add("a", "good", label="<b>tuned</b>", digest="a" * 64)
    book.add("b", "poor", label="other", digest="b" * 64)
    items = tmp_path / "items.yaml"
    items.write_text(json.dumps({"items": [item().model_dump(mode="json")]}))
    monkeypatch.setattr("pipeline.evaluate.espeak.EspeakEngine", lambda: nullcontext(ToneEngine()))
    with planted(Plan()) as url:
        options = EvaluateOptions(items=(str(items),), out=tmp_path / "out", grades=book.file)
        evaluate_to_folder([url], options)
    page = (tmp_path / "out/report.html").read_text()
    assert "What people say" in page and "&lt;b&gt;tuned&lt;/b&gt;" in page
    own, other = page.split("n = 1;")[1:]
    assert "of this report<" in own and "none of this report" in other
    assert "too few to say how far they agree" in page
    assert json.loads((tmp_path / "out/people.json").read_text())["conversations"] == 2
    index = (tmp_path / "out/index.html").read_text()
    assert "people.json" in index and 'href="judge.html"' in index
    assert "people" not in json.loads((tmp_path / "out/report.json").read_text())
    with pytest.raises(MissingInputError, match="must hold people's grades"):
        evaluate_to_folder([url], EvaluateOptions(grades=tmp_path / "none.jsonl"))


def test_data_for_a_report_is_json(book):
    book.add("a", "poor")
    data = people_data(book.file, PlaceWords())
    assert json.loads(json.dumps(data))["agreement"]["n"] == 0
    with pytest.raises(MissingInputError, match="must hold people's grades"):
        read_people(book.file.parent / "none.jsonl")
