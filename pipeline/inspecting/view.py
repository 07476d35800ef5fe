"""An inspection as tables for people. Names and texts come from files: they are shown as text,
never as markup or terminal codes."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from duplex.findings import FINDINGS, Finding
from duplex.frames import frames_to_seconds
from duplex.inspection import Measures
from duplex.judgement import Inspection
from pipeline.inspecting.folders import FolderReport

COLOURS = {"harm": "bold red", "warn": "yellow", "note": "cyan"}
WORST = 12  # files listed by name
LISTED = 12


def printable(text: str) -> str:
    """Without what a terminal would act on."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def show_inspection(inspection: Inspection, console: Console) -> None:
    _line(console, printable(inspection.name), "bold")
    m = inspection.measures
    if m is not None:
        seconds = frames_to_seconds(m.num_frames)
        record = f", record {inspection.record_id}" if inspection.record_id else ", no record"
        _line(console, f"[17, {m.num_frames}] {inspection.dtype}, {seconds:.1f} s{record}")
        evidence = "; ".join(inspection.profile.evidence)
        _line(console, f"looks like {inspection.profile.name}: {printable(evidence)}")
        _line(console, f"frame 0 of the prompt: {m.frame_0}; silence and sine: {m.steady.source}")
        if m.prompt and m.prompt.decoded:
            _line(console, f"system text: {printable(m.prompt.decoded)[:300]}")
        _phases(m, console)
        _turns(m, console)
        if inspection.loudness_lufs:
            levels = (
                f"{name} {'no sound' if level is None else f'{level:.1f} LUFS'}"
                for name, level in inspection.loudness_lufs.items()
            )
            _line(console, f"loudness: {', '.join(levels)}")
    show_findings(inspection.findings, console)
    _verdict(console, inspection.harm, len(inspection.findings))


def show_findings(findings: tuple[Finding, ...], console: Console) -> None:
    for found in findings:
        _finding(console, found.severity, found.code, found.message)


def show_folder(report: FolderReport, console: Console) -> None:
    summary = report.summary()
    _line(console, f"{printable(report.path)} ({report.kind})", "bold")
    known = [f.measures.dropped_tokens for f in report.files if f.measures]
    dropped = "unknown how many" if known and None in known else summary["dropped_tokens"]
    _line(
        console,
        f"{summary['files']} files, {summary['seconds'] / 3600:.2f} h, "
        f"{summary['text_tokens']} text tokens, {dropped} dropped, "
        f"{summary['late_tokens']} late",
    )
    for title, counts in (("looks like", summary["profiles"]), ("split", summary["splits"])):
        if counts:
            listing = ", ".join(f"{name} {count}" for name, count in counts.items())
            _line(console, f"{title}: {listing}")
    show_findings(report.findings, console)
    for row in summary["findings"]:
        kind, share = FINDINGS[row["code"]], f"{row['files']} of {summary['files']} files"
        first = next(m for f in report.files for m in f.findings if m.code == row["code"]).message
        found = first.removeprefix(f"must hold: {kind.must}; ").partition(". Do: ")[0]
        text = f"in {share}, first: {found}. Must hold: {kind.must}. Do: {kind.remedy}."
        _finding(console, row["severity"], row["code"], text)
    harmed = [file for file in report.files if file.harm]
    for file in harmed[:WORST]:
        codes = ", ".join(found.code for found in file.findings if found.severity == "harm")
        _line(console, f"  {printable(file.name)}: {codes}")
    if len(harmed) > WORST:
        _line(console, f"  and {len(harmed) - WORST} more; --json lists all")
    for file in report.files[:LISTED] if report.kind == "tensors stage" else ():
        _line(console, f"  {printable(file.record_id or '')}  {printable(file.file)}", "dim")
    if report.kind == "tensors stage" and len(report.files) > LISTED:
        _line(console, f"  and {len(report.files) - LISTED} more files; --json lists all", "dim")
    found = len(summary["findings"]) + len(report.findings)
    _verdict(console, report.harm, found)


def _phases(m: Measures, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column(f"phase ({m.phases_from})")
    for name in ("frames", "length", "tokens", "PAD", "EPAD", "-1"):
        table.add_column(name, justify="right")
    for phase in m.phases:
        counts = (phase.words, phase.pad, phase.epad, phase.zero)
        table.add_row(
            Text(phase.label),
            f"{phase.start}-{phase.end}",
            f"{phase.num_frames}",
            *(f"{count / max(phase.num_frames, 1):.0%}" if count else "" for count in counts),
        )
    console.print(table)


def _turns(m: Measures, console: Console) -> None:
    agent = [turn for turn in m.turns if turn.role == "agent"]
    if not m.turns:
        _line(console, "turns: none found")
        return
    users = len(m.turns) - len(agent)
    _line(console, f"turns ({m.turns_from}): {len(agent)} of the agent, {users} of the user")
    if m.onset_shares:
        first, second = m.onset_shares
        _line(
            console,
            f"onset: {first:.0%} of the tokens in the first 30 % of their turns, "
            f"{second:.0%} in the first 40 %",
        )
    lost = "" if m.dropped_tokens is None else f", {m.dropped_tokens} dropped"
    late = "" if m.late_tokens is None else f", {m.late_tokens} late"
    _line(console, f"tokens in the dialogue: {m.text_tokens}{lost}{late}")


def _finding(console: Console, severity: str, code: str, message: str) -> None:
    line = Text(f"{severity:<5}", style=COLOURS[severity])
    line.append(f"{code}: ", style="bold")
    line.append(printable(message), style="default")
    console.print(line, soft_wrap=True)


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=style), soft_wrap=True)


def _verdict(console: Console, harm: bool, findings: int) -> None:
    if harm:
        _line(console, "Verdict: this would harm training.", COLOURS["harm"])
    else:
        rest = "nothing found" if not findings else "the findings above are not harmful"
        _line(console, f"Verdict: fit for training; {rest}.", "bold green")
