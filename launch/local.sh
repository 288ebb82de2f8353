#!/usr/bin/env bash
# Several processes of one run on this machine, over the loopback interface:
#
#   launch/local.sh N -- --config=configs/exopd.py [FLAGS...]
#
# On a CPU, JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 gives each process four emulated devices.
# A line of output begins with its process's index. SIGTERM and Ctrl-C are passed on, so that the
# run saves and stops. When one process fails, the others end too; the status is the first one's.
set -euo pipefail

if [[ $# -lt 3 || ! $1 =~ ^[1-9][0-9]*$ || $2 != -- ]]; then
  echo "usage: $0 N -- --config=FILE [FLAGS...]" >&2
  exit 2
fi
n=$1
shift 2
python=${PYTHON:-python}
grace=5 # seconds for the others' own last words: without their peer they would wait for minutes
port=$("$python" -c 'import socket as s; x = s.socket(); x.bind(("", 0)); print(x.getsockname()[1])')

pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((i = 0; i < n; i++)); do
  # Not a pipeline: signals have to reach, and the status to come from, the process itself.
  PYTHONUNBUFFERED=1 "$python" -m gopd_jax.main "$@" \
    --coordinator="127.0.0.1:$port" --processes="$n" --process="$i" \
    > >(exec sed -u "s/^/$i: /") 2> >(exec sed -u "s/^/$i: /" >&2) &
  pids+=($!)
done

status=0 deadline=
while :; do
  alive=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      alive+=("$pid")
      continue
    fi
    code=0
    wait "$pid" || code=$?
    ((status)) || status=$code
  done
  ((${#alive[@]})) || exit "$status"
  if ((status && status != 143 && status != 130)); then
    : "${deadline:=$((SECONDS + grace))}"
    ((SECONDS < deadline)) || kill -KILL "${alive[@]}" 2>/dev/null || true
  fi
  sleep 0.2 &
  wait $! || true # a trapped signal ends the wait, not the sleep
done
