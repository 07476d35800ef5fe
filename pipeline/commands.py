"""What the commands do, and how they show it. `duplex/cli.py` parses and calls these."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from duplex.config import Config
from duplex.configfile import load_config
from duplex.errors import (
    EXIT_WORK_FAILED,
    MissingInputError,
    RequestError,
    StageFailedError,
)
from pipeline import run as pipeline_run
from pipeline.run import STAGE_NAMES, Selection, plan, planned_cost, run_folder_of
from pipeline.runners import check_runner
from pipeline.serve_command import persona_urls

if TYPE_CHECKING:
    from pipeline.evaluate_targets import EvaluateOptions

STATE_COLOURS = {
    "done": "green", "stale": "yellow", "running": "cyan", "failed": "red", "missing": "dim",
    "ok": "green", "warn": "yellow", "fail": "red",
}  # fmt: skip


def show_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, default=str))


def run(
    config: Config,
    config_path: Path,
    runs: Path,
    overrides: list[str],
    *,
    first: str | None,
    last: str | None,
    only: str | None,
    skip: str,
    runner: str,
    retry_rejected: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    check_runner(runner)
    skipped = tuple(name.strip() for name in skip.split(",") if name.strip())
    selection = Selection.of(first, last, only, skipped)
    if dry_run:
        pipeline_run.check_request(config)
        show_plan(config, runs, selection, as_json=as_json)
        return
    stream = sys.stderr if as_json else sys.stdout

    def report(line: str) -> None:
        print(line, file=stream, flush=True)

    pipeline_run.run(
        config, config_path, runs, selection,
        overrides=overrides, retry_rejected=retry_rejected, runner=runner, report=report,
    )  # fmt: skip
    if as_json:
        status(config, runs, as_json=True)
    else:
        show_end(config, config_path, runs, overrides)


def show_plan(config: Config, runs: Path, selection: Selection, *, as_json: bool) -> None:
    rows = []
    absent: set[str] = set()
    for step in plan(config, runs):
        needed = absent & set(step.stage.reads)
        if step.done:
            action = "keep"
        elif step.stage.name not in selection.names:
            action = "leave out"
            absent.add(step.stage.name)
        elif needed:
            raise MissingInputError(
                f"{step.stage.name} reads the output of {', '.join(sorted(needed))}, which is left "
                f"out and not complete in {run_folder_of(config, runs)}."
            )
        else:
            action = "run"
        rows.append({"name": step.stage.name, "action": action,
                     "folder": step.folder.path.name if step.folder else None})  # fmt: skip
    if as_json:
        show_json({"stages": rows})
        return
    table = Table(box=None)
    for column in ("stage", "action", "folder"):
        table.add_column(column)
    for row in rows:
        table.add_row(row["name"], row["action"], row["folder"] or "(known when its inputs are)")
    Console().print(table)
    print(planned_cost(config, runs, selection))


def show_end(config: Config, config_path: Path, runs: Path, overrides: list[str]) -> None:
    """After a whole run: the report, how to serve, and a URL for each persona."""
    steps = {step.stage.name: step for step in plan(config, runs)}
    evaluated, personas = steps["evaluate"], steps["personas"]
    if not evaluated.done or evaluated.folder is None:
        return
    print(f"\nReport:  {evaluated.folder.path / 'report.html'}")
    elsewhere = f" --runs {shlex.quote(str(runs))}" if runs != Path("runs") else ""
    settings = "".join(f" --set {shlex.quote(override)}" for override in overrides)
    print(f"Serve:   duplex serve {config_path}{elsewhere}{settings}")
    if personas.folder is not None:
        host, port = config.serve.runtime.host, config.serve.runtime.port
        for name, url in persona_urls(config, runs, f"http://{host}:{port}"):
            print(f"  {name:<20} {url}")


def status(config: Config, runs: Path, *, as_json: bool) -> None:
    from pipeline.status import stage_rows

    rows = stage_rows(config, runs)
    if as_json:
        show_json({"run": str(run_folder_of(config, runs)), "stages": rows})
        return
    table = Table(box=None, title=str(run_folder_of(config, runs)), title_justify="left")
    for column in ("", "stage", "state", "counts", "seconds", "folder"):
        table.add_column(column, overflow="fold")
    for row in rows:
        counts = ", ".join(f"{number} {name}" for name, number in row["counts"].items())
        state = f"[{STATE_COLOURS[row['state']]}]{row['state']}[/]"
        state += " (imported)" if row.get("imported") else ""
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        folder = Path(row["folder"]).name if row["folder"] else ""
        table.add_row(str(row["number"]), row["name"], state, counts, seconds, folder)
    console = Console()
    console.print(table)
    for row in rows:
        if row["message"]:
            console.print(f"{row['name']}: {row['message']}", markup=False)


def doctor(config: Config, runs: Path, *, as_json: bool) -> None:
    from pipeline.doctor import examine

    checks = examine(config, runs)
    failed = [check for check in checks if check["state"] == "fail"]
    if as_json:
        show_json({"ok": not failed, "checks": checks})
    else:
        table = Table(box=None)
        for column in ("check", "state", "found"):
            table.add_column(column, overflow="fold")
        for check in checks:
            colour = STATE_COLOURS[check["state"]]
            table.add_row(check["check"], f"[{colour}]{check['state']}[/]", check["found"])
        Console().print(table)
    if failed:
        sys.exit(EXIT_WORK_FAILED)


def import_(
    config: Config,
    runs: Path,
    stage: str,
    path: Path | None,
    *,
    forget: bool,
    recording: dict[str, str | None],
    as_json: bool,
) -> None:
    from pipeline.imports import forget_import, import_stage
    from pipeline.recordings import RecordingOptions

    if forget:
        gone = forget_import(config, runs, stage)
        print(f"{stage}: " + ("the import is forgotten" if gone else "nothing was imported"))
        return
    if path is None:
        raise RequestError("PATH must be given: the file or folder to import")
    given = {name: value for name, value in recording.items() if value is not None}
    options = RecordingOptions(**given) if given else None
    folder, imported = import_stage(
        config, runs, stage, path, recording=options,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    if as_json:
        show_json({"folder": str(folder), "records": len(imported.records),
                   "refused": dict(imported.refused), "notes": imported.notes})  # fmt: skip
        return
    print(f"{stage}: {len(imported.records)} records imported, {len(imported.refused)} refused")
    for name, why in imported.refused[:10]:
        print(f"  refused {name}: {why}")
    for note in imported.notes[:10]:
        print(f"  {note}")
    print(f"in {folder}; `duplex run` uses it from now on")


def probe(
    url: str, checkpoint: Path | None, token: str | None, timeout_s: float, *, as_json: bool
) -> None:
    from dataclasses import asdict

    from pipeline.engines.checkpoint import Checkpoint
    from pipeline.serving.probe import probe_sync
    from pipeline.serving.wire import query_pairs

    if not url.startswith(("http://", "https://", "ws://", "wss://")):
        raise RequestError(
            f"a server's URL must begin with http://, https://, ws:// or wss://, found {url[:80]}"
        )
    if not any(key == "text_prompt" and value for key, value in query_pairs(url)):
        raise RequestError(
            "the URL must hold the text_prompt that is to be proven, found none: "
            "http://host:port/?text_prompt=… (percent-encoded)"
        )
    tokenizer = None
    if checkpoint is not None:
        tokenizer = Checkpoint.open(checkpoint).files()["tokenizer"].read_bytes()
    result = probe_sync(url, tokenizer=tokenizer, token=token, timeout_s=timeout_s)
    if as_json:
        show_json(asdict(result))
    else:
        for key, value in asdict(result).items():
            if value is None or value == ():
                continue
            for line in value if isinstance(value, tuple) else (value,):
                print(f"{key:>16}: {line}")
    if not result.proven:
        sys.exit(EXIT_WORK_FAILED)


def evaluate(targets: list[str], options: EvaluateOptions, runs: Path, *, as_json: bool) -> None:
    """Exits with 1 where a verdict is one of `options.fail_on`."""
    from pipeline import evaluate_targets

    if len(targets) == 1 and targets[0].endswith((".yaml", ".yml")):
        found = _evaluate_config(Path(targets[0]), options, runs, as_json=as_json)
    elif all(evaluate_targets.is_report(target) for target in targets):
        found = evaluate_targets.compare_reports(targets, options)
        if not as_json:
            evaluate_targets.show_verdicts(found["verdicts"])
    else:
        found = evaluate_targets.evaluate_to_folder(targets, options)
        if not as_json:
            evaluate_targets.show_verdicts(found["verdicts"])
            print(f"Report:  {found['report']}")
    if as_json and found["verdicts"] is not None:
        show_json(found)
    if found["failed"]:
        for line in found["failed"]:
            print(f"--fail-on: {line}", file=sys.stderr)
        sys.exit(EXIT_WORK_FAILED)


def _evaluate_config(
    path: Path, options: EvaluateOptions, runs: Path, *, as_json: bool
) -> dict[str, Any]:
    """Stage 9 of a config; `verdicts` is None: what is shown is the run's."""
    from pipeline.evaluate_targets import EvaluateOptions
    from pipeline.evaluation.verdicts import check_conditions, failures

    if options.against not in (None, "base"):
        raise RequestError(
            "a config is evaluated --against base, found --against " + options.against
        )
    plain = EvaluateOptions(
        against=options.against, fail_on=options.fail_on, overrides=options.overrides
    )
    if options != plain:
        raise RequestError(
            "only --against base and --fail-on go with a config, whose evaluate section says the "
            "rest: --set evaluate.items=…, evaluate.seeds=…, evaluate.prompts=weak. "
            "`duplex grades` shows people's grades"
        )
    check_conditions(options.fail_on, num_models=2)  # before hours of work
    overrides = list(options.overrides)
    config = load_config(path, overrides)
    run(
        config, path, runs, overrides, first="evaluate", last=None, only=None, skip="",
        runner="local", retry_rejected=False, dry_run=False, as_json=as_json,
    )  # fmt: skip
    folder = plan(config, runs)[STAGE_NAMES.index("evaluate")].folder
    assert folder is not None  # it has just been run
    report = json.loads((folder.path / "report.json").read_text(encoding="utf-8"))
    return {"verdicts": None, "failed": failures(report["verdicts"], options.fail_on)}


def clean(config: Config, runs: Path, *, dry_run: bool, yes: bool, as_json: bool) -> None:
    from pipeline.clean import plan_removals, remove

    removals = plan_removals(config, runs)
    total = sum(removal.num_bytes for removal in removals)
    if as_json:
        folders = [{"path": r.path, "bytes": r.num_bytes} for r in removals]
        show_json({"remove": not dry_run and yes, "bytes": total, "folders": folders})
    else:
        for removal in removals:
            print(f"{removal.num_bytes / 1e6:10.1f} MB  {removal.path}")
        print(f"{total / 1e6:10.1f} MB in {len(removals)} folders that this config does not need")
    if dry_run or not removals:
        return
    if not yes:
        if as_json or not sys.stdin.isatty():
            raise RequestError("nothing was removed: say --yes to remove without being asked")
        if input("Remove them? [y/N] ").strip().lower() != "y":
            raise StageFailedError("nothing was removed: the answer was not y")
    remove(removals, config, runs)
    if not as_json:
        print("removed")
