"""What a report says of a run's data."""

from duplex.base import canonical_json
from duplex.records import record_line
from duplex.store import LedgerEntry, StageFolder
from pipeline.evaluation.origins import origins_of
from tests import factories


def complete(root, number, stage, key, records, *, funnel=None, rejected=0):
    folder = StageFolder.of(root, number, stage, key * 8)
    folder.path.mkdir(parents=True)
    for index in range(rejected):
        error = ValueError(f"<b>too short</b> {index}")
        folder.reject_task(f"task-{index}", key, error)
    provenance = {"funnel": funnel} if funnel else {}
    lines = [record_line(record) for record in records]
    counts = {"records": len(records), "rejected": rejected}
    folder.complete(lines, files=[], counts=counts, provenance=provenance)
    return folder


def test_the_funnel_and_the_folder_it_is_of_are_told(tmp_path):
    funnel = {"written": 5, "kept": 2, "reasons": {"digits": 2, "echo": 1}}
    rows = [factories.dialogue("a", persona_id="ann"), factories.dialogue("b", persona_id="bob")]
    made = complete(tmp_path, 2, "dialogues", "aaaaaaaa", rows, funnel=funnel, rejected=1)
    StageFolder.of(tmp_path, 2, "dialogues", "b" * 64).finish_task(  # newer, and not complete
        LedgerEntry("x", "k", (canonical_json({"record": "Voice"}),), (), 0.0)
    )
    tensors = complete(tmp_path, 5, "tensors", "cccccccc", [])
    dialogues, clips = origins_of(tmp_path, tensors)
    assert dialogues["folder"] == made.path.name
    assert dialogues["holds"] == ("2 dialogues of 2 personas, written by scripted; of 5 candidates")
    assert dialogues["left"].startswith("2 digits, 1 echo, 1 dialogues rejected for good")
    assert clips == {"stage": "tensors", "folder": tensors.path.name, "holds": "nothing",
                     "left": "nothing"}  # fmt: skip


def test_a_damaged_part_is_told_and_breaks_no_report(tmp_path):
    tensors = complete(tmp_path, 5, "tensors", "cccccccc", [])
    (tensors.path / "parts" / "part-00000.jsonl").write_text("{}")
    (row,) = origins_of(tmp_path, tensors)
    assert "part-00000.jsonl" in row["holds"]
