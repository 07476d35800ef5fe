"""Blobs that are written in chunks: named by their content, whole or not there."""

import hashlib

import pytest

from duplex.files import CHUNK_BYTES
from duplex.sinks import FolderBlobs
from duplex.store import StageFolder


def test_chunks_and_files_are_stored_under_their_digest(tmp_path):
    sink = FolderBlobs(StageFolder(tmp_path / "stage", "speech", ""))
    content = bytes(range(256)) * 5000
    source = tmp_path / "source.wav"
    source.write_bytes(content)
    assert len(content) > CHUNK_BYTES
    digests = {
        sink.put_chunks((content[at : at + 1000] for at in range(0, len(content), 1000)), ".a"),
        sink.put_file(source, ".b"),
        sink.put(content, ".c"),
    }
    (digest,) = digests
    assert digest == hashlib.sha256(content).hexdigest()
    assert sink.names == [f"{digest}{suffix}" for suffix in (".a", ".b", ".c")]
    blobs = sorted((tmp_path / "stage" / "blobs").iterdir())
    assert [path.name for path in blobs] == sink.names
    assert all(path.read_bytes() == content for path in blobs)
    assert source.exists()


def test_a_source_that_fails_leaves_nothing(tmp_path):
    sink = FolderBlobs(StageFolder(tmp_path / "stage", "speech", ""))

    def failing():
        yield b"half"
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        sink.put_chunks(failing(), ".wav")
    assert list((tmp_path / "stage" / "blobs").iterdir()) == []
    assert sink.names == []
