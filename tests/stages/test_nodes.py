"""Nodes of a training run find each other, compare, and end together; their processes are small
ones here, without torch. Real training on two nodes: test_train_nodes.py."""

import json
import socket
import threading
import time
from contextlib import contextmanager, suppress

import psutil
import pytest

from duplex.errors import CorruptFileError, RequestError, WorkError
from pipeline import join_training
from tests.stages.node_helpers import free_address
from tests.stages.training_factories import make_config
from training import launch, links, nodes
from training.launch import run_workers
from training.nodes import FirstNode, OtherNode, connect

CLAIMS = {"seed": "42", "train.steps": "6"}
WORKER = """
import os, sys, time
sys.path.insert(0, os.getcwd())
from duplex.errors import CorruptFileError
from training.launch import work

def meet(job):
    if job["fault"] == "wall" and os.environ["RANK"] == "1":
        time.sleep(600)

def do(job, report):
    rank = os.environ["RANK"]
    with open(job["folder"] + "/new-" + rank, "w") as file:
        file.write(str(os.getpid()))
    os.rename(file.name, job["folder"] + "/pid-" + rank)  # whole: this process may be killed
    report("rank " + rank)
    if job["fault"] == f"ours on {rank}":
        raise CorruptFileError("that file")
    if job["fault"] == f"death on {rank}":
        os._exit(3)
    if job["fault"]:
        time.sleep(600)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
             "GLOO_SOCKET_IFNAME")
    with open(job["folder"] + "/env-" + rank, "w") as file:
        file.write(" ".join(os.environ[name] for name in names))
    return {"of": rank}

work(do, meet)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    (tmp_path / "small_node_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "small_node_worker"


@pytest.fixture
def shared(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


class Nodes:
    """Node 0 in this thread, the others in threads of their own."""

    def __init__(self, worker, shared, count=2, timeout_s=60):
        self.worker, self.shared, self.count, self.timeout_s = worker, shared, count, timeout_s
        self.address = free_address()
        self.said, self.outcomes, self.threads = [], {}, []
        self.meet_s = timeout_s

    def first(self, fault="", claims=CLAIMS):
        with FirstNode(
            self.address, processes=2 * self.count, nodes=self.count, report=self.said.append,
            join_timeout_s=self.timeout_s, folder=self.shared, claims=claims,
        ) as team:  # fmt: skip
            return self._work(team, fault)

    def other(self, node=1, fault="", folder=None, claims=CLAIMS):
        link = connect(self.address, 20)
        assert link is not None
        with OtherNode(
            link, processes=2 * self.count, nodes=self.count, node=node,
            join_timeout_s=self.timeout_s, host="127.0.0.1",
        ) as team:  # fmt: skip
            team.introduce(folder or self.shared, claims, lambda line: None)
            result = self._work(team, fault)
            return result, team.wait_for_end()

    def _work(self, team, fault):
        team.join_timeout_s = self.meet_s
        job = {"fault": fault, "folder": str(self.shared)}
        return run_workers(self.worker, job, 2 * self.count, self.said.append, team=team)

    def start(self, node=1, **options):
        def live():
            try:
                self.outcomes[node] = self.other(node, **options)
            except Exception as error:  # noqa: BLE001 - looked at by the test
                self.outcomes[node] = error

        self.threads.append(threading.Thread(target=live))
        self.threads[-1].start()

    def outcome(self, node=1):
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()
        return self.outcomes[node]

    def running(self):
        """Processes of the run that are alive."""
        pids = [int(path.read_text()) for path in self.shared.glob("pid-*")]
        return [pid for pid in pids if psutil.pid_exists(pid)]


@pytest.fixture
def two(worker, shared):
    return Nodes(worker, shared)


def test_the_processes_of_three_nodes_get_their_places_and_the_first_ones_result(worker, shared):
    three = Nodes(worker, shared, count=3)
    three.start(2)
    three.start(1)
    assert three.first() == {"of": "0"}
    assert three.outcome(1) == ({}, True) and three.outcome(2) == ({}, True)
    places = [(shared / f"env-{rank}").read_text().split() for rank in range(6)]
    assert [p[:4] for p in places] == [[str(r), str(r % 2), "6", "2"] for r in range(6)]
    assert {tuple(p[4:]) for p in places} == {("127.0.0.1", places[0][5], "lo")}
    assert any("node 1 (" in line and "has joined" in line for line in three.said)
    assert three.said.count("rank 0") == 1 and "rank 2" not in three.said
    assert not list(shared.glob(".join-*"))


def test_an_error_of_ours_on_one_node_ends_the_other_with_it(two):
    two.start(fault="ours on 3")
    with pytest.raises(CorruptFileError, match=r"^that file$"):
        two.first(fault="ours on 3")
    assert isinstance(two.outcome(), CorruptFileError) and two.running() == []


def test_a_process_that_dies_on_the_first_node_ends_the_other_with_the_same_words(two):
    two.start(fault="death on 0")
    with pytest.raises(WorkError, match="rank 0 on node 0 dead by exit code 3"):
        two.first(fault="death on 0")
    assert str(two.outcome()).startswith("all 4 processes must live until the end, found rank 0 on")
    assert two.running() == []


def test_a_node_that_is_gone_ends_the_first(two):
    def leave():
        link = connect(two.address, 20)
        assert link is not None
        team = OtherNode(link, processes=4, nodes=2, node=1, join_timeout_s=60, host="127.0.0.1")
        team.introduce(two.shared, CLAIMS, print)
        link.close()  # as the kernel does when its process is killed

    thread = threading.Thread(target=leave)
    thread.start()
    with pytest.raises(WorkError, match=r"node 1 \(.*\) is gone.*start the run again on all"):
        two.first(fault="wait")
    thread.join(30)
    assert two.running() == []


@contextmanager
def planted_first(two):
    """A first node by hand, who knows the run folder: gives its `say`, its secret, and what the
    other node said of itself."""
    secret, name = "s" * 32, ".join-" + "0" * 16
    (two.shared / name).write_text(secret)
    with socket.create_server(("127.0.0.1", int(two.address.split(":")[1]))) as listener:
        two.start(fault="wait")
        connection, _ = listener.accept()
        lines = connection.makefile("rw")

        def say(**message):
            lines.write(json.dumps(message) + "\n")
            lines.flush()

        say(duplex=1, proof=name, challenge="c")
        yield say, secret, json.loads(lines.readline())
    assert two.running() == []


def test_a_first_node_that_falls_silent_is_gone_too(two, monkeypatch):
    """As with a cable that is pulled: no end of the connection is ever seen."""
    monkeypatch.setattr(links, "SILENCE_S", 1.0)
    with planted_first(two) as (say, secret, hello):
        assert hello["proof"].encode() == nodes._sign(secret, "c")
        say(welcome=True, proof=nodes._sign(secret, nodes.WELCOME + hello["challenge"]).decode())
        say(start=1)
        assert "node 0 is gone" in str(two.outcome())


@pytest.mark.parametrize("proof", ["", "00" * 32, "of the challenge alone"])
def test_a_stranger_at_the_address_is_not_followed(two, proof):
    """He knows the file's name, which everybody who connects is told, and not what it holds."""
    with planted_first(two) as (say, secret, hello):
        if proof == "of the challenge alone":  # as if a node had been made to sign it
            proof = nodes._sign(secret, hello["challenge"]).decode()
        say(welcome=True, proof=proof)
        say(start=1)
        assert "who answers there does not know this run folder" in str(two.outcome())


def test_who_speaks_a_byte_now_and_then_is_put_out(two, monkeypatch):
    monkeypatch.setattr(nodes, "HELLO_S", 1.0)
    host, port = two.address.split(":")
    with first_in_thread(two):
        while True:
            with suppress(OSError):
                slow = socket.create_connection((host, int(port)), timeout=5)
                break
            time.sleep(0.05)
        started, ended = time.monotonic(), None
        slow.settimeout(0.2)
        while ended is None and time.monotonic() - started < 10:
            with suppress(TimeoutError):
                slow.sendall(b" ")
                ended = time.monotonic() if slow.recv(4096) == b"" else None
        slow.close()
        two.other()
    assert ended is not None and ended - started < 5
    assert two.firsts == [{"of": "0"}]


def test_a_node_that_does_not_end_is_named(two, monkeypatch):
    """Its processes are done here, and it sends signs of life."""
    monkeypatch.setattr(launch, "END_S", 1.0)

    def stay():
        link = connect(two.address, 20)
        assert link is not None
        team = OtherNode(link, processes=4, nodes=2, node=1, join_timeout_s=60, host="127.0.0.1")
        team.introduce(two.shared, CLAIMS, print)
        while team.events.get()[2] is not None:
            pass

    thread = threading.Thread(target=stay)
    thread.start()
    with pytest.raises(WorkError, match=r"all nodes must end within 1 s of each other, node 1 did"):
        two.first()
    thread.join(30)
    assert not thread.is_alive() and two.running() == []


def test_a_node_with_other_settings_is_refused_by_name_and_the_first_goes_on_waiting(two):
    with pytest.raises(RequestError, match=r"train\.steps must be the same .* 6 on node 0 and 7"):
        run_beside(two, lambda: two.other(claims=CLAIMS | {"train.steps": "7"}))
    assert two.firsts == [{"of": "0"}]
    assert any("was turned away: train.steps must be" in line for line in two.said)


@contextmanager
def first_in_thread(two):
    two.firsts = []

    def live():
        try:
            two.firsts.append(two.first())
        except Exception as error:  # noqa: BLE001 - looked at by the test
            two.firsts.append(error)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        yield
    finally:
        thread.join(30)
    assert not thread.is_alive()


def run_beside(two, do):
    """`do` while node 0 waits; then a node that is right, so that node 0 ends well."""
    with first_in_thread(two):
        try:
            return do()
        finally:
            two.other()


def test_a_node_that_does_not_share_the_folder_is_refused(two, tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "SEEN_WITHIN_S", 0.1)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(RequestError, match=r"all nodes must share the run root.*by --runs"):
        run_beside(two, lambda: two.other(folder=tmp_path / "elsewhere"))
    assert two.firsts == [{"of": "0"}]


@pytest.mark.parametrize(("node", "reason"), [(2, "must be 1 to 1 there, found 2")])
def test_a_rank_that_there_is_not_is_refused(two, node, reason):
    with pytest.raises(RequestError, match=reason):
        run_beside(two, lambda: two.other(node))


def test_a_rank_that_is_there_already_is_refused(worker, shared):
    three = Nodes(worker, shared, count=3)
    with first_in_thread(three):
        three.start(1)
        while not any("node 1" in line for line in three.said):
            time.sleep(0.05)
        with pytest.raises(RequestError, match=r"node 1 \(.*\) is here already"):
            three.other(1)
        three.other(2)
    assert three.firsts == [{"of": "0"}]


def test_strangers_neither_join_nor_disturb(two):
    host, port = two.address.split(":")

    lines = (
        b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 100, b'{"node": 1, "proof": ""}\n', b'["a"]\n',
        b'{"proof": "x", "claims": 3}\n', b"[" * 100_000 + b"\n",
    )  # fmt: skip

    def knock():
        for words in lines:
            with socket.create_connection((host, int(port)), timeout=20) as stranger:
                greeting = json.loads(stranger.makefile("rb").readline())
                with suppress(OSError):
                    stranger.sendall(words)
                assert "challenge" in greeting
        silent = socket.create_connection((host, int(port)), timeout=20)
        two.silent = silent  # and stays

    def when_open():
        deadline = time.monotonic() + 20
        while True:
            try:
                return knock()
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    run_beside(two, when_open)
    assert two.firsts == [{"of": "0"}]
    two.silent.close()


def test_a_node_that_never_comes_is_named_in_time(two):
    two.timeout_s = 0.5
    with pytest.raises(WorkError, match=r"join within 0\.5 s .*found node 1 missing.*node_rank"):
        two.first()
    assert not list(two.shared.glob(".join-*"))


def test_a_first_node_that_never_comes_is_named_in_time():
    address = free_address()
    with pytest.raises(WorkError, match=rf"node 0 must answer at {address} .*within 0\.3 s"):
        connect(address, 0.3)


def test_something_else_at_the_address_is_said_to_be_that(two):
    host, port = two.address.split(":")
    with socket.create_server((host, int(port))) as listener:
        two.start()
        connection, _ = listener.accept()
        connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
        assert "something else answers there" in str(two.outcome())


def test_an_address_that_is_taken_is_named(two):
    host, port = two.address.split(":")
    with socket.create_server((host, int(port))), pytest.raises(RequestError, match=two.address):
        two.first()


def test_processes_that_cannot_reach_each_other_end_in_time(two):
    two.meet_s = 2
    two.start(fault="wall")
    # A busy machine may need longer to start the others too.
    with pytest.raises(WorkError, match=r"reach each other .*rank (0, )?1 did.*NCCL_SOCKET_IFNAME"):
        two.first(fault="wall")
    assert isinstance(two.outcome(), WorkError) and two.running() == []


def test_a_node_without_the_tensors_is_told_to_share_the_run_root(
    two, tiny_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(join_training, "SEEN_WITHIN_S", 0.1)
    place = {"nodes": 2, "node_rank": 1, "main_address": two.address, "join_timeout_s": 20}
    config = make_config(tiny_checkpoint, processes=2, runtime=place)
    with pytest.raises(RequestError, match=r"share the run root.*holds no finished tensors here"):
        run_beside(two, lambda: join_training.take_part(config, tmp_path / "empty", print))
    assert not (tmp_path / "empty").exists()
