#!/bin/sh
# Makes a virtual environment with the kit in it. Called by make; see the variables in the Makefile.
set -eu
venv=$1
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || {
    echo "Python 3.11, 3.12 or 3.13 is needed; found $("$python" --version). Try: make PYTHON=python3.12 ..." >&2
    exit 2
}
echo "Installing into $venv what is not there yet: 1.9 GB, a few minutes, once." >&2
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check"

# torch first and by itself. On Linux PyPI's newest torch is a CUDA build of several GB; without an
# NVIDIA GPU the index of CPU builds serves the same version in a tenth of that.
version=$(sed -n 's/^torch==//p' constraints.txt)
torch=${TORCH:-torch==$version}
index=${TORCH_INDEX:-}
if ! $pip show -q torch 2>/dev/null; then
    if [ -n "$index" ]; then
        $pip install --quiet --index-url "$index" "$torch"
    elif [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then
        # a mirror may carry a CPU file of this version itself; --only-binary and --no-deps keep CUDA packages out
        $pip install --quiet --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch" 2>/dev/null ||
            $pip install --quiet --no-deps "$torch"
    else
        $pip install --quiet "$torch"
    fi
fi
$pip install --quiet -c constraints.txt -e '.[test]'
