"""A small hub: the endpoints that `huggingface_hub` uses to create, upload, list and download.

Repositories live in memory: a row of commits, each the whole tree {path: (content, is_lfs)}, and a
store of large files by sha256. `faults` breaks things on purpose, `log` says what was asked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "TestTokenThatMustNotBeSeen0123456789"
LARGE = (".wav", ".pt", ".parquet", ".safetensors")


class Repo:
    def __init__(self, private: bool):
        self.private = private
        self.commits: list[tuple[str, dict[str, tuple[bytes, bool]]]] = []
        self.commit({})

    @property
    def tree(self) -> dict[str, tuple[bytes, bool]]:
        return self.commits[-1][1]

    def commit(self, tree: dict[str, tuple[bytes, bool]]) -> str:
        material = json.dumps([len(self.commits), sorted(tree)]).encode()
        self.commits.append((hashlib.sha1(material).hexdigest(), tree))
        return self.commits[-1][0]

    def at(self, revision: str) -> tuple[str, dict[str, tuple[bytes, bool]]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((one for one in self.commits if one[0] == revision), None)


class Hub:
    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.ranges: list[str] = []
        self.faults: list[Callable[[str, str], str | None]] = []
        self.lock = threading.RLock()
        handler = type("Bound", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def asked(self, method: str, part: str) -> list[str]:
        return [path for verb, path in self.log if verb == method and part in path]

    def fail_once(self, method: str, part: str, how: str) -> None:
        """The first such request is answered by `how`: "500", or "drop" within its body."""
        left = [how]

        def fault(verb: str, path: str) -> str | None:
            return left.pop() if left and verb == method and part in path else None

        self.faults.append(fault)

    def put(self, repo: str, path: str, content: bytes) -> None:
        """Change a file as somebody else with the right to write could."""
        files = self.repos[repo].tree | {path: (content, path.endswith(LARGE))}
        self.repos[repo].commit(files)


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.log.append((self.command, path))
            how = next((h for f in self.hub.faults if (h := f(self.command, path))), None)
        size = int(self.headers.get("Content-Length") or 0)
        if how == "drop":
            self.rfile.read(min(size // 2, 1 << 14))
            self.close_connection = True
            return self.connection.close()
        body = self.rfile.read(size)
        if how == "500":
            return self._answer(500, {"error": "try again"})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and "/lfs/" not in path:
            return self._answer(401, {"error": "Invalid username or password."})
        with self.hub.lock:
            return self._route(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _answer(self, status: int, value: Any, **headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _missing(self, what: str) -> None:
        self._answer(404, {"error": what}, X_Error_Code=what)

    def _route(self, path: str, body: bytes) -> None:
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            if hashlib.sha256(body).hexdigest() != match[1]:
                return self._answer(400, {"error": "not what was announced"})
            self.hub.large[match[1]] = body
            return self._answer(200, {})
        forms = {
            r"/(?:datasets/)?([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch()": self._batch,
            r"/api/(?:datasets|models)/([\w.-]+/[\w.-]+)/preupload/(main)": self._preupload,
            r"/api/(?:datasets|models)/([\w.-]+/[\w.-]+)/commit/(main)": self._commit,
            r"/api/(?:datasets|models)/([\w.-]+/[\w.-]+)/tree/([\w]+)": self._tree,
            r"/api/(?:datasets|models)/([\w.-]+/[\w.-]+)/revision/([\w]+)": self._info,
            r"/api/(?:datasets|models)/([\w.-]+/[\w.-]+)()": self._info,
            r"/(?:datasets/)?([\w.-]+/[\w.-]+)/resolve/(\w+/.+)": self._resolve,
        }
        for form, answer in forms.items():
            if match := re.fullmatch(form, path):
                repo = self.hub.repos.get(match[1])
                return answer(repo, match, body) if repo else self._missing("RepoNotFound")
        return self._missing("EntryNotFound")

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        kind = "datasets/" if asked.get("type") == "dataset" else ""
        status = 409 if name in self.hub.repos else 200
        self.hub.repos.setdefault(name, Repo(bool(asked.get("private"))))
        self._answer(status, {"url": f"{self.hub.url}/{kind}{name}", "name": name})

    def _info(self, repo: Repo, match: re.Match[str], body: bytes) -> None:
        found = repo.at(match[2] or "main")
        if found is None:
            return self._missing("RevisionNotFound")
        files = [{"rfilename": path} for path in found[1]]
        value = {"id": match[1], "sha": found[0], "private": repo.private, "siblings": files}
        self._answer(200, value | {"tags": [], "downloads": 0, "likes": 0})

    def _tree(self, repo: Repo, match: re.Match[str], body: bytes) -> None:
        found = repo.at(match[2])
        if found is None:
            return self._missing("RevisionNotFound")
        entries = []
        for path, (content, large) in found[1].items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
            entry["oid"] = blob_id(content)
            if large:
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self._answer(200, entries)

    def _preupload(self, repo: Repo, match: re.Match[str], body: bytes) -> None:
        files = [
            {"path": file["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular"}
            for file in json.loads(body)["files"]
        ]  # fmt: skip
        self._answer(200, {"files": files})

    def _batch(self, repo: Repo, match: re.Match[str], body: bytes) -> None:
        objects = []
        for one in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}
            here = one["oid"] in self.hub.large
            objects.append(one if here else one | {"actions": upload})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repo: Repo, match: re.Match[str], body: bytes) -> None:
        tree = dict(repo.tree)
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                tree[value["path"]] = (base64.b64decode(value["content"]), False)
            elif item["key"] == "lfsFile":
                tree[value["path"]] = (self.hub.large[value["oid"]], True)
            elif item["key"] == "deletedFile":
                del tree[value["path"]]
        oid = repo.commit(tree)
        url = f"{self.hub.url}/{match[1]}/commit/{oid}"
        self._answer(200, {"commitUrl": url, "commitOid": oid, "success": True})

    def _resolve(self, repo: Repo, match: re.Match[str], body: bytes) -> None:
        revision, _, path = match[2].partition("/")
        found = repo.at(revision)
        if found is None or path not in found[1]:
            return self._missing("RevisionNotFound" if found is None else "EntryNotFound")
        content, large = found[1][path]
        etag = hashlib.sha256(content).hexdigest() if large else blob_id(content)
        headers = {"X_Repo_Commit": found[0], "ETag": f'"{etag}"', "Accept_Ranges": "bytes"}
        status = 200
        if asked := self.headers.get("Range"):
            self.hub.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            total = len(content)
            content, status = content[start:], 206
            headers["Content_Range"] = f"bytes {start}-{total - 1}/{total}"
        self._answer(status, content, **headers)
