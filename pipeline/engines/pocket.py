"""The pocket model: Moshi's own classes at a size that a laptop trains, and taught to speak.

    LMModel    dim 256, 6 layers, depth 128 x 2, card 512: 11.8 M parameters
    MimiModel  n_filters 12, 8 x 512 codes, transformer 128 x 2: about 1.9 M parameters
    tokenizer  SentencePiece unigram with byte fallback

It stands in for the 7B model wherever a laptop, a test or a newcomer needs one. Its weights lie in
data/pocket, half and quarter precision; what they can do and how they were made stands beside them
in CODEC.md and BASE.md. A run unpacks them once into a checkpoint folder like any other's.
"""

from __future__ import annotations

import io
import math
import tempfile
from pathlib import Path
from typing import Any

from duplex.base import canonical_json
from duplex.datafiles import CHECKOUT
from duplex.errors import MissingInputError
from duplex.files import known_sha256, sha256_bytes
from duplex.streams import CODEBOOKS, DELAYS, TEXT_PAD

LAYOUT_VERSION = 3
POCKET = CHECKOUT / "data" / "pocket"
CORPUS = POCKET / "corpus.txt"
# Both models' weights and configurations, as training.pocket writes them.
FILES = ("base.json", "base.safetensors", "codec.json", "codec.safetensors", "tokenizer.model")
CARD = 512
TEXT_CARD = 600

LM_CONFIG: dict[str, Any] = {
    "dim": 256,
    "text_card": TEXT_CARD,
    "existing_text_padding_id": TEXT_PAD,
    "n_q": 16,
    "dep_q": 8,
    "card": CARD,
    "num_heads": 4,
    "num_layers": 6,
    "hidden_scale": 4.125,
    "causal": True,
    "layer_scale": None,
    "context": 750,
    "max_period": 10000,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
    "depformer_dim": 128,
    "depformer_dim_feedforward": int(4.125 * 128),
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
    """Which pocket model this is: of its files. Imports no torch.

    Raises:
        MissingInputError: one of them is not there.
    """
    for name in FILES:
        if not (POCKET / name).is_file():
            raise MissingInputError(
                f"{POCKET / name}: must be there, as it is in the repository; found none. Restore "
                "it, or train the pocket models anew: python -m training.pocket --help"
            )
    found = {name: known_sha256(POCKET / name) for name in FILES}
    return sha256_bytes(canonical_json({"layout": LAYOUT_VERSION, **found}).encode())


def tokenizer_bytes() -> bytes:
    """The pocket base's SentencePiece model."""
    return (POCKET / "tokenizer.model").read_bytes()


def pocket_folder(models_root: Path) -> Path:
    """The pocket checkpoint, unpacked there if it is not yet; safe against kills and races."""
    from training.pocket.base_weights import write_pocket_checkpoint

    folder = models_root / f"pocket-{recipe_digest()[:12]}"
    if folder.is_dir():
        return folder
    models_root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=models_root, prefix=".pocket-") as name:
        unfinished = Path(name) / "checkpoint"
        unfinished.mkdir()
        write_pocket_checkpoint(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process unpacked the same in the meantime
                raise
    return folder


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
