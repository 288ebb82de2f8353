#!/usr/bin/env bash
# A run on TPU slices of a GKE cluster: launch/gke_jobset.yaml filled in and given to kubectl.
#
#   launch/gke.sh [OPTIONS] NAME [Nx]KIND:SHAPE -- --config=FILE --config.workdir=DIR [FLAGS...]
#   launch/gke.sh --image=REPOSITORY/gopd:1 --claim=opd opd v5e:4x4 -- \
#     --config=configs/qwen3.py --config.workdir=/shared/opd
#
#   --image=IMAGE        with this tree as its working directory, its requirements and jax[tpu]
#   --claim=NAME         a PersistentVolumeClaim that all pods can write (ReadWriteMany), at /shared
#   --restarts=N         of the whole set, 50 unless given
#   --chips-per-host=N   4 unless given, or all where a slice has fewer
#   --queue=NAME         of Kueue, multislice-queue (XPK's) unless given
#   --dry-run            print the manifest, do nothing
#
# KIND:SHAPE is that of gopd_jax.plan: v5e:4x4, or 2xv5e:4x4 for two slices. The cluster has JobSet
# and as many node pools of that shape. Pods that are taken away are started again by the cluster
# and the run continues from its checkpoints, so DIR lies under /shared. `kubectl delete jobset
# NAME` ends it: the pods get SIGTERM, and the run saves.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/common.sh"
python=${PYTHON:-python}
image= claim= restarts=50 per_host=4 queue=multislice-queue dry=

while [[ $# -gt 0 && $1 == --* && $1 != -- ]]; do
  case $1 in
    --image=?*) image=${1#*=} ;;
    --claim=?*) claim=${1#*=} ;;
    --restarts=?*) restarts=${1#*=} ;;
    --chips-per-host=?*) per_host=${1#*=} ;;
    --queue=?*) queue=${1#*=} ;;
    --dry-run) dry=yes ;;
    *) usage "there is no option $1" ;;
  esac
  shift
done
[[ $# -ge 4 && $1 != -- && $3 == -- ]] || usage
name=$1 slice=$2
shift 3
[[ $image && $claim ]] || usage "give --image and --claim"
[[ $restarts =~ ^[0-9]+$ ]] || usage "--restarts=$restarts is no number"
[[ $per_host =~ ^[1-9][0-9]*$ ]] || usage "--chips-per-host=$per_host is no number"
# The name of a pod is NAME-slice-job-SLICE-HOST-xxxxx, which has to be a label.
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  usage "$name is no name of a JobSet; take at most 40 of a-z, 0-9 and -"
read_slice "$slice"
((per_host <= chips)) || per_host=$chips
((chips % per_host == 0)) ||
  usage "$slice has $chips chips, not a multiple of --chips-per-host=$per_host"
case $kind in
  v5e) accelerator=tpu-v5-lite-podslice ;;
  v5p) accelerator=tpu-v5p-slice ;;
  v6e) accelerator=tpu-v6e-slice ;;
esac
# Whether FILE is there is not known here: it is a file of the image, or of the claim.
read_flags "$@"
[[ $workdir == /shared/?* ]] || usage "give --config.workdir=/shared/DIR, which outlives the pods"

fill='import json, string, sys
template, n, *rest = sys.argv[1:]
words = dict(word.split("=", 1) for word in rest[: int(n)])
# A JSON string is one of YAML, also where the word alone is no text: on, 1234.
words |= {key: json.dumps(words[key]) for key in ("name", "queue", "image", "claim")}
arguments = json.dumps(["--distributed", *rest[int(n) :]])
print(string.Template(open(template).read()).substitute(words, arguments=arguments))'
words=(
  "name=$name" "queue=$queue" "restarts=$restarts" "slices=$slices" "hosts=$((chips / per_host))"
  "chips=$per_host" "accelerator=$accelerator" "topology=$topology" "image=$image" "claim=$claim"
)
manifest=$("$python" -c "$fill" "$here/gke_jobset.yaml" "${#words[@]}" "${words[@]}" "${flags[@]}")
if [[ $dry ]]; then
  echo "$manifest"
else
  kubectl apply -f - <<<"$manifest"
fi
