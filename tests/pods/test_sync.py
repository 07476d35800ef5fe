"""What an agent that lies or breaks off can do to the folder at home: nothing."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from duplex.errors import CorruptFileError, PodError
from pipeline.pods import client as client_module
from pipeline.pods.client import PodClient, plain, read_status
from pipeline.pods.names import MAX_BYTES, may_be_fetched, read_offers
from pipeline.pods.sync import bring_home
from tests.pods.fake_runpod import FakeClock

TRAIN = "06-train-1a2b3c4d"
ADAPTER = f"{TRAIN}/adapter/adapter_model.safetensors"
MANIFEST = f"{TRAIN}/manifest.json"
CONTENT = bytes(range(251)) * 40


def entry(name, content, **changes):
    sha256 = hashlib.sha256(content).hexdigest()
    return {"name": name, "bytes": len(content), "sha256": sha256} | changes


class Liar:
    """An agent. `files`: what it sends; `listed`: what it says; `breaks`: pieces it cuts short."""

    def __init__(self, files, listed=None):
        self.files, self.breaks, self.ranges = files, [], []
        self.listed = listed or [entry(name, content) for name, content in files.items()]
        self.ignores_range = False

    @contextmanager
    def serving(self):
        liar = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                if self.path == "/files":
                    return self.send(200, json.dumps({"files": liar.listed}).encode())
                content = liar.files[self.path.removeprefix("/files/")]
                first, last = map(int, re.findall(r"\d+", self.headers["Range"]))
                liar.ranges.append((first, last))
                how = liar.breaks.pop(0) if liar.breaks else None
                if how == "503":
                    return self.send(503, b"")
                if liar.ignores_range:
                    return self.send(200, content)
                piece = content[first : last + 1]
                where = f"bytes {first}-{last}/{len(content)}"
                if how == "elsewhere":
                    where = f"bytes 0-{last - first}/{len(content)}"
                self.send(206, piece, where, cut=how == "cut")

            def send(self, status, content, where=None, cut=False):
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                if where:
                    self.send_header("Content-Range", where)
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if cut else content)
                if cut:
                    self.close_connection = True

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        client = PodClient("pod0001x", "token", template=url + "?{pod}{port}", agent=url)
        try:
            yield client
        finally:
            client.close()
            server.shutdown()
            server.server_close()

    def sync(self, folder, from_pod=()):
        with self.serving() as client:
            return bring_home(client, folder, FakeClock(), lambda _: None, from_pod)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(client_module, "PIECE_BYTES", 4000)


def placed(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_pieces_are_put_together_and_checked(tmp_path):
    metrics = f"{TRAIN}/metrics.jsonl"
    liar = Liar({MANIFEST: b"{}", metrics: b"{}\n", ADAPTER: CONTENT})
    synced = liar.sync(tmp_path)
    assert (tmp_path / ADAPTER).read_bytes() == CONTENT
    assert synced.fetched == [ADAPTER, metrics, MANIFEST]  # the manifest last
    assert liar.ranges[:3] == [(0, 3999), (4000, 7999), (8000, 10039)]


@pytest.mark.parametrize("how", ["cut", "503", "elsewhere"])
def test_a_break_is_taken_up_where_it_was(tmp_path, how):
    liar = Liar({ADAPTER: CONTENT})
    liar.breaks = [None, how, how]
    liar.sync(tmp_path)
    assert (tmp_path / ADAPTER).read_bytes() == CONTENT
    assert [first for first, _ in liar.ranges] == [0, 4000, 4000, 4000, 8000]


def test_what_came_before_a_break_is_not_fetched_again_by_the_next_sync(tmp_path):
    liar = Liar({ADAPTER: CONTENT})
    liar.breaks = [None] + ["503"] * 6
    with pytest.raises(PodError, match="HTTP 503"):
        liar.sync(tmp_path)
    assert not (tmp_path / ADAPTER).exists()
    liar.ranges.clear()
    liar.sync(tmp_path)
    assert liar.ranges[0][0] == 4000
    assert placed(tmp_path) == [ADAPTER]


def test_bytes_that_are_not_what_was_promised_get_no_name(tmp_path):
    listed = [entry(ADAPTER, CONTENT), entry(MANIFEST, b"{}")]
    liar = Liar({ADAPTER: CONTENT[:-1] + b"!", MANIFEST: b"{}"}, listed)
    with pytest.raises(CorruptFileError, match="twice"):
        liar.sync(tmp_path)
    assert placed(tmp_path) == []  # no manifest either: nothing looks complete


def test_a_part_that_is_spoiled_is_fetched_anew(tmp_path):
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    (tmp_path / ".sync").mkdir()
    (tmp_path / ".sync" / f"{sha256}.part").write_bytes(b"spoiled")
    Liar({ADAPTER: CONTENT}).sync(tmp_path)
    assert (tmp_path / ADAPTER).read_bytes() == CONTENT


def test_a_part_that_is_too_long_is_fetched_anew(tmp_path):
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    (tmp_path / ".sync").mkdir()
    (tmp_path / ".sync" / f"{sha256}.part").write_bytes(CONTENT[::-1] + b"more")
    Liar({ADAPTER: CONTENT}).sync(tmp_path)
    assert (tmp_path / ADAPTER).read_bytes() == CONTENT


def test_more_bytes_than_asked_for_are_not_read(tmp_path):
    liar = Liar({ADAPTER: CONTENT * 100}, [entry(ADAPTER, CONTENT)])
    liar.ignores_range = True
    with pytest.raises(PodError, match="sent more"):
        liar.sync(tmp_path)


BAD_NAMES = [
    "../../.ssh/authorized_keys", "/etc/passwd", f"{TRAIN}/../../x", f"{TRAIN}/adapter/../../../x",
    f"{TRAIN}\\..\\x", f"{TRAIN}/manifest.json\n", f"{TRAIN}/manifest.json/../../../x", "",
    f"{TRAIN}/adapter/evil.py", "06-train-1a2b3c4d/parts/part-00000.jsonl.sh", f"./{MANIFEST}",
    "99-evil-1a2b3c4d/manifest.json", "06-train-1A2B3C4D/manifest.json", f"{TRAIN}//manifest.json",
    f"{TRAIN}/parts/part-٠٠٠٠٠.jsonl", "07-merge-1a2b3c4d/checkpoint/model.safetensors",
    "state.json", ".pods/small/state.json", "manifest.json", f"{TRAIN}/work/checkpoint.pt",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_not_on_our_list_is_never_written(tmp_path, name):
    home = tmp_path / "a" / "b" / "runs" / "small"
    assert not may_be_fetched(name)
    liar = Liar({MANIFEST: b"{}"}, [entry(name, b"{}"), entry(MANIFEST, b"{}")])
    synced = liar.sync(home)
    assert synced.refused == 1
    assert placed(tmp_path) == [f"a/b/runs/small/{MANIFEST}"]


def test_strange_lists_offer_nothing():
    good = entry(MANIFEST, b"{}")
    strange = [
        good | {"bytes": -1}, good | {"bytes": MAX_BYTES + 1}, good | {"bytes": True},
        good | {"bytes": "2"}, good | {"sha256": "x" * 64}, good | {"sha256": None},
        good | {"name": 7}, "text", None, [], {},
    ]  # fmt: skip
    assert read_offers({"files": strange}) == ([], len(strange))
    assert len(read_offers({"files": [good, good]})[0]) == 1
    for value in (None, [], {}, {"files": None}, {"files": {}}, "x", 3):
        assert read_offers(value) == ([], 1)


def test_a_folder_with_work_of_this_machine_is_left_alone(tmp_path):
    own, mine = tmp_path / TRAIN, b'{"mine": 1}'
    own.mkdir()
    (own / "manifest.json").write_bytes(mine)
    liar = Liar({ADAPTER: CONTENT, MANIFEST: b"{}"})
    synced = liar.sync(tmp_path)
    assert synced.left_alone == [ADAPTER, MANIFEST] and synced.fetched == []
    assert (own / "manifest.json").read_bytes() == mine and placed(tmp_path) == [MANIFEST]
    # Of a sync before, it is brought up to date.
    assert liar.sync(tmp_path, from_pod=[TRAIN]).fetched == [ADAPTER, MANIFEST]


def test_a_folder_that_is_under_way_here_is_left_alone(tmp_path):
    (tmp_path / TRAIN / "work").mkdir(parents=True)
    assert Liar({MANIFEST: b"{}"}).sync(tmp_path).fetched == []


def test_what_a_pod_says_moves_no_cursor():
    assert plain("a\x1b[2Jb\rc\x07\x9bd\n\te") == "a[2Jbcd\n\te"
    status = read_status(
        {"pipeline": "owned\x1b[2J", "message": "\x1b]0;x\x07hello", "spent_usd": "1",
         "stages": [{"name": "\x1b[31mtrain", "state": "done", "message": 3},
                    {"name": "x", "state": "exploded"}, 7] * 30}
    )  # fmt: skip
    assert status.pipeline == "unknown" and status.spent_usd is None
    assert "\x1b" not in status.message and status.stages[0] == ("[31mtrain", "done", "3")
    assert len(status.stages) <= 20
    with pytest.raises(PodError, match="must be an object"):
        read_status([1])
