"""The set of dialogues: who says nearly the same is written again, and the end is always one.

The stage is the real one; its writer is replaced by one that draws from a few texts, so that
nearly every dialogue is in conflict with another one.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duplex.config import Config
from duplex.errors import RecordError, StageFailedError
from duplex.records import Dialogue, Turn
from duplex.stage import StageContext, Task, record_seed
from duplex.store import StageFolder
from pipeline.dialogues import DialoguesStage
from pipeline.engines.funnel import read_candidates, read_funnel
from pipeline.engines.near_duplicates import NearDuplicates, hashed_shingles, jaccard
from pipeline.engines.set_review import SetReview, full_text, opening
from pipeline.runners.local import execute
from tests.factories import dialogue

NUM_TASKS, NUM_TEXTS = 14, 38


def text_of(number: int) -> tuple[Turn, ...]:
    """Texts 2k and 2k + 1 are nearly the same; the last two only begin alike."""
    rng = random.Random(number // 2)
    spelled = [f"word{rng.randrange(400)}" for _ in range(80)]
    if number % 2:
        spelled[60] = "another"
    rows = [" ".join(spelled[i : i + 10]) for i in range(0, 80, 10)]
    if number == NUM_TEXTS - 1:
        rows[3:] = [f"{row[::-1]}" for row in rows[3:]]
    return tuple(
        Turn(role="agent" if index % 2 else "user", text=row) for index, row in enumerate(rows)
    )


class FewTexts(DialoguesStage):
    def __init__(self, *, num_threads: int = 1, stop_after: int | None = None, faults=()):
        super().__init__()
        self.num_threads, self.stop_after, self.faults = num_threads, stop_after, dict(faults)
        self.processed: list[tuple[str, int]] = []

    def tasks(self, context):
        return [Task(f"ann.{number:02d}", ("source",)) for number in range(NUM_TASKS)]

    def threads(self, config):
        return self.num_threads

    def setup(self, context):
        pass

    def process(self, task, seed, blobs):
        if self.stop_after is not None and len(self.processed) >= self.stop_after:
            raise KeyboardInterrupt
        if self.num_threads > 1:
            time.sleep(random.random() / 200)
        self.processed.append((task.id, task.attempt))
        if (task.id, task.attempt) in self.faults:
            raise RecordError(self.faults[task.id, task.attempt])
        return [dialogue(task.id, persona_id="ann", turns=text_of(seed % NUM_TEXTS))]

    def page(self, folder, context):
        return None


def run(root: Path, stage: FewTexts, *, seed: int = 42, allowed: float = 1.0, **options):
    section = {"runtime": {"max_reject_rate": allowed}}
    config = Config.model_validate({"name": "toy", "seed": seed, "dialogues": section})
    folder = StageFolder.of(root, 2, "dialogues", "a" * 64)
    return execute(stage, StageContext(config, root), folder, **options), folder


def in_conflict(one: Dialogue, other: Dialogue) -> bool:
    near = jaccard(hashed_shingles(full_text(one)), hashed_shingles(full_text(other))) >= 0.7
    return near or opening(one) == opening(other)


def one_after_the_other(seed: int) -> tuple[dict[str, int], set[str]]:
    """What the runner must come to: each task's first attempt that conflicts with none before."""
    final: list[Dialogue] = []
    attempts, lost = {}, set()
    for number in range(NUM_TASKS):
        name = f"ann.{number:02d}"
        for attempt in range(DialoguesStage.max_attempts):
            turns = text_of(record_seed(seed, "dialogues", name, attempt) % NUM_TEXTS)
            made = dialogue(name, persona_id="ann", turns=turns)
            if not any(in_conflict(made, other) for other in final):
                final.append(made)
                attempts[name] = attempt
                break
        else:
            lost.add(name)
    return attempts, lost


def ended_at(folder: StageFolder) -> dict[str, int]:
    return {entry.task_id: entry.attempt for entry in folder.finished()}


@pytest.mark.parametrize("seed", [2, 3, 4, 42])
def test_each_dialogue_ends_at_its_first_attempt_that_is_like_none_before(tmp_path, seed):
    _, folder = run(tmp_path, FewTexts(), seed=seed)
    attempts, lost = one_after_the_other(seed)
    assert ended_at(folder) == attempts
    assert set(folder.rejected()) == lost
    assert max(attempts.values()) > 1, "this seed shows nothing: nobody is sent back twice"
    kept = [record for record in folder.records() if isinstance(record, Dialogue)]
    assert not any(in_conflict(a, b) for a in kept for b in kept if a.id < b.id)


@pytest.mark.slow  # many seeds
@given(st.integers(min_value=0, max_value=2**31))
@settings(deadline=None, max_examples=15)
def test_whatever_the_seed_the_review_comes_to_an_end(tmp_path_factory, seed):
    _, folder = run(tmp_path_factory.mktemp("runs"), FewTexts(), seed=seed)
    assert (ended_at(folder), set(folder.rejected())) == one_after_the_other(seed)


def test_threads_that_finish_in_any_order_change_no_byte(tmp_path):
    calm, _ = run(tmp_path / "calm", FewTexts())
    digests = {run(tmp_path / f"{n}", FewTexts(num_threads=5))[0]["digest"] for n in range(4)}
    assert digests == {calm["digest"]}


def test_a_run_that_is_stopped_anywhere_ends_as_an_undisturbed_one(tmp_path):
    calm_stage = FewTexts()
    calm, calm_folder = run(tmp_path / "calm", calm_stage)
    assert len(calm_stage.processed) > NUM_TASKS + 5  # several rounds
    for stop_after in range(1, len(calm_stage.processed), 2):
        root = tmp_path / f"stopped-{stop_after}"
        with pytest.raises(KeyboardInterrupt):
            run(root, FewTexts(stop_after=stop_after))
        second = FewTexts()
        resumed, folder = run(root, second)
        assert resumed["digest"] == calm["digest"], stop_after
        # Nothing is made twice, and nothing noted twice.
        assert len(second.processed) == len(calm_stage.processed) - stop_after
        assert read_candidates(folder) == read_candidates(calm_folder)
        assert read_funnel(folder) == read_funnel(calm_folder)


def _run_slowly(root):
    class Slow(FewTexts):
        def process(self, task, seed, blobs):
            time.sleep(0.02)
            return super().process(task, seed, blobs)

    run(root, Slow())


def test_after_a_kill_the_digest_is_that_of_an_undisturbed_run(tmp_path):
    calm, _ = run(tmp_path / "calm", FewTexts())
    process = multiprocessing.get_context("fork").Process(target=_run_slowly, args=(tmp_path,))
    process.start()
    assert process.pid
    ledger = StageFolder.of(tmp_path, 2, "dialogues", "a" * 64).path / "ledger.jsonl"
    for _ in range(500):  # until the second round has begun
        if ledger.exists() and len(ledger.read_text().splitlines()) > NUM_TASKS + 1:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    stage = FewTexts()
    resumed, _ = run(tmp_path, stage)
    assert resumed["digest"] == calm["digest"] and stage.processed


def test_a_second_run_sends_nothing_back(tmp_path):
    first, _ = run(tmp_path, FewTexts())
    again = FewTexts()
    second, _ = run(tmp_path, again)
    assert again.processed == [] and first["digest"] == second["digest"]


def test_the_funnel_counts_what_was_sent_back_and_why(tmp_path):
    stage = FewTexts()
    manifest, folder = run(tmp_path, stage)
    lines = read_candidates(folder)
    funnel = manifest["provenance"]["funnel"]
    assert funnel["kept"] == manifest["counts"]["records"]
    assert funnel["written"] == len(stage.processed) == funnel["kept"] + len(lines)
    assert set(funnel["reasons"]) <= {"near-duplicate", "same-opening"} and funnel["reasons"]
    assert all(line["by"] == "review" and line["turns"] for line in lines)
    attempts = [(line["task"], line["attempt"]) for line in lines]
    assert len(set(attempts)) == len(attempts)


def scarce(root: Path, **options):
    """A seed that leaves dialogues which find no text of their own."""
    return run(root, FewTexts(), seed=scarce_seed(), **options)


@functools.cache
def scarce_seed() -> int:
    return next(seed for seed in range(1000) if one_after_the_other(seed)[1])


def test_what_finds_no_place_is_rejected_and_missing_ones_are_counted(tmp_path):
    _, lost = one_after_the_other(scarce_seed())
    with pytest.raises(
        StageFailedError,
        match=rf"{len(lost)} are missing.*--retry-rejected: those {len(lost)} are made again, with "
        "other seeds",
    ):
        scarce(tmp_path, allowed=0.0)
    manifest, folder = scarce(tmp_path)
    assert manifest["counts"]["rejected"] == len(lost)
    assert "It was made 8 times." in next(iter(folder.rejected().values()))["message"]
    assert read_funnel(folder).kept == NUM_TASKS - len(lost)


def test_a_retry_begins_at_new_attempts_and_keeps_the_others(tmp_path):
    _, folder = scarce(tmp_path)
    before, lost = ended_at(folder), set(folder.rejected())
    stage = FewTexts()
    run(tmp_path, stage, seed=scarce_seed(), retry_rejected=True)
    assert {name for name, _ in stage.processed} == lost
    assert min(attempt for _, attempt in stage.processed) == DialoguesStage.max_attempts
    after = ended_at(folder)
    assert {name: at for name, at in after.items() if name not in lost} == before
    # What is done or rejected for good stays so without being asked again.
    calm = FewTexts()
    run(tmp_path, calm, seed=scarce_seed())
    assert calm.processed == [] and ended_at(folder) == after


def test_a_reject_of_a_later_attempt_is_not_tried_again_unasked(tmp_path):
    """The ledger still holds the attempt before it, which was sent back."""
    attempts, _ = one_after_the_other(42)
    name = next(name for name, attempt in attempts.items() if attempt == 1)
    fault = {(name, 1): "the writer found no words"}
    manifest, folder = run(tmp_path, FewTexts(faults=fault))
    assert manifest["counts"]["rejected"] == 1 and folder.rejected()[name]["attempt"] == 1
    again = FewTexts(faults=fault)
    second, _ = run(tmp_path, again)
    assert again.processed == [] and second["digest"] == manifest["digest"]
    retried = FewTexts(faults=fault)
    third, _ = run(tmp_path, retried, retry_rejected=True)
    assert retried.processed[0] == (name, 2) and third["counts"]["rejected"] == 0


# -- the index by itself


def texts(rng: random.Random, count: int) -> Iterator[str]:
    for _ in range(count):
        yield " ".join(f"w{rng.randrange(30)}" for _ in range(40))


def test_near_duplicates_are_those_of_the_exact_measure():
    rng = random.Random(5)
    base = list(texts(rng, 40))
    edited = [" ".join([*text.split()[:-2], "x", "y"]) for text in base[:20]]
    rows = {f"t{n}": text for n, text in enumerate(base + edited)}
    index = NearDuplicates(0.7)
    for name, text in rows.items():
        index.put(name, text)
    sets = {name: hashed_shingles(text) for name, text in rows.items()}
    exact = {(a, b) for a in rows for b in rows if a != b and jaccard(sets[a], sets[b]) >= 0.7}
    assert {(a, b) for a in rows for b in index.near(a)} == exact
    assert len(exact) == 40


def test_a_text_that_changes_leaves_its_pairs(tmp_path):
    index = NearDuplicates(0.7)
    one, other = texts(random.Random(1), 2)
    index.put("a", one)
    index.put("b", one)
    assert index.near("a") == {"b": 1.0} == {"b": index.near("b")["a"]}
    index.put("b", other)
    assert index.near("a") == index.near("b") == {}
    index.put("b", one)
    index.remove("a")
    assert index.near("b") == {} and index.names() == ["b"]


def test_openings_are_compared_within_a_persona_by_their_words():
    alike = dialogue("a", persona_id="ann", turns=text_of(NUM_TEXTS - 2))
    other = dialogue("b", persona_id="ann", turns=text_of(NUM_TEXTS - 1))
    elsewhere = dialogue("c", persona_id="bob", turns=text_of(NUM_TEXTS - 1))
    review = SetReview(0.7)
    assert {name: f.code for name, f in review.faults([alike, other]).items()} == {
        "b": "same-opening"
    }
    assert review.faults([alike, elsewhere]) == {}
    loud = tuple(
        t.model_copy(update={"text": t.text.upper() + "!"}) for t in text_of(NUM_TEXTS - 1)
    )
    assert set(review.faults([alike, dialogue("d", persona_id="ann", turns=loud)])) == {"d"}


def test_who_conflicts_with_one_that_goes_back_may_stay():
    """As b goes back, c stays; then d, which is alike c, cannot."""

    def sent_back(**numbers: int) -> set[str]:
        rows = [dialogue(name, persona_id="ann", turns=text_of(n)) for name, n in numbers.items()]
        return set(SetReview(0.7).faults(rows))

    assert sent_back(a=0, b=1, c=2, d=3) == {"b", "d"}
    assert sent_back(a=0, b=3, c=4, d=6) == set()


def test_pairs_that_have_nothing_to_do_with_each_other_go_back_in_one_round():
    rows = [
        dialogue(f"{pair}-{side}", persona_id="ann", turns=text_of(3 * pair))
        for pair in range(4)
        for side in ("a", "b")
    ]
    assert set(SetReview(0.7).faults(rows)) == {f"{pair}-b" for pair in range(4)}


def test_another_threshold_is_another_set(tmp_path):
    pair = [dialogue(name, persona_id=name, turns=text_of(n)) for n, name in enumerate("ab")]
    assert set(SetReview(0.7).faults(pair)) == {"b"}
    assert SetReview(0.99).faults(pair) == {}
