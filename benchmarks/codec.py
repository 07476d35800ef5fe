"""What the pocket codec keeps of speech that it has not heard.

    python -m benchmarks.codec                        # prints; data/pocket
    python -m benchmarks.codec --codec DIR --write    # and writes docs/results/codec.{json,md}

Two sets of 200 utterances: voices heard in training (their pitch and rate drawn anew), and variants
that were left out. Six in ten say held-out lines of the corpus, four in ten numbers drawn anew, in
sentences and lists that training has, too. For each: mel distance (nats of magnitude), STOI and
extended STOI (pystoi), pitch (of 80 ms that are voiced in the original, the share within 5 % of its
pitch afterwards), word error rate of pocketsphinx on the original and on what was decoded,
with one language model of the set's texts for both, and the difference with its interval; as a
control, what is decoded from the first codebook alone. Texts are dialogue and numbers; words that
the recogniser's dictionary lacks do not count.

Code use: perplexity of each codebook (of 512). Semantic: how often the most frequent phone of a
code is the one that sounds in a half frame, per codebook by itself. The table is made on other
speech, and no head on that code alone could do better on it. Streaming: codes frame by frame
against the whole file. Apart from speech: how loud decoded silence is, and where the strongest
frequency of the decoded 440 Hz tone lies. Position: mel distance along 30 s, longer than any
training crop.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pystoi
import torch

from benchmarks.told import Told
from duplex.datafiles import CHECKOUT
from duplex.frames import FRAME_SAMPLES, SAMPLE_RATE
from duplex.metrics import mean_interval
from training.device import cpu_name
from training.pocket.codec_labels import FRAME_STEPS, IGNORED, PhoneSet, frame_labels
from training.pocket.codec_losses import mel_distance
from training.pocket.speech_pool import HELD_OUT_VARIANTS, VARIANTS, Spoken, record_tape, speak
from training.pocket.weights import WEIGHTS, load_codec

UTTERANCES, SEED = 200, 20_001
TABLE_MINUTES, CHUNK_FRAMES = 15.0, 125
LONG_S, PART_S = 30, 5
TOO_SHORT = 1e-5  # what pystoi returns where it cannot measure
PITCH_HZ, VOICED = (60.0, 400.0), 0.6
RESULTS = CHECKOUT / "docs/results"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--codec", type=Path, default=CHECKOUT / "data/pocket")
    parser.add_argument("--utterances", type=int, default=UTTERANCES)
    parser.add_argument("--write", action="store_true", help="docs/results/codec.{json,md}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(arguments.codec, arguments.utterances)
    text = describe(result)
    print(text)
    if arguments.write:
        (RESULTS / "codec.json").write_text(json.dumps(result, indent=2) + "\n")
        (RESULTS / "codec.md").write_text(text)


@torch.no_grad()
def measure(folder: Path, count: int) -> dict[str, Any]:
    mimi = load_codec(folder)
    sets = {
        name: list(itertools.islice(speak(SEED, variants, held_out=True, everyday=True), count))
        for name, variants in (("heard", VARIANTS), ("unseen", HELD_OUT_VARIANTS))
    }
    codes = {
        name: [mimi.encode(_whole_frames(one.samples)) for one in spoken]
        for name, spoken in sets.items()
    }
    return {
        "machine": f"{cpu_name()}, one thread, Python {platform.python_version()}",
        "bytes": (folder / WEIGHTS).stat().st_size,
        "utterances": count,
        "sets": {name: _kept(mimi, sets[name], codes[name]) for name in sets},
        "codes": _code_use(mimi, torch.cat(codes["heard"], dim=2)[0]),
        "semantic": _semantic(mimi, sets["heard"], codes["heard"]),
        "streaming": _streaming(mimi, sets["heard"][:20], codes["heard"][:20]),
        "apart": _apart_from_speech(mimi),
        "position": _by_position(mimi),
        "speed": _speed(mimi),
    }


def _whole_frames(samples: np.ndarray) -> torch.Tensor:
    """float32 [1, 1, S'], zeros after the samples up to a whole frame."""
    padded = np.pad(samples, (0, -len(samples) % FRAME_SAMPLES))
    return torch.from_numpy(padded.astype(np.float32))[None, None]


# -- what is kept of sound and words


def _kept(mimi: Any, spoken: Sequence[Spoken], codes: list[torch.Tensor]) -> dict[str, Any]:
    decoded = [
        mimi.decode(code)[0, 0].numpy()[: len(one.samples)]
        for one, code in zip(spoken, codes, strict=True)
    ]
    first_alone = [mimi.decode(code[:, :1])[0, 0].numpy() for code in codes]
    pairs = [(one.samples, sound) for one, sound in zip(spoken, decoded, strict=True)]
    told = Told([one.text for one in spoken])
    original = [told.errors(one.text, one.samples) for one in spoken]
    after = [told.errors(one.text, sound) for one, sound in zip(spoken, decoded, strict=True)]
    control = [told.errors(one.text, sound) for one, sound in zip(spoken, first_alone, strict=True)]
    words = sum(count for _, count in original)
    more = [
        (found - before) / count
        for (before, count), (found, _) in zip(original, after, strict=True)
        if count
    ]
    return {
        "seconds": sum(len(one.samples) for one in spoken) / SAMPLE_RATE,
        "mel": _mean([_mel(*pair) for pair in pairs]),
        "stoi": _intelligibility(pairs),
        "estoi": _intelligibility(pairs, extended=True),
        "pitch": _mean([share for pair in pairs if (share := _pitch_kept(*pair)) is not None]),
        "words": words,
        "wer_original": sum(errors for errors, _ in original) / words,
        "wer_decoded": sum(errors for errors, _ in after) / words,
        "wer_more": _mean(more),
        "wer_control": sum(errors for errors, _ in control) / words,
    }


def _intelligibility(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], extended: bool = False
) -> dict[str, float]:
    """Mean (extended) STOI; utterances under 0.4 s of sound have none and do not count."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Not enough STFT frames")
        values = [float(pystoi.stoi(*pair, SAMPLE_RATE, extended=extended)) for pair in pairs]
    return _mean([value for value in values if value > TOO_SHORT])


def _mel(original: np.ndarray, decoded: np.ndarray) -> float:
    return float(mel_distance(*(torch.from_numpy(sound)[None] for sound in (decoded, original))))


def _mean(values: Sequence[float]) -> dict[str, float]:
    low, high = mean_interval(values) or (float("nan"), float("nan"))
    return {"mean": float(np.mean(values)), "low": low, "high": high}


def _pitch_kept(original: np.ndarray, decoded: np.ndarray) -> float | None:
    """Share of voiced frames whose pitch is kept; None without a voiced frame."""
    count = len(original) // FRAME_SAMPLES
    wanted, strength = _pitches(original[: count * FRAME_SAMPLES].reshape(count, -1))
    found, _ = _pitches(decoded[: count * FRAME_SAMPLES].reshape(count, -1))
    voiced = strength > VOICED
    return float((abs(found / wanted - 1) < 0.05)[voiced].mean()) if voiced.any() else None


def _pitches(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hz and strength (1: periodic) of the best period of each frame [N, S], by autocorrelation."""
    power = np.abs(np.fft.rfft(frames, 2 * frames.shape[1])) ** 2
    correlation = np.fft.irfft(power)[:, : frames.shape[1]]
    correlation /= (1 - np.arange(frames.shape[1]) / frames.shape[1]) * (correlation[:, :1] + 1e-9)
    shortest, longest = (round(SAMPLE_RATE / hertz) for hertz in reversed(PITCH_HZ))
    periods = correlation[:, shortest:longest].argmax(axis=1) + shortest
    return SAMPLE_RATE / periods, correlation[np.arange(len(frames)), periods]


# -- what the codes are


def _code_use(mimi: Any, codes: torch.Tensor) -> list[dict[str, float]]:
    """Of codes [K, T]: each codebook's perplexity, and how many of its codes occur."""
    found = []
    for row in codes:
        shares = torch.bincount(row, minlength=mimi.cardinality).double() / len(row)
        entropy = -(shares * shares.clamp(min=1e-12).log()).sum()
        found.append({"perplexity": float(entropy.exp()), "used": int((shares > 0).sum())})
    return found


def _semantic(mimi: Any, spoken: Sequence[Spoken], codes: list[torch.Tensor]) -> dict[str, Any]:
    """Accuracy of naming the phones in the halves of frames, from one codebook at a time."""
    tape = record_tape(SEED + 1, TABLE_MINUTES)
    frames = len(tape.labels) // FRAME_STEPS // CHUNK_FRAMES * CHUNK_FRAMES
    audio = torch.from_numpy(tape.samples[: frames * FRAME_SAMPLES].astype(np.float32) / 32768)
    chunks = audio.view(-1, 1, 1, CHUNK_FRAMES * FRAME_SAMPLES)
    seen = torch.cat([mimi.encode(chunk) for chunk in chunks], dim=2)[0]
    seen_labels = _frames_of(tape.labels, frames)
    given = torch.cat(codes, dim=2)[0]
    labels = torch.cat([_labels(one, tape.phones) for one in spoken])
    known = labels != IGNORED
    most = torch.bincount(seen_labels[seen_labels != IGNORED]).argmax()
    return {
        "classes": len(tape.phones.names),
        "majority": float((labels == most)[known].float().mean()),
        "accuracy": [
            float(
                (_most_frequent(old, seen_labels, mimi.cardinality)[new] == labels)[known]
                .float()
                .mean()
            )
            for old, new in zip(seen, given, strict=True)
        ],
    }


def _labels(one: Spoken, phones: PhoneSet) -> torch.Tensor:
    """int64 [F, 2] of an utterance padded to F whole frames."""
    frames = -(-len(one.samples) // FRAME_SAMPLES)
    steps = np.full(frames * FRAME_STEPS, "_", dtype=one.phones.dtype)
    steps[: len(one.phones)] = one.phones
    return _frames_of(phones.indices(steps), frames)


def _frames_of(steps: np.ndarray, frames: int) -> torch.Tensor:
    return torch.from_numpy(frame_labels(steps[: frames * FRAME_STEPS]).astype(np.int64))


def _most_frequent(codes: torch.Tensor, labels: torch.Tensor, cardinality: int) -> torch.Tensor:
    """int64 [cardinality, 2]: of each code, the class seen most in each half of its frames."""
    counts = torch.zeros(cardinality, labels.shape[1], int(labels.max()) + 1)
    for half in range(labels.shape[1]):
        known = labels[:, half] != IGNORED
        places = (codes[known], torch.full_like(codes[known], half), labels[known, half])
        counts.index_put_(places, torch.ones(len(places[0])), accumulate=True)
    return counts.argmax(dim=2)


# -- how it behaves in use


def _streaming(mimi: Any, spoken: Sequence[Spoken], codes: list[torch.Tensor]) -> dict[str, int]:
    """Codes that differ between frame by frame and the whole file."""
    differing = total = 0
    for one, whole in zip(spoken, codes, strict=True):
        frames = _whole_frames(one.samples).split(FRAME_SAMPLES, dim=2)
        with mimi.streaming(1):
            streamed = torch.cat([mimi.encode(frame) for frame in frames], dim=2)
        differing += int((streamed != whole).sum())
        total += whole.numel()
    return {"codes": total, "differing": differing}


def _apart_from_speech(mimi: Any) -> dict[str, float]:
    """RMS of decoded silence in dBFS, and the strongest frequency of a decoded 440 Hz tone."""
    time_s = np.arange(5 * SAMPLE_RATE) / SAMPLE_RATE
    decoded = [
        mimi.decode(mimi.encode(_whole_frames(sound)))[0, 0].numpy()[SAMPLE_RATE:]
        for sound in (0 * time_s, 0.5 * np.sin(2 * np.pi * 440 * time_s))
    ]
    spectrum = np.abs(np.fft.rfft(decoded[1] * np.hanning(len(decoded[1]))))
    return {
        "silence_dbfs": float(10 * np.log10(np.mean(np.square(decoded[0])) + 1e-12)),
        "tone_hz": float(spectrum.argmax() * SAMPLE_RATE / len(decoded[1])),
        "tone_dbfs": float(10 * np.log10(np.mean(np.square(decoded[1])) + 1e-12)),
    }


def _by_position(mimi: Any) -> list[float]:
    """Mel distance of each `PART_S` seconds of ten stretches of `LONG_S` seconds."""
    tape = record_tape(SEED + 2, 10 * LONG_S / 60, held_out=True)
    stretches = tape.samples[: 10 * LONG_S * SAMPLE_RATE].reshape(10, -1) / np.float32(32768)
    decoded = [mimi.decode(mimi.encode(torch.from_numpy(s)[None, None]))[0, 0] for s in stretches]
    parts = range(0, LONG_S * SAMPLE_RATE, PART_S * SAMPLE_RATE)
    return [
        float(np.mean([
            _mel(stretch[start : start + PART_S * SAMPLE_RATE],
                 sound.numpy()[start : start + PART_S * SAMPLE_RATE])
            for stretch, sound in zip(stretches, decoded, strict=True)
        ]))
        for start in parts
    ]  # fmt: skip


def _speed(mimi: Any) -> dict[str, float]:
    """CPU milliseconds a frame, streaming, batch 1."""
    sound = torch.randn(100, 1, 1, FRAME_SAMPLES, generator=torch.Generator().manual_seed(0)) * 0.1
    with mimi.streaming(1):
        started = time.process_time()
        codes = [mimi.encode(frame) for frame in sound]
        encoded = time.process_time()
        for code in codes:
            mimi.decode(code)
        decoded = time.process_time()
    return {
        "encode_ms": 1000 * (encoded - started) / len(sound),
        "decode_ms": 1000 * (decoded - encoded) / len(sound),
    }


# -- the page


def describe(result: dict[str, Any]) -> str:
    heard, unseen = result["sets"]["heard"], result["sets"]["unseen"]
    semantic, streaming = result["semantic"], result["streaming"]
    rows = [
        f"| {name} | {_interval(heard[key])} | {_interval(unseen[key])} |"
        for name, key in (
            ("mel distance", "mel"),
            ("STOI", "stoi"),
            ("extended STOI", "estoi"),
            ("pitch kept", "pitch"),
        )
    ]
    rows += [
        f"| {name} | {heard[key]:.3f} | {unseen[key]:.3f} |"
        for name, key in (
            ("WER, original", "wer_original"),
            ("WER, decoded", "wer_decoded"),
            ("WER, decoded from codebook 1 alone", "wer_control"),
        )
    ]
    rows.append(f"| more, by utterance | {_interval(heard['wer_more'])} | "
                f"{_interval(unseen['wer_more'])} |")  # fmt: skip
    books = [
        f"| {number} | {use['perplexity']:.0f} | {use['used']} | {accuracy:.1%} |"
        for number, (use, accuracy) in enumerate(
            zip(result["codes"], semantic["accuracy"], strict=True), start=1
        )
    ]
    apart = result["apart"]
    positions = ", ".join(f"{value:.2f}" for value in result["position"])
    return "\n".join([
        "# The pocket codec",
        "",
        f"`python -m benchmarks.codec --write`: {result['machine']}; {result['bytes'] / 1e6:.1f} "
        f"MB. Two sets of {result['utterances']} utterances (held-out lines, and numbers drawn "
        f"anew), {heard['seconds'] / 60:.0f} and {unseen['seconds'] / 60:.0f} minutes; WER of "
        f"pocketsphinx over {heard['words']} and {unseen['words']} words, with one language model "
        "of a set's texts for original and decoded sound. In brackets: 95 % intervals.",
        "",
        "| | voices heard in training | voices left out |",
        "| --- | ---: | ---: |",
        *rows,
        "",
        f"Codes of the first set. Phones: {semantic['classes']} classes, two a frame; always the "
        f"most frequent one is right in {semantic['majority']:.1%}.",
        "",
        "| codebook | perplexity of 512 | codes used | phone known from it alone |",
        "| ---: | ---: | ---: | ---: |",
        *books,
        "",
        f"Streaming against whole file: {streaming['differing']} of {streaming['codes']} codes "
        f"differ. Mel distance along {LONG_S} s, by {PART_S} s: {positions}. CPU time a frame: "
        f"{result['speed']['encode_ms']:.1f} ms to encode, {result['speed']['decode_ms']:.1f} ms "
        f"to decode (of 80). Silence comes back at {apart['silence_dbfs']:.0f} dBFS, a tone of 440 "
        f"Hz and -9 dBFS with its strongest frequency at {apart['tone_hz']:.0f} Hz and "
        f"{apart['tone_dbfs']:.0f} dBFS.",
        "",
    ])  # fmt: skip


def _interval(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


if __name__ == "__main__":
    main()
