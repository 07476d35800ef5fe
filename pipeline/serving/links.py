"""Links for trainees: a prompt and voice under a random name, with an end.

The link holds the name alone, so nobody reads the prompt out of it. The file, where there is one,
holds a digest of the name: who reads the file cannot open its links.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import time
from pathlib import Path

from duplex.errors import RequestError
from duplex.files import append_line, read_lines, write_atomic
from pipeline.serving.bodies import Body, read_body

LONGEST_H = 24 * 31
NAME_CHARS = 80
MAX_LINKS = 10_000


class Pass(Body):
    """What a trainee was given; a line of the file, beside the link's digest. expires: seconds
    since 1970."""

    name: str
    text_prompt: str
    voice_prompt: str
    greeting: str
    expires: int


class LinkBook:
    """The links of a server.

    Args:
        path: JSON lines that a later start reads again; None: they end with the process. The file
            is what counts: who removes it, or a line of it, ends those links; what is being said
            over them goes on to the time that they had.
    """

    def __init__(self, path: Path | None = None):
        self._path = path
        self._passes: dict[str, Pass] = {}
        self._read_at: tuple[int, int] | None = None  # the file's time and size
        self._refresh()

    def _refresh(self) -> None:
        """Read the file again if it is another one by now. A line that is no link is left out."""
        if self._path is None:
            return
        try:
            status = self._path.stat()
        except FileNotFoundError:
            found = None
        else:
            found = (status.st_mtime_ns, status.st_size)
        if found == self._read_at:
            return
        passes = {}
        for line in read_lines(self._path):
            try:
                key = str(line.pop("link"))
                passes[key] = read_body(Pass, line)
            except (KeyError, RequestError) as error:
                logging.warning("%s: a line is no link, opens nothing: %s", self._path.name, error)
        self._passes, self._read_at = passes, found

    def add(
        self, name: str, text_prompt: str, voice_prompt: str, greeting: str, hours: float
    ) -> str:
        """The random name of a new link.

        Raises:
            RequestError: not a name or time to give, or there are too many.
        """
        if not 0 < hours <= LONGEST_H:
            raise RequestError(
                f"hours must be more than 0 and at most {LONGEST_H}, found {str(hours)[:20]}"
            )
        if not 0 < len(name) <= NAME_CHARS:
            raise RequestError(f"name must be 1 to {NAME_CHARS} characters, found {len(name)}")
        self._refresh()
        now = time.time()
        kept = {key: one for key, one in self._passes.items() if one.expires > now}
        if len(kept) < len(self._passes):
            self._passes = kept
            self._rewrite()
        if len(self._passes) >= MAX_LINKS:
            raise RequestError(f"there are {MAX_LINKS} links already; wait until some have ended")
        link = secrets.token_urlsafe(24)
        given = Pass(
            name=name,
            text_prompt=text_prompt,
            voice_prompt=voice_prompt,
            greeting=greeting,
            expires=int(now + hours * 3600),
        )
        self._passes[_digest(link)] = given
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            append_line(self._path, _line(_digest(link), given))
            self._refresh()
        return link

    def _rewrite(self) -> None:
        """Leave what has ended out of the file."""
        if self._path is not None:
            lines = [_line(key, one) + "\n" for key, one in self._passes.items()]
            write_atomic(self._path, "".join(lines).encode())
            self._read_at = None

    def find(self, link: str) -> Pass | None:
        """None where there is no such link, or its time is over."""
        self._refresh()
        given = self._passes.get(_digest(link))
        return given if given is not None and given.expires > time.time() else None


def _line(digest: str, given: Pass) -> str:
    return json.dumps({"link": digest, **given.model_dump()}, ensure_ascii=False)


def _digest(link: str) -> str:
    return hashlib.sha256(link.encode("utf-8", "surrogateescape")).hexdigest()
