#!/usr/bin/env bash
# The tests, from a bare checkout: sets the environment up, then runs pytest on all but the slow ones.
# Arguments go to pytest: `tests/run.sh tests/data`, `tests/run.sh -m slow`, `tests/run.sh -n 0` (in one process).
#
# Two files run at a time: most tests wait for something (ranks for each other, a process for its start) half of their
# time. More than two would need more than two cores: a file may start four ranks. tests/conftest.py says which files
# must not run side by side.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source examples/setup_env.sh
exec python -m pytest -rfEs -m "not slow" -n 2 --dist loadgroup --no-loadscope-reorder "$@"
