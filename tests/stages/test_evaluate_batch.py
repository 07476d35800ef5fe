"""The batch path: the same conversations as over a WebSocket, without one."""

from dataclasses import replace

import numpy as np
import pytest

from duplex.config import SamplingSection
from duplex.errors import RequestError, ServerError, WorkError
from pipeline.evaluation import offline
from pipeline.evaluation.batch import Call, converse_together
from pipeline.evaluation.checkpoints import Machine, play_checkpoints
from pipeline.evaluation.offline import play_checkpoint
from pipeline.evaluation.play import PlaySettings, same_answer
from pipeline.serving.model import ServedModel
from tests.factories import slow
from tests.stages.planted_server import spoken

GREEDY = SamplingSection(text_temperature=0, audio_temperature=0)
HOT = SamplingSection(text_temperature=1.2, audio_temperature=1.2)


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return ServedModel.load(tiny_checkpoint, "cpu", num_slots=3)


def calls(count=5):
    rng = np.random.default_rng(0)
    return [
        Call(
            user=(0.1 * rng.normal(size=1920 * (6 + 5 * n) - 7)).astype(np.float32),
            prompt=f"You are Ann {n}.",
            seed=n,
        )
        for n in range(count)
    ]


def same(one, other):
    return same_answer(one, other) and one.text == other.text


@pytest.mark.parametrize("sampling", [slow(GREEDY), HOT])
def test_who_else_talks_changes_nothing(model, sampling):
    """Five calls over three slots, of which each ends and begins at its own frame."""
    ended = []
    together = converse_together(model, calls(), sampling, ended.append)
    assert sorted(ended) == [0, 1, 2, 3, 4] and ended[0] == 0
    assert [len(one.agent) // 1920 for one in together] == [6, 11, 16, 21, 26]
    for call, found in zip(calls(), together, strict=True):
        (alone,) = converse_together(model, [call], sampling)
        assert same(found, alone)
    backwards = converse_together(model, calls()[::-1], sampling)
    assert all(same(a, b) for a, b in zip(together, backwards[::-1], strict=True))
    assert not same_answer(together[0], together[1])


def test_the_first_call_again_has_its_slot_and_other_neighbours(model, monkeypatch):
    begun, begin = [], model.begin

    def noted(*args, slot, **more):
        begun.append((more["seed"] if "seed" in more else args[2], slot))
        return begin(*args, slot=slot, **more)

    monkeypatch.setattr(model, "begin", noted)
    found = converse_together(model, calls(), HOT, again=True)
    assert len(found) == 6 and same(found[0], found[5])
    assert [place for place in begun if place[0] == 0] == [(0, 0), (0, 0)]
    assert begun.index((0, 0), 1) == 3  # while the others talk, not behind them
    assert len(converse_together(model, calls(1), HOT, again=True)) == 2


def test_a_prompt_that_is_not_taken_and_a_call_that_is_too_long_are_refused(model):
    long = replace(calls(1)[0], user=np.zeros(1920 * 5000, dtype=np.float32))
    with pytest.raises(ServerError, match=r"found 5000 frames and room for .* evaluate\.seconds"):
        converse_together(model, [long], GREEDY)
    with pytest.raises(RequestError, match="voice"):
        converse_together(model, [replace(calls(1)[0], voice="nobody")], GREEDY)
    assert len(converse_together(model, calls(2), GREEDY)) == 2  # and it goes on


def test_no_process_is_started_for_less_than_a_minute_of_conversation():
    found = [offline.worthwhile_processes(s, most) for s, most in ((24, 8), (119, 8), (680, 2))]
    assert found == [1, 1, 2]
    assert offline.worthwhile_processes(680, 64) == 11


@pytest.mark.slow
def test_a_batch_gives_what_a_server_gives_bit_for_bit(tiny_checkpoint, monkeypatch):
    """Two processes, two seeds, three items; the first conversation over a real server too, and
    then all of them: with one slot each row of each sum is the same one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(offline, "SECONDS_A_PROCESS", 5)  # of eighteen
    items = [spoken(item_id=f"item-{n}", seconds=3, user_turns=["Hm " * (n + 1)]) for n in range(3)]
    tokenizer = (tiny_checkpoint / "tokenizer.model").read_bytes()
    settings = PlaySettings(seeds=(4, 5), tokenizer=tokenizer)
    machine = Machine("cpu", slots=1)
    said = []
    played, started_s = play_checkpoints(
        {"one": tiny_checkpoint}, items, settings, machine, said.append, tokenizer=tokenizer
    )
    (one,) = played
    assert one.served is True and one.repeats is True and started_s["one"] > 0
    assert [m.name for m in one.conversations] == [
        f"item-{n}.s{seed}" for seed in (4, 5) for n in range(3)
    ]
    assert all(m.proof.proven for m in one.conversations)
    assert one.info == {"device": "cpu", "slots": 1, "processes": 2}
    answers = {m.conversation.agent.tobytes() for m in one.conversations}
    assert len(answers) == 6  # an item of its own, and each seed draws otherwise
    assert any("one item-0.s4" in line for line in said)
    served, _ = play_checkpoints(
        {"one": tiny_checkpoint}, items, settings, machine, said.append,
        tokenizer=tokenizer, sockets=True,
    )  # fmt: skip
    for by_batch, by_socket in zip(one.conversations, served[0].conversations, strict=True):
        assert same(by_batch.conversation, by_socket.conversation)
    assert served[0].served is None


def test_a_server_that_says_something_else_is_told(tiny_checkpoint, monkeypatch):
    items = [spoken(seconds=2, user_turns=["Hm"])]
    tokenizer = (tiny_checkpoint / "tokenizer.model").read_bytes()
    settings = PlaySettings(tokenizer=tokenizer)
    real = offline.play_checkpoint

    def other(label, folder, spoken, settings, report, **more):
        return real(label, folder, spoken, replace(settings, seeds=(9,)), report, **more)

    monkeypatch.setattr("pipeline.evaluation.checkpoints.play_checkpoint", other)
    played, _ = play_checkpoints(
        {"one": tiny_checkpoint}, items, settings, Machine("cpu"), lambda line: None,
        tokenizer=tokenizer,
    )  # fmt: skip
    assert played[0].served is False


@pytest.mark.parametrize(
    ("calls", "most", "again", "slots"),
    [
        (1, 16, False, 1), (1, 16, True, 1), (8, 16, False, 8), (8, 16, True, 5),
        (16, 16, False, 16), (17, 16, False, 9), (48, 16, True, 13), (50, 16, True, 13),
        (5, 1, True, 1),
    ],
)  # fmt: skip
def test_no_slot_is_there_for_nobody(calls, most, again, slots):
    assert offline._even_slots(calls, most, again) == slots


def test_a_process_that_dies_is_named_with_advice(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(offline, "WORKER", "tests.stages.dying_batch_worker")
    tokenizer = (tiny_checkpoint / "tokenizer.model").read_bytes()
    with pytest.raises(WorkError, match=r"rank \d dead by signal 9 .*evaluate\.runtime\.slots"):
        play_checkpoint(
            "one", tiny_checkpoint, [spoken(seconds=2)], PlaySettings(seeds=(0, 1)),
            lambda line: None, tokenizer=tokenizer, device="cpu", processes=2,
        )  # fmt: skip
