"""`duplex push` and `duplex pull`: data sets and adapters on the Hugging Face hub.

What goes up and down is in `pipeline/hubs/`; here is what the commands do and show.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import get_args

from duplex.config import Config
from duplex.configfile import load_config
from duplex.errors import RequestError
from duplex.files import require_free
from pipeline.commands import show_json
from pipeline.converters.common import is_config
from pipeline.hubs.bundle import Bundle, What, make_bundle
from pipeline.hubs.index import CARD, DATA_STAGES
from pipeline.run import plan, run_folder_of

SHOWN = 8  # files of a folder that a dry run names


def push(
    config_path: Path,
    repo: str,
    what: str,
    *,
    public: bool,
    view: bool,
    consent: str | None,
    dry_run: bool,
    runs: Path,
    overrides: list[str],
    as_json: bool,
) -> None:
    from pipeline.hubs.client import Hub, check_repo

    check_repo(repo)
    chosen = _what(what)
    config = load_config(config_path, overrides)
    hub = None if dry_run else Hub(repo, _repo_type(chosen), must_write=True)
    with make_bundle(
        config, config_path, runs, chosen,
        view=view, consent=consent, overrides=overrides, repo=repo,
    ) as bundle:  # fmt: skip
        if chosen == "data" and (absent := _unfinished(config, runs)):
            _say(f"left out, since not finished under this config: {', '.join(absent)}")
        if hub is None:
            _show_dry(bundle, repo, public=public, as_json=as_json)
            return
        address = hub.push(bundle, public=public, report=_say)
        summary = {"repo": repo, "url": address, "public": public, "files": len(bundle.files),
                   "bytes": bundle.num_bytes}  # fmt: skip
    if as_json:
        show_json(summary)
    else:
        print(f"{address}: {summary['files']} files, {summary['bytes'] / 1e6:.1f} MB, "
              f"{'public' if public else 'private'}")  # fmt: skip


def pull(
    repo: str,
    target: Path,
    what: str | None,
    *,
    revision: str | None,
    runs: Path,
    overrides: list[str],
    as_json: bool,
) -> None:
    from pipeline.hubs.client import Hub
    from pipeline.hubs.restore import restore_adapter, restore_stages

    into_run = is_config(target)
    if target.suffix in (".yaml", ".yml") and not into_run:
        raise RequestError(f"{target}: the config must exist, found nothing there")
    chosen = _what(what or ("data" if into_run else "adapter"))
    if chosen == "data" and not into_run:
        raise RequestError(
            "data is pulled into the run of a config: name one (*.yaml), not a folder"
        )
    if not into_run:
        require_free(target)
    hub = Hub(repo, _repo_type(chosen), must_write=False)
    if into_run:
        config = load_config(target, overrides)
        cache = run_folder_of(config, runs) / "hub" / repo.replace("/", "--")
        index, folder, commit = hub.pull(chosen, revision, cache, _say)
        rows = restore_stages(config, runs, index, folder, f"{repo}@{commit}")
        shutil.rmtree(cache)  # its blobs are linked; an unfinished pull is kept, and gone on from
        if as_json:
            show_json({"repo": repo, "commit": commit, "stages": [vars(row) for row in rows]})
            return
        for row in rows:
            print(f"{row.stage}: {row.how} in {row.folder}, digest {row.digest[:12]}")
        print(
            "`duplex run` goes on from here; with `duplex import CONFIG --stage S --forget` a stage"
        )
        print("that was put in place does its own work again")
        return
    cache = target.resolve().parent / f".{target.name}.pull"
    index, folder, commit = hub.pull(chosen, revision, cache, _say)
    restore_adapter(index, folder, target)
    shutil.rmtree(cache)
    if as_json:
        show_json({"repo": repo, "commit": commit, "out": str(target), "base": index.base})
    else:
        print(f"{target}: an adapter of {index.base}, for `duplex merge {index.base} {target} OUT`")


def _what(what: str) -> What:
    for known in get_args(What):
        if what == known:
            return known
    raise RequestError(f"--what must be data or adapter, found {what}")


def _repo_type(what: What) -> str:
    return "dataset" if what == "data" else "model"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _unfinished(config: Config, runs: Path) -> list[str]:
    return [
        step.stage.name
        for step in plan(config, runs)
        if step.stage.name in DATA_STAGES and not step.done
    ]


def _show_dry(bundle: Bundle, repo: str, *, public: bool, as_json: bool) -> None:
    names = sorted(bundle.files)
    if as_json:
        show_json({
            "repo": repo, "type": bundle.repo_type, "public": public, "bytes": bundle.num_bytes,
            "files": [{"path": name, "bytes": bundle.size(name)} for name in names],
            "card": bundle.card,
        })  # fmt: skip
        return
    folders: dict[str, list[str]] = {}
    for name in names:
        folders.setdefault(name.partition("/")[0] if "/" in name else ".", []).append(name)
    for folder, inside in folders.items():
        size = sum(map(bundle.size, inside))
        print(f"{size / 1e6:10.2f} MB  {folder}: {len(inside)} files")
        for name in inside[:SHOWN] if folder == "." else ():
            print(f"{bundle.size(name) / 1e6:10.2f} MB    {name}")
    print(f"{bundle.num_bytes / 1e6:10.2f} MB  would go to {repo} ({bundle.repo_type}, "
          f"{'public' if public else 'private'}); nothing was sent\n\n--- {CARD}")  # fmt: skip
    print(bundle.card)
