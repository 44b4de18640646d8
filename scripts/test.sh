#!/usr/bin/env bash
# Lint and test in an environment of its own, .venv:
#
#     bash scripts/test.sh [--all] [pytest's arguments]
#
# --all runs the slow tests too. The first run installs the project (about 2 minutes, 6 GB); later ones start at once.
# PYTHON=/path/to/python chooses the Python that .venv is made of.
set -euo pipefail
cd "$(dirname "$0")/.."

# ------------------------------------------------------------------------------------------------------- environment
python=.venv/bin/python
recent='import sys; sys.exit(sys.version_info < (3, 11))'
fail() { echo "error: $*" >&2 && exit 1; }
if [ ! -x "$python" ]; then
    base=
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if "$candidate" -c "$recent" 2>/dev/null; then base=$candidate && break; fi
    done
    found=$("${PYTHON:-python3}" --version 2>&1) || true
    [ -n "$base" ] || fail "Python 3.11 or later is needed; '${PYTHON:-python3}' is $found."
    echo "== making .venv with $("$base" --version) (seconds)"
    "$base" -m venv .venv || { rm -rf .venv && fail "$base has no venv. On Debian: apt-get install python3-venv"; }
fi
"$python" -c "$recent" || fail ".venv holds $("$python" --version), Python 3.11 or later is needed. Remove .venv."
key="$PWD $(cksum < pyproject.toml)"
if [ "$(cat .venv/installed-dev 2>/dev/null)" != "$key" ]; then
    echo '== installing linvision with its dev extra into .venv (about 2 minutes the first time)'
    "$python" -m pip install --quiet --disable-pip-version-check -e '.[dev]'
    echo "$key" | tee .venv/installed-dev > .venv/installed
fi

# ------------------------------------------------------------------------------------------------------ lint and test
echo '== ruff (seconds)'
"$python" -m ruff check
"$python" -m ruff format --check

marked=()
case "${1:-}" in --all) marked=(-m '') && shift ;; esac
echo "== pytest${marked:+, the slow tests too} (under 10 minutes on 2 cores${marked:+ without the slow ones})"
export OMP_NUM_THREADS=1 # two processes, one core each
"$python" -m pytest -n 2 ${marked[@]+"${marked[@]}"} "$@"
