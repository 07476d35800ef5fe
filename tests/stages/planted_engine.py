# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""A second isolated engine, of the real protocol: it speaks by espeak-ng, and breaks on request.

Started by its path with a plain Python, as `uv` would start another; `MODE` in its environment
says how it starts. A text that begins with `!` says what to do instead of speaking.
"""

import json
import os
import subprocess
import sys
import time

MODE = os.environ.get("MODE", "")
HELLO = {
    "protocol": "duplex-speech-1", "engine": "planted", "version": "1.0", "rate": 22050,
    "languages": ["en"], "cloning": False, "watermark": False,
}  # fmt: skip


def reply(header, samples=b""):
    sys.stdout.buffer.write(json.dumps(header | {"bytes": len(samples)}).encode() + b"\n" + samples)
    sys.stdout.buffer.flush()


def worker():
    path = os.environ["ESPEAK_WORKER"]
    process = subprocess.Popen(
        [os.environ.get("WORKER_PYTHON", sys.executable), "-P", path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()
    return process


def speak(process, request):
    line = {"text": request["text"], "voice": "en-us", "variant": "f2", "pitch": 50, "range": 50,
            "rate_wpm": request["params"].get("rate_wpm", 175)}  # fmt: skip
    process.stdin.write(json.dumps(line).encode() + b"\n")
    process.stdin.flush()
    header = json.loads(process.stdout.readline())
    return process.stdout.read(header["bytes"])


def misbehave(request):
    """Whether the request was one of these."""
    what, identity = request["text"].removeprefix("!"), request["id"]
    if what == "crash":
        print("CUDA error: out of memory", file=sys.stderr, flush=True)
        os._exit(3)
    elif what == "hang":
        child = subprocess.Popen(["sleep", "600"])
        print(f"child {child.pid}", file=sys.stderr, flush=True)
        time.sleep(600)
    elif what == "garbage":
        print("Loading model: 100%", flush=True)
    elif what == "endless line":
        sys.stdout.buffer.write(b"x" * (3 << 20))
        sys.stdout.buffer.flush()
        time.sleep(600)
    elif what == "huge":
        print(json.dumps({"id": identity, "bytes": 1 << 40}), flush=True)
    elif what == "half":
        print(json.dumps({"id": identity, "bytes": 1000}), flush=True)
        os._exit(0)
    elif what == "other id":
        reply({"id": identity + 7}, b"\0\0")
    elif what == "nothing":
        reply({"id": identity})
    elif what == "environment":
        reply({"id": identity, "error": "text", "message": ",".join(sorted(os.environ))})
    elif what.startswith("error "):
        reply({"id": identity, "error": what.split()[1], "message": "as it was asked to"})
    else:
        return False
    return True


def main():
    if MODE == "dies":
        print("No solution found when resolving", file=sys.stderr)
        sys.exit(2)
    if MODE == "never ready":
        time.sleep(600)
    if MODE == "missing":
        reply({"error": "missing", "message": "the weights of planted"})
        return
    reply(HELLO | ({"version": "2.0"} if MODE == "another version" else {}))
    process = worker()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if not (request["text"].startswith("!") and misbehave(request)):
            reply({"id": request["id"]}, speak(process, request))
    process.stdin.close()
    process.wait()


if __name__ == "__main__":
    main()
