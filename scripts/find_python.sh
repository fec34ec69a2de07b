#!/usr/bin/env bash
# Prints the path of a Python that can hold the project. $PYTHON, if set, is the only candidate.
# Python 3.12 and 3.13 come first. On 3.14 megatron-core has to be compiled, and beyond it torch 2.11 has no wheels.
set -euo pipefail

# A command that exists may still fail, as pyenv's shims do, so each candidate has to run and to tell its path.
probe='
import sys, sysconfig
import ensurepip, venv
newest = int(sys.argv[1])
fits = (3, 12) <= sys.version_info[:2] <= (3, newest) and not sysconfig.get_config_var("Py_GIL_DISABLED")
sys.exit(print(sys.executable) if fits else 1)
'

candidates() {
    type -ap python3.12 python3.13 python3 python3.14 python || true
    printf '%s\n' "${PYENV_ROOT:-$(pyenv root 2>/dev/null || echo "${HOME-}/.pyenv")}"/versions/*/bin/python3
    uv python find --system '>=3.12,<3.14' 2>/dev/null || true
}

first_fit() { # first_fit NEWEST_MINOR < candidates
    local candidate
    while IFS= read -r candidate; do
        "$candidate" -c "$probe" "$1" 2>/dev/null </dev/null && return
    done
    return 1
}

if [ -n "${PYTHON-}" ]; then
    first_fit 14 <<<"$PYTHON" && exit
    echo "PYTHON=$PYTHON does not run, is not Python 3.12 to 3.14, or lacks the venv and ensurepip modules." >&2
    exit 1
fi

found=$(candidates)
first_fit 13 <<<"$found" && exit

if type uv >/dev/null 2>&1; then
    echo "No Python 3.12 or 3.13 found: asking uv to install 3.12." >&2
    uv python install 3.12 >&2 && uv python find --system 3.12 | first_fit 12 && exit
fi
first_fit 14 <<<"$found" && exit

printf '%s\n' >&2 \
    "No Python 3.12 to 3.14 with the venv and ensurepip modules was found. Install one in any of these ways:" \
    "  Debian 13, Ubuntu 24.04 or later:  sudo apt-get install python3 python3-venv python3-dev" \
    "  Ubuntu 22.04:                      sudo add-apt-repository ppa:deadsnakes/ppa" \
    "                                     sudo apt-get install python3.12 python3.12-venv python3.12-dev" \
    "  uv (no root needed):               curl -LsSf https://astral.sh/uv/install.sh | sh   (then open a new shell)" \
    "  pyenv:                             pyenv install 3.12" \
    "Then run 'make setup' again, or name the interpreter: make setup PYTHON=/path/to/python3"
exit 1
