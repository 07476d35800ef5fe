"""The loss against numbers worked out one frame at a time, without torch's cross-entropy."""

import math

import numpy as np
import pytest
import torch
from moshi.models.lm import LMOutput

from duplex.config_train import LossSection
from duplex.streams import AGENT_ROWS, NUM_ROWS, TEXT_EPAD, TEXT_PAD, TEXT_ROW
from training.loss import (
    MASK_ROWS,
    MASK_ROWS_WITH_USER,
    STREAMS,
    USER_STREAMS,
    coefficients,
    part_counts,
    stream_means,
    stream_sums,
    training_loss,
)

CARD, TEXT_CARD = 5, 7
BATCH, FRAMES = 2, 6


def example(seed=0, dep_q=8):
    """A model's output with its NaN tail, codes with words and both paddings, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(BATCH, dep_q, FRAMES, CARD, generator=generator)
    mask = torch.ones(BATCH, dep_q, FRAMES, dtype=torch.bool)
    mask[:, 1:, -1] = False
    logits[~mask] = float("nan")  # as LMModel leaves them
    text_logits = torch.randn(BATCH, 1, FRAMES, TEXT_CARD, generator=generator)
    text_mask = torch.ones(BATCH, 1, FRAMES, dtype=torch.bool)
    codes = torch.randint(0, CARD, (BATCH, NUM_ROWS, FRAMES), generator=generator)
    codes[:, TEXT_ROW] = torch.tensor(
        [[4, TEXT_PAD, 5, TEXT_EPAD, 6, 4], [TEXT_PAD, TEXT_PAD, 4, 5, 6, TEXT_EPAD]]
    )
    loss_mask = torch.ones(BATCH, MASK_ROWS, FRAMES, dtype=torch.bool)
    loss_mask[0, :, :2] = False  # a prompt
    loss_mask[1, :, :1] = False
    logits.requires_grad_(True)
    text_logits.requires_grad_(True)
    return LMOutput(logits, mask, text_logits, text_mask), codes, loss_mask


def nll(logits, code):
    values = [float(value) for value in logits.detach()]
    return math.log(sum(math.exp(v) for v in values)) - values[code]


def by_hand(output, codes, loss_mask, section):
    """Text and audio, each with its sum of weights."""
    text = text_weight = audio = audio_weight = 0.0
    for b in range(BATCH):
        for t in range(FRAMES):
            if loss_mask[b, 0, t]:
                code = int(codes[b, 0, t])
                weight = section.text_padding_weight if code in (TEXT_PAD, TEXT_EPAD) else 1.0
                text += weight * nll(output.text_logits[b, 0, t], code)
                text_weight += weight
            for k in range(8):
                if loss_mask[b, 1 + k, t] and output.mask[b, k, t]:
                    weight = section.semantic_weight if k == 0 else section.acoustic_weight
                    audio += weight * nll(output.logits[b, k, t], int(codes[b, 1 + k, t]))
                    audio_weight += weight
    return text, text_weight, audio, audio_weight


@pytest.mark.parametrize(
    "section",
    [
        LossSection(),
        LossSection(semantic_weight=1, acoustic_weight=1, text_padding_weight=1),
        LossSection(semantic_weight=3, acoustic_weight=0.25, text_padding_weight=0),
    ],
)
def test_both_terms_are_weighted_means(section):
    output, codes, loss_mask = example()
    sums = stream_sums(output, codes, loss_mask)
    text, text_weight, audio, audio_weight = by_hand(output, codes, loss_mask, section)
    terms = text / text_weight + audio / audio_weight
    assert training_loss(sums, section).item() == pytest.approx(terms, rel=1e-5)
    one_mean = section.model_copy(update={"normalize": "all"})
    expected = (text + audio) / (text_weight + audio_weight)
    assert training_loss(sums, one_mean).item() == pytest.approx(expected, rel=1e-5)


def test_uniform_logits_give_the_logarithms_whatever_the_weights():
    """What normalisation means: a model that knows nothing has loss ln V + ln C."""
    output, codes, loss_mask = example()
    blank = LMOutput(
        torch.zeros_like(output.logits), output.mask, torch.zeros_like(output.text_logits),
        output.text_mask,
    )  # fmt: skip
    sums = stream_sums(blank, codes, loss_mask)
    for section in (LossSection(), LossSection(semantic_weight=1000, acoustic_weight=7)):
        loss = training_loss(sums, section).item()
        assert loss == pytest.approx(math.log(TEXT_CARD) + math.log(CARD), rel=1e-5)
    unnormalised = 100 * sums.nll[2] / sums.count[2] + (sums.nll[3:] / sums.count[3:]).mean()
    assert unnormalised.item() > 50 * math.log(CARD), "the predecessor's loss would fail above"


def test_semantic_to_acoustic_is_a_hundred_to_one():
    """The gradient of one semantic frame is 100 times that of an acoustic one alike."""
    output, codes, loss_mask = example()
    logits = torch.zeros_like(output.logits).requires_grad_(True)
    alike = LMOutput(logits, output.mask, output.text_logits, output.text_mask)
    codes[:, AGENT_ROWS] = 2
    training_loss(stream_sums(alike, codes, loss_mask), LossSection()).backward()
    assert logits.grad is not None
    semantic, acoustic = logits.grad[1, 0, 3], logits.grad[1, 4, 3]
    assert torch.allclose(semantic, 100 * acoustic, rtol=1e-4)
    assert acoustic.abs().max() > 0
    text = output.text_logits.grad
    assert text is not None and text.abs().max() > 0


def test_masked_frames_give_no_gradient_and_no_nan():
    output, codes, loss_mask = example()
    training_loss(stream_sums(output, codes, loss_mask), LossSection()).backward()
    for gradient in (output.logits.grad, output.text_logits.grad):
        assert gradient is not None and torch.isfinite(gradient).all()
    assert not output.logits.grad[0, :, :2].any(), "prompt"
    assert not output.text_logits.grad[0, 0, :2].any(), "prompt"
    assert not output.logits.grad[:, 1:, -1].any(), "the tail that the model cannot predict"
    assert output.logits.grad[:, 0, -1].any()


def test_changing_a_masked_code_changes_nothing():
    output, codes, loss_mask = example()
    before = stream_sums(output, codes, loss_mask)
    codes[0, :, :2] = 1
    codes[:, 9:] = 0  # the user's rows
    after = stream_sums(output, codes, loss_mask)
    assert torch.equal(before.nll, after.nll) and torch.equal(before.count, after.count)


def test_only_the_agents_streams_count_at_dep_q_16():
    output, codes, loss_mask = example(dep_q=16)
    narrow = LMOutput(
        output.logits[:, :8], output.mask[:, :8], output.text_logits, output.text_mask
    )
    assert torch.equal(
        stream_sums(output, codes, loss_mask).nll, stream_sums(narrow, codes, loss_mask).nll
    )


def test_sums_of_clips_add_up_to_the_sum_of_the_batch():
    output, codes, loss_mask = example()
    whole = stream_sums(output, codes, loss_mask)
    parts = [
        stream_sums(
            LMOutput(
                output.logits[b : b + 1], output.mask[b : b + 1],
                output.text_logits[b : b + 1], output.text_mask[b : b + 1],
            ),
            codes[b : b + 1],
            loss_mask[b : b + 1],
        )
        for b in range(BATCH)
    ]  # fmt: skip
    total = parts[0].detached() + parts[1].detached()
    assert torch.allclose(total.nll, whole.detached().nll)
    assert torch.equal(total.count, whole.detached().count)


def test_means_are_of_raw_streams():
    output, codes, loss_mask = example()
    means = stream_means(stream_sums(output, codes, loss_mask).detached())
    assert tuple(means) == STREAMS and len(STREAMS) == 10
    words = [(0, 2), (0, 4), (0, 5), (1, 2), (1, 3), (1, 4)]
    expected = np.mean([nll(output.text_logits[b, 0, t], int(codes[b, 0, t])) for b, t in words])
    assert means["text_nonpad"] == pytest.approx(expected, rel=1e-5)
    everything = [(b, t) for b in range(BATCH) for t in range(FRAMES) if loss_mask[b, 0, t]]
    expected = np.mean(
        [nll(output.text_logits[b, 0, t], int(codes[b, 0, t])) for b, t in everything]
    )
    assert means["text"] == pytest.approx(expected, rel=1e-5)
    places = [(b, t) for b, t in everything if t < FRAMES - 1]
    expected = np.mean([nll(output.logits[b, 7, t], int(codes[b, 8, t])) for b, t in places])
    assert means["acoustic_7"] == pytest.approx(expected, rel=1e-5)


def test_a_stream_without_frames_has_no_mean_and_no_weight():
    output, codes, loss_mask = example()
    codes[:, TEXT_ROW] = TEXT_PAD
    sums = stream_sums(output, codes, loss_mask)
    assert stream_means(sums.detached())["text_nonpad"] is None
    for normalize in ("terms", "none"):
        section = LossSection(text_padding_weight=0, normalize=normalize)
        weights = coefficients(sums.count, section)
        assert (weights * sums.nll)[:2].sum().item() == 0
        assert math.isfinite(training_loss(sums, section).item())


def test_counts_come_from_codes_and_mask_alone():
    output, codes, loss_mask = example()
    codes[1, 3, 4] = -1  # a code that is not there
    loss_mask[:, 2:, -1] = False  # as `make_batch` leaves out what the delays push off the end
    output.mask[1, 2, 4] = False  # as LMModel.forward does
    counts = part_counts(codes, loss_mask)
    assert torch.equal(counts, stream_sums(output, codes, loss_mask).count)


def test_the_users_streams_count_where_they_are_asked_for():
    output, codes, _ = example(dep_q=16)
    loss_mask = torch.ones(BATCH, MASK_ROWS_WITH_USER, FRAMES, dtype=torch.bool)
    sums = stream_sums(output, codes, loss_mask)
    assert sums.nll.shape == (18,)
    alone = stream_sums(output, codes, loss_mask[:, :MASK_ROWS])
    assert torch.equal(sums.nll[:10], alone.nll)
    swapped = LMOutput(  # agent and user in each other's place
        output.logits.roll(8, 1), output.mask.roll(8, 1), output.text_logits, output.text_mask
    )
    codes[:, 1:] = codes[:, 1:].roll(8, 1)
    mirrored = stream_sums(swapped, codes, loss_mask)
    assert torch.equal(mirrored.nll[10:], sums.nll[2:10])
    for normalize in ("terms", "all", "none"):  # weighted alike
        section = LossSection(normalize=normalize)
        assert training_loss(mirrored, section).item() == pytest.approx(
            training_loss(sums, section).item(), rel=1e-6
        )
    assert tuple(stream_means(sums.detached())) == STREAMS + USER_STREAMS


def test_coefficients_of_a_whole_batch_make_its_parts_add_up():
    output, codes, loss_mask = example()
    loss_mask[:, 2:, -1] = False  # as `make_batch` leaves out what the delays push off the end
    whole = training_loss(stream_sums(output, codes, loss_mask), LossSection())
    weights = coefficients(part_counts(codes, loss_mask), LossSection())
    parts = torch.tensor(0.0)
    for b in range(BATCH):
        one = LMOutput(
            output.logits[b : b + 1], output.mask[b : b + 1],
            output.text_logits[b : b + 1], output.text_mask[b : b + 1],
        )  # fmt: skip
        sums = stream_sums(one, codes[b : b + 1], loss_mask[b : b + 1])
        parts = parts + (weights * sums.nll).sum()
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)


def test_the_predecessors_loss_is_a_weighted_sum_of_means():
    """CE_text + 100 CE_semantic + mean CE_acoustic, and its first value as it was expected."""
    output, codes, loss_mask = example()
    sums = stream_sums(output, codes, loss_mask)
    section = LossSection(text_padding_weight=1, normalize="none")
    nll, count = sums.nll, sums.count
    text = (nll[0] + nll[1]) / (count[0] + count[1])
    expected = text + 100 * nll[2] / count[2] + sum(nll[k] / count[k] for k in range(3, 10)) / 7
    assert training_loss(sums, section).item() == pytest.approx(expected.item(), rel=1e-6)
    share = text / training_loss(sums, section)
    assert share < 0.05, "text drowns in it"
    assert text / training_loss(sums, LossSection(text_padding_weight=1)) > 0.3
