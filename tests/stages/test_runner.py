"""Run folders and the local runner: resume, adoption, rejects, kills, locks."""

import json
import multiprocessing
import os
import signal
import time

import pytest

from duplex.config import Config
from duplex.errors import (
    CorruptFileError,
    LockedError,
    RecordError,
    StageFailedError,
    TransientError,
)
from duplex.lock import RunLock, is_locked
from duplex.records import Voice
from duplex.stage import MapStage, StageContext, Task, record_seed
from duplex.store import LAST_KEYS, LedgerEntry, StageFolder
from pipeline.runners.local import execute


class ToyStage(MapStage):
    """Makes a voice and a blob for each task; borrows the section of `voices`."""

    name = "voices"
    number = 3
    set_only = frozenset({"user_voices"})

    def __init__(self, sources, faults=None, pause_s=0.0):
        self.sources = sources
        self.faults = faults or {}
        self.pause_s = pause_s
        self.processed = []
        self.setups = 0

    def tasks(self, context):
        return [Task(name, (source,), source) for name, source in self.sources.items()]

    def setup(self, context):
        self.setups += 1

    def process(self, task, seed, blobs):
        time.sleep(self.pause_s)
        self.processed.append(task.id)
        if task.id in self.faults:
            raise self.faults[task.id]
        sha = blobs.put(f"{task.payload} {seed}".encode(), ".bin")
        params = {"seed": seed, "blob": sha}
        return [Voice(id=task.id, engine="toy", role="agent", params=params, licence="none")]


SOURCES = {f"voice-{index}": f"source {index}" for index in range(6)}


def run(stage, root, config=None, **options):
    config = config or Config(name="toy")
    context = StageContext(config, root)
    key = stage.folder_key(config, {})[:-8] + f"{abs(hash(tuple(stage.sources.items()))):08x}"[:8]
    folder = StageFolder.of(root / config.name, stage.number, stage.name, key[-8:] * 8)
    return execute(stage, context, folder, **options), folder


def lines_of(folder):
    return (folder.path / "parts" / "part-00000.jsonl").read_text().splitlines()


def test_a_second_run_makes_nothing_and_has_the_same_digest(tmp_path):
    first, _ = run(ToyStage(SOURCES), tmp_path)
    again = ToyStage(SOURCES)
    second, _ = run(again, tmp_path)
    assert again.processed == [] and again.setups == 0
    assert first["digest"] == second["digest"]
    assert first["counts"] == {"tasks": 6, "records": 6, "rejected": 0}


def test_a_changed_source_remakes_its_record_alone(tmp_path):
    run(ToyStage(SOURCES), tmp_path)
    changed = ToyStage(SOURCES | {"voice-3": "another source"})
    manifest, folder = run(changed, tmp_path)
    assert changed.processed == ["voice-3"]
    assert manifest["provenance"]["adopted"] == 5
    blob = next((folder.path / "blobs").iterdir())
    assert (
        sorted(path.stat().st_nlink for path in (folder.path / "blobs").iterdir()) == [1] + [2] * 5
    )
    assert blob.exists()


def test_settings_that_only_choose_the_set_keep_the_records(tmp_path):
    stage = ToyStage(SOURCES)
    task = stage.tasks(StageContext(Config(name="toy"), tmp_path))[0]
    few = Config.model_validate({"name": "toy", "voices": {"user_voices": 2}})
    many = Config.model_validate({"name": "toy", "voices": {"user_voices": 9}})
    assert stage.record_key(few, task) == stage.record_key(many, task)
    assert stage.folder_key(few, {}) != stage.folder_key(many, {})
    other_seed = Config.model_validate({"name": "toy", "seed": 7})
    assert stage.record_key(few, task) != stage.record_key(other_seed, task)
    runtime = Config.model_validate({"name": "toy", "voices": {"runtime": {"max_reject_rate": 1}}})
    assert stage.record_key(few, task) == stage.record_key(runtime, task)


def test_order_changes_no_byte(tmp_path):
    forward, folder = run(ToyStage(SOURCES), tmp_path / "a")
    backward, other = run(ToyStage(dict(reversed(SOURCES.items()))), tmp_path / "b")
    assert forward["digest"] == backward["digest"]
    assert lines_of(folder) == lines_of(other)


def test_a_bad_record_is_rejected_with_its_reason_and_not_tried_again(tmp_path):
    config = Config.model_validate({"name": "toy", "voices": {"runtime": {"max_reject_rate": 0.5}}})
    faults = {
        "voice-2": RecordError("no such voice"),
        "voice-4": CorruptFileError("x.wav: damaged"),
    }
    manifest, folder = run(ToyStage(SOURCES, faults), tmp_path, config)
    assert manifest["counts"] == {"tasks": 6, "records": 4, "rejected": 2}
    assert folder.rejected()["voice-2"]["message"] == "no such voice"
    assert folder.rejected()["voice-4"]["error"] == "CorruptFileError"
    calm = ToyStage(SOURCES)
    run(calm, tmp_path, config)
    assert calm.processed == []
    manifest, _ = run(calm, tmp_path, config, retry_rejected=True)
    assert calm.processed == ["voice-2", "voice-4"]
    assert manifest["counts"]["rejected"] == 0


def test_too_many_rejects_fail_the_stage_and_name_the_file(tmp_path):
    with pytest.raises(StageFailedError, match=r"found 1 of 6.*rejected\.jsonl.*no such voice"):
        run(ToyStage(SOURCES, {"voice-2": RecordError("no such voice")}), tmp_path)
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_transient_failure_is_no_reject_and_is_tried_again(tmp_path):
    with pytest.raises(StageFailedError, match="1 of 6 tasks could not be done for now"):
        run(ToyStage(SOURCES, {"voice-1": TransientError("busy")}), tmp_path)
    later = ToyStage(SOURCES)
    manifest, folder = run(later, tmp_path)
    assert later.processed == ["voice-1"]
    assert folder.rejected() == {} and manifest["counts"]["records"] == 6


def test_a_torn_ledger_line_costs_its_own_task_only(tmp_path):
    _, folder = run(ToyStage(SOURCES), tmp_path)
    ledger = folder.path / "ledger.jsonl"
    (folder.path / "manifest.json").unlink()
    ledger.write_bytes(ledger.read_bytes()[:-40])
    stage = ToyStage(SOURCES)
    manifest, _ = run(stage, tmp_path)
    assert stage.processed == ["voice-5"]
    assert manifest["counts"]["records"] == 6


def test_a_lost_blob_is_made_again(tmp_path):
    first, folder = run(ToyStage(SOURCES), tmp_path)
    (folder.path / "manifest.json").unlink()
    next((folder.path / "blobs").iterdir()).unlink()
    stage = ToyStage(SOURCES)
    second, _ = run(stage, tmp_path)
    assert len(stage.processed) == 1 and first["digest"] == second["digest"]


def test_a_damaged_blob_is_made_again_instead_of_adopted(tmp_path):
    _, folder = run(ToyStage(SOURCES), tmp_path)
    damaged = next((folder.path / "blobs").iterdir())
    damaged.write_bytes(b"something else")
    changed = ToyStage(SOURCES | {"voice-3": "another source"})
    manifest, other = run(changed, tmp_path)
    spared = "voice-3" if manifest["provenance"]["adopted"] == 5 else None
    remade = set(changed.processed) - {"voice-3"}
    assert spared or len(remade) == 1
    assert all(other.read_blob(record.params["blob"], ".bin") for record in other.records())


def test_doing_a_stage_again_takes_its_manifest_back_first(tmp_path):
    config = Config.model_validate({"name": "toy", "voices": {"runtime": {"max_reject_rate": 1}}})
    _, folder = run(ToyStage(SOURCES, {"voice-2": RecordError("no")}), tmp_path, config)
    seen = []

    class Watching(ToyStage):
        def process(self, task, seed, blobs):
            seen.append(folder.manifest())
            return super().process(task, seed, blobs)

    manifest, _ = run(Watching(SOURCES), tmp_path, config, retry_rejected=True)
    assert seen == [None] and manifest["counts"]["rejected"] == 0


def test_a_changed_part_or_blob_is_noticed_when_read(tmp_path):
    _, folder = run(ToyStage(SOURCES), tmp_path)
    record = next(folder.records())
    blob = folder.path / "blobs" / f"{record.params['blob']}.bin"
    assert folder.read_blob(record.params["blob"], ".bin") == blob.read_bytes()
    blob.write_bytes(b"something else")
    with pytest.raises(CorruptFileError, match=blob.name):
        folder.read_blob(record.params["blob"], ".bin")
    part = folder.path / "parts" / "part-00000.jsonl"
    part.write_text(part.read_text().replace("toy", "boy"))
    with pytest.raises(CorruptFileError, match="part-00000"):
        list(folder.records())


def finished(root):
    return sum(len(path.read_text().splitlines()) for path in root.glob("toy/*/ledger.jsonl"))


def _run_slowly(root):
    run(ToyStage(SOURCES, pause_s=0.3), root)


@pytest.mark.parametrize("records", [1, 2, 3])
def test_after_a_kill_the_digest_is_that_of_an_undisturbed_run(tmp_path, records):
    undisturbed, _ = run(ToyStage(SOURCES), tmp_path / "calm")
    # fork keeps the interpreter's hash seed, which `run` uses for the folder's name
    process = multiprocessing.get_context("fork").Process(target=_run_slowly, args=(tmp_path,))
    process.start()
    while process.is_alive() and finished(tmp_path) < records:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    stage = ToyStage(SOURCES)
    resumed, _ = run(stage, tmp_path)
    assert resumed["digest"] == undisturbed["digest"]
    assert 0 < len(stage.processed) < 6


def test_seeds_depend_on_run_stage_and_record_alone():
    assert record_seed(1, "a", "b") == record_seed(1, "a", "b")
    seeds = {
        record_seed(*parts)
        for parts in ((1, "a", "b"), (2, "a", "b"), (1, "b", "b"), (1, "a", "c"))
    }
    assert len(seeds) == 4


def test_one_run_at_a_time_and_the_lock_dies_with_its_holder(tmp_path):
    with RunLock(tmp_path):
        assert is_locked(tmp_path)
        with pytest.raises(LockedError, match=f"process {os.getpid()}"), RunLock(tmp_path):
            pass
    assert not is_locked(tmp_path)
    ready = multiprocessing.get_context("fork").Event()
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(10) and is_locked(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with RunLock(tmp_path):
        pass


def _hold(root, ready):
    with RunLock(root):
        ready.set()
        time.sleep(60)


def test_manifest_is_the_last_word(tmp_path):
    manifest, folder = run(ToyStage(SOURCES), tmp_path)
    on_disk = json.loads((folder.path / "manifest.json").read_text())
    assert on_disk == manifest
    assert {"stage", "key", "digest", "counts", "files", "provenance"} <= set(on_disk)
    assert "seconds" in on_disk["provenance"]


def test_tasks_are_counted_without_their_records_whatever_their_names(tmp_path):
    names = ['pla"in', "sla\\sh", "ü", 'a","task":"b', "long-" * 300]
    folder = StageFolder(tmp_path / "03-voices-ab", "voices", "ab")
    for name in names:
        folder.finish_task(LedgerEntry(name, "key", ('{"id":"x","task":"y"}',), (), 0.25))
    ledger = folder.path / "ledger.jsonl"
    assert folder.num_finished() == len(folder.ledger()) == len(names)
    assert all(LAST_KEYS.search(line) for line in ledger.read_bytes().splitlines())
    ledger.write_bytes(ledger.read_bytes() * 2)  # again: the same tasks
    assert folder.num_finished() == len(names)
    ledger.write_bytes(ledger.read_bytes()[:-40])  # torn: its task has an earlier line
    assert folder.num_finished() == len(folder.ledger()) == len(names)
    ledger.write_bytes(ledger.read_bytes().splitlines()[0][:-9] + b"\n")
    assert folder.num_finished() == len(folder.ledger()) == 0
