"""The codec's card: data, size, losses, time, limits, licence. Every figure is the run's own."""

from __future__ import annotations

from typing import Any

from training.pocket.codec_losses import SCALES
from training.pocket.speech_pool import ACCENTS, HELD_OUT_VARIANTS, VARIANTS

CARD = "CODEC.md"


def card(facts: dict[str, Any]) -> str:
    """Markdown.

    Args:
        facts: of `codec_command.train`.
    """
    recipe, last, seconds = facts["recipe"], facts["log"][-1], facts["seconds"]
    head = next(line for line in facts["log"] if line["step"] == recipe.steps)
    changed = facts["codes_changed"]
    weights = ", ".join(f"{name} {weight:g}" for name, weight in recipe.weights.items())
    frames = sum(crops * frames for crops, frames in recipe.crops) / len(recipe.crops)
    heard_h = recipe.all_steps * frames * 0.08 / 3600
    return f"""# The pocket codec

Moshi's `MimiModel` at a size that a laptop trains: 24 kHz, 12.5 frames a second, 8 codebooks of \
{recipe.config["quantizer"]["bins"]} codes, {facts["parameters"] / 1e6:.2f} M parameters, \
{facts["bytes"] / 1e6:.1f} MB. Written by `python -m training.pocket codec`; what it is worth is \
measured by `python -m benchmarks.codec` ([results](../../docs/results/codec.md)).

| | |
| --- | --- |
| data | {recipe.minutes:g} minutes of English by espeak-ng: {len(VARIANTS)} voice variants, \
{len(ACCENTS)} accents, pitch, range and rate drawn for each utterance; no recording of a person |
| held out | {len(HELD_OUT_VARIANTS)} variants ({", ".join(HELD_OUT_VARIANTS)}), a tenth of the \
corpus' lines and of the words; sentences of numbers are drawn anew |
| mixed in | a second voice, room tone, noise of a place, silence, a 440 Hz tone, levels over \
26 dB |
| training | {recipe.steps} steps of {frames:.0f} frames, then {recipe.decoder_steps} for the \
decoder alone: {heard_h:.1f} hours heard; seed \
{recipe.seed}; AdamW, peak rate {recipe.learning_rate:g} |
| losses | {weights}; mel and magnitude at windows of {min(SCALES)} to {max(SCALES)} samples |
| first codebook | taught by a linear head that names the phone in each half of a frame, \
{facts["phones"]} classes |
| time | {seconds["wall_s"] / 60:.0f} minutes ({seconds["cpu_s"] / 60:.0f} of CPU time) on \
{facts["machine"]} |
| last losses | mel {last["mel"]:.3f}, magnitude {last["magnitude"]:.3f}; on held-out texts, all \
quantized: mel {last["valid_mel"]:.3f}; the head named {head["valid_phone_accuracy"]:.1%} of \
their phones right |
| float16 | of the codes of held-out texts {sum(changed) / len(changed):.1%} are others than with \
the weights as trained; of the first codebook {changed[0]:.1%}, of the last {changed[-1]:.1%} |
| sha256 | `{facts["digest"]}` |

**Can**: code and decode synthetic English speech so that a recogniser hears its words; stream.

**Cannot**: keep the pitch: the decoder makes formants over a buzz or a whisper of its own, so
voices sound alike and rough, and a tone is lost. Nor the voice of a person (it has heard none),
music, or other languages. How far each goes stands in the results.

**Licence**: Apache-2.0, as this repository. It was trained on the output of espeak-ng (GPLv3),
which holds no part of that program.
"""
