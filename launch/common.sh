# What the launchers of TPU slices share; they source it.

usage() { # to the launcher's user, with what was wrong, and the options at its head
  [[ $# -eq 0 ]] || echo "$0: $1" >&2
  echo "usage: $0 [OPTIONS] NAME [Nx]KIND:SHAPE --" \
    "--config=FILE --config.workdir=DIR [FLAGS...]" >&2
  sed -n '/^#   --/s/^#  //p' "${BASH_SOURCE[-1]}" >&2
  exit 2
}

read_slice() { # 2xv5e:4x4 into slices=2 kind=v5e topology=4x4 chips=16, those of one slice
  [[ $1 =~ ^(([1-9][0-9]*)x)?(v5e|v5p|v6e):([1-9][0-9]*(x[1-9][0-9]*)*)$ ]] ||
    usage "$1 is no slice; give v5e:4x4, v5p:4x4x4, v6e:8x8, or 2xv5e:4x4 for two of them"
  slices=${BASH_REMATCH[2]:-1} kind=${BASH_REMATCH[3]} topology=${BASH_REMATCH[4]}
  local between=${topology//[^x]/} axes=2
  [[ $kind != v5p ]] || axes=3
  ((${#between} + 1 == axes)) ||
    usage "$1 has a shape of $((${#between} + 1)) axes, and $kind has $axes"
  # All there are of two axes. A plan can be compiled for others, but a name such as v5litepod-64
  # tells the number of chips alone: for 4x16 there would come an 8x8.
  local made="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
  [[ $kind == v5p || " $made " == *" $topology "* ]] ||
    usage "$1 is no slice that can be had; those of $kind are $made"
  chips=$((${topology//x/*}))
}

value_of() { # a flag of the run's, its name without dashes, into value: as main reads it, the last
  local flag next=
  value=
  for flag in "${@:2}"; do
    if [[ $next ]]; then
      value=$flag next=
    elif [[ $flag =~ ^--?"$1"(=(.*))?$ ]]; then
      value=${BASH_REMATCH[2]}
      [[ ${BASH_REMATCH[1]} ]] || next=yes # --config FILE, in two words
    fi
  done
}

# The run's flags into flags, with the slices that read_slice found, preset and workdir, which is
# empty where there is none. What main would refuse for certain is refused here: it would say so
# once the slices are there and paid for.
read_flags() {
  local flag
  value_of config "$@"
  preset=${value%%:*} # configs/qwen3.py of configs/qwen3.py:1.7b
  [[ $preset ]] || usage "no --config=FILE is given"
  for flag in "$@"; do
    [[ ! $flag =~ ^--?config(=|$) ]] || break
    [[ ! $flag =~ ^--?(no)?config\. ]] || usage "$flag stands before --config; give --config first"
  done
  value_of config.workdir "$@"
  workdir=$value flags=("$@")
  value_of config.mesh.slices "$@"
  [[ ! $value || $value == "$slices" ]] ||
    usage "--config.mesh.slices=$value contradicts the slices asked for, $slices; leave it out"
  [[ $value || $slices == 1 ]] || flags+=("--config.mesh.slices=$slices")
}
