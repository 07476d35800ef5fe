"""Files to the hub and back, by the `huggingface_hub` client. Both ways go on where they stopped.

Up: what the repository has already is not sent again, file by file, and what was sent in a commit
that did not come about is not either (the hub keeps it by its sha256). Files go up in commits of
at most `COMMIT_FILES`; the last commit brings card, index and records, and takes away what an
earlier push left. Down: names and sizes are checked before anything is asked for.

The token is HF_TOKEN alone, and in no message.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from duplex.errors import CorruptFileError, DuplexError, RequestError, TransientError
from duplex.files import file_chunks, sha256_bytes, sha256_file
from pipeline.hubs.bundle import Bundle
from pipeline.hubs.index import (
    BLOB,
    INDEX,
    MAX_INDEX_BYTES,
    VIEW,
    HubFile,
    HubIndex,
    is_ours,
    read_index,
)

Result = TypeVar("Result")
COMMIT_FILES, COMMIT_BYTES = 200, 1 << 30
ATTEMPTS, FIRST_WAIT_S = 4, 1.0  # the client has retries of its own below
DOWNLOADS = 8  # at once
MAX_DETAIL = 300
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def check_repo(repo: str) -> None:
    if not _REPO.fullmatch(repo) or ".." in repo or repo.endswith(".git"):
        raise RequestError(f"a repository must read owner/name, found {repo!r}")


class Hub:
    """One repository of one type."""

    def __init__(self, repo: str, repo_type: str, *, must_write: bool):
        """
        Raises:
            RequestError: the name is none, or a push has no token, or the client is offline.
        """
        check_repo(repo)
        self._token = os.environ.get("HF_TOKEN", "").strip()
        if must_write and not self._token:
            raise RequestError(
                "HF_TOKEN must hold a token that may write, found nothing. Make one at "
                "https://huggingface.co/settings/tokens and export it"
            )
        from huggingface_hub import HfApi, constants
        from huggingface_hub.utils.tqdm import disable_progress_bars

        if constants.HF_HUB_OFFLINE:
            raise RequestError("HF_HUB_OFFLINE is set: unset it to reach the hub")
        if not sys.stderr.isatty():
            disable_progress_bars()
        self._repo, self._type = repo, repo_type
        # False: never a token from a file that `huggingface-cli login` left.
        self._api = HfApi(
            endpoint=os.environ.get("HF_ENDPOINT") or None,  # as it is now, not at import
            token=self._token or False,
            library_name="duplex-workbench",
        )

    # -- up

    def push(self, bundle: Bundle, *, public: bool, report: Callable[[str], None]) -> str:
        """Bring the repository to what the bundle is; returns its address.

        Raises:
            RequestError: no such owner, no right to write, or a public repository unasked.
            TransientError: the hub did not answer; say it again to go on.
        """
        self._create(public)
        there = {file.path: file for file in self._tree(None)}
        sent = [name for name in sorted(bundle.files) if not _is_there(name, bundle, there)]
        stale = [path for path in sorted(there) if is_ours(path) and path not in bundle.files]
        large = [name for name in sent if BLOB.fullmatch(name) or VIEW.fullmatch(name)]
        last = [name for name in sent if name not in large]
        report(f"{len(bundle.files) - len(sent)} of {len(bundle.files)} files are there already")
        done = 0
        for chunk in _chunks(large, bundle):
            self._commit(bundle, chunk, [], f"{len(chunk)} files")
            done += len(chunk)
            report(f"{done} of {len(sent)} files sent")
        if last or stale:
            self._commit(bundle, last, stale, f"{bundle.what} of {bundle.index.name}")
            report(f"{len(sent)} of {len(sent)} files sent, {len(stale)} old ones removed")
        kind = "datasets/" if self._type == "dataset" else ""
        return f"{self._api.endpoint}/{kind}{self._repo}"

    def _create(self, public: bool) -> None:
        def create() -> bool:
            self._api.create_repo(
                self._repo, repo_type=self._type, private=not public, exist_ok=True
            )
            info = self._api.repo_info(self._repo, repo_type=self._type)
            return bool(info.private)

        if not self._asking(create) and not public:
            raise RequestError(
                f"{self._repo} must be private, or --public be given: it is there already, and "
                "everybody can read it. Nothing was pushed"
            )

    def _commit(self, bundle: Bundle, names: list[str], stale: list[str], message: str) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        def commit() -> None:
            operations: list[Any] = [
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=bundle.files[name])
                for name in names
            ]
            operations += [CommitOperationDelete(path_in_repo=path) for path in stale]
            self._api.create_commit(
                self._repo, operations, commit_message=message, repo_type=self._type
            )

        self._asking(commit)

    # -- down

    def pull(
        self, kind: str, revision: str | None, into: Path, report: Callable[[str], None]
    ) -> tuple[HubIndex, Path, str]:
        """The index, the folder with its files in `into`, each as the index says, and the commit.

        Raises:
            RequestError: there is no such repository or revision, or it is no push of ours.
            CorruptFileError: a name, a size or a digest is not what it must be.
            TransientError: the hub did not answer; say it again to go on.
        """
        info = self._asking(
            lambda: self._api.repo_info(self._repo, repo_type=self._type, revision=revision)
        )
        commit = str(info.sha)
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise CorruptFileError(
                f"{self._repo}: a commit must be 40 digits, found {commit!r:.60}"
            )
        sizes = {file.path: int(file.size) for file in self._tree(commit)}
        _check_names(sizes)
        if INDEX not in sizes:
            raise RequestError(
                f"{self._repo} must hold {INDEX}, found none: it is no push of ours, or one that "
                "was not finished"
            )
        if sizes[INDEX] > MAX_INDEX_BYTES:
            raise CorruptFileError(f"{INDEX} must have at most {MAX_INDEX_BYTES >> 20} MiB")
        folder = into / commit
        index = read_index(self._download(INDEX, commit, folder))
        if index.kind != kind:
            raise RequestError(f"{self._repo} must hold {kind}, found {index.kind}")
        for file in index.files:
            if sizes.get(file.path) != file.bytes:
                raise CorruptFileError(
                    f"{self._repo}: {file.path} must have {file.bytes} bytes, found "
                    f"{sizes.get(file.path, 'nothing')}. Nothing of it was used"
                )
        _check_room(index, into)
        report(f"{len(index.files)} files, {sum(f.bytes for f in index.files) / 1e6:.1f} MB")
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            list(pool.map(lambda file: self._fetch(file, commit, folder), index.files))
        return index, folder, commit

    def _fetch(self, file: HubFile, commit: str, folder: Path) -> None:
        path = self._download(file.path, commit, folder)
        if path.stat().st_size != file.bytes or sha256_file(path) != file.sha256:
            path.unlink()
            raise CorruptFileError(
                f"{self._repo}: {file.path} must have sha256 {file.sha256[:12]}…, found another: "
                "it was changed after the push. Nothing of it was used"
            )

    def _download(self, name: str, commit: str, folder: Path) -> Path:
        def download() -> str:
            return self._api.hf_hub_download(
                self._repo, name, repo_type=self._type, revision=commit, local_dir=folder
            )

        return Path(self._asking(download))

    # -- both

    def _tree(self, revision: str | None) -> list[Any]:
        from huggingface_hub.hf_api import RepoFile

        return self._asking(
            lambda: [
                entry
                for entry in self._api.list_repo_tree(
                    self._repo, recursive=True, repo_type=self._type, revision=revision
                )
                if isinstance(entry, RepoFile)
            ]
        )

    def _asking(self, ask: Callable[[], Result]) -> Result:
        """What `ask` returns; asked again while the hub is not well."""
        wait_s, failure = FIRST_WAIT_S, ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(wait_s)
                wait_s *= 2
            refusal: DuplexError | None = None
            try:
                return ask()
            except Exception as error:  # noqa: BLE001  # the client raises of many libraries
                refusal = self._refusal(error)
                failure = self._clean(error)
            if refusal is not None:
                raise refusal  # outside of the handler: the library's error may hold the token
        raise TransientError(
            f"the hub did not do it in {ATTEMPTS} attempts; say it again to go on where this "
            f"stopped. The last answer: {failure}"
        )

    def _refusal(self, error: Exception) -> DuplexError | None:
        """The error that no second attempt would mend, or None."""
        if isinstance(error, DuplexError):
            return error
        status = _status_of(error)
        if status in (408, 409, 425, 429, 412) or (status is not None and status >= 500):
            return None
        if status is not None:
            return RequestError(
                f"the hub refused {self._repo} with {status}: {self._clean(error)}. Check the "
                "name, and that HF_TOKEN may do this"
            )
        known = ("requests", "urllib3", "huggingface_hub", "http")
        if type(error).__module__.split(".")[0] in known or isinstance(error, OSError):
            full = isinstance(error, OSError) and error.errno is not None and error.filename
            return RequestError(str(error)) if full else None
        return None if isinstance(error, RuntimeError) else RequestError(self._clean(error))

    def _clean(self, error: Exception) -> str:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        if error.__cause__ is not None:
            text += f" ({' '.join(str(error.__cause__).split())})"
        if self._token:
            text = text.replace(self._token, "***")
        text = re.sub(r"\bhf_\w{4,}", "***", text)
        return text if len(text) <= MAX_DETAIL else text[:MAX_DETAIL] + "…"


def _status_of(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, if there is one."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def _is_there(name: str, bundle: Bundle, there: dict[str, Any]) -> bool:
    """Whether the repository has this very file: by sha256 of large ones, git's sha1 of others."""
    file = there.get(name)
    if file is None or file.size != bundle.size(name):
        return False
    content = bundle.files[name]
    if file.lfs is not None:
        known = bundle.digests.get(name)
        return file.lfs.sha256 == (known or _sha256(content))
    digest = hashlib.sha1(f"blob {bundle.size(name)}\0".encode(), usedforsecurity=False)
    for chunk in [content] if isinstance(content, bytes) else file_chunks(content):
        digest.update(chunk)
    return file.blob_id == digest.hexdigest()


def _sha256(content: Path | bytes) -> str:
    return sha256_bytes(content) if isinstance(content, bytes) else sha256_file(content)


def _chunks(names: list[str], bundle: Bundle) -> Iterator[list[str]]:
    chunk: list[str] = []
    num_bytes = 0
    for name in names:
        if chunk and (len(chunk) == COMMIT_FILES or num_bytes + bundle.size(name) > COMMIT_BYTES):
            yield chunk
            chunk, num_bytes = [], 0
        chunk.append(name)
        num_bytes += bundle.size(name)
    if chunk:
        yield chunk


def _check_names(paths: dict[str, int]) -> None:
    """
    Raises:
        CorruptFileError: a name that would lead out of a folder: nobody well-meaning has one.
    """
    for path in paths:
        parts = re.split(r"[/\\]", path)
        if path.startswith(("/", "~")) or ":" in path or {"..", ".", ""} & set(parts):
            raise CorruptFileError(
                f"a file's name must stay in its folder, found {path!r:.80}. Nothing was pulled"
            )


def _check_room(index: HubIndex, into: Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    need, free = sum(file.bytes for file in index.files), shutil.disk_usage(into).free
    if need > free:
        raise RequestError(
            f"{into} must have room for {need / 1e9:.1f} GB, found {free / 1e9:.1f} GB free"
        )
