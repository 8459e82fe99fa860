#!/usr/bin/env bash
# The first run on a GPU, without a network: `bash tests/gpu/first_run.sh [FOLDER_OF_WHEELS] [arguments]`.
#
# first_run.py says what it does and what it takes; wheels.sh how packages that are missing there can be brought.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
source tests/gpu/wheels.sh
bring_wheels "$@"
python3 tests/gpu/first_run.py "${arguments[@]}"
