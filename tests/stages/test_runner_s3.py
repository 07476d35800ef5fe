"""Blobs through S3: the AWS SDK against a server that signs, refuses, is busy and lies."""

import logging
import os
from pathlib import Path

import pytest

from duplex.config import Config
from duplex.errors import CorruptFileError, StageFailedError
from duplex.files import sha256_bytes
from duplex.records import Voice
from duplex.stage import StageContext
from duplex.store import StageFolder
from pipeline.runners import s3
from pipeline.runners.storage import Borrowed, Storage, lend, name_of
from tests.stages import ray_toys as toys
from tests.stages.s3_server import KEY_ID, SECRET, s3_server

URL = "s3://data/some prefix/run"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(monkeypatch):
    with s3_server() as books:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in books.environment.items():
            monkeypatch.setenv(name, value)
        yield books


@pytest.fixture
def quick(monkeypatch):
    """Two tries in place of eight, whose waits double."""
    monkeypatch.setattr(s3, "TRIES", 2)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    return path


@pytest.fixture(autouse=True)
def nothing_secret_is_shown(capfd, caplog):
    caplog.set_level(logging.DEBUG)
    yield
    shown = "".join(capfd.readouterr()) + caplog.text
    assert SECRET not in shown and KEY_ID not in shown and "wrong-secret" not in shown


def failure_of(do):
    with pytest.raises(StageFailedError) as caught:
        do()
    text = str(caught.value)
    assert not any(word in text for word in (SECRET, KEY_ID, "wrong-secret", "AKIA"))
    chain = (caught.value.__cause__, caught.value.__suppress_context__)
    assert chain == (None, True)  # a traceback shows nothing of the SDK's either
    return text


def test_a_lent_stage_and_what_is_made_travel_whole(store, tmp_path):
    _, folder = toys.run(tmp_path / "runs")
    context = StageContext(Config(name="c"), tmp_path / "runs", {"voices": folder})
    lend(context, URL)
    own = StageFolder(tmp_path / "runs" / "own", "x", "k")
    place = Borrowed(context, own, URL, {"voices": name_of(folder)})
    voices = list(place.context.records("voices", Voice))
    assert [v.id for v in voices] == [r.id for r in folder.records()] != []
    blob = voices[0].params["blob"]
    lent = place.context.inputs["voices"]
    assert lent.read_blob(blob, ".bin") == folder.read_blob(blob, ".bin")
    place.leave()
    assert all(key.startswith("some prefix/run/") for key in store.buckets["data"])
    assert f"some prefix/run/blobs/{blob}.bin" in store.buckets["data"]
    made = len([request for request in store.requests if request.startswith("PUT")])
    lend(context, URL)  # what is there is not sent again
    assert len([request for request in store.requests if request.startswith("PUT")]) == made


def test_a_large_object_goes_in_parts(store, tmp_path):
    content = os.urandom(12 << 20)
    (tmp_path / "large").write_bytes(content)
    name = f"{sha256_bytes(content)}.bin"
    Storage(URL).put(tmp_path / "large", f"blobs/{name}")
    assert len([r for r in store.requests if r.startswith("PUT")]) == 2
    assert Storage(URL).get_blob(name, tmp_path / "here").read_bytes() == content


def test_an_object_that_is_not_what_its_name_says_is_refused(store, file, tmp_path):
    name = f"{sha256_bytes(b'content')}.bin"
    Storage(URL).put(file, f"blobs/{name}")
    store.buckets["data"][f"some prefix/run/blobs/{name}"] = b"c0ntent"
    with pytest.raises(CorruptFileError, match=rf"data/some prefix/run/blobs/{name}.*Remove it"):
        Storage(URL).get_blob(name, tmp_path / "here")
    assert not list((tmp_path / "here").iterdir())


def test_a_bucket_that_is_not_there_is_named_and_not_made(store, file, tmp_path):
    text = failure_of(lambda: Storage("s3://nowhere/run").put(file, "blobs/a.bin"))
    assert "s3://nowhere/run cannot be written (blobs/a.bin): there is no such bucket" in text
    assert set(store.buckets) == {"data"}
    text = failure_of(lambda: Storage(URL).get("blobs/a.bin", tmp_path / "a"))
    assert "cannot be read (blobs/a.bin): there is nothing of that name" in text


@pytest.mark.parametrize(
    ("name", "value"),
    [("AWS_SECRET_ACCESS_KEY", "wrong-secret"), ("AWS_ACCESS_KEY_ID", "AKIASOMEBODYELSES001")],
)
def test_wrong_credentials_are_refused_and_not_shown(
    store, file, tmp_path, monkeypatch, name, value
):
    Storage(URL).put(file, "blobs/there.bin")
    monkeypatch.setenv(name, value)
    for do in (
        lambda: Storage(URL).put(file, "blobs/a.bin"),
        lambda: Storage(URL).get("blobs/there.bin", tmp_path / "there"),
    ):
        text = failure_of(do)
        assert f"{URL} cannot be" in text and "refuses these credentials" in text
        assert "AWS_SECRET_ACCESS_KEY" in text and "s3:PutObject" in text
    assert set(store.buckets["data"]) == {"some prefix/run/blobs/there.bin"}


@pytest.mark.parametrize("code", ["SlowDown", "InternalError"])
def test_a_busy_store_is_asked_again(store, file, code):
    store.faults = [code, code]
    Storage(URL).put(file, "blobs/a.bin")
    assert store.buckets["data"]["some prefix/run/blobs/a.bin"] == b"content"
    assert store.faults == [] and len(store.requests) >= 4


def test_a_store_that_stays_busy_ends_the_stage_with_what_to_do(store, quick, file, tmp_path):
    store.always = "SlowDown"
    text = failure_of(lambda: Storage(URL).put(file, "blobs/a.bin"))
    assert f"{URL} cannot be written (blobs/a.bin)" in text and "fewer --workers" in text


def test_a_store_that_is_busy_while_it_is_written_to_says_so_too(store, quick, file, monkeypatch):
    monkeypatch.setattr("fsspec.implementations.arrow.ArrowFSWrapper.exists", lambda *_: False)
    store.always = "SlowDown"  # with its own words, key id and all, which a HEAD does not bring
    assert "fewer --workers" in failure_of(lambda: Storage(URL).put(file, "blobs/a.bin"))


def test_a_store_that_is_not_there_is_said_to_be_that(store, quick, file, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    text = failure_of(lambda: Storage(URL).put(file, "blobs/a.bin"))
    assert "cannot be reached: see AWS_ENDPOINT_URL" in text


@pytest.mark.parametrize("url", ["s3://", "s3://user:wrong-secret@data/x", "s3://data/x?key=1"])
def test_an_url_that_is_none_of_s3_is_refused(store, url):
    assert "must read s3://bucket/prefix" in failure_of(lambda: Storage(url))


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_what_was_cut_short_is_put_again_whole(store, tmp_path, monkeypatch, fault):
    """The SDK completes an object when its stream is closed, whatever closed it."""
    big = tmp_path / "big.bin"
    big.write_bytes(bytes(range(256)) * 1000)
    monkeypatch.setattr(s3, "PUT_BYTES", 100_000)
    opened, blocks = Path.open, []

    class Broken:
        def __init__(self, inner):
            self.inner = inner

        def read(self, size):
            blocks.append(size)
            if len(blocks) == 2:
                raise fault
            return self.inner.read(size)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.inner.close()

    with monkeypatch.context() as patch:
        patch.setattr(
            Path,
            "open",
            lambda self, *a: Broken(opened(self, *a)) if self == big else opened(self, *a),
        )
        with pytest.raises((KeyboardInterrupt, StageFailedError)):
            Storage(URL).put(big, "blobs/a.bin")
    name = "some prefix/run/blobs/a.bin"
    assert 0 < len(store.buckets["data"][name]) < big.stat().st_size
    Storage(URL).put(big, "blobs/a.bin")
    assert store.buckets["data"][name] == big.read_bytes()
    writes = len(store.requests)
    Storage(URL).put(big, "blobs/a.bin")  # whole: nothing is sent
    assert {one.split()[0] for one in store.requests[writes:]} == {"HEAD"}


@pytest.mark.slow
def test_a_run_on_a_cluster_through_s3_has_the_local_digests(store, tmp_path):
    from pipeline.runners import ray as runner

    here, _ = toys.run(tmp_path / "here")
    runner.ray.init(
        address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR", runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )  # fmt: skip
    try:
        there, folder = toys.run(tmp_path / "there", runner=runner.RayRunner(), storage=URL)
        assert there["digest"] == here["digest"]
        assert all(folder.blobs_are_whole(entry) for entry in folder.ledger().values())
        stored = {key.rsplit("/", 1)[1] for key in store.buckets["data"]}
        assert stored == {path.name for path in (folder.path / "blobs").iterdir()}
        written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
        assert SECRET.encode() not in written and KEY_ID.encode() not in written
    finally:
        runner.ray.shutdown()
