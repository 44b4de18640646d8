# Sourced by demo.sh and test.sh from the root of the repository: the environment in .venv.
# PYTHON=/path/to/python chooses the Python that .venv is made of.
python=.venv/bin/python

fail() { echo "error: $*" >&2 && exit 1; }

# prepare_environment EXTRA: make .venv if there is none, install the project with the extra unless it is there.
prepare_environment() {
    local extra=$1 base= candidate found key
    local recent='import sys; sys.exit(sys.version_info < (3, 11))'
    if ! "$python" -m pip --version > /dev/null 2>&1; then # none, or one whose making was interrupted
        for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
            if "$candidate" -c "$recent" 2>/dev/null; then base=$candidate && break; fi
        done
        found=$("${PYTHON:-python3}" --version 2>&1) || true
        [ -n "$base" ] || fail "Python 3.11 or later is needed; '${PYTHON:-python3}' is $found."
        echo "making .venv with $("$base" --version) (seconds)"
        "$base" -m venv .venv || fail "$base has no venv. On Debian: apt-get install python3-venv"
    fi
    "$python" -c "$recent" || fail ".venv holds $("$python" --version), Python 3.11 or later is needed. Remove .venv."
    key="$PWD $(cksum < pyproject.toml)"
    if [ "$(cat ".venv/installed-$extra" 2>/dev/null)" != "$key" ]; then
        echo "installing linvision[$extra] (about 2 minutes the first time)"
        "$python" -m pip install --quiet --disable-pip-version-check -e ".[$extra]"
        echo "$key" > ".venv/installed-$extra"
        if [ "$extra" = dev ]; then echo "$key" > .venv/installed-train; fi # which dev includes
    fi
}
