"""What must not leave the machine: keys, its own paths and name, voices without consent."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Mapping

from duplex.base import Record
from duplex.errors import RequestError
from duplex.records import Speech, TensorClip, Voice, VoiceSample

_SECRETS = {
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "an API key": re.compile(r"\b(?:sk|pk|rpa)[-_][A-Za-z0-9_-]{16,}"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_|github_pat_)[A-Za-z0-9_]{20,}"),
    "an AWS key": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
_PATHS = re.compile(r"(?:/(?:home|Users|root|mnt|workspace|tmp|private|var)/[^\s\"']+|[A-Z]:\\\\)")
_SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
SPENDING = ("models", "requests", "replies", "tokens_in", "tokens_out", "usd")
_SHORTEST = 8  # of a value in the environment that is looked for


def scan_texts(texts: Mapping[str, bytes]) -> None:
    """`texts`: what goes up as text, by its name there.

    Raises:
        RequestError: something that must not; said by kind and file, never by its content.
    """
    held = {
        name: value
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST
    }
    found: list[str] = []
    for path, content in texts.items():
        text = content.decode(errors="replace")
        found += [f"{path}: {what}" for what, form in _SECRETS.items() if form.search(text)]
        found += [f"{path}: the value of {name}" for name, value in held.items() if value in text]
        if match := _PATHS.search(text):
            found.append(f"{path}: a path of this machine, {match[0][:60]}")
        if (host := socket.gethostname()) and len(host) >= _SHORTEST and host in text:
            found.append(f"{path}: the name of this machine")
    if found:
        listing = "\n".join(f"  - {line}" for line in found[:20])
        raise RequestError(
            f"nothing was pushed: what goes up must hold no secret and no path.\n{listing}\n"
            "Find it in the records, mend its cause, and make them again."
        )


def unconsented(records: Iterable[Record]) -> list[str]:
    """Voices of people whose consent is not recorded: one line each.

    A voice with a sample or a source is a recording; a voice that no record of the run names
    came with an import, and nobody knows whose it is.
    """
    records = list(records)
    voices = {record.id: record for record in records if isinstance(record, Voice)}
    lines = [
        f"voice {voice.id} ({voice.engine}): a recording without consent"
        for voice in voices.values()
        if (voice.sample or voice.source) and not voice.consent
    ]
    used: set[str] = set()
    anonymous = []
    for record in records:
        if isinstance(record, Speech):
            used |= {turn.voice_id for turn in record.turns}
        elif isinstance(record, TensorClip):
            used |= set(record.voices)
            if not record.voices:
                anonymous.append(record)
        elif isinstance(record, VoiceSample):
            used.add(record.voice_id)
    lines += [f"voice {name}: no record says whose it is" for name in sorted(used - set(voices))]
    if anonymous and not voices:
        lines.append(f"{len(anonymous)} clips: no record says whose voices these are")
    return lines


def check_consent(records: Iterable[Record], stated: str | None) -> None:
    """
    Raises:
        RequestError: recorded voices, and no consent: neither recorded nor stated.
    """
    lines = unconsented(records)
    if lines and not (stated or "").strip():
        listing = "\n".join(f"  - {line}" for line in lines[:10])
        raise RequestError(
            f"nothing was pushed: recorded voices need the consent of who speaks.\n{listing}\n"
            'If you have it, say on what terms: --consent "...", which the card will quote.'
        )


def strip_provenance(provenance: Mapping[str, object]) -> dict[str, object]:
    """What of a manifest's provenance is about the work, not about the machine it ran on."""
    kept = ("finished", "commit", "packages", "funnel")
    found = {name: provenance[name] for name in kept if provenance.get(name) is not None}
    spent = provenance.get("llm")
    if isinstance(spent, dict):  # which models, how much; never where they were asked
        found["llm"] = {name: spent[name] for name in SPENDING if name in spent}
    return found
