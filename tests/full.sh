#!/usr/bin/env bash
# Every test, quick and slow, on both lines of Megatron-Core: what a release needs, and no change has the time for.
# A line fails alone: the others still run, and the exit status says that one did.
set -uo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

failed=()
line() {
    printf '\n== %s (after %d s)\n' "$*" "$SECONDS"
    "$@" || failed+=("$*")
}
line bash tests/run.sh
line bash tests/run.sh -m slow --durations=15
line bash tests/compat.sh
line bash tests/compat.sh -m slow --durations=15

printf '\n== %d s; failed: %d\n' "$SECONDS" "${#failed[@]}"
printf '   %s\n' "${failed[@]}"
[ "${#failed[@]}" -eq 0 ]
