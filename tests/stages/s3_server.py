"""A small S3 server on loopback: objects, multipart uploads, signatures, and faults on request.

Written from the S3 API reference and AWS Signature Version 4: path-style addresses, HEAD, GET with
Range, PUT, POST ?uploads, PUT ?partNumber, POST ?uploadId, DELETE, ListObjectsV2. A signature is
computed anew from the request and the secret, so wrong credentials fail as they do there.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

KEY_ID, SECRET = "AKIAPLANTEDKEYID0001", "planted-secret-of-the-test"
STATUS = {
    "NoSuchBucket": 404, "NoSuchKey": 404, "NoSuchUpload": 404, "AccessDenied": 403,
    "InvalidAccessKeyId": 403, "SignatureDoesNotMatch": 403, "SlowDown": 503,
    "InternalError": 500, "MethodNotAllowed": 405, "BadDigest": 400,
}  # fmt: skip


@dataclass
class Store:
    buckets: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"data": {}})
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)  # "PUT /data/key"
    faults: list[str] = field(default_factory=list)  # codes of the next answers
    always: str | None = None  # code of every answer
    lock: threading.Lock = field(default_factory=threading.Lock)
    port: int = 0

    @property
    def environment(self) -> dict[str, str]:
        """What a client on this machine needs."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


class Refused(Exception):
    """An answer that is an error, by S3's code."""


@contextmanager
def s3_server() -> Iterator[Store]:
    store = Store()

    class Handler(_Handler):
        books = store

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    store.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    books: Store

    def do_GET(self) -> None:
        self._answer()

    do_PUT = do_POST = do_HEAD = do_DELETE = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        bucket, _, key = unquote(parts.path).removeprefix("/").partition("/")
        body = self._body()
        books = self.books
        with books.lock:
            books.requests.append(f"{self.command} {unquote(parts.path)}")
            try:
                fault = books.faults.pop(0) if books.faults else books.always
                if fault:
                    raise Refused(fault)
                self._check_signature(parts.path, parts.query)
                if bucket not in books.buckets:
                    raise Refused("NoSuchBucket")
                status, headers, content = self._do(bucket, key, query, body)
            except Refused as refused:
                code = str(refused)
                status, headers = STATUS[code], {"Content-Type": "application/xml"}
                # As S3's own: it shows the key id and what was signed.
                content = (
                    f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code} of "
                    f"{KEY_ID}</Message><AWSAccessKeyId>{KEY_ID}</AWSAccessKeyId></Error>"
                ).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _do(
        self, bucket: str, key: str, query: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        objects, uploads = self.books.buckets[bucket], self.books.uploads
        if self.command == "HEAD" and not key:
            return 200, {"x-amz-bucket-region": "us-east-1"}, b""
        if self.command == "GET" and not key:
            return 200, {"Content-Type": "application/xml"}, _listing(objects, query)
        if self.command in ("GET", "HEAD"):
            if key not in objects:
                raise Refused("NoSuchKey")
            return self._content(objects[key])
        if self.command == "PUT" and "uploadId" in query:
            if query["uploadId"] not in uploads:
                raise Refused("NoSuchUpload")
            uploads[query["uploadId"]][int(query["partNumber"])] = body
            return 200, {"ETag": _etag(body)}, b""
        if self.command == "PUT":
            objects[key] = body
            return 200, {"ETag": _etag(body)}, b""
        if self.command == "POST" and "uploads" in query:
            name = f"upload-{len(uploads)}"
            uploads[name] = {}
            return (
                200,
                {"Content-Type": "application/xml"},
                _xml("InitiateMultipartUploadResult", Bucket=bucket, Key=key, UploadId=name),
            )
        if self.command == "POST" and "uploadId" in query:
            parts = uploads.pop(query["uploadId"])
            objects[key] = b"".join(parts[number] for number in sorted(parts))
            return (
                200,
                {"Content-Type": "application/xml"},
                _xml("CompleteMultipartUploadResult", Key=key, ETag=_etag(objects[key])),
            )
        if self.command == "DELETE":
            objects.pop(key, None)
            return 204, {}, b""
        raise Refused("MethodNotAllowed")

    def _content(self, content: bytes) -> tuple[int, dict[str, str], bytes]:
        headers = {"ETag": _etag(content), "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not found:
            return 200, headers | {"Content-Length": str(len(content))}, content
        start, end = int(found[1]), int(found[2] or len(content) - 1)
        piece = content[start : end + 1]
        headers["Content-Range"] = f"bytes {start}-{start + len(piece) - 1}/{len(content)}"
        return 206, headers | {"Content-Length": str(len(piece))}, piece

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            raw = b"".join(iter(self._http_chunk, b""))
        else:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return _unframed(raw) if "aws-chunked" in self.headers.get("Content-Encoding", "") else raw

    def _http_chunk(self) -> bytes:
        size = int(self.rfile.readline().split(b";")[0], 16)
        chunk = self.rfile.read(size)
        self.rfile.readline()
        return chunk

    def _check_signature(self, path: str, query: str) -> None:
        """AWS Signature Version 4 of the Authorization header."""
        given = re.fullmatch(
            r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d+)/([^/]+)/s3/aws4_request, ?"
            r"SignedHeaders=([^,]+), ?Signature=([0-9a-f]{64})",
            self.headers.get("Authorization", ""),
        )
        if given is None:
            raise Refused("AccessDenied")
        key_id, date, region, names, signature = given.groups()
        if key_id != KEY_ID:
            raise Refused("InvalidAccessKeyId")
        pairs = sorted(parse_qsl(query, keep_blank_values=True))
        canonical = "\n".join(
            [
                self.command,
                quote(unquote(path), safe="/-_.~"),
                "&".join(f"{quote(k, safe='-_.~')}={quote(v, safe='-_.~')}" for k, v in pairs),
                *(
                    f"{name}:{' '.join(self.headers.get(name, '').split())}"
                    for name in names.split(";")
                ),
                "",
                names,
                self.headers.get("x-amz-content-sha256", ""),
            ]
        )
        scope = f"{date}/{region}/s3/aws4_request"
        hashed = hashlib.sha256(canonical.encode()).hexdigest()
        text = f"AWS4-HMAC-SHA256\n{self.headers.get('x-amz-date')}\n{scope}\n{hashed}"
        key = f"AWS4{SECRET}".encode()
        for part in (date, region, "s3", "aws4_request", text):
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        if not hmac.compare_digest(key.hex(), signature):
            raise Refused("SignatureDoesNotMatch")


def _unframed(raw: bytes) -> bytes:
    """What aws-chunked content holds; its trailing checksums are left out."""
    content = b""
    while raw:
        head, _, raw = raw.partition(b"\r\n")
        size = int(head.split(b";")[0], 16)
        if not size:
            break
        content, raw = content + raw[:size], raw[size + 2 :]
    return content


def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


def _xml(name: str, **values: str) -> bytes:
    inner = "".join(f"<{key}>{escape(value)}</{key}>" for key, value in values.items())
    return f"<?xml version='1.0'?><{name}>{inner}</{name}>".encode()


def _listing(objects: dict[str, bytes], query: dict[str, str]) -> bytes:
    prefix = query.get("prefix", "")
    found = sorted(key for key in objects if key.startswith(prefix))
    rows = "".join(
        f"<Contents><Key>{escape(key)}</Key><Size>{len(objects[key])}</Size>"
        f"<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
        for key in found
    )
    return (
        "<?xml version='1.0'?><ListBucketResult><IsTruncated>false</IsTruncated>"
        f"<KeyCount>{len(found)}</KeyCount>{rows}</ListBucketResult>"
    ).encode()
