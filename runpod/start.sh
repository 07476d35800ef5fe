#!/usr/bin/env bash
# What a pod does from its first second: answer /ping, check itself, run or resume the pipeline,
# serve, and serve again when the server dies. Started again after a kill at any moment, it goes
# on: finished records are in the run folders on the volume. SIGTERM, which is what a pod gets that
# is taken back, ends all of it at a whole record within ten seconds, with exit code 0. What fails in a
# pod is said by its agent, and waited out: an end would only start the container again, billed.
#
# With arguments it runs those instead, in the image's environment: `… duplex status CONFIG`.
#
#   DUPLEX_CONFIG   config to run             (default: configs/coffee.yaml of this checkout)
#   DUPLEX_RUNS     run root, on the volume   (default: /workspace/runs)
#   DUPLEX_SET      more settings as `duplex run --set` takes them, one a line; no secrets
#   DUPLEX_FROM, DUPLEX_TO, DUPLEX_ONLY, DUPLEX_SKIP   as the options of `duplex run`
#   DUPLEX_TOKEN, OPENAI_API_KEY, HF_TOKEN, WANDB_API_KEY   secrets: from the environment alone
#   DUPLEX_BUDGET_USD, DUPLEX_PRICE_USD_H, DUPLEX_IDLE_MINUTES   what the watchdog ends the pod at;
#                              the price counts until the API names its own
#   RUNPOD_POD_ID, RUNPOD_API_KEY   by which it does that; a pod has them. The pipeline gets no such key
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

# -- ends

# Linux: whatever is started here dies with this script, however that dies.
bound=()
if setpriv --pdeathsig KILL true 2>/dev/null; then bound=(setpriv --pdeathsig KILL --); fi
log_pid=
ping_pid="${DUPLEX_PING_PID:-}"
# Agent and watchdog. Root starts them as the user, and becomes that user then, in the same process.
read -ra beside <<<"${DUPLEX_BESIDE_PIDS:-}"
unset DUPLEX_BESIDE_PIDS DUPLEX_PING_PID

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
  pids+=("${beside[@]}" ${ping_pid:+"$ping_pid"})
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
  [ -z "$scratch" ] || rm -rf "$scratch"
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

# Why it was given up, for the agent: on the container's own disk, since the volume may be full.
scratch="${DUPLEX_FAILED_FILE:+$(dirname "${DUPLEX_FAILED_FILE:-}")}"
if [ -z "$scratch" ]; then scratch="$(mktemp -d 2>/dev/null || true)"; fi
export DUPLEX_FAILED_FILE="${scratch:+$scratch/failed}"

# Outside of a pod it ends with 1. In a pod, RunPod would start the container again at once, bill it,
# and nobody would learn why: there it waits, with agent and watchdog, until idle minutes end the pod.
fail() {
  echo "start.sh: $*" >&2
  if [ -z "${DUPLEX_POD_ID:-${RUNPOD_POD_ID:-}}" ] || [ ${#beside[@]} = 0 ]; then exit 1; fi
  [ -z "$DUPLEX_FAILED_FILE" ] || echo "$*" >"$DUPLEX_FAILED_FILE" || true
  say "waiting: the agent says why, and the watchdog ends the pod when its idle minutes are over"
  while true; do
    start_ping
    await sleep 30 || true
  done
}

# -- what is there from the first second

# Whom programs beside are started as: nothing, or how to become the user.
as=()

# /ping, until the server takes the port.
start_ping() {
  [ -z "$ping_pid" ] || ! kill -0 "$ping_pid" 2>/dev/null || return 0
  "${as[@]}" "${bound[@]}" env -u RUNPOD_API_KEY \
    "$python" -I "$app/runpod/ping.py" --host "$host" --port "$port" &
  ping_pid=$!
}

# Agent and watchdog, where this checkout has them; their settings are in the environment.
start_beside() {
  cd "$app"
  if [ -f pipeline/pods/agent.py ]; then
    "${as[@]}" "${bound[@]}" "$app/runpod/keep.sh" "$python" -m pipeline.pods.agent &
    beside+=($!)
  fi
  if [ -f pipeline/pods/watchdog.py ]; then
    "${as[@]}" "${bound[@]}" "$app/runpod/keep.sh" --until-done \
      "$python" -m pipeline.pods.watchdog &
    beside+=($!)
  fi
}

[ -x "$python" ] || fail "$python must be an interpreter with this project, found nothing there;" \
  "run \`make setup\` in $app, or set DUPLEX_PYTHON"

# -- who we are

# A volume belongs to root where it is mounted. What a person did there as root, in a terminal of the
# pod, is handed over too. Some network volumes let nobody change owners: then root stays.
hand_over() {
  mkdir -p "$runs" "$HF_HOME" || return 1
  find "$runs" "$HF_HOME" -xdev ! -user "$user" -exec chown -h "$user:" {} + 2>/dev/null || true
  setpriv --reuid="$(id -u "$user")" --regid="$(id -g "$user")" --clear-groups \
    test -w "$runs" -a -w "$HF_HOME"
}

# In the background, since a signal is to be heard meanwhile.
await_hand_over() {
  local code=0
  hand_over &
  wait $! || code=$?
  return "$code"
}

if [ "$(id -u)" = 0 ] && [ -n "$user" ]; then
  if ! id -u "$user" >/dev/null 2>&1; then
    say "there is no user $user here: staying root"
  else
    home="$(getent passwd "$user" | cut -d: -f6)"
    as=(setpriv "--reuid=$(id -u "$user")" "--regid=$(id -g "$user")" --init-groups env "HOME=$home")
    [ -z "$scratch" ] || chown "$user:" "$scratch"
    start_ping
    start_beside # before the owners of a large volume are changed
    if await_hand_over; then
      trap - EXIT TERM INT
      export DUPLEX_BESIDE_PIDS="${beside[*]}" DUPLEX_PING_PID=$ping_pid
      exec "${as[@]}" "$app/runpod/start.sh"
    fi
    say "$user cannot be given $runs: staying root"
    end_all
    as=() beside=() ping_pid=
  fi
fi

# -- beside the pipeline, before all that can fail

start_ping
[ ${#beside[@]} -gt 0 ] || start_beside

# -- the token

token="${DUPLEX_TOKEN:-}"
shortest="$("$python" -c 'from duplex.tokens import SHORTEST_TOKEN as n; print(n)')" ||
  fail "$python must be an interpreter that finds this project in $app, see above"
case "$host" in
  127.0.0.1 | localhost | ::1) ;;
  *)
    [ -n "$token" ] || fail "DUPLEX_TOKEN must be set to serve on $host, found nothing"
    [ ${#token} -ge "$shortest" ] || fail "DUPLEX_TOKEN must have at least $shortest characters," \
      "found ${#token}; \`openssl rand -hex 16\` makes a good one"
    ;;
esac

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
arguments=("$config" --runs "$runs" "${sets[@]}")
cd "$app"

# -- the life of a pod

[ -z "$DUPLEX_FAILED_FILE" ] || rm -f "$DUPLEX_FAILED_FILE"
# The watchdog alone needs the key that can end pods; agent and log have it to take it out of what
# they show.
duplex=(env -u RUNPOD_API_KEY "$python" -m duplex.cli)

said="${scratch:-/tmp}/doctor"
# What the doctor calls a fault, or else its last words, short enough for a message.
findings() {
  sleep 0.2 # until `tee` has written the end
  { grep -wE 'fail' "$said" || tail -n 3 "$said"; } 2>/dev/null | tr -s ' \n' ' ' | cut -c -800
}

code=0
await "${duplex[@]}" doctor "${arguments[@]}" > >(tee "$said") 2>&1 || code=$?
if [ "$code" != 0 ]; then
  [ "$code" = 1 ] && [ "${DUPLEX_DOCTOR:-}" = warn ] ||
    fail "duplex doctor found what must be mended first (exit code $code): $(findings)" \
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
