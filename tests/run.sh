#!/usr/bin/env bash
# The tests, from a bare checkout: sets the environment up, then runs pytest on all but the slow ones.
# Arguments go to pytest: `tests/run.sh tests/data`, `tests/run.sh -m slow`.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source examples/setup_env.sh
exec python -m pytest -rs -m "not slow" "$@"
