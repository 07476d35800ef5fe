"""What answers on the server's port until the server does: /ping with 204, all else with 503.

    python -I runpod/ping.py [--host 0.0.0.0] [--port PORT]
    python -I runpod/ping.py --check [--port PORT]      exit 0 when something answers /ping

PORT: DUPLEX_PORT, else 8998.

Whoever starts a pod has no other sign that it lives: RunPod's API has no field for it, and its
load balancer takes 204 for "starting" and 200 for "ready". Standard library only, so that it is
up before anything heavy is imported. Connections are held to a few seconds and a few threads.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MAX_CONNECTIONS = 32
TIMEOUT_S = 5
RETRY_S = 15
STARTING = {"state": "starting", "retry_after_s": RETRY_S}


class Answer(BaseHTTPRequestHandler):
    timeout = TIMEOUT_S  # of a client that says nothing
    server_version, sys_version = "duplex-ping", ""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] == "/ping":
            self.send_response(204)
            self.end_headers()
            return
        body = json.dumps(STARTING).encode()
        self.send_response(503)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Retry-After", str(RETRY_S))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Silent: a health check every few seconds is no news, and URLs may hold tokens."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    _places = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def process_request(self, request: object, client_address: object) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)  # type: ignore[arg-type]
        else:
            self.shutdown_request(request)  # type: ignore[arg-type]

    def process_request_thread(self, request: object, client_address: object) -> None:
        try:
            super().process_request_thread(request, client_address)  # type: ignore[arg-type]
        finally:
            self._places.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no error."""


def check(port: int) -> int:
    """Whether anything answers /ping here, starting or ready: what the image's HEALTHCHECK asks."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/ping", timeout=TIMEOUT_S) as answer:
            return 0 if answer.status in (200, 204) else 1
    except urllib.error.HTTPError as error:
        print(f"/ping on port {port} must answer 200 or 204, found {error.code}", file=sys.stderr)
    except OSError as error:
        print(f"/ping on port {port} must answer, found none: {error}", file=sys.stderr)
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=int(os.environ.get("DUPLEX_PORT") or 8998))
    parser.add_argument("--check", action="store_true", help="ask /ping instead of answering it")
    options = parser.parse_args()
    if options.check:
        return check(options.port)
    try:
        server = Server((options.host, options.port), Answer)
    except OSError as error:
        print(f"ping.py: port {options.port} must be free: {error.strerror}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with server:
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
