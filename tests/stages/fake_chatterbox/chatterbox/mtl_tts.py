"""The interface of chatterbox-tts 0.1.7's multilingual model; the sound is a tone.

Signatures, the state that `generate` leaves in `conds`, and what it returns are those of the
package's `mtl_tts.py`. The tone's pitch tells the voice, its loudness the exaggeration, and noise
from torch's generator is laid under it, so that the seed is heard.
"""

from pathlib import Path
from types import SimpleNamespace

import torch

SR = 24000


class ChatterboxMultilingualTTS:
    def __init__(self, t3, s3gen, ve, tokenizer, device: str, conds=None):
        self.sr = SR
        self.device = device
        self.conds = conds

    @classmethod
    def get_supported_languages(cls):
        return {"de": "German", "en": "English", "hi": "Hindi"}

    @classmethod
    def from_local(cls, ckpt_dir, device, t3_model: str | None = None):
        assert (Path(ckpt_dir) / "ve.pt").exists()
        return cls(None, None, None, None, device, conds=SimpleNamespace(pitch=100.0, emotion=0.5))

    def prepare_conditionals(self, wav_fpath, exaggeration=0.5):
        size = Path(wav_fpath).stat().st_size
        self.conds = SimpleNamespace(pitch=200.0 + size, emotion=exaggeration)

    def generate(
        self,
        text,
        language_id,
        audio_prompt_path=None,
        exaggeration=0.5,
        cfg_weight=0.5,
        temperature=0.8,
        repetition_penalty=1.2,
        min_p=0.05,
        top_p=1.0,
    ):
        if language_id.lower() not in self.get_supported_languages():
            raise ValueError(f"Unsupported language_id '{language_id}'")
        if audio_prompt_path:
            self.prepare_conditionals(audio_prompt_path, exaggeration=exaggeration)
        self.conds.emotion = exaggeration
        print("Sampling:  12%", flush=True)  # as its progress bars do
        times = torch.arange(int(0.06 * SR * len(text))) / SR
        tone = 0.2 * exaggeration * torch.sin(2 * torch.pi * self.conds.pitch * times)
        return (tone + 0.001 * torch.randn(len(times))).unsqueeze(0)
