#!/usr/bin/env bash
# What a pod does from its first second: check itself, run or resume the pipeline, serve.
# Started again after a preemption, it goes on where it stopped: finished records are in the
# run folders on the volume. Everything is set by environment variables:
#
#   DUPLEX_CONFIG   config to run           (default: configs/coffee.yaml)
#   DUPLEX_RUNS     run root, on the volume (default: /workspace/runs)
#   DUPLEX_HOST     address to serve on     (default: 0.0.0.0, which needs DUPLEX_TOKEN)
#   DUPLEX_PORT     port to serve on        (default: 8998)
#   DUPLEX_TOKEN, OPENAI_API_KEY, HF_TOKEN  secrets; never written to the volume
set -euo pipefail

app="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
config="${DUPLEX_CONFIG:-$app/configs/coffee.yaml}"
runs="${DUPLEX_RUNS:-/workspace/runs}"
host="${DUPLEX_HOST:-0.0.0.0}"
port="${DUPLEX_PORT:-8998}"
duplex="$app/.venv/bin/duplex"

fail() {
  echo "start.sh: $*" >&2
  exit 1
}

[ -x "$duplex" ] || fail "$duplex must be there, found nothing; run \`make setup\` in $app"
mkdir -p "$runs" 2>/dev/null || fail "the run root $runs must be writable; mount the volume there"
[ -w "$runs" ] || fail "the run root $runs must be writable; mount the volume there"
case "$host" in
  127.0.0.1 | localhost | ::1) ;;
  *) [ -n "${DUPLEX_TOKEN:-}" ] || fail "DUPLEX_TOKEN must be set to serve on $host, found nothing" ;;
esac

cd "$app"
"$duplex" doctor "$config" --runs "$runs"
"$duplex" run "$config" --runs "$runs"
exec "$duplex" serve "$config" --runs "$runs" --host "$host" --port "$port"
