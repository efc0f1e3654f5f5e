# Sourced by the scripts beside it: goes to the repository root and leaves a ready virtual environment in .venv.
# PYTHON=/path/to/python chooses the interpreter (3.11 or newer). A second run installs nothing.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

usable() { # runs at all (a shim may not), is new enough, and can make a virtual environment
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    usable "$PYTHON" && echo "$PYTHON" && return
    echo "error: PYTHON: got $PYTHON; expected Python 3.11 or newer with venv." >&2
    return 1
  fi
  for candidate in python3.12 python3.11 python3.13 python3 python; do # the tested ones first
    while read -r path; do
      usable "$path" && echo "$path" && return
    done < <(type -aP "$candidate")
  done
  echo "error: no Python 3.11 or newer with venv found. Install one (Debian, Ubuntu: also python3-venv)," \
    "or set PYTHON=/path/to/python." >&2
  return 1
}

if ! .venv/bin/python -c 'import pip' >/dev/null 2>&1; then
  python="$(find_python)"
  echo "setup: virtual environment .venv with $("$python" --version) ($python)"
  rm -rf .venv
  "$python" -m venv .venv
fi

constraints=constraints-py312.txt
[ "$(.venv/bin/python -c 'import sys; print(sys.version_info[1])')" != 11 ] || constraints=constraints-py311.txt
stamp="$(cat pyproject.toml "$constraints" | cksum) $PWD"
if [ "$(cat .venv/installed 2>/dev/null)" != "$stamp" ]; then
  echo "setup: installing with $constraints (once, a few minutes)"
  .venv/bin/python -m pip install -qq --disable-pip-version-check -c "$constraints" -e '.[data,test]'
  echo "$stamp" >.venv/installed
fi
export PATH="$PWD/.venv/bin:$PATH" MPLBACKEND="${MPLBACKEND:-Agg}"
