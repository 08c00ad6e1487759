#!/bin/sh
# Makes a virtual environment that holds this checkout and what an extra of pyproject.toml needs:
#     build_tools/prepare.sh PYTHON ENVIRONMENT EXTRA [options of pip]
# It says what is happening while pip is silent, and ends with one sentence where something is missing.
set -u
python=$1 environment=$2 extra=$3
shift 3
root=$(cd "$(dirname "$0")/.." && pwd)
log=$environment/prepare.log

fail() {
    echo "set-up: $1" >&2
    exit 1
}

asks() {
    "$python" -c "import sys, sysconfig, os; sys.exit(not ($1))" 2>/dev/null
}

"$python" -c "" >/dev/null 2>&1 ||
    fail "there is no $python that runs; install Python 3.10 or newer, or name one: make PYTHON=python3.12 ..."
asks "sys.version_info >= (3, 10)" ||
    fail "$("$python" --version 2>&1) is too old; Python 3.10 or newer is needed, name one: make PYTHON=python3.12 ..."
asks "__import__('venv') and __import__('ensurepip')" ||
    fail "Python's venv module is missing; install it (on Debian and Ubuntu: apt-get install python3-venv)"
asks "os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h'))" ||
    fail "Python's headers are missing; install them (on Debian and Ubuntu: apt-get install python3-dev)"
command -v "${CXX:-g++}" >/dev/null || { [ -z "${CXX:-}" ] && { command -v c++ || command -v clang++; } >/dev/null; } ||
    fail "no C++ compiler was found; install g++ (on Debian and Ubuntu: apt-get install g++), or set CXX to one"

if ! [ -x "$environment/bin/python" ]; then
    echo "set-up: a virtual environment in $environment"
    mkdir -p "$environment" && "$python" -m venv "$environment" || fail "$environment could not be made (is the disk full?)"
fi

# The last line that pip has written and that a reader can use.
news() {
    sed -n 's/^ *\(Collecting\|Downloading\|Installing\|Preparing\|Building\|Processing\) /\1 /p' "$log" | tail -n 1 | cut -c -100
}

echo "set-up: installing what [$extra] needs into $environment; the log is $log"
echo "set-up: the ordinary PyTorch brings CUDA's libraries, 3 GB to download and 6 GB on disk; README names a smaller build"
# Python compiles what is imported when it is imported: a small part of what is installed.
"$environment/bin/python" -m pip install --disable-pip-version-check --progress-bar off --no-compile "$@" \
    --editable "$root[$extra]" >"$log" 2>&1 &
pip=$!
trap 'kill $pip 2>/dev/null' INT TERM
seconds=0 before=
while kill -0 $pip 2>/dev/null; do
    sleep 1
    seconds=$((seconds + 1))
    if [ $((seconds % 5)) -eq 0 ] && now=$(news) && [ "$now" != "$before" ]; then
        echo "set-up: $seconds s: $now"
        before=$now
    fi
done
if ! wait $pip; then
    grep -q "No space left on device" "$log" &&
        fail "the disk is full; $(df -Ph "$environment" | awk 'END {print $4}') are left at $environment, and pip also uses ${TMPDIR:-/tmp}"
    tail -n 20 "$log" >&2
    fail "pip failed after $seconds s; $log holds all it said"
fi
echo "set-up: done after $seconds s"
