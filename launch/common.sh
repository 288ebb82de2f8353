# What the launchers of TPU slices share; they source it.

usage() { # to the launcher's user, with what was wrong, and the options at its head
  [[ $# -eq 0 ]] || echo "$0: $1" >&2
  echo "usage: $0 [OPTIONS] NAME [Nx]KIND:SHAPE --" \
    "--config=FILE --config.workdir=DIR [FLAGS...]" >&2
  sed -n '/^#   --/s/^#  //p' "${BASH_SOURCE[-1]}" >&2
  exit 2
}

read_slice() { # 2xv5e:4x4 into slices=2 kind=v5e topology=4x4 chips=16, those of one slice
  [[ $1 =~ ^(([1-9][0-9]*)x)?(v5e|v5p|v6e):([1-9][0-9x]*)$ ]] ||
    usage "$1 is no slice; give v5e:4x4, v5p:4x4x4, v6e:8x8, or 2xv5e:4x4 for two of them"
  slices=${BASH_REMATCH[2]:-1} kind=${BASH_REMATCH[3]} topology=${BASH_REMATCH[4]}
  chips=$((${topology//x/*}))
}

read_workdir() { # of the run's flags, into workdir, which is empty where there is none
  local flag
  workdir=
  for flag in "$@"; do
    [[ $flag != --config.workdir=?* ]] || workdir=${flag#*=}
  done
}
