"""Tiny random models of the neural speech engines, saved so that the engines' own code loads them.

They say nothing; the path through each is that of the real weights. Moshi's TTS is built from the
package's own classes with all that its published config has: two text streams in one, conditions
by sum and by cross-attention, audio behind text.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np

from duplex.frames import SAMPLE_RATE
from duplex.records import Voice
from pipeline.engines import pocket
from pipeline.engines.speaking import SpeechRequest
from tests.stages.conftest import TINY_CARD, TINY_CORPUS, _tiny_mimi_config
from tests.stages.random_model import build_mimi, plain


def _lut(*values: str) -> dict[str, Any]:
    return {"n_bins": 5, "dim": 4, "tokenizer": "noop", "possible_values": list(values)}


VOICE_WIDTH = 8
CSM_CODEBOOK = 64
MOSHI_VOICE = "people/ann.wav"
DELAY_STEPS = 4
MOSHI_CONFIG: dict[str, Any] = {
    "dim": 32, "num_heads": 2, "num_layers": 1, "hidden_scale": 2, "causal": True,
    "text_card": 340, "text_card_out": 5, "existing_text_padding_id": 3,
    "demux_second_stream": True, "n_q": 8, "dep_q": 8, "card": TINY_CARD,
    "delays": [0, 0, 2, 2, 2, 2, 2, 2, 2], "context": 500, "max_period": 10000,
    "gating": "silu", "norm": "rms_norm_f32", "positional_embedding": "rope",
    "cross_attention": True,
    "depformer_dim": 16, "depformer_dim_feedforward": 32, "depformer_num_heads": 2,
    "depformer_num_layers": 1, "depformer_multi_linear": True, "depformer_context": 8,
    "depformer_gating": "silu", "depformer_pos_emb": "none", "depformer_weights_per_step": True,
}  # fmt: skip
MOSHI_CONDITIONS: dict[str, Any] = {
    "conditioners": {
        "speaker_wavs": {"type": "tensor", "tensor": {"dim": VOICE_WIDTH}},
        "control": {"type": "lut", "lut": _lut("ok", "also_ok")},
        "cfg": {"type": "lut", "lut": _lut("1.0", "2.0", "3.0")},
    },
    "fuser": {
        "cross_attention_pos_emb": False, "cross_attention_pos_emb_scale": 1,
        "sum": ["control", "cfg"], "prepend": [], "cross": ["speaker_wavs"],
    },
}  # fmt: skip


def write_moshi_tts(folder: Path, *, seed: int = 5, **changes: Any) -> Path:
    """A checkpoint as kyutai/tts-1.6b-en_fr has one; `changes` overrides keys of its config."""
    import torch
    from moshi.models import loaders
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy({**MOSHI_CONFIG, **MOSHI_CONDITIONS, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = loaders.get_moshi_lm(None, copy.deepcopy(config), dtype=torch.float32)
        for parameter in lm.parameters():
            if parameter.dim() > 1:  # the library leaves some uninitialised
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    mimi_config = _tiny_mimi_config()
    mimi = build_mimi(mimi_config, seed)
    save_file(plain(lm.state_dict()), folder / "tts.safetensors")
    save_file(plain(mimi.state_dict()), folder / "mimi.safetensors")
    (folder / "mimi_config.json").write_text(json.dumps(mimi_config))
    (folder / "text.model").write_bytes(pocket.train_tokenizer(TINY_CORPUS, config["text_card"]))
    files = {
        "moshi_name": "tts.safetensors", "mimi_name": "mimi.safetensors",
        "mimi_config_name": "mimi_config.json", "tokenizer_name": "text.model",
        "model_type": "tts", "model_id": {"sig": "tiny", "epoch": 1},
        "tts_config": {"audio_delay": DELAY_STEPS / 12.5, "second_stream_ahead": 2},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**config, **files}))
    return folder


def write_moshi_voices(folder: Path, *names: str, width: int = VOICE_WIDTH) -> Path:
    """Embeddings as kyutai/tts-voices has them, one for each name."""
    import torch
    from safetensors.torch import save_file

    for number, name in enumerate(names or (MOSHI_VOICE,)):
        path = folder / f"{name}.tiny@1.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(number)
        save_file({"speaker_wavs": torch.randn(1, width, 6, generator=generator)}, path)
    return folder


def voice(engine: str, transcript: str | None = None, **params: str | int | float) -> Voice:
    return Voice(
        id=f"agent-{engine}", engine=engine, role="agent", params=params,
        transcript=transcript, licence="none",
    )  # fmt: skip


def request(engine: str, text: str, **changes: Any) -> SpeechRequest:
    changes.setdefault("voice", voice(engine))
    return SpeechRequest(**{"text": text, "seed": 7, **changes})


def write_sample(path: Path, seconds: float = 1.0, seed: int = 1) -> Path:
    """A voice's recording: 24 kHz mono, a tone in noise."""
    import soundfile

    rng = np.random.default_rng(seed)
    time_s = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    sound = 0.3 * np.sin(2 * np.pi * 150 * seed * time_s) + 0.05 * rng.standard_normal(len(time_s))
    soundfile.write(str(path), sound, SAMPLE_RATE, subtype="PCM_16")
    return path


def write_csm(folder: Path, *, codebooks: int = 4, codec_codebooks: int = 6, seed: int = 5) -> Path:
    """A checkpoint as sesame/csm-1b has one: model with codec, tokenizer, feature extractor."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        CsmConfig,
        CsmForConditionalGeneration,
        CsmProcessor,
        EncodecFeatureExtractor,
        MimiConfig,
        PreTrainedTokenizerFast,
    )

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens(
        ["<|begin_of_text|>", "<|end_of_text|>", "<|AUDIO|>", "<|audio_eos|>", "<|pad|>"]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>",
        pad_token="<|pad|>",
    )  # fmt: skip
    small = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    codec = MimiConfig(
        **{**small, "intermediate_size": 16}, num_filters=4, codebook_size=CSM_CODEBOOK,
        codebook_dim=8, vector_quantization_hidden_dimension=8, upsample_groups=16,
        num_quantizers=codec_codebooks, upsampling_ratios=[8, 6, 5, 4],
    )  # fmt: skip
    shared = {"num_codebooks": codebooks, "vocab_size": CSM_CODEBOOK + 3}
    depth = {**small, **shared, "backbone_hidden_size": 16, "max_position_embeddings": 33}
    config = CsmConfig(
        **small, **shared, text_vocab_size=len(tokenizer), max_position_embeddings=400,
        codebook_pad_token_id=CSM_CODEBOOK + 2, codebook_eos_token_id=0,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
        audio_token_id=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
        audio_eos_token_id=tokenizer.convert_tokens_to_ids("<|audio_eos|>"),
        depth_decoder_config=depth, codec_config=codec.to_dict(),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = CsmForConditionalGeneration(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:  # as initialised, every context gives the same speech
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            elif "codec" in name and name.endswith("bias"):
                parameter.zero_()  # else they drown the sound
        for module in model.codec_model.modules():
            if hasattr(module, "embed_sum"):
                module.embed_sum.normal_()
    model.save_pretrained(folder)
    CsmProcessor(EncodecFeatureExtractor(1, SAMPLE_RATE), tokenizer).save_pretrained(folder)
    return folder


def write_pocket_tts(folder: Path, *, end_bias: float = 0.0, seed: int = 5) -> Path:
    """A YAML file with weights and tokenizer beside it, as the package has them on the hub.

    As made, the model ends as soon as it may; an `end_bias` far below zero never lets it end.
    """
    import torch
    import yaml
    from pocket_tts.models import tts_model
    from pocket_tts.utils.config import load_config
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    transformer = {
        "d_model": 16, "num_heads": 2, "num_layers": 1, "layer_scale": 0.01, "context": 250,
        "dim_feedforward": 16, "input_dimension": 16, "output_dimensions": [16],
    }  # fmt: skip
    seanet = {
        "dimension": 16, "channels": 1, "n_filters": 2, "n_residual_layers": 1,
        "ratios": [6, 5, 4], "kernel_size": 7, "residual_kernel_size": 3, "last_kernel_size": 3,
        "dilation_base": 2, "pad_mode": "constant", "compress": 2,
    }  # fmt: skip
    config: dict[str, Any] = {
        "flow_lm": {
            "insert_bos_before_voice": True, "dtype": "float32",
            "flow": {"depth": 1, "dim": 16},
            "transformer": {
                "d_model": 32, "hidden_scale": 2, "max_period": 10000, "num_heads": 2,
                "num_layers": 1,
            },
            "lookup_table": {
                "dim": 32, "n_bins": len(letters), "tokenizer": "tokenizers",
                "tokenizer_path": str(folder / "tokenizer.json"),
            },
        },
        "mimi": {
            "dtype": "float32", "sample_rate": SAMPLE_RATE, "inner_dim": 8, "outer_dim": 16,
            "channels": 1, "frame_rate": 12.5, "seanet": seanet, "transformer": transformer,
            "quantizer": {"dimension": 8, "output_dimension": 16},
        },
    }  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = tts_model.TTSModel._from_pydantic_config_with_weights(
            load_config(path), 0.3, 1, None, -4.0
        )
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        model.flow_lm.out_eos.bias.fill_(end_bias)
    save_file(plain(model.state_dict()), folder / "model.safetensors")
    path.write_text(yaml.safe_dump({**config, "weights_path": str(folder / "model.safetensors")}))
    return path


def write_dia(folder: Path, *, seed: int = 5) -> Path:
    """A checkpoint as nari-labs/Dia-1.6B-0626 has one, with the codec in the folder `codec`."""
    import torch
    from transformers import (
        DacConfig,
        DacModel,
        DiaConfig,
        DiaFeatureExtractor,
        DiaForConditionalGeneration,
        DiaTokenizer,
    )

    small = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    cross = {"cross_num_attention_heads": 2, "cross_head_dim": 8, "cross_num_key_value_heads": 2}
    config = DiaConfig(
        encoder_config={**small, "max_position_embeddings": 256},
        decoder_config={
            **small, **cross, "cross_hidden_size": 16, "max_position_embeddings": 700,
        },
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = DiaForConditionalGeneration(config)
        codec = DacModel(
            DacConfig(
                encoder_hidden_size=4, decoder_hidden_size=32, codebook_dim=4, sampling_rate=44_100
            )
        )
        for parameter in [*model.parameters(), *codec.parameters()]:
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    codec.save_pretrained(folder / "codec")
    DiaFeatureExtractor(sampling_rate=44_100, hop_length=512).save_pretrained(folder)
    DiaTokenizer().save_pretrained(folder)
    return folder
