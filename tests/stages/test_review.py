"""Records that a stage sends back after looking at all of them, and tasks in threads."""

import itertools
import random
import threading
import time

import pytest

from duplex.config import Config
from duplex.errors import StageFailedError
from duplex.records import Voice
from duplex.stage import MapStage, StageContext, Task
from duplex.store import StageFolder
from pipeline.runners.local import execute

NUM_TASKS, NUM_COLOURS = 20, 80
REACH = 3  # colours nearer than that are alike: being alike is not transitive


class Colours(MapStage):
    """Draws a colour for each task and sends back those that one before it has already."""

    name = "voices"
    number = 3
    max_attempts = 40

    def __init__(self, *, threads=1, jitter=0, stop_after=None, colours=NUM_COLOURS):
        self._threads, self._jitter, self._stop_after = threads, jitter, stop_after
        self._colours = colours
        self.processed = []
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()

    def threads(self, config):
        return self._threads

    def tasks(self, context):
        return [Task(f"task-{index:02d}", ()) for index in range(NUM_TASKS)]

    def process(self, task, seed, blobs):
        with self._lock:
            if self._stop_after is not None and len(self.processed) >= self._stop_after:
                raise KeyboardInterrupt
            self.processed.append((task.id, task.attempt))
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        time.sleep(random.random() * self._jitter)
        with self._lock:
            self._at_once -= 1
        colour = random.Random(seed).randrange(self._colours)
        return [Voice(id=task.id, engine="toy", role="user", params={"c": colour}, licence="-")]

    def review(self, done, context):
        taken, sent_back = set(), {}
        for task_id, (voice,) in done:
            if any(abs(voice.params["c"] - other) < REACH for other in taken):
                sent_back[task_id] = f"the colour {voice.params['c']} is taken."
            else:
                taken.add(voice.params["c"])
        return sent_back


def run(stage, root, **options):
    config = Config(name="toy", seed=44)  # one that ends elsewhere if a kill loses a review
    folder = StageFolder.of(root, 3, "voices", "c0105c0105" * 6)
    return execute(stage, StageContext(config, root), folder, **options), folder


@pytest.fixture(scope="module")
def in_order(tmp_path_factory):
    manifest, folder = run(Colours(), tmp_path_factory.mktemp("in-order"))
    return manifest, folder


def test_what_is_sent_back_is_made_again_until_nothing_is(in_order):
    manifest, folder = in_order
    colours = [record.params["c"] for record in folder.records()]
    assert len(colours) == NUM_TASKS
    assert min(b - a for a, b in itertools.pairwise(sorted(colours))) >= REACH
    assert manifest["counts"]["rejected"] == 0
    assert manifest["provenance"]["made"] > NUM_TASKS  # the seed does make some meet


def test_threads_change_no_byte(in_order, tmp_path):
    manifest, _ = run(Colours(threads=7, jitter=0.004), tmp_path)
    assert manifest["digest"] == in_order[0]["digest"]


@pytest.mark.parametrize("stops", [[3], [19, 3], [22], [21, 1, 1], [22, 2, 1, 3]])
def test_a_stopped_review_goes_on_to_the_same_end(in_order, tmp_path, stops):
    """The runs stop within the first round, between the rounds and within later ones."""
    for stop_after in stops:
        with pytest.raises(KeyboardInterrupt):
            run(Colours(stop_after=stop_after), tmp_path)
    manifest, _ = run(Colours(), tmp_path)
    assert manifest["digest"] == in_order[0]["digest"]


def test_a_finished_stage_makes_nothing_again(in_order):
    manifest, folder = in_order
    stage = Colours()
    again, _ = run(stage, folder.path.parent)
    assert stage.processed == [] and again["digest"] == manifest["digest"]


def test_what_never_fits_is_rejected_with_its_reason(tmp_path):
    with pytest.raises(StageFailedError, match="19 of 20"):
        run(Colours(colours=1), tmp_path)
    folder = StageFolder.of(tmp_path, 3, "voices", "c0105c0105" * 6)
    assert all("is taken. It was made" in r["message"] for r in folder.rejected().values())


def test_no_more_tasks_run_at_once_than_threads(tmp_path):
    stage = Colours(threads=3, jitter=0.01)
    run(stage, tmp_path)
    assert stage.most_at_once == 3


def test_an_error_lets_what_is_under_way_finish_and_begins_nothing_more(tmp_path):
    class Stopping(Colours):
        def process(self, task, seed, blobs):
            if task.id == "task-03":
                raise StageFailedError("the budget is spent")
            return super().process(task, seed, blobs)

    stage = Stopping(threads=3, jitter=0.05)
    with pytest.raises(StageFailedError, match="budget"):
        run(stage, tmp_path)
    folder = StageFolder.of(tmp_path, 3, "voices", "c0105c0105" * 6)
    begun = {task_id for task_id, _ in stage.processed}
    assert set(folder.ledger()) == begun and len(begun) < 10


def test_the_stage_is_set_up_once_for_all_rounds(tmp_path):
    class Counted(Colours):
        setups = closed = 0

        def setup(self, context):
            self.setups += 1

        def close(self):
            self.closed += 1

    stage = Counted()
    manifest, _ = run(stage, tmp_path)
    assert manifest["provenance"]["made"] > NUM_TASKS
    assert (stage.setups, stage.closed) == (1, 1)
