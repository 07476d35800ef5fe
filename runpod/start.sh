#!/usr/bin/env bash
# What a pod does from its first second: answer /ping, check itself, run or resume the pipeline,
# serve, and serve again when the server dies. Started again after a kill at any moment, it goes
# on: finished records are in the run folders on the volume. SIGTERM, which is what a pod gets that
# is taken back, ends all of it at a whole record within ten seconds, with exit code 0.
#
# With arguments it runs those instead, in the image's environment: `… duplex status CONFIG`.
#
#   DUPLEX_CONFIG   config to run             (default: configs/coffee.yaml of this checkout)
#   DUPLEX_RUNS     run root, on the volume   (default: /workspace/runs)
#   DUPLEX_SET      more settings as `duplex run --set` takes them, one a line; no secrets
#   DUPLEX_FROM, DUPLEX_TO, DUPLEX_ONLY, DUPLEX_SKIP   as the options of `duplex run`
#   DUPLEX_TOKEN, OPENAI_API_KEY, HF_TOKEN, WANDB_API_KEY   secrets: from the environment alone
#   DUPLEX_HOST, DUPLEX_PORT   where to serve (default: 0.0.0.0, which needs DUPLEX_TOKEN, and 8998)
#   DUPLEX_AGENT_PORT          where the pod's agent answers (default: 8999)
#   DUPLEX_DOCTOR=warn         go on although `duplex doctor` finds something that fails
#   DUPLEX_SERVE_TRIES, _PAUSE_S, _STABLE_S   a server that dies so often in a row is given up (5);
#                              first pause (2), doubled up to 60; after so long it counts as well (600)
#   DUPLEX_USER     whom to become when started as root (default: duplex; empty: stay root)
#   DUPLEX_PYTHON   interpreter               (default: .venv/bin/python of this checkout)
#   DUPLEX_LOG      everything that is printed, rotated (default: pod.log in the run root)
#   HF_HOME         downloaded models         (default: huggingface, beside the run root)
set +x # no trace that shows a token, however this was started
set -euo pipefail

app="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${DUPLEX_PYTHON:-$app/.venv/bin/python}"
config="${DUPLEX_CONFIG:-$app/configs/coffee.yaml}"
runs="${DUPLEX_RUNS:-/workspace/runs}"
host="${DUPLEX_HOST:-0.0.0.0}"
port="${DUPLEX_PORT:-8998}"
agent_port="${DUPLEX_AGENT_PORT:-8999}"
tries="${DUPLEX_SERVE_TRIES:-5}"
first_pause_s="${DUPLEX_SERVE_PAUSE_S:-2}"
stable_s="${DUPLEX_SERVE_STABLE_S:-600}"
user="${DUPLEX_USER-duplex}"
log="${DUPLEX_LOG:-$runs/pod.log}"
grace_s=8 # a pod that is taken back has ten seconds

case "$runs" in /*) ;; *) runs="$PWD/$runs" ;; esac
case "$log" in /*) ;; *) log="$PWD/$log" ;; esac
if [ -f "$config" ]; then config="$(cd "$(dirname "$config")" && pwd)/$(basename "$config")"; fi

# What the programs beside the pipeline read (pipeline/pods).
export DUPLEX_CONFIG="$config" DUPLEX_RUNS="$runs" DUPLEX_LOG="$log"
export DUPLEX_HOST="$host" DUPLEX_PORT="$port" DUPLEX_AGENT_PORT="$agent_port"
export HF_HOME="${HF_HOME:-$(dirname "$runs")/huggingface}"
PATH="$(dirname "$python"):$PATH"
export PATH
export PYTHONPATH="$app${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

[ $# -eq 0 ] || exec "$@"

say() { echo "start.sh: $*"; }

fail() {
  echo "start.sh: $*" >&2
  exit 1
}

# -- who we are

# A volume belongs to root where it is mounted. What a person did there as root, in a terminal of the
# pod, is handed over too. Some network volumes let nobody change owners: then root stays.
hand_over() {
  mkdir -p "$runs" "$HF_HOME" || return 1
  find "$runs" "$HF_HOME" -xdev ! -user "$user" -exec chown -h "$user:" {} + 2>/dev/null
  setpriv --reuid="$(id -u "$user")" --regid="$(id -g "$user")" --clear-groups \
    test -w "$runs" -a -w "$HF_HOME"
}

if [ "$(id -u)" = 0 ] && [ -n "$user" ]; then
  if ! id -u "$user" >/dev/null 2>&1; then
    say "there is no user $user here: staying root"
  elif ! hand_over; then
    say "$user cannot be given $runs: staying root"
  else
    home="$(getent passwd "$user" | cut -d: -f6)"
    exec setpriv --reuid="$(id -u "$user")" --regid="$(id -g "$user")" --init-groups \
      env HOME="$home" "$app/runpod/start.sh"
  fi
fi

# -- ends

# Linux: whatever is started here dies with this script, however that dies.
bound=()
if setpriv --pdeathsig KILL true 2>/dev/null; then bound=(setpriv --pdeathsig KILL --); fi
log_pid=

any_running() {
  local pid
  for pid in "$@"; do
    if kill -0 "$pid" 2>/dev/null; then return 0; fi
  done
  return 1
}

# SIGTERM to all that was started; SIGKILL to what is left after the grace.
end_all() {
  local pids left
  mapfile -t pids < <(jobs -p)
  [ ${#pids[@]} -gt 0 ] || return 0
  kill -TERM "${pids[@]}" 2>/dev/null || true
  for ((left = grace_s * 10; left > 0; left--)); do
    any_running "${pids[@]}" || return 0
    sleep 0.1
  done
  say "killing what did not stop within $grace_s s"
  kill -KILL "${pids[@]}" 2>/dev/null || true
}

# The log ends with its last writer; its last lines are waited for.
on_exit() {
  local code=$? left
  trap '' TERM INT
  end_all
  exec >&- 2>&-
  if [ -n "$log_pid" ]; then
    for ((left = 20; left > 0; left--)); do
      any_running "$log_pid" || break
      sleep 0.05
    done
  fi
  exit "$code"
}

on_signal() {
  trap '' TERM INT
  say "stopping on $1; what is finished is kept"
  end_all
  say "stopped"
  exit 0
}

trap on_exit EXIT
trap 'on_signal SIGTERM' TERM
trap 'on_signal SIGINT' INT

# Bash hears a signal only while it waits, not while a program runs in its foreground.
await() {
  local code=0
  "${bound[@]}" "$@" &
  wait $! || code=$?
  return "$code"
}

# -- /ping, from the first second until the server takes the port

ping_pid=

start_ping() {
  [ -z "$ping_pid" ] || ! kill -0 "$ping_pid" 2>/dev/null || return 0
  "${bound[@]}" "$python" -I "$app/runpod/ping.py" --host "$host" --port "$port" &
  ping_pid=$!
}

[ -x "$python" ] || fail "$python must be an interpreter with this project, found nothing there;" \
  "run \`make setup\` in $app, or set DUPLEX_PYTHON"
case "$host" in
  127.0.0.1 | localhost | ::1) ;;
  *) [ -n "${DUPLEX_TOKEN:-}" ] || fail "DUPLEX_TOKEN must be set to serve on $host, found nothing" ;;
esac
start_ping

# -- the volume

mkdir -p "$runs" "$HF_HOME" 2>/dev/null || true
probe="$runs/.writable.$$"
(: >"$probe") 2>/dev/null || fail "the run root $runs must be writable for $(id -un)," \
  "found that it is not; mount the volume there, or set DUPLEX_RUNS"
rm -f "$probe"
exec > >("$python" -I "$app/runpod/pod_log.py" "$log") 2>&1
log_pid=$!
say "$(date -u +%FT%TZ): $config, runs in $runs, log in $log, as $(id -un)"
if [ "$(stat -c %d "$runs" 2>/dev/null)" = "$(stat -c %d / 2>/dev/null)" ]; then
  say "$runs is on the container's own disk, no volume is mounted there: what is made is lost" \
    "with the container"
fi

# -- what was asked for

sets=()
while IFS= read -r line; do
  case "$line" in
    *token=* | *api_key=*) fail "DUPLEX_SET must hold no secrets, which others see in the process" \
      "list, found ${line%%=*}; use the variable that the config names" ;;
    *[![:space:]]*) sets+=(--set "$line") ;;
  esac
done <<<"${DUPLEX_SET:-}"
chosen=()
for option in from to only skip; do
  name="DUPLEX_${option^^}"
  [ -z "${!name:-}" ] || chosen+=("--$option" "${!name}")
done
duplex=("$python" -m duplex.cli)
arguments=("$config" --runs "$runs" "${sets[@]}")
cd "$app"

# -- the life of a pod

# Agent and watchdog, where this checkout has them; their settings are in the environment.
for program in agent watchdog; do
  if [ -f "$app/pipeline/pods/$program.py" ]; then
    "${bound[@]}" "$app/runpod/keep.sh" "$python" -m "pipeline.pods.$program" &
  fi
done

code=0
await "${duplex[@]}" doctor "${arguments[@]}" || code=$?
if [ "$code" != 0 ]; then
  [ "$code" = 1 ] && [ "${DUPLEX_DOCTOR:-}" = warn ] ||
    fail "duplex doctor found what must be mended first (exit code $code), see above;" \
      "DUPLEX_DOCTOR=warn goes on all the same"
fi

code=0
await "${duplex[@]}" run "${arguments[@]}" "${chosen[@]}" || code=$?
[ "$code" = 0 ] || fail "duplex run ended with exit code $code, see above; what is finished is" \
  "kept, and the next start goes on"

failures=0
pause_s="$first_pause_s"
while true; do
  start_ping
  # The server sends it away when it takes the port itself.
  export DUPLEX_PLACEHOLDER_PID=$ping_pid
  started_s=$SECONDS
  code=0
  await "${duplex[@]}" serve "${arguments[@]}" --host "$host" --port "$port" || code=$?
  [ "$code" != 2 ] || fail "the server cannot start as it was asked to, see above; given up"
  lived_s=$((SECONDS - started_s))
  if [ "$lived_s" -ge "$stable_s" ]; then
    failures=0
    pause_s="$first_pause_s"
  fi
  failures=$((failures + 1))
  [ "$failures" -lt "$tries" ] || fail "the server ended $failures times in a row, the last time" \
    "with exit code $code after $lived_s s; given up. Its messages are above"
  unset DUPLEX_PLACEHOLDER_PID
  start_ping
  say "the server ended with exit code $code after $lived_s s; again in $pause_s s" \
    "(failure $failures of $tries)"
  await sleep "$pause_s"
  pause_s=$((pause_s * 2 < 60 ? pause_s * 2 : 60))
done
