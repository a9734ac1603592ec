#!/usr/bin/env bash
# Makes or refreshes a virtual environment with the newest working Python that a tested constraints file exists for.
#
#   scripts/setup_env.sh [--venv .venv] [--extras test] [--constraints py312] [--prefer 3.11]
#   scripts/setup_env.sh --find [--prefer 3.11]      only print the interpreter that would be used
#
# PYTHON=/path/to/python overrides the search. When nothing changed it returns at once, so `make` may call it every time.
set -euo pipefail

SUPPORTED="3.11 3.12 3.13"

die() {
  echo "set-up: $*" >&2
  exit 1
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv=.venv extras=test constraints="" prefer="" find_only=""
while [ $# -gt 0 ]; do
  case "$1" in
    --find) find_only=1; shift ;;
    --venv | --extras | --constraints | --prefer)
      [ $# -ge 2 ] || die "$1 needs a value"
      case "$1" in
        --venv) venv="$2" ;;
        --extras) extras="$2" ;;
        --constraints) constraints="$2" ;;
        --prefer) prefer="$2" ;;
      esac
      shift 2 ;;
    *) die "unknown argument '$1'; the arguments are explained at the top of scripts/setup_env.sh" ;;
  esac
done

# Prints "3.12.1 <tab> path" if $1 runs and can make environments. It is run, not looked at: a pyenv shim for a
# version that is not active exists and is executable, and fails; Debian's python3 comes without ensurepip.
probe() {
  "$1" -I -c '
import sys, sysconfig
import ctypes, ensurepip, fcntl, ssl, venv, zlib
if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit(1)
print("%d.%d.%d\t%s" % (sys.version_info[:3] + (sys.executable,)))
' 2>/dev/null </dev/null || true
}

# Everything that might be a Python, in the order in which equals are preferred.
candidates() {
  local dir name path
  local IFS=:
  for dir in $PATH; do
    for name in python3.13 python3.12 python3.11 python3 python; do
      path="$dir/$name"
      [ -f "$path" ] && [ -x "$path" ] && printf '%s\n' "$path"
    done
  done
  local elsewhere="${PYENV_ROOT:-$HOME/.pyenv}/versions/*/bin:$HOME/.local/share/uv/python/*/bin"
  elsewhere="$elsewhere:/usr/local/bin:/opt/*/bin:/opt/python/*/bin:/opt/homebrew/bin:/opt/homebrew/opt/python@3.*/bin"
  for dir in ${PYTHON_SEARCH-$elsewhere}; do # unquoted: the globs are meant to expand
    path="$dir/python3"
    [ -f "$path" ] && [ -x "$path" ] && printf '%s\n' "$path"
  done
  return 0
}

# Orders versions as numbers: 3.9.18 -> 003009018.
rank() {
  local IFS=.
  # shellcheck disable=SC2086
  printf '%03d%03d%03d' $1
}

find_python() {
  local found version path minor score best="" best_score="" tried=""
  if [ -n "${PYTHON:-}" ]; then
    path="$(command -v "$PYTHON" || true)"
    [ -n "$path" ] || die "PYTHON=$PYTHON: no such program; give the path of a Python 3.11, 3.12 or 3.13"
    found="$(probe "$path")"
    [ -n "$found" ] || die "PYTHON=$PYTHON does not run, or lacks venv, ensurepip or ssl; give another one"
    version="${found%%$'\t'*}"
    [ "$(rank "$version")" -ge "$(rank 3.11.0)" ] || die "PYTHON=$PYTHON is Python $version; 3.11 or newer is needed"
    case " $SUPPORTED " in
      *" ${version%.*} "*) ;;
      *) echo "set-up: Python $version is untested here (tested: $SUPPORTED)" >&2 ;;
    esac
    printf '%s\n' "$found"
    return
  fi
  while read -r path; do
    found="$(probe "$path")"
    if [ -z "$found" ]; then
      tried="$tried, $path (does not run or lacks venv, ensurepip or ssl)"
      continue
    fi
    version="${found%%$'\t'*}" minor="${found%%$'\t'*}" minor="${minor%.*}"
    case " $SUPPORTED " in
      *" $minor "*) ;;
      *) tried="$tried, $path ($version)"; continue ;;
    esac
    score="$(rank "$version")"
    [ "$minor" = "$prefer" ] && score="1$score" || score="0$score"
    if [ -z "$best" ] || [ "$score" -gt "$best_score" ]; then
      best="$found" best_score="$score"
    fi
  done < <(candidates | awk '!seen[$0]++')
  [ -n "$best" ] || die "no working Python of version $(echo "$SUPPORTED" | sed 's/ /, /g'). Install one (apt-get install" \
    "python3 python3-venv, uv python install 3.12, or pyenv) or give PYTHON=/path/to/python. Tried: ${tried:+${tried#, }}${tried:-none}"
  printf '%s\n' "$best"
}

if [ -n "$find_only" ]; then
  found="$(find_python)"
  printf '%s\n' "${found#*$'\t'}"
  exit 0
fi

# Up to date: the stamp names the same requirements, the same place (environments do not survive a move) and the
# environment's Python still runs. One line in the stamp after the key: the interpreter it was made with.
cd "$root"
key="$(cat setup.cfg pyproject.toml constraints/*.txt | cksum | tr ' ' -) $root [$extras] ${constraints:-auto}"
stamp="$venv/.complete"
if [ -f "$stamp" ]; then
  { read -r old_key && read -r old_python; } <"$stamp" || true
  if [ "$old_key" = "$key" ] && { [ -z "${PYTHON:-}" ] || [ "$(command -v "$PYTHON")" = "${old_python:-}" ]; } &&
    "$venv/bin/python" -I -S -c '' 2>/dev/null; then
    exit 0
  fi
fi

found="$(find_python)"
version="${found%%$'\t'*}" python="${found#*$'\t'}"
if [ -n "${PYTHON:-}" ]; then python="$(command -v "$PYTHON")"; fi
if [ -z "$constraints" ]; then
  case "$version" in 3.11.*) constraints=py311 ;; *) constraints=py312 ;; esac
fi
exec "$python" -I scripts/setup_env.py --root="$root" --venv="$venv" --extras="$extras" \
  --constraints="constraints/$constraints.txt" --key="$key" ${PYTHON:+--explicit}
