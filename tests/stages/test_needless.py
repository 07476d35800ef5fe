"""What a process need not import it does not import: seconds of every stage and server."""

import os
import subprocess
import sys

from tests.e2e.conftest import ROOT

CODE = """
import importlib.util, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from pipeline.engines.checkpoint import Checkpoint
from pipeline.needless import keep_out_bitsandbytes

checkpoint = Checkpoint.open(Path(sys.argv[1]))
loaded = checkpoint.load_lm().state_dict()
saved = load_file(checkpoint.files()["moshi"])
assert loaded.keys() == saved.keys()
assert all(torch.equal(loaded[name], saved[name]) for name in saved)
empty = checkpoint.empty_lm().state_dict()
assert all(tensor.is_meta for tensor in empty.values())
assert {name: t.shape for name, t in empty.items()} == {name: t.shape for name, t in saved.items()}
assert not {"torch._dynamo", "sympy", "bitsandbytes"} & sys.modules.keys()
keep_out_bitsandbytes()
assert importlib.util.find_spec("bitsandbytes") is None
"""


def test_loading_a_model_brings_no_compiler_and_changes_no_weight(tiny_checkpoint):
    result = subprocess.run(
        [sys.executable, "-c", CODE, str(tiny_checkpoint)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
