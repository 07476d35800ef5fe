"""Blobs and inputs through a store of objects, by fsspec's own stores in memory and on disk."""

import os

import fsspec
import pytest

from duplex.config import Config
from duplex.errors import CorruptFileError, StageFailedError
from duplex.records import Voice
from duplex.stage import StageContext
from duplex.store import StageFolder
from pipeline.runners.storage import SCRATCH, Borrowed, Storage, lend, name_of
from tests.stages import ray_toys as toys


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    yield (
        f"memory://{tmp_path.name}/bucket" if request.param == "memory" else f"file://{tmp_path}/s"
    )
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def borrowed(url, tmp_path, monkeypatch):
    """A finished toy stage, lent and borrowed: (its folder, the borrowed place)."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    _, folder = toys.run(tmp_path / "runs")
    context = StageContext(Config(name="c"), tmp_path / "runs", {"voices": folder})
    lend(context, url)
    place = Borrowed(
        context, StageFolder(tmp_path / "runs" / "own", "x", "k"), url, {"voices": name_of(folder)}
    )
    yield folder, place
    place.leave()
    assert not place.root.exists()


def test_a_lent_folder_reads_as_the_one_that_was_lent(borrowed):
    folder, place = borrowed
    lent = place.context.inputs["voices"]
    assert lent.digest == folder.digest and not lent.path.is_relative_to(folder.path)
    voices = list(place.context.records("voices", Voice))
    assert [v.id for v in voices] == [r.id for r in folder.records()] != []
    assert not (lent.path / "blobs").exists()  # each is fetched when it is asked for
    blob = voices[0].params["blob"]
    assert lent.read_blob(blob, ".bin") == folder.read_blob(blob, ".bin")
    assert len(list((lent.path / "blobs").iterdir())) == 1


def test_what_is_made_is_handed_in_and_fetched_by_its_name(borrowed, url, tmp_path):
    from duplex.sinks import FolderBlobs

    _, place = borrowed
    sha = FolderBlobs(place.folder).put(b"made", ".bin")
    place.hand_in((f"{sha}.bin",))
    assert not list((place.folder.path / "blobs").iterdir())
    path = Storage(url).get_blob(f"{sha}.bin", tmp_path / "driver")
    assert path.read_bytes() == b"made"


def test_an_object_that_is_not_what_its_name_says_is_refused(borrowed, url, tmp_path):
    _, place = borrowed
    blob = next(iter(place.context.records("voices", Voice))).params["blob"]
    files, root = fsspec.core.url_to_fs(url)
    files.pipe_file(f"{root}/blobs/{blob}.bin", b"another")
    with pytest.raises(CorruptFileError, match="found something else"):
        place.context.inputs["voices"].read_blob(blob, ".bin")
    with pytest.raises(StageFailedError, match=r"cannot be read \(blobs/00"):
        Storage(url).get_blob("00.bin", tmp_path / "driver")


def test_a_store_that_cannot_be_opened_is_named_without_its_password():
    with pytest.raises(StageFailedError) as caught:
        Storage("nosuch://user:hush@host/bucket")
    assert "host/bucket" in str(caught.value) and "hush" not in str(caught.value)


def test_what_killed_workers_left_is_swept_and_what_others_use_is_not(borrowed, url, tmp_path):
    folder, place = borrowed
    dead, alive = tmp_path / f"{SCRATCH}999999999-x", tmp_path / f"{SCRATCH}{os.getpid()}-x"
    for left in (dead, alive):
        left.mkdir()
    own = StageFolder(tmp_path / "runs" / "own", "x", "k")
    Borrowed(place.context, own, url, {"voices": name_of(folder)}).leave()
    assert alive.exists() and place.root.exists() and not dead.exists()
