"""Free running while training: the adapted model itself speaks, and nothing is left behind."""

import numpy as np
import pytest
import torch
from moshi.models.lm import LMGen
from moshi.utils.compile import no_compile

from duplex.config import SamplingSection
from duplex.errors import RequestError
from duplex.streams import AGENT_ROWS, TEXT_ROW
from pipeline.engines.checkpoint import Checkpoint
from tests.stages.conftest import write_tiny_checkpoint
from tests.stages.training_factories import LORA, PROMPT_FRAMES, make_clip
from training import free_running
from training.free_running import run_freely, streamable, untouched
from training.lora import adapter_parameters, add_adapters, target_modules

GREEDY = SamplingSection(text_topk=1, audio_topk=1)
FREE = 14
CLIPS = [make_clip("a", 40, 1), make_clip("b", 12, 2)]  # b ends after 4 free frames


def adapted(folder, dtype=torch.float32, std=0.3):
    """A model in training mode whose adapters matter."""
    lm = Checkpoint.open(folder).load_lm(dtype=dtype)
    add_adapters(lm, LORA, target_modules(lm), seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in adapter_parameters(lm).items():
            if "lora_B" in name:
                parameter.normal_(std=std, generator=generator)
    return lm.train()


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return adapted(tiny_checkpoint)


@pytest.fixture(scope="module", params=[8, 16])
def any_model(request, tiny_checkpoint, tmp_path_factory):
    if request.param == 8:
        return adapted(tiny_checkpoint)
    folder = tmp_path_factory.mktemp("wide") / "wide"
    return adapted(write_tiny_checkpoint(folder, dep_q=request.param))


def likeliest(lm, run):
    """Teacher-forced argmax of text and agent's codes on the conversation that `run` made."""
    end = PROMPT_FRAMES + len(run.text)
    codes = run.clip.codes[:, :end].astype(np.int64)
    codes[TEXT_ROW, PROMPT_FRAMES:], codes[AGENT_ROWS, PROMPT_FRAMES:] = run.text, run.codes
    lm.eval()
    with torch.no_grad(), no_compile():
        output = lm(torch.from_numpy(codes)[None])
    text = output.text_logits[0, 0].argmax(-1)[PROMPT_FRAMES:]
    audio = output.logits[0, :8].argmax(-1)[:, PROMPT_FRAMES:]
    return text.numpy(), audio.numpy(), output.mask[0, :8, PROMPT_FRAMES:].numpy()


def test_what_is_said_freely_is_what_the_training_forward_finds_likeliest(any_model):
    """Greedy: positions, delays, prompt, user's codes and PEFT's own layers, all in one."""
    runs = run_freely(any_model, CLIPS, FREE, GREEDY, seed=1)
    assert [run.text.shape for run in runs] == [(FREE,), (4,)]
    for run in runs:
        text, audio, known = likeliest(any_model, run)
        assert np.array_equal(text, run.text)
        assert known[0].all() and np.array_equal(audio[known], run.codes[known])
    any_model.train()


def test_the_adapters_take_part(model, tiny_checkpoint):
    tuned = run_freely(model, CLIPS, FREE, GREEDY, seed=1)[0]
    base = run_freely(adapted(tiny_checkpoint, std=0), CLIPS, FREE, GREEDY, seed=1)[0]
    assert not np.array_equal(tuned.text, base.text)


def test_a_row_says_the_same_alone_and_beside_others(model):
    alone = run_freely(model, CLIPS[:1], FREE, GREEDY, seed=1)[0]
    beside = run_freely(model, CLIPS, FREE, GREEDY, seed=1)[0]
    assert np.array_equal(alone.text, beside.text) and np.array_equal(alone.codes, beside.codes)


def test_sampling_follows_from_the_seed(model):
    first, again, other = (
        run_freely(model, CLIPS, FREE, SamplingSection(), seed=seed)[0].text for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_adapters_in_float32_on_a_bfloat16_base_stream(tiny_checkpoint):
    lm = adapted(tiny_checkpoint, torch.bfloat16)
    (run,) = run_freely(lm, CLIPS[:1], 3, GREEDY, seed=1)
    assert run.codes.shape == (8, 3) and (run.codes >= 0).all()


def test_without_the_plain_layer_streaming_fails(model):
    """Why `streamable` is there; the day this passes, it can go."""
    with untouched(model), pytest.raises(RuntimeError, match="Unknown type"):
        LMGen(model.eval()).streaming(1)


def state_of(lm):
    return {
        "modules": {name: id(module) for name, module in lm.named_modules()},
        "parameters": {name: id(p) for name, p in lm.named_parameters()},
        "bits": {name: p.detach().clone() for name, p in lm.named_parameters()},
        "modes": [module.training for module in lm.modules()],
        "grads": [p.grad for p in lm.parameters()],
        "attributes": [sorted(module.__dict__) for module in lm.modules()],
        "contexts": [getattr(module, "context", None) for module in lm.modules()],
        "streaming": [getattr(module, "_streaming_state", None) for module in lm.modules()],
        "detached": [getattr(module, "_streaming_detached", None) for module in lm.modules()],
        "random": torch.get_rng_state(),
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    for key in before:
        if key == "bits":
            assert all(torch.equal(value, after[key][name]) for name, value in before[key].items())
        elif key == "random":
            assert torch.equal(before[key], after[key])
        else:
            assert before[key] == after[key], key


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(model, monkeypatch, fails):
    model.transformer.eval()  # a mixed state is kept as it is
    before = state_of(model)
    if fails:

        def fail(self, text):
            if self.position == 5:
                raise KeyError("planted")

        monkeypatch.setattr(free_running._Forced, "text", fail)
        with pytest.raises(KeyError, match="planted"):
            run_freely(model, CLIPS, FREE, GREEDY, seed=1)
    else:
        run_freely(model, CLIPS, FREE, GREEDY, seed=1)
    assert_same(before, state_of(model))
    model.train()


def test_the_ring_is_cut_for_the_time(model):
    with untouched(model), streamable(model, 30), model.eval().streaming(2):
        rings = [
            layer.self_attn._streaming_state.kv_cache.capacity for layer in model.transformer.layers
        ]
    assert rings == [30, 30]
    assert model.transformer.layers[0].self_attn.context == 3000


def test_what_cannot_run_is_refused(model, monkeypatch):
    with pytest.raises(RequestError, match="clips and frames, found 0 and 4"):
        run_freely(model, [], 4, GREEDY, seed=1)
    monkeypatch.setattr(model, "dep_q", 4)
    with pytest.raises(RequestError, match="found dep_q 4"):
        run_freely(model, CLIPS, 4, GREEDY, seed=1)
