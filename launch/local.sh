#!/usr/bin/env bash
# Several processes of one run on this machine, over the loopback interface.
#
#   launch/local.sh N -- --config=configs/exopd.py [FLAGS...]
#
# With emulated devices, four in each process: JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 launch/local.sh 2 -- ...
# Output lines begin with their process's index. When one process fails, the others are ended and
# its exit status is returned; SIGTERM and Ctrl-C are passed on, so that the run saves and stops.
set -euo pipefail

if [[ $# -lt 3 || ! $1 =~ ^[1-9][0-9]*$ || $2 != -- ]]; then
  echo "usage: $0 N -- --config=FILE [FLAGS...]" >&2
  exit 2
fi
n=$1
shift 2
python=${PYTHON:-python}
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

pids=()
stop() { kill -TERM "${pids[@]}" 2>/dev/null || true; }
trap stop TERM INT

for ((i = 0; i < n; i++)); do
  # The process itself is in the background, not a pipe to it: signals and exit status are its own.
  PYTHONUNBUFFERED=1 "$python" -m gopd_jax.main "$@" \
    --coordinator="127.0.0.1:$port" --processes="$n" --process="$i" \
    > >(sed -u "s/^/$i: /") 2> >(sed -u "s/^/$i: /" >&2) &
  pids+=($!)
done

status=0
left=("${pids[@]}")
while ((${#left[@]})); do
  code=0
  wait -n "${left[@]}" || code=$?  # above 128 also where a signal came to this script: look again
  alive=()
  for pid in "${left[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      alive+=("$pid")
      continue
    fi
    code=0
    wait "$pid" || code=$?
    if ((code && !status)); then
      status=$code
      ((code == 143 || code == 130)) || stop
    fi
  done
  left=(${alive[@]+"${alive[@]}"})
done
exit "$status"
