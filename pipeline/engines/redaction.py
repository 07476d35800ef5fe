"""What a server said, made fit for a message or a log: short, on one line, without keys. Pure."""

from __future__ import annotations

import re

MAX_DETAIL = 300  # characters


def redacted(text: str, key: str = "") -> str:
    """The start of `text` without `key`, what looks like one, and the user of an address."""
    if key:
        text = text.replace(key, "***")
    # To the last @ before a path: a password may hold one.
    text = re.sub(r"//[^/\s]+@", "//***@", text)
    # Servers that mask the key themselves leave its ends to be read.
    text = re.sub(r"\b(?:sk|key|token)-[\w*-]{4,}", "***", " ".join(text.split()))
    return text if len(text) <= MAX_DETAIL else text[:MAX_DETAIL] + "…"
