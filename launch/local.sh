#!/usr/bin/env bash
# Several processes of one command on this machine, joined over loopback (jax.distributed).
#
#     ./launch/local.sh --processes=2 [--devices=4] -m launch.train --config=configs/mixlora.py --workdir=runs/two
#
# What follows the options goes to `python`. --devices: CPU devices of each process. Process 0 writes to this terminal,
# the others to stderr with their number in front. The first process that fails ends the others; its status is ours.
set -euo pipefail
processes=2 devices=""
while [[ "${1:-}" == --* ]]; do
  case "$1" in
    --processes=*) processes="${1#*=}" ;;
    --devices=*) devices="${1#*=}" ;;
    *) echo "launch/local.sh: got $1; expected --processes=N or --devices=N, then the arguments of python." >&2; exit 2 ;;
  esac
  shift
done
if ! [[ "$processes" =~ ^[1-9][0-9]*$ && "$devices" =~ ^([1-9][0-9]*)?$ && $# -gt 0 ]]; then
  echo "launch/local.sh: got --processes=$processes --devices=$devices and $# arguments for python;" \
    "expected numbers from 1 on, and a command such as -m launch.train." >&2
  exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -z "$devices" ]] || export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
port="$(python -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')"
export MOLORA_COORDINATOR="localhost:$port" MOLORA_PROCESSES="$processes"

children=()
stop() { kill -TERM "${children[@]}" 2>/dev/null || true; }
trap stop INT TERM
for ((i = 0; i < processes; i++)); do
  if ((i == 0)); then
    MOLORA_PROCESS=$i python "$@" &
  else
    MOLORA_PROCESS=$i python "$@" > >(sed -u "s/^/[$i] /" >&2) 2>&1 &
  fi
  children+=($!)
done
status=0
for ((i = 0; i < processes; i++)); do
  code=0
  wait -n "${children[@]}" 2>/dev/null || code=$? # it names those that were waited for before, too
  if ((code != 0 && status == 0)); then
    status=$code
    stop
  fi
done
exit "$status"
