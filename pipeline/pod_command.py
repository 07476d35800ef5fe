"""`duplex pod`: what its commands do. Parsing is in `duplex/cli_pod.py`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from duplex.datafiles import find_path
from duplex.errors import DuplexError, PodError, RequestError
from duplex.files import sha256_file
from duplex.lock import RunLock
from pipeline.commands import show_json
from pipeline.pod_session import PodOptions, Session
from pipeline.pods.api import ApiTrouble
from pipeline.pods.book import PodEntry
from pipeline.pods.client import PodClient, PodStatus
from pipeline.pods.follow import Follower
from pipeline.pods.lifecycle import Goal, Rules
from pipeline.pods.sync import Synced, bring_home
from pipeline.run import run_folder_of
from pipeline.serve_command import item_urls


def up(session: Session, options: PodOptions) -> None:
    with RunLock(session.book.folder):
        entry = _bring_up(session, options, "answering")
    assert entry.id is not None
    client = session.connect(entry.id)
    client.close()
    if session.as_json:
        show_json(
            {"pod": entry.id, "server": client.server, "agent": client.agent} | session.bill()
        )
        return
    session.say(
        f"{entry.id} answers; `duplex pod status {session.config_path}` shows how far it is"
    )
    session.show_bill()


def run(session: Session, options: PodOptions) -> None:
    with RunLock(session.book.folder):
        entry = _bring_up(session, options, "finished")
        assert entry.id is not None
        client = session.connect(entry.id)
        try:
            with _says_what_runs(session):
                synced = _bring_home(session, client)
        finally:
            client.close()
    urls = item_urls(session.config, client.server)
    if session.as_json:
        show_json(
            {
                "pod": entry.id,
                "server": client.server,
                "urls": dict(urls),
                "sync": _sync_json(synced),
            }
            | session.bill()
        )
        return
    _show_synced(session, synced)
    session.say("")
    for name, url in urls:
        session.say(f"{name:<20} {url}")
    session.say(
        f"Each wants token=… in its query once, the one in {session.book.token_path}; the browser "
        "keeps it."
    )
    for line in session.left_running():
        session.say(line)
    session.show_bill()


def _bring_up(session: Session, options: PodOptions, goal: Goal) -> PodEntry:
    wish, gpus = session.wish(options), session.gpus(options)
    with _says_what_runs(session):
        _refuse_strays(session)
        session.show_estimate(gpus, options)
        session.confirm(options)
        rules = Rules(
            goal, options.budget_usd, deadline_s=options.ready_minutes * 60,
            keeps_data=wish.keeps_data, abandon_volume=options.abandon_volume,
        )  # fmt: skip
        follower = Follower(session.control, session.clock, session.connect, session.say)
        return follower.follow(wish, gpus, rules)


def _refuse_strays(session: Session) -> None:
    """Tell of pods under our name before another one is paid for."""
    for pod in session.control.reconcile().own:
        session.say(
            f"{pod.id} ({pod.name}, {pod.status}) is named as this config's and in no book here: "
            f"another machine's, or a lost one. `duplex pod down {session.config_path} --strays` "
            "deletes it."
        )


@contextmanager
def _says_what_runs(session: Session) -> Iterator[None]:
    """However it ends, nobody is left to think that nothing runs."""
    try:
        yield
    except (DuplexError, KeyboardInterrupt) as error:
        try:
            lines = session.left_running()
            if session.book.exists and not isinstance(error, RequestError):
                session.show_bill()
        except DuplexError as worse:
            lines = [str(worse)]
        for line in lines:
            print(line, file=sys.stderr, flush=True)
        raise


def status(session: Session) -> None:
    """
    Raises:
        ApiTrouble: what the book says has been shown; what runs is not known.
    """
    trouble, strays = None, None
    try:
        strays = session.control.reconcile()
    except ApiTrouble as error:
        trouble = error
    entry = session.book.read().current
    inside: PodStatus | None = None
    answers = ready = False
    if entry is not None and entry.runs and entry.id is not None:
        client = session.connect(entry.id)
        try:
            answers = client.agent_answers()
            if answers:
                inside, ready = client.status(), client.server_is_ready()
        except PodError as error:
            inside = PodStatus("unknown", message=str(error))
        finally:
            client.close()
    if session.as_json:
        show_json(
            session.bill()
            | {
                "answers": answers, "server_ready": ready,
                "inside": None if inside is None else asdict(inside),
                "strays": [asdict(pod) for pod in strays.own] if strays else None,
                "others": [asdict(pod) for pod in strays.others] if strays else None,
            }
        )  # fmt: skip
    else:
        session.show_bill()
        if entry is not None and entry.runs:
            session.say(f"model server: {'ready' if ready else 'not ready'}; "
                        f"pod: {'answers' if answers else 'does not answer'}")  # fmt: skip
        if inside is not None:
            _show_inside(session, inside)
        for kind, pods in (("of this config, in no book here", strays.own if strays else ()),
                           ("of another config", strays.others if strays else ())):  # fmt: skip
            for pod in pods:
                session.say(f"also there: {pod.id} {pod.name} {pod.status} ({kind})")
        for line in session.left_running():
            session.say(line)
    if trouble is not None:
        raise trouble


def _show_inside(session: Session, inside: PodStatus) -> None:
    session.say(f"pipeline: {inside.pipeline} {inside.message}".rstrip())
    for name, state, message in inside.stages:
        session.say(f"  {name:<10} {state:<8} {message}".rstrip())
    path = find_path(str(session.config_path))
    if inside.config_sha256 is not None and inside.config_sha256 != sha256_file(path):
        session.say(f"the pod's config is not {path}: its image was built with another one")


def logs(session: Session, tail: int) -> None:
    with session.running_pod() as (_, client):
        text = client.logs(tail)
    if session.as_json:
        show_json({"log": text.splitlines()})
    else:
        print(text)


def sync(session: Session) -> None:
    with session.running_pod() as (_, client):
        synced = _bring_home(session, client)
    if session.as_json:
        show_json(_sync_json(synced))
    else:
        _show_synced(session, synced)


def _bring_home(session: Session, client: PodClient) -> Synced:
    folder = run_folder_of(session.config, session.runs)
    with RunLock(folder):
        before = session.book.read().fetched
        synced = bring_home(client, folder, session.clock, session.say, before)
        session.book.change(
            lambda state: state.model_copy(
                update={"fetched": tuple(sorted({*state.fetched, *synced.folders}))}
            )
        )
    return synced


def _sync_json(synced: Synced) -> dict[str, Any]:
    return asdict(synced)


def _show_synced(session: Session, synced: Synced) -> None:
    folder = run_folder_of(session.config, session.runs)
    session.say(
        f"{len(synced.fetched)} files fetched ({synced.num_bytes / 1e6:.1f} MB), "
        f"{len(synced.kept)} were there, in {folder}"
    )
    if synced.left_alone:
        folders = sorted({name.partition("/")[0] for name in synced.left_alone})
        session.say(f"left alone, since made here: {', '.join(folders)}")
    if synced.refused:
        session.say(f"{synced.refused} entries of the pod's list were refused: not on ours")


def down(session: Session, *, delete: bool, strays: bool) -> None:
    with _says_what_runs(session):
        done = session.control.down(delete=delete, strays=strays)
        bill = session.bill()
    if session.as_json:
        show_json({"done": done} | bill)
        return
    for line in done or ["no pod of this config is there"]:
        session.say(line)
    session.show_bill()
