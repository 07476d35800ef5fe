"""The loop: parts add up to their batch, resume forgets nothing, failures keep a checkpoint."""

import errno
import json

import pytest
import torch
from safetensors import SafetensorError

from duplex.errors import WorkError
from tests.stages.training_factories import make_clip, make_trainer
from training import checkpoint
from training.failures import is_out_of_memory
from training.log import StopTraining, perplexities
from training.sampler import Sampler

TRAIN = [make_clip(f"t{i}", n, i) for i, n in enumerate([50, 24, 33, 60, 41, 28])]
VALID = [make_clip(f"v{i}", n, i + 9) for i, n in enumerate([45, 30])]
LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}
STILL = LORA | {"dropout": 0.0}


def trainer(tiny_checkpoint, work, watch=None, **train):
    options = {"lora": LORA} | train
    return make_trainer(tiny_checkpoint, work, TRAIN, VALID, watch=watch, **options)


def gradients(trainer):
    """Of the first update, before clipping."""
    found = {}
    inner = trainer._accelerator.clip_grad_norm_

    def clip(parameters, norm):
        for name, parameter in trainer._parameters.items():
            found.setdefault(name, parameter.grad.clone())
        return inner(list(parameters), norm)

    trainer._accelerator.clip_grad_norm_ = clip
    try:
        trainer._train_step(0)
    finally:
        del trainer._accelerator.clip_grad_norm_
    return found


@pytest.fixture(scope="module")
def whole_batch(tiny_checkpoint, tmp_path_factory):
    work = tmp_path_factory.mktemp("whole")
    return gradients(trainer(tiny_checkpoint, work, batch_size=4, lora=STILL))


def test_parts_of_a_batch_have_its_gradient(tiny_checkpoint, tmp_path, whole_batch):
    """Clips of 24 to 60 frames: the mean of the parts' own gradients would be another."""
    parts = gradients(trainer(tiny_checkpoint, tmp_path, batch_size=4, accumulate=2, lora=STILL))
    assert parts.keys() == whole_batch.keys() and len(parts) == 114
    for name, expected in whole_batch.items():
        scale = expected.abs().max()
        assert torch.allclose(parts[name], expected, rtol=1e-4, atol=1e-5 * float(scale)), name


def test_each_transformer_has_its_rate(tiny_checkpoint, tmp_path):
    run = trainer(tiny_checkpoint, tmp_path, learning_rate=1e-3, depth_learning_rate=4e-3, steps=2)
    log = run.run().log
    rates = [(line["lr"], line["lr_depth"]) for line in log if line["kind"] == "train"]
    assert rates == [(1e-3, 4e-3), (1e-3, 4e-3)]  # one step of warm-up, then the peak
    groups = {group["group"]: group["names"] for group in run._adam.param_groups}
    assert all(name.startswith(("depformer", "linears")) for name in groups["depth"])
    assert all(name.startswith(("transformer", "text_linear")) for name in groups["temporal"])
    assert sum(map(len, groups.values())) == len(run._parameters)


def test_the_log_has_perplexity_and_padding(tiny_checkpoint, tmp_path):
    log = trainer(tiny_checkpoint, tmp_path, steps=1).run().log
    valid = [line for line in log if line["kind"] == "valid"]
    for line in valid:
        for name in ("text", "text_nonpad"):
            nll = line["streams"][name]
            assert line["perplexity"][name] == pytest.approx(2.718281828459045**nll)
    timing = [json.loads(line) for line in (tmp_path / "timing.jsonl").open()]
    by_kind = {line["kind"]: line for line in timing}
    assert by_kind["valid"]["frames"] == 75 and by_kind["valid"]["padded_frames"] == 90
    assert all(line["memory_bytes"] > 1e6 for line in timing)
    assert perplexities({"text": 1e9, "text_nonpad": None}) == {"text": None, "text_nonpad": None}


# -- the best adapter

SCORES = {0: 0.0, 2: 5.0, 4: 1.0, 6: 3.0}


def watch(step, streams):
    return {"score": SCORES[step]}


class Killed(Exception):
    pass


def kill_at(step):
    def on_step(report):
        if report.step == step:
            raise Killed

    return on_step


@pytest.fixture(scope="module")
def undisturbed(tiny_checkpoint, tmp_path_factory):
    work = tmp_path_factory.mktemp("undisturbed")
    run = trainer(tiny_checkpoint, work, watch, validate_every=2)
    return run.run(), work, run._adapter_tensors()


def same(tensors, others):
    return tensors.keys() == others.keys() and all(
        torch.equal(tensor, others[name]) for name, tensor in tensors.items()
    )


def test_the_lowest_score_is_kept_but_never_the_start(undisturbed):
    result, _, last = undisturbed
    assert result.best.step == 4 and result.best.score == 1.0 and result.final_step == 6
    assert not same(result.best.tensors, last)
    scores = [line["score"] for line in result.log if line["kind"] == "guards"]
    assert scores == list(SCORES.values())


@pytest.mark.parametrize("step", [3, 5])
def test_a_resumed_run_has_the_same_losses_and_the_same_best(
    tiny_checkpoint, tmp_path, undisturbed, step
):
    """The best of step 4 is in no checkpoint yet at 3, and in one at 5."""
    with pytest.raises(Killed):
        trainer(tiny_checkpoint, tmp_path, watch, validate_every=2).run(kill_at(step))
    run = trainer(tiny_checkpoint, tmp_path, watch, validate_every=2)
    result = run.run()
    expected, work, last = undisturbed
    assert result.resumed_from == step - 1 and result.log == expected.log
    assert same(run._adapter_tensors(), last) and result.best.step == expected.best.step
    assert same(result.best.tensors, expected.best.tensors)
    for name in ("metrics.jsonl", "checkpoints/best-00000004.safetensors"):
        assert (tmp_path / name).read_bytes() == (work / name).read_bytes(), name


@pytest.mark.parametrize("forgotten", ["place", "moments"])
def test_a_resume_that_forgot_something_would_be_seen(
    tiny_checkpoint, tmp_path, undisturbed, monkeypatch, forgotten
):
    """The test above compares losses: planted faults of a resume must change them."""
    with pytest.raises(Killed):
        trainer(tiny_checkpoint, tmp_path, watch, validate_every=2).run(kill_at(5))
    if forgotten == "place":  # the sampler begins at the first batch again
        batch = Sampler.batch
        monkeypatch.setattr(Sampler, "batch", lambda self, step: batch(self, step % 4))
    else:
        monkeypatch.setattr("training.loop.load_adam", lambda adam, tensors: None)
    result = trainer(tiny_checkpoint, tmp_path, watch, validate_every=2).run()
    assert result.log != undisturbed[0].log


def test_a_damaged_best_is_not_gone_on_from(tiny_checkpoint, tmp_path, undisturbed):
    with pytest.raises(Killed):
        trainer(tiny_checkpoint, tmp_path, watch, validate_every=2).run(kill_at(5))
    path = tmp_path / "checkpoints" / "best-00000004.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    result = trainer(tiny_checkpoint, tmp_path, watch, validate_every=2).run()
    assert result.resumed_from == 2 and same(result.best.tensors, undisturbed[0].best.tensors)


def test_without_a_watch_the_validation_loss_decides(tiny_checkpoint, tmp_path):
    result = trainer(tiny_checkpoint, tmp_path, validate_every=2, steps=4).run()
    losses = {line["step"]: line["loss"] for line in result.log if line["kind"] == "valid"}
    del losses[0]
    assert result.best.step == min(losses, key=losses.get)


def test_a_watch_can_end_training_and_a_resume_keeps_to_it(tiny_checkpoint, tmp_path):
    asked = []

    def stop(step, streams):
        asked.append((step, streams is not None))
        if step == 4:
            raise StopTraining("it only repeats itself", {"score": None, "collapse": "loops"})
        return {"score": float(step)}

    options = {"validate_every": 2}
    result = trainer(tiny_checkpoint, tmp_path, stop, **options).run()
    assert asked == [(0, True), (2, True), (4, True)]
    assert result.stopped == "it only repeats itself" and result.final_step == 4
    assert result.best.step == 2 and result.log[-1]["collapse"] == "loops"
    again = trainer(tiny_checkpoint, tmp_path, stop, **options).run()
    assert again.log == result.log and again.stopped == result.stopped and len(asked) == 3
    assert same(again.best.tensors, result.best.tensors)


def test_scores_of_other_clips_than_the_validations_choose_nothing(tiny_checkpoint, tmp_path):
    """A check between validations scores the clips it watches, which are not all."""
    scores = {2: 0.1, 4: 5.0, 6: 4.0}
    options = {"validate_every": 4, "guards": {"every": 2}}
    result = trainer(
        tiny_checkpoint, tmp_path, lambda step, _: {"score": scores.get(step)}, **options
    ).run()
    assert (result.best.step, result.best.score) == (6, 4.0)


# -- failures


def real_cpu_error():
    torch.empty(1 << 50)


def planted(error):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize(
    "fail",
    [
        real_cpu_error,
        planted(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
        planted(MemoryError()),
    ],
    ids=["cpu", "cuda", "python"],
)
def test_too_little_memory_says_what_to_change(tiny_checkpoint, tmp_path, fail):
    run = trainer(tiny_checkpoint, tmp_path, validate_every=50)
    forward, calls = run.forward.forward, []

    def short(*arguments):
        calls.append(1)
        # Preflight, validation of one batch, then a step each.
        return fail() if len(calls) == 5 else forward(*arguments)

    run.forward.forward = short
    with pytest.raises(WorkError, match="too little at step 3") as caught:
        run.run()
    for setting in ("accumulate=2", "checkpointing=full", "crop_frames", "batch_size"):
        assert f"train.{setting}" in str(caught.value) or setting in str(caught.value)
    assert "2 clips of up to" in str(caught.value)
    assert trainer(tiny_checkpoint, tmp_path, validate_every=50).run().resumed_from == 2


@pytest.mark.parametrize(
    ("guards", "advice"),
    [
        ({"budget": False}, "fewer train.guards.free_seconds (now 12)"),
        ({"free_seconds": 0, "clips": 1}, "Try, in this order: train.guards.budget=false."),
    ],
)
def test_a_check_that_does_not_fit_says_what_to_change(tiny_checkpoint, tmp_path, guards, advice):
    def fail(step, streams):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    run = trainer(tiny_checkpoint, tmp_path, fail, guards=guards)
    with pytest.raises(WorkError, match="a check of the guards must fit into memory") as caught:
        run.run()
    assert advice in str(caught.value) and "accumulate" not in str(caught.value)


def test_other_errors_are_not_taken_for_too_little_memory():
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


@pytest.mark.parametrize("full", ["tensors", "best", "json"])
def test_a_disk_that_fills_leaves_the_checkpoint_before(
    tiny_checkpoint, tmp_path, undisturbed, monkeypatch, full
):
    save, write = checkpoint.save_tensors, checkpoint.write_json

    def save_tensors(tensors, path):
        of_best = path.name.startswith(".best")
        if of_best is (full == "best") and full != "json" and "00000004" in path.name:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(tensors, path)

    def write_json(path, value):
        if full == "json" and value["step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_tensors", save_tensors)
        patch.setattr(checkpoint, "write_json", write_json)
        with pytest.raises(WorkError, match=r"step-00000004\.safetensors.*needs [\d,]+ bytes"):
            trainer(tiny_checkpoint, tmp_path, watch, validate_every=2).run()
    assert not list(tmp_path.glob("checkpoints/*.tmp"))
    result = trainer(tiny_checkpoint, tmp_path, watch, validate_every=2).run()
    assert result.resumed_from == 2 and result.log == undisturbed[0].log
    assert same(result.best.tensors, undisturbed[0].best.tensors)


@pytest.mark.parametrize("fault", [OSError(errno.EIO, "Input/output error"), SafetensorError("x")])
def test_a_checkpoint_that_cannot_be_read_now_is_kept(tmp_path, monkeypatch, fault):
    state = checkpoint.TrainState(1, {"a": torch.ones(2)}, ["{}"])
    checkpoint.save_checkpoint(tmp_path, state, "mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def broken(path):
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load_file", broken)
        with pytest.raises(WorkError, match="left in place"):
            checkpoint.latest_checkpoint(tmp_path, "mine")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert torch.equal(checkpoint.latest_checkpoint(tmp_path, "mine").tensors["a"], torch.ones(2))


@pytest.mark.parametrize(("number", "code"), [(28, errno.ENOSPC), (122, errno.EDQUOT)])
def test_what_the_tensor_library_says_of_the_disk_keeps_its_number(
    tmp_path, monkeypatch, number, code
):
    def broken(tensors, path):
        raise SafetensorError(f"I/O error: no room (os error {number})")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(OSError) as caught:
        checkpoint.save_tensors({"a": torch.zeros(1)}, tmp_path / "x")
    assert caught.value.errno == code


def test_other_errors_of_the_disk_stay_what_they_are(tmp_path, monkeypatch):
    def broken(tensors, path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(checkpoint, "save_tensors", broken)
    state = checkpoint.TrainState(1, {"a": torch.zeros(2)}, [])
    with pytest.raises(OSError, match="Input/output"):
        checkpoint.save_checkpoint(tmp_path, state, "mine")
