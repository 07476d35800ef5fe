"""The pocket model: Moshi's own classes at a size that a laptop trains, built from a seed.

Its weights are random: the codec's codebooks are set by the package's own k-means on seeded
noise, so that codes differ as sounds do, but nobody taught it to speak. It stands in for the
7B model wherever the *path* is what matters; its speech is noise, and reports say so.

    LMModel    dim 192, 5 layers, depth 96 x 2, card 512: about 6.6 M parameters
    MimiModel  n_filters 12, 8 x 512 codes, transformer 128 x 2: about 1.9 M parameters
    tokenizer  SentencePiece unigram with byte fallback, trained on data/pocket/corpus.txt

Built in about ten seconds on one core; the recipe's digest names the folder.
"""

from __future__ import annotations

import io
import json
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duplex.base import canonical_json
from duplex.datafiles import CHECKOUT
from duplex.files import sha256_bytes, sha256_file
from duplex.streams import CODEBOOKS, DELAYS, TEXT_PAD

if TYPE_CHECKING:
    import torch

RECIPE_VERSION = 2
SEED = 1234
CORPUS = CHECKOUT / "data" / "pocket" / "corpus.txt"
CARD = 512
TEXT_CARD = 1000
TARGET_RMS = 0.1  # loudness of random codes, of a full scale of 1

LM_CONFIG: dict[str, Any] = {
    "dim": 192,
    "text_card": TEXT_CARD,
    "existing_text_padding_id": TEXT_PAD,
    "n_q": 16,
    "dep_q": 8,
    "card": CARD,
    "num_heads": 4,
    "num_layers": 5,
    "hidden_scale": 4.125,
    "causal": True,
    "layer_scale": None,
    "context": 750,
    "max_period": 10000,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
    "depformer_dim": 96,
    "depformer_dim_feedforward": int(4.125 * 96),
    "depformer_num_heads": 4,
    "depformer_num_layers": 2,
    "depformer_layer_scale": None,
    "depformer_multi_linear": True,
    "depformer_context": 8,
    "depformer_max_period": 10000,
    "depformer_gating": "silu",
    "depformer_pos_emb": "none",
    "depformer_weights_per_step": True,
    "delays": list(DELAYS),
}

_CODEC_DIM = 128
MIMI_CONFIG: dict[str, Any] = {
    "sample_rate": 24000,
    "channels": 1,
    "frame_rate": 12.5,
    "seanet": {
        "channels": 1,
        "dimension": _CODEC_DIM,
        "causal": True,
        "n_filters": 12,
        "n_residual_layers": 1,
        "activation": "ELU",
        "compress": 2,
        "dilation_base": 2,
        "disable_norm_outer_blocks": 0,
        "kernel_size": 7,
        "residual_kernel_size": 3,
        "last_kernel_size": 3,
        "norm": "none",
        "pad_mode": "constant",
        "ratios": [8, 6, 5, 4],
        "true_skip": True,
    },
    "quantizer": {
        "dimension": 64,
        "n_q": CODEBOOKS,
        "bins": CARD,
        "input_dimension": _CODEC_DIM,
        "output_dimension": _CODEC_DIM,
    },
    "transformer": {
        "d_model": _CODEC_DIM,
        "num_heads": 4,
        "num_layers": 2,
        "causal": True,
        "layer_scale": 0.01,
        "context": 250,
        "conv_layout": True,
        "max_period": 10000,
        "gating": "none",
        "norm": "layer_norm",
        "positional_embedding": "rope",
        "dim_feedforward": 512,
        "input_dimension": _CODEC_DIM,
        "output_dimensions": [_CODEC_DIM],
    },
}


def recipe_digest() -> str:
    """What the pocket model is made from. Reads the corpus, imports no torch."""
    recipe = {
        "version": RECIPE_VERSION,
        "seed": SEED,
        "lm": LM_CONFIG,
        "mimi": MIMI_CONFIG,
        "corpus": sha256_file(CORPUS),
    }
    return sha256_bytes(canonical_json(recipe).encode())


def pocket_folder(models_root: Path) -> Path:
    """The pocket checkpoint, built there if it is not yet; safe against kills and races."""
    folder = models_root / f"pocket-{recipe_digest()[:12]}"
    if folder.is_dir():
        return folder
    models_root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=models_root, prefix=".pocket-") as name:
        unfinished = Path(name) / "checkpoint"
        unfinished.mkdir()
        write_checkpoint(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process built the same in the meantime
                raise
    return folder


def write_checkpoint(
    folder: Path,
    *,
    lm_config: dict[str, Any] = LM_CONFIG,
    mimi_config: dict[str, Any] = MIMI_CONFIG,
    corpus: str | None = None,
    lm_seed: int = SEED,
) -> None:
    """Write all files of a checkpoint of random weights into an empty folder."""
    from training.checkpoint import save_tensors

    corpus = CORPUS.read_text(encoding="utf-8") if corpus is None else corpus
    lm = build_lm(lm_config, lm_seed)
    mimi = build_mimi(mimi_config, SEED)
    save_tensors(_plain(lm.state_dict()), folder / "model.safetensors")
    save_tensors(_plain(mimi.state_dict()), folder / "mimi.safetensors")
    (folder / "mimi_config.json").write_text(json.dumps(mimi_config, indent=2))
    (folder / "tokenizer.model").write_bytes(train_tokenizer(corpus, lm_config["text_card"]))
    config = {
        **lm_config,
        "model_type": "moshi",
        "moshi_name": "model.safetensors",
        "mimi_name": "mimi.safetensors",
        "mimi_config_name": "mimi_config.json",
        "tokenizer_name": "tokenizer.model",
        "model_id": {"sig": "pocket", "epoch": 0},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def build_lm(config: dict[str, Any], seed: int) -> Any:
    """An `LMModel` in float32 on the CPU with every weight drawn from `seed`.

    The library leaves `in_proj`, `out_proj` and the depth transformer uninitialised for
    training from scratch, and says so: they get std 1/sqrt(fan-in) here.
    """
    import torch
    from moshi.models.lm import LMModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = LMModel(device="cpu", dtype=torch.float32, **config)
        for module in lm.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
    return lm.eval()


def build_mimi(config: dict[str, Any], seed: int) -> Any:
    """A `MimiModel` whose codebooks fit its own latents: the package's k-means on noise."""
    import torch
    from moshi.models.loaders import get_mimi
    from moshi.utils.compile import no_compile

    with torch.random.fork_rng(devices=[]), torch.no_grad(), no_compile():
        torch.manual_seed(seed)
        mimi = get_mimi(None, config, num_codebooks=config["quantizer"]["n_q"])
        latents = mimi.encode_to_latent(_seeded_sounds(seed), quantize=False)
        mimi.quantizer.train()
        # Each training forward starts one more codebook, on the residual of those before it.
        for _ in range(config["quantizer"]["n_q"]):
            mimi.quantizer(latents, mimi.frame_rate)
        mimi.eval()
        _give_voice(mimi, seed)
    return mimi


def _give_voice(mimi: Any, seed: int) -> None:
    """Draw the decoder anew so that other codes are other sounds.

    As the library initialises it, a random decoder's biases drown its input: replacing every
    semantic code moves the waveform by 3e-6, a tenth of an int16 step. Here it is 0.2 of 1.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    convolutions = [
        module
        for part in (mimi.upsample, mimi.decoder)
        for module in part.modules()
        if isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d)
    ]
    for convolution in convolutions:
        reach = convolution.kernel_size[0] / convolution.stride[0]
        if isinstance(convolution, torch.nn.Conv1d):
            fan_in = convolution.weight[0].numel()
        else:
            fan_in = reach * (convolution.weight.shape[0] if convolution.groups == 1 else 1)
        convolution.weight.normal_(std=math.sqrt(2 / fan_in), generator=generator)
        if convolution.bias is not None:
            convolution.bias.zero_()
    codes = torch.randint(0, mimi.cardinality, (1, CODEBOOKS, 50), generator=generator)
    loudness = mimi.decode(codes).square().mean().sqrt()
    convolutions[-1].weight.mul_(TARGET_RMS / loudness)


def _seeded_sounds(seed: int) -> torch.Tensor:
    """float32 [32, 1, 96000]: tones and noise from loud to near silent, four seconds each."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    time_s = torch.arange(96_000) / 24_000
    level = torch.logspace(-3, 0, 32)[:, None]
    pitch_hz = 80 * 2 ** (torch.rand(32, 4, generator=generator) * 5)
    wobble = 1 + 0.5 * torch.sin(2 * math.pi * 3 * time_s + torch.arange(32)[:, None])
    tones = torch.sin(2 * math.pi * pitch_hz[..., None] * time_s).mean(1) * wobble
    noise = torch.randn(32, 96_000, generator=generator) * 0.3
    return ((tones + noise) * level * 0.5)[:, None]


def train_tokenizer(corpus: str, vocabulary: int) -> bytes:
    """A SentencePiece model with Moshi's ids: unk 0 (= EPAD), bos 1, eos 2, pad 3."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in corpus.splitlines() if line.strip()),
        model_writer=model,
        vocab_size=vocabulary,
        model_type="unigram",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=TEXT_PAD,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _plain(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
