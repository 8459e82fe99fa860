#!/usr/bin/env bash
# The tests that touch Megatron-Core (training, model, checkpoints) on its newer line: 0.19.x under Python 3.12.
#
# Makes .venv-compat beside .venv the first time: constraints.txt with another Megatron-Core (5 GB where pip offers
# only torch's CUDA build, which runs on a CPU as well). A stamp in it makes every later start instant. Where there is
# no Python 3.12 or the environment cannot be made, it prints one line `SKIPPED compat: <why>` and succeeds.
# As tests/run.sh it leaves the slow ones out, and arguments go to pytest: `tests/compat.sh -m slow`, `-k TP2`.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

megatron="megatron-core>=0.19,<0.20"
tests=(tests/training tests/model tests/checkpoint)
venv="$PWD/.venv-compat"
stamp="$venv/.compat-installed"
wanted="$megatron $(cksum setup.py constraints.txt examples/setup_env.sh) $PWD"

skip() { printf 'SKIPPED compat: %s\n' "$*"; exit 0; }

find_python() {
    local candidate
    # pyenv puts a python3.12 on PATH that only says which versions it has, unless one of them is selected.
    for candidate in python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12; do
        if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    return 1
}

# In a subshell, because setup_env.sh ends the script that sources it when it fails.
install() (
    export VIRTUAL_ENV="$venv"
    source examples/setup_env.sh
    setup_say "installing $megatron over it"
    setup_pip "$megatron"
)

if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    if ! [ -x "$venv/bin/python" ]; then
        python=$(find_python) || skip "no python3.12 with venv here, which Megatron-Core 0.19 needs"
        "$python" -m venv "$venv" >/dev/null || skip "$python could not make $venv"
    fi
    install || skip "$venv could not be set up; see the messages above"
    printf '%s\n' "$wanted" >"$stamp"
fi
# One test trains there and goes on here.
if [ -x .venv/bin/python ]; then
    export MEGALONG_OLDER_PYTHON="$PWD/.venv/bin/python"
fi
exec "$venv/bin/python" -m pytest -rfEs -m "not slow" -n 2 --dist loadgroup --no-loadscope-reorder "${tests[@]}" "$@"
