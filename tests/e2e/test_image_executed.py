"""runpod/Dockerfile executed step by step in a bare root, and its entry point run there to a served
model. No container engine: chroot, in namespaces of its own for each step (`chroot_image.py`).

**Executed for real**, in the file's order and as it says: apt-get, useradd, COPY with
.dockerignore, the installation of every package, compiling, the link, the steps with secrets, ENV,
ARG, WORKDIR; then the health check's command and the entry point as process 1, by root, with a
volume of root's over /workspace, 64 MB of shared memory and no network but loopback.

**Stands for something else**, so untested: the base is a Debian of this machine's release and not
Ubuntu with CUDA (whether its apt-get, useradd and libraries do the same, and whether torch finds
its driver); uv is this environment's and not the stage's; wheels come from this machine's cache
where it has them. Where the interpreter that uv manages cannot be downloaded, the base's own
python3.11 takes its place: that one flag is changed, a warning says so, and /opt/python is not
tested then. Never tested: layers, image size, pushing, what RunPod does with the image.

Needs root, debootstrap (Debian's package of that name), a registry, 12 GB of disk for a while, and
about a quarter of an hour.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sysconfig
import time
import warnings
from pathlib import Path

import pytest

from tests.e2e.chroot_image import (
    Image,
    bare_root,
    holding,
    make_folder,
    remove_folder,
    said,
)
from tests.e2e.conftest import ROOT, SMALL
from tests.e2e.image import context_files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]

UV = Path(sysconfig.get_paths()["scripts"]) / "uv"
INDEX_SECRET, HUB_SECRET = "planted-index-secret-93ab", "hf_plantedhubtoken-61cd"
TOKEN = "planted-pod-token-5f2c"
PROBE = "http://127.0.0.1:8998/?text_prompt=You%20are%20Marcus%2C%20a%20customer."
GET = (  # as a browser: a page's token becomes a cookie
    "import sys, urllib.request as u\n"
    "opener = u.build_opener(u.HTTPCookieProcessor())\n"
    "try: a = opener.open(sys.argv[1], timeout=5); print(a.status, a.read(300))\n"
    "except u.HTTPError as e: print(e.code, '')\n"
    "except OSError as e: print(0, e)\n"
)


def index_settings(folder: Path) -> tuple[Path, list[Path]]:
    """The file of the secret uv_index, and what it names: this machine's own settings where it has
    any, what it trusts, and a setting that harms nothing and is looked for later."""
    wheels = folder / INDEX_SECRET
    wheels.mkdir()
    lines = {"UV_FIND_LINKS": f"/run/secrets/{INDEX_SECRET}"}
    lent = [wheels]
    for name in ("UV_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX", "UV_EXTRA_INDEX_URL"):
        if value := os.environ.get(name):
            lines[name] = value
    if (url := os.environ.get("PIP_INDEX_URL")) and "UV_INDEX_URL" not in lines:
        lines.setdefault("UV_DEFAULT_INDEX", url)
    trusted = os.environ.get("SSL_CERT_FILE")
    if trusted and Path(trusted).is_file():
        lent.append(Path(shutil.copy(trusted, folder / "trusted.pem")))
        lines["SSL_CERT_FILE"] = "/run/secrets/trusted.pem"
    file = folder / "uv_index"
    file.write_text("".join(f"{name}='{value}'\n" for name, value in lines.items()))
    return file, lent


def outside_of_app(root: Path) -> tuple[set[str], set[str]]:
    return files_below(root / "root"), {path.name for path in (root / "opt").iterdir()}


def files_below(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*") if not path.is_dir()}


@pytest.fixture(scope="module")
def built():
    """The image; what /root and /opt held before the first step, and after the last."""
    folder = make_folder()
    try:
        root = bare_root(folder)
        before = outside_of_app(root)
        uv_index, lent = index_settings(folder)
        hub = folder / "hf_token"
        hub.write_text(HUB_SECRET)
        cache = subprocess.run([UV, "cache", "dir"], capture_output=True, text=True, check=True)
        Path(cache.stdout.strip()).mkdir(parents=True, exist_ok=True)
        image = Image(
            root, secrets={"uv_index": uv_index, "hf_token": hub}, lent=lent,
            caches={"/root/.cache/uv": Path(cache.stdout.strip())},
        )  # fmt: skip
        image.build()
        print("\n".join(f"{seconds:7.1f} s  {what}" for seconds, what in image.seconds))
        for substituted in image.substituted:
            warnings.warn(f"not as the Dockerfile says: {substituted}", stacklevel=1)
        yield image, before, outside_of_app(root)
    finally:
        remove_folder(folder)


@pytest.fixture
def image(built):
    return built[0]


def as_user(*command: str) -> list[str]:
    return ["setpriv", "--reuid=duplex", "--regid=duplex", "--init-groups", "env",
            "HOME=/home/duplex", *command]  # fmt: skip


def test_the_command_runs_as_the_user_from_anywhere(image):
    result = image.run(as_user("duplex", "--help"))
    assert result.returncode == 0 and "duplex run" in result.stdout, said(result)
    code = "import sys, duplex, torch, moshi; print(sys.prefix, duplex.__file__)"
    result = image.run(as_user("python", "-c", code))
    assert result.stdout.split() == ["/app/.venv", "/app/duplex/__init__.py"], said(result)


def test_the_packages_are_those_of_the_constraints(image):
    check = image.run(["uv", "--no-cache", "pip", "check"])
    assert check.returncode == 0, said(check)
    lines = image.run(["uv", "--no-cache", "pip", "freeze"]).stdout.splitlines()
    installed = dict(line.split("==", 1) for line in lines if "==" in line)
    constraints = re.findall(
        r"^([\w.-]+)==([\w.+!-]+)", (ROOT / "constraints.txt").read_text(), re.M
    )
    differing = [(name, version, installed[name]) for name, version in constraints
                 if installed.get(name, version) != version]  # fmt: skip
    assert differing == [] and {"torch", "moshi", "peft"} <= set(installed)


def test_nothing_lies_on_the_volume_or_in_roots_home(built):
    image, before, after = built
    assert not image.path("/workspace").exists() or not any(image.path("/workspace").iterdir())
    assert after[0] == before[0] and not image.path("/run/secrets").exists()
    assert after[1] - before[1] <= {"python"} and (after[1] or image.substituted)
    interpreter = image.run(["readlink", "-f", "/app/.venv/bin/python"]).stdout
    assert interpreter.startswith("/usr/bin/" if image.substituted else "/opt/python/")


def test_the_user_reads_all_of_it_and_changes_none(image):
    kept = "-not -type l -not -path '/proc/*' -not -path '/sys/*' -not -path '/dev/*'"
    code = f"find /app /opt /usr /etc {kept} -writable 2>/dev/null | head"
    assert image.run(as_user("sh", "-c", code)).stdout == ""
    code = "find /app /opt -not -readable -o -type d -not -executable | head"
    assert image.run(as_user("sh", "-c", code)).stdout == ""


def test_the_checkout_is_there_as_docker_would_send_it(image):
    sent = set(context_files())
    assert sent <= files_below(image.path("/app"))
    assert not image.path("/app/tests").exists() and not image.path("/app/.git").exists()
    modes = {path: image.path(f"/app/{path}").stat().st_mode & 0o777 for path in sent}
    assert modes["runpod/start.sh"] & 0o111 and all(mode & 0o004 for mode in modes.values())


def test_everything_is_compiled(image):
    app = image.path("/app")
    packages = next(app.glob(".venv/lib/python3.11/site-packages"))
    for folder in (app / "duplex", app / "pipeline", app / "training", packages / "moshi"):
        for source in folder.rglob("*.py"):
            compiled = source.parent / "__pycache__" / f"{source.stem}.cpython-311.pyc"
            assert compiled.is_file(), f"{source} is compiled anew in each process"


def test_no_secret_is_left_in_any_file(image):
    secrets = [INDEX_SECRET, HUB_SECRET]
    assert holding(secrets, image.root) == []
    # The same look finds what a careless step would leave.
    mounts = [{"type": "secret", "id": "hf_token"}]
    careless = image.run(["sh", "-c", "cp /run/secrets/hf_token /opt/left"], mounts=mounts)
    assert careless.returncode == 0, said(careless)
    assert holding(secrets, image.path("/opt")) == [str(image.path("/opt/left"))]
    image.path("/opt/left").unlink()


def settings() -> str:
    """The pocket config made as small as the other tests have it, one setting a line."""

    def flat(section: dict, before: str = ""):
        for name, value in section.items():
            if isinstance(value, dict):
                yield from flat(value, f"{before}{name}.")
            else:
                yield f"{before}{name}={value}"

    people = ["personas.only=[angry-marcus, friendly-june, nervous-mei]"]
    small = {name: section for name, section in SMALL.items() if name != "name"}
    return "\n".join([*people, *flat(small)]).replace("'", "")


@pytest.fixture
def volume(image):
    """Root's, and of another name than the image's folder: it is mounted over /workspace."""
    place = image.root.parent / "volume"
    place.mkdir(mode=0o755)
    yield place
    shutil.rmtree(place)


def ask(container, path: str) -> str:
    program = ["/app/.venv/bin/python", "-I", "-c", GET, f"http://127.0.0.1:8998{path}"]
    return container.run(program).stdout


def wait_for(container, look, within_s: float, what: str) -> None:
    deadline = time.monotonic() + within_s
    while not look():
        assert container.process.poll() is None, f"the container ended:\n{container.output()}"
        assert time.monotonic() < deadline, f"no {what}:\n{container.output()}"
        time.sleep(2)  # asking takes an interpreter each time


def test_the_entry_point_killed_twice_ends_in_a_served_model(image, volume, tmp_path):
    out = tmp_path / "out"
    variables = {
        "DUPLEX_CONFIG": "/app/configs/pocket.yaml", "DUPLEX_SET": settings(),
        "DUPLEX_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    draw = random.Random()
    seed = int(os.environ.get("DUPLEX_TEST_SEED", draw.randrange(2**32)))
    print(f"moments drawn with seed {seed}")
    draw.seed(seed)
    built_s = time.time()
    time.sleep(0.1)

    def begun(container, stage: str):
        return lambda: re.search(rf"^\d {stage}: ", container.output(), re.MULTILINE)

    for number, stage in enumerate(("speech", "train")):
        container = image.start(volume, tmp_path / f"out{number}", variables)
        try:
            wait_for(container, lambda c=container: ask(c, "/ping").startswith("204"), 30, "/ping")
            assert container.run(image.healthcheck).returncode == 0
            wait_for(container, begun(container, stage), 1200, f"stage {stage}")
            time.sleep(draw.uniform(0, 5))
        finally:
            container.kill()
    container = image.start(volume, out, variables)
    try:
        wait_for(container, lambda: ask(container, "/ping").startswith("200"), 2400, "served model")
        assert container.run(image.healthcheck).returncode == 0
        assert ask(container, "/").startswith("401")
        page = ask(container, f"/?token={TOKEN}")
        assert page.startswith("200") and "<!doctype html>" in page.lower(), page
        url = f"{PROBE}&token={TOKEN}"
        proof = container.run(["duplex", "probe", url], user="duplex", HOME="/home/duplex")
        assert proof.returncode == 0, said(proof)
        sets = [part for line in settings().splitlines() for part in ("--set", line)]
        status = container.run(
            ["duplex", "status", "/app/configs/pocket.yaml", "--runs", "/workspace/runs", *sets,
             "--json"], user="duplex", HOME="/home/duplex",
        )  # fmt: skip
        states = [row["state"] for row in json.loads(status.stdout)["stages"]]
        assert states == ["done"] * 9, said(status)
        lines = container.run(["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"]).stdout
        assert "pipeline.serving.app" in lines and TOKEN not in lines
        code, seconds = container.stop()
    finally:
        container.kill()
    assert code == 0 and seconds < 10, container.output()
    assert "staying root" not in container.output() and "as duplex" in container.output()
    owner = int(image.run(["id", "-u", "duplex"]).stdout)
    assert {path.lstat().st_uid for path in volume.rglob("*")} == {owner}
    for text in (container.output(), (volume / "runs" / "pod.log").read_text()):
        assert TOKEN not in text
    # All that it makes is on the volume; the container's own disk holds no part of a run.
    changed = image.run(["find", "/app", "/opt", "/usr", "/etc", "/root", "/var", "-newermt",
                         f"@{built_s}", "-not", "-type", "d"]).stdout.split()  # fmt: skip
    assert changed == []
