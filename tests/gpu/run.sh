#!/usr/bin/env bash
# Parity on one GPU, without a network: `bash tests/gpu/run.sh [FOLDER_OF_WHEELS] [pytest arguments]`.
#
# Uses the python3 at hand and its torch; wheels.sh says how packages that are missing there can be brought.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
source tests/gpu/wheels.sh
bring_wheels "$@"
nvidia-smi -L || true
python3 -m pytest -rs tests/gpu "${arguments[@]}"
