#!/usr/bin/env bash
# Makes the virtual environment ($VENV, .venv if unset) and installs the project into it, editable.
# A stamp in the environment says what was installed: nothing is done while it holds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv}
python=$venv/bin/python
stamp=$venv/mimo-strategy.stamp

fingerprint() {
    "$python" -V && pwd && cat pyproject.toml constraints.txt
}

if ! "$python" -c '' 2>/dev/null; then
    if [ -n "$(ls -A "$venv" 2>/dev/null)" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
        echo "$venv is neither empty nor a virtual environment: it is left alone. Choose another VENV." >&2
        exit 1
    fi
    base=$(scripts/find_python.sh)
    echo "Making $venv with $base ($("$base" -V))."
    "$base" -m venv --clear "$venv"
fi

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
    echo "$venv has $("$python" -V), but 3.12 or later is needed: remove it or choose another VENV." >&2
    exit 1
fi
if [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint | cksum)" ]; then
    echo "$venv is up to date."
    exit
fi

rm -f "$stamp"
echo "Installing mimo-strategy and what it needs into $venv."
if ! "$python" -c 'import torch' 2>/dev/null; then
    echo "torch with its CUDA libraries is a download of 2 to 3 GB and takes some minutes; it runs without a GPU too."
    free=$(df -Pk "$venv" | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free" -ge 8 ] || echo "Only $free GB are free on the disk of $venv; the installation takes about 8." >&2
fi
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip
[ -t 1 ] || export PIP_QUIET=1 # on a terminal pip shows its progress
"$python" -m pip install --disable-pip-version-check -e '.[examples,dev]' -c constraints.txt
fingerprint | cksum >"$stamp"

echo "Done. The environment is in $venv."
if nvidia-smi >/dev/null 2>&1; then
    echo "For the GPU kernels (Transformer Engine, Mamba), which takes a CUDA toolkit and a while to compile:"
    echo "  $python -m pip install --no-build-isolation -e '.[gpu]' -c constraints.txt"
fi
