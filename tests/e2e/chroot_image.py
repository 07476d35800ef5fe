"""runpod/Dockerfile executed without a container engine: every step by chroot, in a bare root.

Each program runs in namespaces of its own (processes, mounts), which end with it: nothing is ever
mounted where the tests see it, so nothing has to be unmounted, and removing the root cannot reach
through a mount. What BuildKit mounts for a step (secrets, the package cache, resolv.conf) is there
for that step alone.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT
from tests.e2e.image import DOCKERFILE, Step, context_files, steps

DOCKER_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NEEDED = ("debootstrap", "unshare", "nsenter", "setpriv", "ip")
NEEDED_GB = 12  # two copies of the packages at the worst moment would not fit in less
SHM_MB = 64  # what Docker gives; RunPod gives more
# uv says one of these where the interpreter that it manages cannot be downloaded.
NO_INTERPRETER = re.compile(r"python-build-standalone|[Ff]ailed to download", re.DOTALL)
# debootstrap says so where the archive cannot be reached.
NO_ARCHIVE = re.compile(r"Failed getting release file|Couldn't download")
MANAGED, OF_THE_BASE = "--managed-python --python 3.11", "--python /usr/bin/python3.11"
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")
OWN = ("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child")


def bare_root(folder: Path) -> Path:
    """debootstrap's smallest root of this machine's release. Skips where none can be made."""
    if os.geteuid() != 0:
        pytest.skip("only root may chroot")
    missing = [name for name in NEEDED if not shutil.which(name)]
    if missing:
        pytest.skip(f"a bare root needs {', '.join(missing)}")
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < NEEDED_GB:
        pytest.skip(f"the image's files need {NEEDED_GB} GB, {folder} has {free_gb:.0f}")
    release = re.search(r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(), re.M)
    root = folder / "root"
    result = subprocess.run(
        [*DIES_WITH_US, "unshare", "--mount", "--propagation", "private",
         "debootstrap", "--variant=minbase", release[1] if release else "stable", str(root)],
        capture_output=True, text=True,
    )  # fmt: skip
    if result.returncode != 0:
        text = result.stdout + result.stderr
        if NO_ARCHIVE.search(text):
            pytest.skip("debootstrap reaches no archive of packages here")
        raise AssertionError(f"debootstrap must make a root, it did not: {text[-2000:]}")
    return root


@dataclass
class Image:
    """A root folder that a Dockerfile's steps turn into the image.

    secrets: id -> file. lent: beside them in /run/secrets, for the steps that have secrets.
    caches: target of a cache mount -> a folder of this machine.
    substituted: what a step was run with in place of what the file says; empty: nothing.
    """

    root: Path
    secrets: Mapping[str, Path] = field(default_factory=dict)
    lent: Sequence[Path] = ()
    caches: Mapping[str, Path] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=lambda: {"PATH": DOCKER_PATH, "HOME": "/root"})
    arguments: dict[str, str] = field(default_factory=dict)
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    folder: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)
    ports: list[str] = field(default_factory=list)
    substituted: list[str] = field(default_factory=list)
    seconds: list[tuple[float, str]] = field(default_factory=list)

    def build(self, dockerfile: Path = DOCKERFILE) -> None:
        """All steps, in order; an instruction that is not known here is a failure."""
        for step in steps(dockerfile.read_text()):
            started = time.monotonic()
            getattr(self, f"_{step.word.lower()}", self._unknown(step))(step.text)
            self.seconds.append((time.monotonic() - started, f"{step.word} {step.text[:60]}"))

    def _unknown(self, step: Step):
        def refuse(_: str) -> None:
            pytest.fail(f"nothing here executes {step.word}: teach it, or that step is untested")

        return refuse

    # -- the instructions

    def _from(self, text: str) -> None:
        """The root is the base, and this environment's uv stands for the stage of that name."""

    def _shell(self, text: str) -> None:
        self.shell = json.loads(text)

    def _workdir(self, text: str) -> None:
        self.folder = text
        self.path(text).mkdir(parents=True, exist_ok=True)

    def _env(self, text: str) -> None:
        for pair in shlex.split(text):
            name, _, value = pair.partition("=")
            self.env[name] = re.sub(
                r"\$\{?(\w+)\}?", lambda found: self.env.get(found[1], ""), value
            )

    def _arg(self, text: str) -> None:
        name, _, default = text.partition("=")
        self.arguments[name] = shlex.split(default)[0] if default else ""

    def _expose(self, text: str) -> None:
        self.ports = text.split()

    def _healthcheck(self, text: str) -> None:
        self.healthcheck = json.loads(text.partition("CMD ")[2])

    def _entrypoint(self, text: str) -> None:
        self.entrypoint = json.loads(text)

    def _copy(self, text: str) -> None:
        *sources, target = text.split()
        place = self.path(self.folder) / target  # an absolute target is one within the root
        if target.startswith("/"):
            place = self.path(target)
        if sources[0].startswith("--from="):
            assert sources == ["--from=uv", "/uv"], sources
            copy_in(Path(sysconfig.get_paths()["scripts"]) / "uv", place, self.root)
            return
        for path in context_files():
            if sources == ["."]:
                copy_in(ROOT / path, place / path, self.root)
            elif path in sources:
                is_folder = target.endswith("/")
                copy_in(ROOT / path, place / Path(path).name if is_folder else place, self.root)

    def _run(self, text: str) -> None:
        mounts = [dict(pair.split("=", 1) for pair in found.split(","))
                  for found in re.findall(r"--mount=(\S+)\s", text)]  # fmt: skip
        shell = re.sub(r"--mount=\S+\s+", "", text)
        result = self.run([*self.shell, shell], mounts=mounts, env=self.arguments)
        if result.returncode and MANAGED in shell and NO_INTERPRETER.search(result.stderr):
            self._install_interpreter()
            shell = shell.replace(MANAGED, OF_THE_BASE)
            self.substituted.append(f"`{OF_THE_BASE}` for `{MANAGED}`: {said(result)[-200:]}")
            result = self.run([*self.shell, shell], mounts=mounts, env=self.arguments)
        assert result.returncode == 0, f"RUN {shell}\n{said(result)}"

    def _install_interpreter(self) -> None:
        command = (
            "apt-get update && apt-get install -y --no-install-recommends python3 libpython3-dev"
        )
        result = self.run([*self.shell, command])
        assert result.returncode == 0, said(result)
        if not self.path("/usr/bin/python3.11").exists():
            pytest.skip(
                "uv's own interpreter cannot be downloaded here, and the release has no 3.11"
            )

    # -- programs in it

    def path(self, inside: str) -> Path:
        """Where something of the image lies here."""
        return self.root / inside.lstrip("/")

    def run(
        self, command: Sequence[str], *, mounts: Sequence[Mapping[str, str]] = (),
        env: Mapping[str, str] | None = None, timeout_s: float = 2400,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """As root, with the image's environment and whatever a RUN step mounts."""
        lines = self._usual_mounts()
        for mount in mounts:
            lines += self._mount(mount)
        try:
            return subprocess.run(
                self._in_own_namespaces([], lines, command), capture_output=True, text=True,
                env=self.env | dict(env or {}), timeout=timeout_s,
            )  # fmt: skip
        finally:
            for place in ("/run/secrets",):
                if self.path(place).is_dir():
                    self.path(place).rmdir()  # empty: what was in it was in memory

    def start(self, volume: Path, out: Path, variables: Mapping[str, str]) -> Container:
        """The entry point as a container's first process: without a network but loopback, the
        volume over /workspace."""
        self.path("/workspace").mkdir(exist_ok=True)
        lines = ["ip link set lo up", *self._usual_mounts(), self._bind(volume, "/workspace")]
        command = self._in_own_namespaces(["--net"], lines, self.entrypoint)
        with out.open("ab") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=self.env | dict(variables),
            )  # fmt: skip
        return Container(self, process, out)

    def _in_own_namespaces(
        self, more: Sequence[str], lines: Sequence[str], command: Sequence[str]
    ) -> list[str]:
        """`env -C` changes to the working directory after the root was changed."""
        chroot = shutil.which("chroot") or "chroot"
        inside = [chroot, str(self.root), "/usr/bin/env", "-C", self.folder, *command]
        last = f"PATH={shlex.quote(self.env['PATH'])} exec {shlex.join(inside)}"
        script = "\n".join(["set -e", f"PATH={DOCKER_PATH}:$PATH", *lines, last])
        return [*DIES_WITH_US, *OWN, *more, "/bin/sh", "-c", script]

    def _usual_mounts(self) -> list[str]:
        for name in ("/etc/resolv.conf", "/etc/hosts"):
            if not self.path(name).exists():
                self.path(name).touch()
        return [
            f"mount -t proc proc {self._quoted('/proc')}",
            f"mount --bind -o ro /sys {self._quoted('/sys')}",
            f"mount -t tmpfs -o size={SHM_MB}m,mode=1777 tmpfs {self._quoted('/dev/shm')}",
            self._bind(Path("/etc/resolv.conf"), "/etc/resolv.conf"),
            self._bind(Path("/etc/hosts"), "/etc/hosts"),
        ]

    def _mount(self, mount: Mapping[str, str]) -> list[str]:
        if mount["type"] == "cache":
            self.path(mount["target"]).mkdir(parents=True, exist_ok=True)
            return [self._bind(self.caches[mount["target"]], mount["target"])]
        assert mount["type"] == "secret", mount
        self.path("/run/secrets").mkdir(exist_ok=True)
        place = self._quoted("/run/secrets")
        lines = [f"mountpoint -q {place} || mount -t tmpfs tmpfs {place}"]
        if secret := self.secrets.get(mount["id"]):
            lines.append(f"install -m 400 {shlex.quote(str(secret))} {place}/{mount['id']}")
        lines += [f"cp -r {shlex.quote(str(path))} {place}/" for path in self.lent]
        return lines

    def _bind(self, source: Path, target: str) -> str:
        return f"mount --bind {shlex.quote(str(source))} {self._quoted(target)}"

    def _quoted(self, inside: str) -> str:
        return shlex.quote(str(self.path(inside)))


@dataclass
class Container:
    """start.sh as process 1 of its own namespaces."""

    image: Image
    process: subprocess.Popen[bytes]
    out: Path

    @property
    def first(self) -> int:
        """Process 1, as this machine numbers it."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        deadline = time.monotonic() + 10
        while not (found := children.read_text().split()):
            assert time.monotonic() < deadline and self.process.poll() is None, self.output()
            time.sleep(0.05)
        return int(found[0])

    def output(self) -> str:
        return self.out.read_text(errors="replace")

    def run(
        self, command: Sequence[str], user: str = "root", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """As `docker exec` does it."""
        become = [] if user == "root" else ["setpriv", f"--reuid={user}", f"--regid={user}",
                                            "--init-groups"]  # fmt: skip
        return subprocess.run(
            [shutil.which("nsenter") or "nsenter", f"--target={self.first}", "--mount", "--pid",
             "--net", "--root", "/usr/bin/env", "-C", self.image.folder, *become, *command],
            capture_output=True, text=True, env=self.image.env | variables, timeout=240,
        )  # fmt: skip

    def kill(self) -> None:
        """The whole container at once: the kernel ends what is left with process 1."""
        if self.process.poll() is None:
            os.kill(self.first, signal.SIGKILL)
        self.process.wait(20)

    def stop(self, within_s: float = 20) -> tuple[int, float]:
        """SIGTERM to process 1; its exit code and how long that took."""
        started = time.monotonic()
        os.kill(self.first, signal.SIGTERM)
        return self.process.wait(within_s), time.monotonic() - started


def copy_in(source: Path, target: Path, root: Path) -> None:
    """As COPY does: to root, with the mode kept, making folders."""
    assert target.parent.resolve().is_relative_to(root.resolve()), target
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)
    os.chown(target, 0, 0)


def said(result: subprocess.CompletedProcess[str]) -> str:
    return (result.stdout + result.stderr).strip()[-4000:]


def holding(words: Sequence[str], place: Path) -> list[str]:
    """Files below `place` that hold one of `words`."""
    patterns = [argument for word in words for argument in ("-e", word)]
    result = subprocess.run(
        ["grep", "-rlsFa", "--devices=skip", *patterns, str(place)],
        capture_output=True, text=True, env={"LC_ALL": "C", "PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert result.returncode in (0, 1), result.stderr
    return result.stdout.split()


def mounted_below(folder: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if line.split()[4].startswith(str(folder))]


def make_folder() -> Path:
    """Not pytest's own: it keeps the last three, and one of these has 8 GB."""
    return Path(tempfile.mkdtemp(prefix="duplex-image-"))


def remove_folder(folder: Path) -> None:
    assert mounted_below(folder) == [], "something is mounted there, and stays"
    shutil.rmtree(folder)
