"""runpod/Dockerfile without a container engine: its steps, and its /app laid out in a folder.

COPY is emulated, with .dockerignore. The environment of `uv pip install` is this one's packages in
a folder of its own. An interpreter that only root may reach is copied, as the image has it in /opt.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT

DOCKERFILE = ROOT / "runpod" / "Dockerfile"
REMOVED_WITHIN_S = 20
SKIPPED_OF_PYTHON = shutil.ignore_patterns(
    "site-packages", "test", "tests", "idlelib", "tkinter", "ensurepip", "config-*", "__pycache__"
)


@dataclass(frozen=True)
class Step:
    """One instruction. text: all of it after the word, lines joined."""

    word: str
    text: str


def steps(content: str) -> list[Step]:
    lines = [line for line in content.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = (line.partition(" ") for line in joined.splitlines() if line.strip())
    return [Step(word.upper(), text.strip()) for word, _, text in pairs]


def ignored(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore keeps `path`, or a folder that it is in, out of the build."""
    parts = path.split("/")
    heads = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    return any(_matches(head, pattern) for head in heads for pattern in patterns)


def _matches(path: str, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return fnmatch.fnmatchcase(path.rsplit("/", 1)[-1], pattern[3:])
    return path.count("/") == pattern.count("/") and fnmatch.fnmatchcase(path, pattern)


def context_files(folder: Path = ROOT) -> list[str]:
    """Paths of the build's context: what a build would send from a checkout as it lies here."""
    lines = (folder / ".dockerignore").read_text().splitlines()
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    found = []
    for here, folders, names in os.walk(folder):
        base = os.path.relpath(here, folder)
        at = "" if base == "." else f"{base}/"
        folders[:] = [name for name in folders if not ignored(f"{at}{name}", patterns)]
        found += [f"{at}{name}" for name in names if not ignored(f"{at}{name}", patterns)]
    return sorted(found)


def lay_out(root: Path) -> Path:
    """The image's /app in `root`/app, and what runs it; returns it."""
    app = root / "app"
    for step in steps(DOCKERFILE.read_text()):
        if step.word != "COPY" or step.text.startswith("--from="):
            continue
        *sources, target = step.text.split()
        for path in context_files():
            if sources == ["."]:
                _copy(path, app / path)
            elif path in sources:
                _copy(
                    path, app / target / Path(path).name if target.endswith("/") else app / target
                )
    make_environment(root, app / ".venv")
    return app


def _copy(path: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(ROOT / path, target)


def make_environment(root: Path, venv: Path) -> None:
    packages = Path(sysconfig.get_paths()["purelib"])
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    python = Path(sys.base_prefix)
    if not all_may_enter(python):
        copied = root / "opt" / "python"
        shutil.copytree(python / "lib" / name, copied / "lib" / name, ignore=SKIPPED_OF_PYTHON)
        for library in (python / "lib").glob("libpython*.so*"):
            shutil.copy2(library, copied / "lib", follow_symlinks=False)
        (copied / "bin").mkdir()
        shutil.copy2((python / "bin" / name).resolve(), copied / "bin" / name)
        python = copied
    (venv / "bin").mkdir(parents=True)
    (venv / "lib" / name).mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(python / "bin" / name)
    (venv / "lib" / name / "site-packages").symlink_to(packages)
    (venv / "pyvenv.cfg").write_text(f"home = {python / 'bin'}\n")


def libraries(root: Path) -> dict[str, str]:
    """A copied interpreter finds its own library here and nowhere else."""
    copied = root / "opt" / "python" / "lib"
    return {"LD_LIBRARY_PATH": str(copied)} if copied.is_dir() else {}


def all_may_enter(path: Path) -> bool:
    return all(place.stat().st_mode & 0o001 for place in (path, *path.resolve().parents))


@dataclass(frozen=True)
class Somebody:
    """A fresh user without rights."""

    name: str
    uid: int
    gid: int
    home: Path


def make_user(home: Path) -> Somebody:
    """Skips where nobody may make one, or the packages cannot be read by others: only root makes
    users, a desk is no place to be asked for root, and a copy of the packages takes 8 GB. The same
    script is tested as whoever runs the tests, without a fresh user, beside these."""
    if os.geteuid() != 0 or not shutil.which("useradd"):
        pytest.skip("only root makes a fresh user, by useradd")
    if not all_may_enter(Path(sysconfig.get_paths()["purelib"])):
        pytest.skip("the packages of this environment are in a folder that only root may enter")
    name = f"duplextest{os.getpid()}"
    command = ["useradd", "--no-create-home", "--home-dir", str(home), "--system", name]
    subprocess.run(command, check=True, capture_output=True)
    entry = pwd.getpwnam(name)
    home.mkdir(parents=True)
    os.chown(home, entry.pw_uid, entry.pw_gid)
    return Somebody(name, entry.pw_uid, entry.pw_gid, home)


def remove_user(user: Somebody) -> None:
    """Once none of their processes is left: userdel refuses before that. What was killed a moment
    ago may take another to be gone, on a busy machine a few seconds."""
    deadline = time.monotonic() + REMOVED_WITHIN_S
    while (left := processes_of(user.uid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            time.sleep(0.5)
    subprocess.run(["userdel", user.name], check=True, capture_output=True)
    assert left == [], f"processes of {user.name} outlived what started them"


def processes_of(uid: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if entry.stat().st_uid == uid:
                found.append(int(entry.name))
    return found
