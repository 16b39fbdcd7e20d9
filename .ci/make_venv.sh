#!/bin/sh
# Makes the virtual environment $VENV with $PYTHON, or with the first Python of at least 3.10 that is found.
set -eu

venv=${VENV:-.venv}
fits='import sys; sys.exit(sys.version_info < (3, 10))'

python=
for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3.10 python3 python}; do
    if command -v "$candidate" >/dev/null 2>&1 && "$candidate" -c "$fits" >/dev/null 2>&1; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "error: Python 3.10 or newer is needed, and none was found (tried: ${PYTHON:-python3.10 to 3.13, python3, python})." >&2
    echo "       Install Python 3.11, or name one: make PYTHON=/path/to/python3.11" >&2
    exit 1
fi

echo "set-up: $venv with $("$python" --version)"
if ! "$python" -m venv "$venv"; then
    rm -rf "$venv"
    echo "error: $python cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 1
fi
