#!/usr/bin/env bash
# Parity on one GPU, without a network: `bash tests/gpu/run.sh [FOLDER_OF_WHEELS] [pytest arguments]`.
#
# Uses the python3 at hand and its torch. Packages that are missing there (megatron-core, pydantic, …) can be brought as
# wheels in a folder, .whl in the checkout by default; they go into a temporary folder and nothing is installed.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."

wheels=.whl
if [ $# -gt 0 ] && [ -d "$1" ]; then
    wheels=$1
    shift
fi
if compgen -G "$wheels/*.whl" >/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf -- "$site"' EXIT
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl
    export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}" NVTE_FRAMEWORK=pytorch
else
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi
nvidia-smi -L || true
python3 -m pytest -rs tests/gpu "$@"
