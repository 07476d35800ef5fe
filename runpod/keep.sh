#!/usr/bin/env bash
# [--until-done] COMMAND…, and again ten seconds after it ends, until SIGTERM. Exit code 2 says that it
# was asked for something wrong: trying again would change nothing. With --until-done, 0 is its end too.
set -euo pipefail

until_done=
if [ "${1:-}" = --until-done ]; then
  until_done=1
  shift
fi

child=
stop() {
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true
  [ -z "$child" ] || wait "$child" || true
  exit 0
}
trap stop TERM INT

bound=()
if setpriv --pdeathsig KILL true 2>/dev/null; then bound=(setpriv --pdeathsig KILL --); fi

while true; do
  code=0
  "${bound[@]}" "$@" &
  child=$!
  wait "$child" || code=$?
  if [ "$code" = 2 ]; then
    echo "keep.sh: not started again, exit code 2: $*"
    exit 2
  fi
  if [ "$code" = 0 ] && [ -n "$until_done" ]; then
    echo "keep.sh: done: $*"
    exit 0
  fi
  echo "keep.sh: exit code $code, again in ${DUPLEX_KEEP_PAUSE_S:-10} s: $*"
  sleep "${DUPLEX_KEEP_PAUSE_S:-10}" &
  child=$!
  wait "$child"
done
