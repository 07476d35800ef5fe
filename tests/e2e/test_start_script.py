"""runpod/start.sh as a pod runs it: a run that is done, what it refuses, and one killed again and
again, in a bare root as a fresh user. The pocket model stands in for 7B, nothing else is replaced.
"""

import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from duplex.lock import is_locked
from tests.e2e.conftest import ROOT, SMALL, environment, make_workplace
from tests.e2e.image import lay_out, libraries, make_user, remove_user
from tests.e2e.test_kills import deterministic

TOKEN = "planted-pod-token-5f2c"
HUB_TOKEN = "hf_plantedhubtoken77"
PROBE = "http://127.0.0.1:{port}/?text_prompt=You%20are%20Marcus%2C%20a%20customer."


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Pod:
    """One start of start.sh, in a process group of its own, with its output in a file."""

    def __init__(self, workplace, out, app=ROOT, **variables):
        self.port = free_port()
        self.out, self.workplace = out, workplace
        self.environment = environment() | {
            "DUPLEX_CONFIG": str(workplace.config), "DUPLEX_RUNS": str(workplace.runs),
            "DUPLEX_HOST": "127.0.0.1", "DUPLEX_PORT": str(self.port),
            "DUPLEX_AGENT_PORT": str(free_port()), "DUPLEX_TOKEN": TOKEN, "HF_TOKEN": HUB_TOKEN,
            "DUPLEX_PYTHON": sys.executable, "DUPLEX_USER": "", "HF_HOME": str(workplace.folder),
            **variables,
        }  # fmt: skip
        self.environment.pop("PYTHONPATH")  # start.sh knows where its code is
        self.script = app / "runpod" / "start.sh"
        self.process = None

    def start(self, *arguments, cwd="/"):
        with self.out.open("ab") as log:
            self.process = subprocess.Popen(
                [str(self.script), *arguments], env=self.environment, stdout=log,
                stderr=subprocess.STDOUT, cwd=cwd, start_new_session=True,
            )  # fmt: skip
        return self

    def output(self):
        return self.out.read_text(errors="replace")

    def get(self, path, method="GET"):
        """The status, or None where nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request(method, path)
            return connection.getresponse().status
        except OSError:
            return None
        finally:
            connection.close()

    def wait_for(self, path, status, within_s):
        """Polls until `path` answers `status`; returns all that was answered, repeats left out."""
        deadline, seen = time.monotonic() + within_s, []
        while not seen or seen[-1] != status:
            assert self.process.poll() is None, f"start.sh ended:\n{self.output()}"
            assert time.monotonic() < deadline, f"found {seen} at {path}:\n{self.output()}"
            answer = self.get(path)
            seen += [answer] if answer != (seen[-1] if seen else "nothing yet") else []
            time.sleep(0.05)
        return seen

    def wait_to_be_in(self, stage):
        """Until this start has begun a stage, or done it; at once for None."""
        before = len(self.output()) if stage else 0
        while stage and not re.search(rf"^\d {stage}: ", self.output()[before:], re.MULTILINE):
            assert self.process.poll() is None, self.output()
            time.sleep(0.1)

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        deadline = time.monotonic() + 20
        while is_locked(self.workplace.run_folder):
            assert time.monotonic() < deadline, "something outlived the kill"
            time.sleep(0.05)

    def stop(self):
        """SIGTERM to the script alone, as a container gets it; its code and how long that took."""
        started = time.monotonic()
        self.process.terminate()
        code = self.process.wait(20)
        return code, time.monotonic() - started


@contextmanager
def ended(pod):
    try:
        yield pod
    finally:
        if pod.process is not None and pod.process.poll() is None:
            os.killpg(pod.process.pid, signal.SIGKILL)
            pod.process.wait()


def start_here(workplace):
    """Its config by absolute paths: start.sh works in its own folder."""
    folder = {"folder": str(workplace.folder / "personas")}
    config = SMALL | {"personas": SMALL["personas"] | folder}
    workplace.config.write_text(yaml.safe_dump(config))
    return workplace


def command_lines():
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield int(entry.parent.name), entry.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # it has ended


def server_of(workplace):
    (found,) = [pid for pid, line in command_lines()
                if "pipeline.serving.app" in line and str(workplace.runs) in line]  # fmt: skip
    return found


@pytest.mark.slow
def test_a_run_that_is_done_is_served_again_when_it_dies_and_stops_on_sigterm(workplace, tmp_path):
    digests = workplace.digests()
    pod = Pod(start_here(workplace), tmp_path / "out", DUPLEX_SERVE_PAUSE_S="1")
    with ended(pod.start()):
        # Nobody at first, for as long as bash and python take to start; from then on somebody.
        assert pod.wait_for("/ping", 204, 5) in ([204], [None, 204])
        assert pod.get("/api/chat") == 503
        # Nobody for the moment in which the port changes hands, if somebody asks just then.
        assert pod.wait_for("/ping", 200, 90) in ([204, 200], [204, None, 204, 200])
        running = [line for line in pod.output().splitlines() if line.endswith(": running …")]
        # The place of the persona files, which `start_here` changes, is in that stage's key.
        assert running == ["1 personas: running …"] and pod.output().count(": done (") == 9
        result = workplace.duplex(
            "probe", PROBE.format(port=pod.port) + f"&token={TOKEN}", "--json", timeout=60
        )
        assert json.loads(result.stdout)["proven"], result.stdout + result.stderr
        lines = [line for _, line in command_lines() if TOKEN in line or HUB_TOKEN in line]
        assert lines == []
        os.kill(server_of(workplace), signal.SIGKILL)
        again = pod.wait_for("/ping", 204, 20)
        assert set(again) <= {200, None, 204}
        assert pod.wait_for("/ready", 200, 60)[-1] == 200
        code, seconds = pod.stop()
        assert code == 0 and seconds < 10, pod.output()
    assert "the server ended with exit code 137" in pod.output()
    assert pod.output().rstrip().endswith("stopped")
    log = workplace.runs / "pod.log"
    assert log.read_text().rstrip().endswith("stopped")
    for text in (pod.output(), log.read_text()):
        assert TOKEN not in text and HUB_TOKEN not in text
    assert [pid for pid, line in command_lines() if str(workplace.runs) in line] == []
    assert workplace.digests() == digests


@pytest.fixture
def fresh(tmp_path):
    return start_here(make_workplace(tmp_path / "fresh"))


def refused(pod, *arguments, within_s=60, cwd="/"):
    with ended(pod.start(*arguments, cwd=cwd)):
        code = pod.process.wait(within_s)
    return code, pod.output()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"DUPLEX_TOKEN": "", "DUPLEX_HOST": "0.0.0.0"}, "DUPLEX_TOKEN must be set to serve"),
        ({"DUPLEX_TOKEN": "fifteen-letters", "DUPLEX_HOST": "0.0.0.0"}, "at least 16 characters"),
        ({"DUPLEX_RUNS": "/proc/nowhere/runs"}, "/proc/nowhere/runs must be writable"),
        ({"DUPLEX_PYTHON": "/nowhere/python"}, "/nowhere/python must be an interpreter"),
        ({"DUPLEX_SET": "train.steps=2\nserve.runtime.token=abcdef-ghijkl"}, "no secrets"),
    ],
)
def test_what_is_refused_at_once(fresh, tmp_path, variables, said):
    code, output = refused(Pod(fresh, tmp_path / "out", **variables), within_s=20)
    assert code == 1 and said in output
    assert "abcdef-ghijkl" not in output
    assert not fresh.run_folder.exists()


def test_what_the_doctor_finds_ends_the_start_before_anything_is_made(fresh, tmp_path):
    pod = Pod(
        fresh, tmp_path / "out", DUPLEX_CONFIG=str(ROOT / "configs" / "coffee.yaml"),
        OPENAI_API_KEY="planted-openai-key", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    code, output = refused(pod)
    assert code == 1 and "no CUDA device" in output and "what must be mended first" in output
    assert not (fresh.runs / "coffee").exists()


def test_sigterm_ends_a_run_as_ctrl_c_does(fresh):
    """It waits for its stage, which stops at a whole record; without that both would just die."""
    process = subprocess.Popen(
        [sys.executable, "-m", "duplex.cli", "run", "small.yaml"], cwd=fresh.folder,
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("2 dialogues: running"):
            break
    time.sleep(0.3)
    process.terminate()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in errors
    assert not is_locked(fresh.run_folder)
    assert fresh.run("--to", "dialogues").returncode == 0


def test_places_are_meant_from_where_it_is_started(fresh, tmp_path):
    """As the README's line for a laptop has them; the script itself works in its own folder."""
    pod = Pod(fresh, tmp_path / "out", DUPLEX_CONFIG="small.yaml", DUPLEX_RUNS="runs")
    code, output = refused(pod, "sh", "-c", 'echo "$DUPLEX_CONFIG $DUPLEX_RUNS"', cwd=fresh.folder)
    assert code == 0 and output.split() == [str(fresh.config), str(fresh.runs)]


def test_a_request_that_is_wrong_is_not_tried_again(fresh, tmp_path):
    pod = Pod(fresh, tmp_path / "out", DUPLEX_SET="train.stepz=2")
    code, output = refused(pod)
    assert code == 1 and "train.steps" in output and not fresh.run_folder.exists()


@pytest.mark.slow
def test_a_server_that_dies_and_dies_is_given_up(workplace, tmp_path):
    pod = Pod(
        start_here(workplace), tmp_path / "out", DUPLEX_SERVE_PAUSE_S="0", DUPLEX_SERVE_TRIES="2"
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", pod.port))
        taken.listen()
        code, output = refused(pod, within_s=90)
    assert code == 1
    assert "(failure 1 of 2)" in output and "ended 2 times in a row" in output
    assert f"port {pod.port} on 127.0.0.1 must be free" in output


def test_arguments_take_the_place_of_the_pipeline(fresh, tmp_path):
    code, output = refused(Pod(fresh, tmp_path / "out"), "sh", "-c", 'echo "$HF_HOME" $PYTHONPATH')
    assert code == 0 and output.split() == [str(fresh.folder), str(ROOT)]


@pytest.fixture
def bare_root():
    """A root with /app as the image has it, a volume of root's and a user without rights; outside
    of pytest's own folder, which only root may enter."""
    root = Path(tempfile.mkdtemp(prefix="duplex-pod-"))
    root.chmod(0o755)
    try:
        user = make_user(root / "home")
        try:
            yield root, lay_out(root), user
        finally:
            remove_user(user)
    finally:
        shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_again_and_again_as_a_fresh_user_it_ends_served_with_equal_digests(
    finished, bare_root, tmp_path
):
    root, app, user = bare_root
    workplace = start_here(make_workplace(root / "workspace"))
    draw = random.Random()
    seed = int(os.environ.get("DUPLEX_TEST_SEED", draw.randrange(2**32)))
    print(f"moments drawn with seed {seed}")
    draw.seed(seed)
    pod = Pod(
        workplace, tmp_path / "out", app, DUPLEX_USER=user.name, DUPLEX_RUNS=str(workplace.runs),
        DUPLEX_PYTHON=str(app / ".venv/bin/python"), HF_HOME=str(root / "workspace/huggingface"),
        **libraries(root),
    )  # fmt: skip
    pod.environment = {k: v for k, v in pod.environment.items() if not k.startswith("PYTEST_")}
    seconds = {row["name"]: row["seconds"] for row in finished.status()}
    with ended(pod):
        for stage in (None, "dialogues", "speech", "tensors", "train", "serve", "evaluate"):
            pod.start()
            pod.wait_to_be_in(stage)
            time.sleep(draw.uniform(0, seconds[stage] if stage else 10))
            assert pod.process.poll() is None, pod.output()
            if stage == "tensors":
                code, took_s = pod.stop()
                assert code == 0 and took_s < 10, f"{took_s:.1f} s\n{pod.output()}"
            else:
                pod.kill()
        pod.start()
        pod.wait_for("/ready", 200, 900)
        url = PROBE.format(port=pod.port) + f"&token={TOKEN}"
        assert workplace.started("probe", url, timeout=60).returncode == 0
        owners = {path.lstat().st_uid for path in workplace.runs.rglob("*")}
        assert owners == {user.uid}
        code, seconds = pod.stop()
        assert code == 0 and seconds < 10, pod.output()
    assert deterministic(workplace) == deterministic(finished)
    assert [row["state"] for row in workplace.status()] == ["done"] * 9
    assert not list(workplace.run_folder.rglob("*.tmp"))


def test_a_moved_run_folder_goes_on_with_no_stage_redone(workplace, tmp_path):
    """To another path, by itself, as `rsync` brings it: without models, caches or the log."""
    moved = make_workplace(tmp_path / "elsewhere" / "deeper")
    shutil.copytree(workplace.run_folder, moved.run_folder)
    shutil.rmtree(workplace.folder)
    assert [row["state"] for row in moved.status()] == ["done"] * 9
    result = moved.run("--dry-run", "--json")
    assert {row["action"] for row in json.loads(result.stdout)["stages"]} == {"keep"}
    manifests = {name: made["provenance"]["finished"] for name, made in moved.manifests().items()}
    (moved.run_folder / Path(moved.status()[-1]["folder"]).name / "manifest.json").unlink()
    changed = moved.run("--to", "serve")
    assert changed.returncode == 0 and changed.stdout.count(": done (") == 8
    after = {name: made["provenance"]["finished"] for name, made in moved.manifests().items()}
    assert after == {name: time for name, time in manifests.items() if name != "evaluate"}
