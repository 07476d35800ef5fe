"""`duplex personas new|check|draft`: personas and scenarios as files that people review.

new     a skeleton to fill in; what is left unfilled is refused by `check` and by every run
check   schema, domain, and the rules of `pipeline/persona_review.py`; exit 1 on a fault
draft   a model writes `ID.draft.yaml`, which no run takes until a person renames it
"""

from __future__ import annotations

import secrets
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from duplex.base import Record
from duplex.characters import Domain, Persona, Scenario
from duplex.configfile import load_config
from duplex.datafiles import (
    DRAFT_SUFFIX,
    PLACEHOLDER,
    domain_faults,
    find_path,
    is_draft,
    load_domain,
    read_record,
    read_yaml,
    validate,
)
from duplex.errors import EXIT_WORK_FAILED, DataFileError, DuplexError, RequestError
from duplex.files import write_atomic
from duplex.lock import RunLock
from duplex.stage import record_seed
from duplex.streams import PROMPT_SILENCE_FRAMES, SYSTEM_TAG
from pipeline import persona_review as rules
from pipeline.commands import show_json
from pipeline.persona_review import Finding
from pipeline.run import run_folder_of

COFFEE = "coffee-shop"
SKELETON = """\
# {id}: fill in each "{mark}", then run `duplex personas check {path}`.
id: {id}
domain: {domain}
type: {type}  # the mood; this domain has {types}
language: {language}
name: "{mark}: what they are called"
traits: # 3 or 4; they go to the writer, not to the model
  - "{mark}: as in careful"
speech_patterns: # the form says where one goes; quote them
  - "{mark}: before a turn, ends in a comma: Oh my,"
  - "{mark}: at a sentence's end, starts with a comma: , I think"
  - "{mark}: after a turn, a sentence: I expected better."
facts: # 4 to 6. `value` is what is spoken and holds one of `says`, the wordings that count
  - {{key: name, value: "{mark}", says: ["{mark}"]}}
  - {{key: "{mark}: one word, as in order", value: "{mark}", says: ["{mark}"]}}
gap_after_user: {{low: 2, high: 8}} # pause before they answer, in frames of 80 ms
gap_other: {{low: 4, high: 12}} # pause before the other side goes on
interrupts: 0 # share of their turns that cut in on the {user_role}
backchannels: 0 # share of the {user_role}'s long turns in which they say mm-hm
backchannel_words: ["mm-hm"]
voice: {{gender: female, age: adult, accent: en-us, pitch: 50, rate_wpm: 175}} # pitch 0-99
prompts: # 3 paraphrases, each with every fact, 35 to 80 words, spoken to the model
  - "{mark}: You are NAME, a {agent_role} {place}. ..."
  - "{mark}: the same facts in another order and other words"
  - "{mark}: once more"
"""


# -- new


def new(persona_id: str, kind: str, domain: str | None, folder: Path | None) -> None:
    place = load_domain(find_path(domain or f"data/domains/{COFFEE}.yaml"))
    target = target_file(persona_id, kind, place, folder, ".yaml")
    text = SKELETON.format(
        id=persona_id, mark=PLACEHOLDER, path=target, domain=place.id, type=kind,
        types=", ".join(place.types), language=place.language, user_role=place.user_role,
        agent_role=place.agent_role, place=place.place,
    )  # fmt: skip
    write_atomic(target, text.encode())
    print(f'{target}: fill in each "{PLACEHOLDER}", then `duplex personas check {target}`')


def target_file(
    persona_id: str, kind: str, domain: Domain, folder: Path | None, suffix: str
) -> Path:
    """Where a new persona goes.

    Raises:
        RequestError: the id is no id, the domain has no such type, or the file is there.
    """
    try:
        Record(id=persona_id)
    except ValueError:
        raise RequestError(
            "ID must be lower-case letters, digits, hyphens, dots and underscores, up to 96, as in "
            f"angry-marcus; found {persona_id!r}"
        ) from None
    if kind not in domain.types:
        raise RequestError(
            f"--type must be one of {', '.join(domain.types)} ({domain.id}), found {kind}. A new "
            "type is a line under `types` in the domain's file"
        )
    default = "data/personas" if domain.id == COFFEE else f"data/{domain.id}/personas"
    place = folder or find_path(default)
    for taken in (place / f"{persona_id}.yaml", place / f"{persona_id}{DRAFT_SUFFIX}"):
        if taken.exists():
            raise RequestError(f"{taken} is there already and is never overwritten: choose an ID")
    return place / f"{persona_id}{suffix}"


# -- check


@dataclass
class Review:
    """All that was read and found; records by their file's path."""

    domain: Domain
    personas: dict[Path, Persona]
    scenarios: dict[Path, Scenario]
    findings: list[Finding]
    frames: dict[Path, list[int]]
    writers: dict[Path, str]

    @property
    def failed(self) -> bool:
        return rules.worst(self.findings)


def check(paths: list[Path], domain: str | None, scenarios: Path | None, *, as_json: bool) -> None:
    review = review_files(paths or [find_path("data/personas")], domain, scenarios)
    if as_json:
        show_json(_as_json(review))
    else:
        _show(review)
    if review.failed:
        sys.exit(EXIT_WORK_FAILED)


def review_files(
    paths: Sequence[Path], domain: str | None = None, scenarios: Path | None = None
) -> Review:
    """Read and review persona and scenario files, drafts too.

    Args:
        paths: files, or folders of them; a file with an `arc` is a scenario.
        domain: its file; None: `data/domains/ID.yaml` of the id that most of the files name.
        scenarios: a folder; None: the folder `scenarios` beside a folder of personas.

    Raises:
        RequestError: a path is not there, or there is nothing to read; the domain is unreadable.
    """
    values, findings = _read_all([*paths, *_scenario_folders(paths, scenarios)])
    if not values:
        raise RequestError(f"{', '.join(map(str, paths))}: must hold *.yaml files, found none")
    place = load_domain(find_path(domain or _domain_of(values)))
    personas: dict[Path, Persona] = {}
    situations: dict[Path, Scenario] = {}
    for path, value in values.items():
        try:
            if isinstance(value, dict) and "arc" in value:
                situations[path] = read_record(path, Scenario)
            else:
                personas[path] = read_record(path, Persona)
        except DataFileError as error:
            findings.append(Finding("fault", str(path), str(error).removeprefix(f"{path}: ")))
    for fault in domain_faults(place, personas, situations):
        about, _, message = fault.partition(": ")
        findings.append(Finding("fault", about, message))
    frames = {path: prompt_frames(persona) for path, persona in personas.items()}
    for path, persona in personas.items():
        findings += rules.review_persona(persona, place, str(path), frames[path])
    for path, scenario in situations.items():
        findings += rules.review_scenario(scenario, str(path))
    findings += rules.review_set(_by_name(personas), _by_name(situations))
    if situations and any(path.is_dir() for path in paths):
        table = rules.coverage(place, personas.values(), situations.values())
        findings += rules.coverage_warnings(table)
    writers = dict(_writers(place, personas, situations))
    findings.sort(key=lambda finding: (finding.level, finding.about))
    return Review(place, personas, situations, findings, frames, writers)


def _by_name(records: dict[Path, Any]) -> dict[str, Any]:
    return {str(path): record for path, record in records.items()}


def _scenario_folders(paths: Sequence[Path], scenarios: Path | None) -> list[Path]:
    if scenarios is not None:
        return [scenarios]
    beside = [path.parent / "scenarios" for path in paths if path.is_dir()]
    return [folder for folder in beside if folder.is_dir() and folder not in paths]


def _read_all(paths: Iterable[Path]) -> tuple[dict[Path, Any], list[Finding]]:
    values: dict[Path, Any] = {}
    findings: list[Finding] = []
    for place in paths:
        if not place.exists():
            raise RequestError(f"{place}: must be a file or a folder, found nothing there")
        for path in sorted(place.glob("*.yaml")) if place.is_dir() else [place]:
            try:
                values[path] = read_yaml(path)
            except DataFileError as error:
                findings.append(Finding("fault", str(path), str(error).removeprefix(f"{path}: ")))
    return values, findings


def _domain_of(values: dict[Path, Any]) -> str:
    named = Counter(
        str(value.get("domain", COFFEE)) for value in values.values() if isinstance(value, dict)
    )
    return f"data/domains/{named.most_common(1)[0][0] if named else COFFEE}.yaml"


def prompt_frames(persona: Persona) -> list[int]:
    """Frames that each prompt takes: one a piece of the pocket tokenizer, and the silence.

    Its 600 pieces are half words: 2.3 a word in the coffee shop, 3.0 elsewhere (measured on the
    shipped personas). A 7B model's 32,000 pieces are longer, so it needs fewer frames.
    """
    tokenizer = _pocket_tokenizer()
    return [
        len(tokenizer.encode(f"{SYSTEM_TAG} {prompt} {SYSTEM_TAG}")) + 2 * PROMPT_SILENCE_FRAMES
        for prompt in persona.prompts
    ]


_tokenizers: list[Any] = []  # trained once: 0.1 s


def _pocket_tokenizer() -> Any:
    from sentencepiece import SentencePieceProcessor

    from pipeline.engines import pocket

    if not _tokenizers:
        model = pocket.tokenizer_bytes()
        _tokenizers.append(SentencePieceProcessor(model_proto=model))  # pyright: ignore[reportCallIssue]
    return _tokenizers[0]


def _writers(
    domain: Domain, personas: dict[Path, Persona], scenarios: dict[Path, Scenario]
) -> Iterator[tuple[Path, str]]:
    """Who can write for each file: the scripted writer, or why it takes an LLM."""
    if domain.id != COFFEE:
        for path in (*personas, *scenarios):
            yield path, f"LLM: the scripted writer knows the {COFFEE} domain only"
        return
    from pipeline.engines.scripted import ScriptedWriter
    from pipeline.engines.scripted_plan import split_arc

    writer = ScriptedWriter()
    for path, persona in personas.items():
        yield path, _or_reason(lambda persona=persona: writer.check([persona]))
    for path, scenario in scenarios.items():
        yield path, _or_reason(lambda scenario=scenario: split_arc(scenario, writer.grammar))


def _or_reason(attempt: Any) -> str:
    try:
        attempt()
    except DuplexError as error:
        return f"LLM: {str(error).splitlines()[-1].strip(' -')}"
    return "scripted"


# -- how a review is shown


def _as_json(review: Review) -> dict[str, Any]:
    personas, scenarios = review.personas, review.scenarios
    return {
        "ok": not review.failed,
        "domain": review.domain.id,
        "personas": [
            {"file": str(path), "id": p.id, "type": p.type, "draft": is_draft(path),
             "prompt_frames": review.frames[path], "writer": review.writers[path]}
            for path, p in personas.items()
        ],
        "scenarios": [
            {"file": str(path), "id": s.id, "kind": s.kind, "writer": review.writers[path]}
            for path, s in scenarios.items()
        ],
        "coverage": rules.coverage(review.domain, personas.values(), scenarios.values()),
        "findings": [asdict(finding) for finding in review.findings],
    }  # fmt: skip


def _show(review: Review) -> None:
    console = Console()
    table = Table("persona", "type", "facts", "words", "frames", "writer", box=None)
    for path, persona in review.personas.items():
        words = "/".join(str(len(prompt.split())) for prompt in persona.prompts)
        frames = "/".join(map(str, review.frames[path]))
        name = f"{persona.id} (draft)" if is_draft(path) else persona.id
        writer = review.writers[path].partition(":")[0]
        table.add_row(name, persona.type, str(len(persona.facts)), words, frames, writer)
    console.print(table)
    if review.scenarios:
        table = Table("scenario", "kind", "first", "beats", "cuts", "moods", "unanswerable",
                      "writer", box=None)  # fmt: skip
        for path, s in review.scenarios.items():
            row = (s.id, s.kind, s.first_speaker, len(s.arc), s.interruptions, len(s.moods),
                   len(s.unanswerable), review.writers[path].partition(":")[0])  # fmt: skip
            table.add_row(*map(str, row))
        console.print(table)
        used = rules.coverage(review.domain, review.personas.values(), review.scenarios.values())
        for part, counts in used.items():
            listed = ", ".join(f"{number} {name}" for name, number in counts.items())
            console.print(f"{part}: {listed}", markup=False, highlight=False, soft_wrap=True)
    for reason in sorted({why for why in review.writers.values() if why.startswith("LLM")}):
        console.print(f"needs an {reason}", markup=False, highlight=False, soft_wrap=True)
    for finding in review.findings:
        line = f"{finding.level}  {finding.about}: {finding.message}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    faults = sum(finding.level == "fault" for finding in review.findings)
    console.print(
        f"{len(review.personas)} personas, {len(review.scenarios)} scenarios of "
        f"{review.domain.id}: {faults} faults, {len(review.findings) - faults} warnings"
    )


# -- draft


def draft(
    persona_id: str,
    about: str,
    kind: str,
    config_path: Path | None,
    domain: str | None,
    folder: Path | None,
    *,
    runs: Path,
    again: bool,
) -> None:
    from pipeline.dialogues import DialoguesStage, check_key
    from pipeline.engines.llm.build import build_client_beside
    from pipeline.persona_draft import write_draft

    config = load_config(config_path or find_path("configs/coffee.yaml"))
    place = load_domain(find_path(domain or config.personas.domain))
    if folder is None and domain is None:
        folder = find_path(config.personas.folder)
    target = target_file(persona_id, kind, place, folder, DRAFT_SUFFIX)
    section = config.dialogues
    if not section.llm:
        raise RequestError(
            f"dialogues.llm must name a model to ask, found nothing in {config.name}. Choose a "
            "config with an LLM writer: --config configs/coffee.yaml"
        )
    check_key(config)
    run_folder = run_folder_of(config, runs)
    seed = record_seed(config.seed, "draft", persona_id)
    with RunLock(run_folder):
        client = build_client_beside(section, run_folder, DialoguesStage.number)
        try:
            fields = write_draft(
                persona_id, about, kind, place, client, model=section.llm,
                temperature=section.temperature, max_tokens=section.max_tokens,
                seed=secrets.randbits(31) if again else seed,
            )  # fmt: skip
        finally:
            client.close()
    validate(Persona, fields, target)
    final = target.name.replace(DRAFT_SUFFIX, ".yaml")
    head = (
        f"# draft by {section.llm}; nobody has read it yet. It was asked for as:\n"
        f"#   {' '.join(about.split())}\n"
        f"# Read it, mend it, run `duplex personas check {target}`, and then rename it to\n"
        f"# {final}: no run takes a *{DRAFT_SUFFIX}.\n"
    )
    body = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=98)
    write_atomic(target, (head + body).encode())
    print(f"{target}: read it, mend it, check it; rename it to {final} when it is right")
    if not client.replies:
        print("nothing was paid: it was asked for in these words before; --again asks anew")
