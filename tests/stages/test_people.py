"""People's grades: read as the server writes them, counted by model, laid beside ours."""

import json

import pytest

from duplex.errors import MissingInputError
from pipeline.evaluation.people import beside_ours, by_model, people_data, read_people
from pipeline.serving.grades import GradeBook


@pytest.fixture
def book(tmp_path):
    """Writes by the server's own class. `add(conversation, grade, …)`."""
    path = tmp_path / "grades.jsonl"

    class Book:
        file = path

        def add(self, conversation, grade, label="merged", digest="d1"):
            content = {"grade": grade, "conversation": conversation, "seconds": 20.0}
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


def test_data_for_a_report_is_json(book):
    book.add("a", "poor")
    data = people_data(book.file, lambda one: None)
    assert json.loads(json.dumps(data))["agreement"]["n"] == 0
    with pytest.raises(MissingInputError, match="must hold people's grades"):
        read_people(book.file.parent / "none.jsonl")
