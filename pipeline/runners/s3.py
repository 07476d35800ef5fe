"""S3 as a store of objects, by the AWS SDK that pyarrow holds, behind fsspec's interface.

pyarrow is there already (`datasets` needs it). s3fs is not taken: its botocore wants
python-dateutil below 3, constraints.txt has 4.

Read from the environment, as by AWS's own tools: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_SESSION_TOKEN, AWS_PROFILE, AWS_REGION or AWS_DEFAULT_REGION, AWS_ENDPOINT_URL_S3 or
AWS_ENDPOINT_URL (another maker's store). What the SDK says of a failure may hold key ids and signed
text, so it is put into a class and an advice here and never shown.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

TRIES = 8  # of a request that the store puts off (500, 503), the waits between doubling: some 5 s
PUT_BYTES = 8 << 20
DEFAULT_REGION = "us-east-1"

# What the SDK's messages hold -> what to do. The first that fits counts.
_ADVICE = (
    (
        ("NO_SUCH_BUCKET", "NoSuchBucket"),
        "there is no such bucket: make it, or mend the name. None is made here",
    ),
    (
        ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "EXPIRED_TOKEN",
         "INVALID_CLIENT_TOKEN_ID", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken",
         "HTTP status 403", "HTTP status 401"),
        "it refuses these credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the "
        "machine's role) must be right on every node, and allow s3:ListBucket, s3:GetObject and "
        "s3:PutObject",
    ),
    (
        ("SLOW_DOWN", "SlowDown", "THROTTLING", "SERVICE_UNAVAILABLE", "INTERNAL_FAILURE",
         "HTTP status 503", "HTTP status 500"),
        f"it was too busy {TRIES} times in a row: run again, with fewer --workers",
    ),
    (
        ("NETWORK_CONNECTION", "curlCode", "REQUEST_TIMEOUT"),
        "it cannot be reached: see AWS_ENDPOINT_URL, AWS_REGION and the node's network",
    ),
    (
        ("PERMANENT_REDIRECT", "PermanentRedirect", "AUTHORIZATION_HEADER_MALFORMED",
         "HTTP status 301"),
        "the bucket is in another region: set AWS_REGION on every node",
    ),
)  # fmt: skip


def open_s3(url: str, environment: Mapping[str, str] = os.environ) -> tuple[Any, str]:
    """(fsspec file system, bucket/prefix) of an s3:// URL.

    Raises:
        ValueError: it names no bucket, or holds a user or a query.
        OSError: the bucket's region is not to be found out.
    """
    parts = urlsplit(url)
    if not parts.netloc or "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("an S3 URL must read s3://bucket/prefix")
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow import fs

    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    if not region:
        region = DEFAULT_REGION if endpoint else fs.resolve_s3_region(parts.netloc)
    place: dict[str, Any] = {"region": region}
    if endpoint:
        where = urlsplit(endpoint)
        place |= {"scheme": where.scheme, "endpoint_override": where.netloc}
    files = fs.S3FileSystem(
        **place,
        background_writes=False,  # an error is that of the write that brought it
        allow_delayed_open=True,  # a small object is one request
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=TRIES),
    )
    return ArrowFSWrapper(files), f"{parts.netloc}{parts.path}".rstrip("/")


def put_object(files: Any, path: Path, target: str) -> None:
    """A file as an object. What breaks this off leaves an object that is cut short: closing the
    stream completes what was sent of it."""
    with path.open("rb") as source, files.fs.open_output_stream(target) as sink:
        while block := source.read(PUT_BYTES):
            sink.write(block)


def advice_on(error: BaseException) -> str | None:
    """What a failure of the SDK means, and what to do; None: it is of no kind known here."""
    text = str(error)
    return next((advice for signs, advice in _ADVICE if any(s in text for s in signs)), None)
