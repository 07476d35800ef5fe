"""What is a secret by its name, and how long a token must be. Needs the standard library
alone, since `runpod/start.sh` asks it too."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

SHORTEST_TOKEN = 16  # characters; `openssl rand -hex 16` makes twice as many
SHORTEST_SECRET = 6  # what is shorter is part of many words
SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSW", re.IGNORECASE)


def secret_values(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Values to take out of what is shown, of all variables named like a secret."""
    values = {
        held
        for name, value in environment.items()
        if SECRET_NAME.search(name) and len(held := value.strip()) >= SHORTEST_SECRET
    }
    return tuple(sorted(values))


def masked(text: str, secrets: Iterable[str]) -> str:
    """`text` without any of `secrets`; the longer ones go first, since one may hold another."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text
