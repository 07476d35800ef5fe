"""Standard input -> standard output and a file that is rotated, with secrets taken out.

    SOMETHING 2>&1 | python -I runpod/pod_log.py FILE [--max-mb 20] [--keep 5]

FILE, FILE.1, … FILE.KEEP: at most (KEEP + 1) * MAX_MB on the volume. Every value of an environment
variable that is named like a secret (TOKEN, KEY, SECRET, PASSWORD) becomes `…`, also where it is
percent-encoded: a second net under programs that should not print them. A full or broken volume
costs the file, never the output. Lines of progress bars (ending in a carriage return) stay out of
the file. Ends with its input alone: signals that stop the others leave it to their last words.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSW", re.IGNORECASE)
SHORTEST = 6  # shorter values stand in ordinary words
LONGEST_LINE = 1 << 16


def secrets(environment: Mapping[str, str]) -> list[bytes]:
    """Values to take out, longest first: one may hold another."""
    values = {
        form
        for name, value in environment.items()
        if SECRET_NAME.search(name) and len(value) >= SHORTEST
        for form in (value, quote(value, safe=""))
    }
    return sorted((value.encode() for value in values), key=len, reverse=True)


class Log:
    """A file that begins anew after `max_bytes`; the `keep` before it stay, numbered."""

    def __init__(self, path: Path, max_bytes: int, keep: int):
        self._path, self._max_bytes, self._keep = path, max_bytes, keep
        self._is_broken = False

    def write(self, line: bytes) -> None:
        if line.endswith(b"\r"):
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            size = self._path.stat().st_size if self._path.exists() else 0
            if size and size + len(line) > self._max_bytes:
                self._rotate()
            with self._path.open("ab") as file:
                file.write(line)
            self._is_broken = False
        except OSError as error:
            if not self._is_broken:
                print(f"{self._path} cannot be written: {error.strerror}", flush=True)
            self._is_broken = True

    def _rotate(self) -> None:
        for number in range(self._keep, 0, -1):
            older = self._numbered(number - 1)
            if older.exists():
                older.replace(self._numbered(number))
        self._path.unlink(missing_ok=True)  # where nothing is to be kept

    def _numbered(self, number: int) -> Path:
        return self._path if number == 0 else self._path.with_name(f"{self._path.name}.{number}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--max-mb", type=float, default=20)
    parser.add_argument("--keep", type=int, default=5)
    options = parser.parse_args()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    hidden = secrets(os.environ)
    log = Log(options.path, int(options.max_mb * 1e6), options.keep)
    rest = b""
    while chunk := os.read(0, 1 << 16):
        *lines, rest = re.split(rb"(?<=[\r\n])", rest + chunk)
        if len(rest) > LONGEST_LINE:
            lines, rest = [*lines, rest + b"\n"], b""
        for line in lines:
            _pass_on(line, hidden, log)
    _pass_on(rest, hidden, log)


def _pass_on(line: bytes, hidden: list[bytes], log: Log) -> None:
    for secret in hidden:
        line = line.replace(secret, "…".encode())
    if line:
        log.write(line)
    with contextlib.suppress(OSError):  # nobody listens any more: the file goes on
        os.write(1, line)


if __name__ == "__main__":
    main()
