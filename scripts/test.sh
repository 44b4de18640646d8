#!/usr/bin/env bash
# Lint, build the docs and test in an environment of its own, .venv:
#
#     bash scripts/test.sh [--all] [pytest's arguments]
#
# --all runs the slow tests too. The first run installs the project (about 2 minutes, 6 GB); later ones start at once.
# PYTHON=/path/to/python chooses the Python that .venv is made of.
set -euo pipefail
cd "$(dirname "$0")/.."

# ------------------------------------------------------------------------------------------------------- environment
source scripts/environment.sh
echo '== environment in .venv'
prepare_environment dev

# ------------------------------------------------------------------------------------------------------ lint and test
echo '== ruff (seconds)'
"$python" -m ruff check
"$python" -m ruff format --check
marked=()
case "${1:-}" in --all) marked=(-m '') && shift ;; esac
echo "== pytest${marked:+, the slow tests too} (6 minutes on 2 cores${marked:+ without the slow ones}); meanwhile mypy and the docs"
said=$(mktemp)
trap 'rm -f "$said"' EXIT
check() {
    local types=0
    "$python" -m mypy || types=$?
    NO_MKDOCS_2_WARNING=1 PYTHONWARNINGS=ignore "$python" -m mkdocs build --strict --quiet && return $types
}
check > "$said" 2>&1 &
export PYTHONDONTWRITEBYTECODE= # what is compiled is kept: tests start many processes
export OMP_NUM_THREADS=1 # two processes, one core each: half of the files each, until one helps the other out
status=0
"$python" -m pytest -n 2 --dist worksteal ${marked[@]+"${marked[@]}"} "$@" || status=$?
echo '== mypy, and the docs site with every link and docstring'
wait $! || status=$?
cat "$said"
exit $status
