#!/bin/sh
# Write constraints.txt: every version of every dependency, for Python 3.11 to 3.13. Called by `make constraints`.
set -eu
cd "$(dirname "$0")/.."
uv=$(command -v uv || echo .venv/bin/uv)
[ -x "$uv" ] || { echo "constraints: needs uv: .venv/bin/python -m pip install uv" >&2; exit 1; }
{
    echo "# Every version the project is built and tested with, for Python 3.11 to 3.13."
    echo "# Written by \`make constraints\`; not edited by hand."
    "$uv" pip compile --quiet --upgrade --universal --python-version 3.11 --all-extras \
        --no-header --no-annotate --no-emit-index-url --no-emit-find-links pyproject.toml
} >constraints.txt.new
mv constraints.txt.new constraints.txt
