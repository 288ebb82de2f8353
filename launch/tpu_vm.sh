#!/usr/bin/env bash
# A run on slices of Cloud TPU VMs, which are asked for as one queued resource:
#
#   launch/tpu_vm.sh [OPTIONS] NAME [Nx]KIND:SHAPE -- --config=FILE --config.workdir=DIR [FLAGS...]
#   launch/tpu_vm.sh --zone=us-west4-a --spot --setup='sudo mount HOST:/share /shared' \
#     opd v5e:4x4 -- --config=configs/qwen3.py --config.workdir=/shared/opd
#
#   --zone=ZONE, --project=PROJECT  gcloud's own settings unless given
#   --spot                          slices that may be taken away, at a lower price
#   --runtime=VERSION               software of the VMs; by KIND unless given
#   --setup=COMMAND                 on every worker before installing: mount what they share
#   --attempts=N                    times that slices or a connection may be lost, 100 unless given
#   --keep                          leave the slices there at the end
#   --dry-run                       print the commands of an undisturbed run, do nothing
#
# KIND:SHAPE is that of gopd_jax.plan: v5e:4x4, or 2xv5e:4x4 for two slices. Creates NAME where it
# is not there, copies gopd_jax and configs of this tree, installs, and runs gopd_jax.main
# --distributed on all workers. FILE is one of those copied, named from the top of the tree. When
# the slices are taken away they are asked for again and the same command continues from its
# checkpoints, so DIR has to outlive them. SIGTERM and Ctrl-C are passed on: the run saves and
# stops, the slices stay. The status is the run's.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/common.sh"
where=() extra=() runtime= setup= attempts=100 keep= dry= stopped=

while [[ $# -gt 0 && $1 == --* && $1 != -- ]]; do
  case $1 in
    --zone=?* | --project=?*) where+=("$1") ;;
    --spot) extra+=("$1") ;;
    --runtime=?*) runtime=${1#*=} ;;
    --setup=?*) setup=${1#*=} ;;
    --attempts=[1-9]*) attempts=${1#*=} ;;
    --keep) keep=yes ;;
    --dry-run) dry=yes ;;
    *) usage "there is no option $1" ;;
  esac
  shift
done
[[ $# -ge 4 && $1 != -- && $3 == -- && $attempts =~ ^[0-9]+$ ]] || usage
name=$1 slice=$2
shift 3
read_slice "$slice"
case $kind in
  v5e) type=v5litepod-$chips default=v2-alpha-tpuv5-lite ;;
  v5p) type=v5p-$((2 * chips)) default=v2-alpha-tpuv5 ;; # its name counts cores
  v6e) type=v6e-$chips default=v2-alpha-tpuv6e ;;
esac
read_flags "$@"
# Looked for by its name among what is sent: a link, or a path with .., leads elsewhere there.
packed=(gopd_jax configs requirements.txt)
(cd "$root" && find "${packed[@]}" -type f) | grep -Fx -- "${preset#./}" >/dev/null ||
  usage "$preset is no file of $root that the workers get; they get ${packed[*]}"
# Compiled programs lie beside it, in a directory that has to be shared, too.
[[ $workdir =~ ^/+[^/]+/+[^/] ]] ||
  usage "give --config.workdir=/DIR/NAME, DIR shared by the workers and kept without them"
if ((slices > 1)); then
  extra+=("--node-count=$slices")
else
  extra+=("--node-id=$name")
fi

act() {
  if [[ $dry ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
queued() { act gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }
on_all() { queued ssh --node=all --worker=all --batch-size=all --command="$1"; }
state() { # ABSENT where there is no such resource, UNKNOWN where gcloud cannot tell
  local said
  if said=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    --format='value(state.state)' 2>&1); then
    tail -n 1 <<<"$said"
  elif [[ $said == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    echo "$said" >&2
    echo UNKNOWN
  fi
}

create() {
  queued create --accelerator-type="$type" --runtime-version="${runtime:-$default}" "${extra[@]}"
}

wait_until_active() { # 1: it failed or was taken away first
  [[ ! $dry ]] || return 0
  local now last=
  while now=$(state) && [[ $now != ACTIVE ]]; do
    [[ $now == "$last" ]] || echo "$name is $now" >&2
    [[ $now != FAILED && $now != SUSPEND* && $now != ABSENT && ! $stopped ]] || return 1
    last=$now
    sleep "${POLL:-30}"
  done
}

install() { # in chains: errexit does not hold where the status of a function is asked for
  local tree=tree.tar.gz status=0
  [[ $dry ]] || tree=$(mktemp --suffix=.tar.gz)
  act tar -C "$root" --exclude=__pycache__ -czf "$tree" "${packed[@]}" &&
    act gcloud compute tpus queued-resources scp "$tree" "$name:tree.tar.gz" "${where[@]}" \
      --node=all --worker=all --batch-size=all || status=$?
  [[ $dry ]] || rm "$tree"
  ((status == 0)) || return 1
  [[ ! $setup ]] || on_all "$setup" || return 1
  # The VMs' own Python may be older than the package asks for; uv brings one.
  on_all 'rm -rf gopd && mkdir gopd && tar -xzf tree.tar.gz -C gopd && cd gopd &&
    python3 -m pip install --quiet --user uv && python3 -m uv venv --python 3.12 .venv &&
    python3 -m uv pip install --quiet --python .venv -r requirements.txt "jax[tpu]" &&
    touch installed'
}

leave() { # with a status, and slices that go on costing
  echo "$name stays; it is deleted with: gcloud compute tpus queued-resources delete $name" \
    "${where[*]} --force" >&2
  exit "$1"
}

# A run whose connection broke is still there, and holds the chips: it saves and stops first. The
# pattern begins with the interpreter, so that the shell that runs this does not match.
stop='pkill -TERM -f "^[^ ]*/gopd/.venv/bin/python -m gopd_jax.main"'
gone='while pgrep -f "^[^ ]*/gopd/.venv/bin/python -m gopd_jax.main" >/dev/null; do sleep 1; done'
cache=$(printf %q "$(dirname "$workdir")/xla")
command="$stop; $gone; cd ~/gopd && JAX_COMPILATION_CACHE_DIR=$cache"
command+=" PYTHONUNBUFFERED=1 exec ~/gopd/.venv/bin/python -m gopd_jax.main --distributed"
command+=$(printf ' %q' "${flags[@]}")

if [[ $dry ]]; then
  create
  install
  on_all "$command"
  [[ $keep ]] || queued delete --force --quiet
  exit 0
fi

trap 'stopped=yes; on_all "$stop; true" >&2 || true' TERM INT
[[ $(state) != UNKNOWN ]] || exit 1
for ((attempt = 0; attempt < attempts; )); do
  [[ ! $stopped ]] || leave 143
  case $(state) in
    ABSENT)
      attempt=$((attempt + 1))
      create
      ;;
    FAILED | SUSPEND*) # nothing is left of it but its name
      queued delete --force --quiet || sleep "${POLL:-30}"
      continue
      ;;
  esac
  wait_until_active || continue
  # The last word of an installation is its mark: one that broke off is made again.
  if ! on_all 'test -e gopd/installed' && ! install; then
    [[ $(state) != ACTIVE ]] || leave 1
    continue
  fi
  on_all "$command" &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    sleep 0.2 &
    wait $! || true # a trapped signal ends the wait, not the run
  done
  status=0
  wait "$pid" || status=$?
  if ((status == 0)); then
    [[ $keep ]] || queued delete --force --quiet
    exit 0
  fi
  [[ ! $stopped && $status -ne 2 ]] || leave "$status"
  # Whether the slices were taken away shows after a while.
  for ((i = 0; i < 10; i++)); do
    [[ $(state) == ACTIVE ]] || continue 2
    sleep "${POLL:-30}"
  done
  ((status == 255)) || leave "$status" # 255: the connection broke, and not the run
  attempt=$((attempt + 1))
done
echo "$name: $attempts attempts have failed; the same command continues" >&2
exit 1
