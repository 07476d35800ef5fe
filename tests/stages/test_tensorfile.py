"""Reading and writing piece by piece gives what the library gives."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from duplex.errors import CorruptFileError
from training.tensorfile import (
    ReadDigest,
    TensorFile,
    TensorSpec,
    aligned_order,
    tensor_writer,
    write_tensors,
)

STATE = {
    "wide": torch.arange(12, dtype=torch.float32).view(3, 4),
    "narrow": torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "scalar": torch.tensor(3.5),
    "none": torch.zeros(0, 4),
    "steps": torch.arange(9),
    "yes": torch.tensor([True, False, True]),
}


@pytest.fixture
def path(tmp_path):
    save_file(STATE, tmp_path / "file.safetensors", metadata={"format": "pt", "who": "me"})
    return tmp_path / "file.safetensors"


def test_it_reads_what_the_library_wrote(path):
    with TensorFile(path) as file:
        assert file.metadata == {"format": "pt", "who": "me"}
        for name, tensor in STATE.items():
            assert torch.equal(file.read(name), tensor), name
            assert torch.equal(file.read(name, torch.float32), tensor.float()), name
        part = file.read_elements("narrow", 9, 6)
        assert torch.equal(part, STATE["narrow"].view(-1)[9:15])


def test_what_it_writes_the_library_reads(tmp_path):
    specs = [TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in STATE.items()]
    out = tmp_path / "out.safetensors"
    write_tensors(out, specs, lambda spec: STATE[spec.name])
    assert all(torch.equal(load_file(out)[name], tensor) for name, tensor in STATE.items())
    ordered = aligned_order(specs, lambda spec: spec.name)
    with tensor_writer(tmp_path / "again", ordered) as writer:
        for spec in ordered:
            flat = STATE[spec.name].reshape(-1)
            writer.write(flat[:2])
            writer.write(flat[2:])
        digest = writer.sha256
    assert (tmp_path / "again").read_bytes() == out.read_bytes()
    assert digest == hashlib.sha256(out.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "order", [["steps", "wide", "narrow"], ["narrow", "steps"], ["narrow"], []]
)
def test_the_digest_is_that_of_the_file_in_whatever_order_it_is_read(path, order):
    with TensorFile(path) as file:
        digest = ReadDigest(file)
        for name in order:
            spec = file.specs[name]
            piece = file.read_bytes(file.starts[name], spec.num_bytes)
            digest.feed(file.starts[name], piece)
        assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_cut_off_while_it_is_read_is_named(path):
    with TensorFile(path) as file:
        with path.open("r+b") as other:
            other.truncate(path.stat().st_size - 4)
        with pytest.raises(CorruptFileError, match="was cut off while it was read"):
            for name in STATE:
                file.read(name)
    with pytest.raises(CorruptFileError, match="must be a safetensors file"):
        TensorFile(path)
