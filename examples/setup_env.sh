# Sourced by examples/quickstart.sh and tests/run.sh: puts `python` and `megalong` on PATH.
#
# Uses the active virtual environment, else .venv in the checkout (made with Python 3.11 or newer). If the active
# environment has megalong of another checkout, it is not changed and .venv is used instead: otherwise its users would
# run other code. Installs the versions of constraints.txt, with a CPU build of torch if there is no NVIDIA GPU. A stamp
# in the environment records what was installed for which checkout, so the next start takes no time. Ends the sourcing
# script on failure.

setup_root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

setup_say() { printf 'set-up: %s\n' "$*" >&2; }
setup_fail() { setup_say "$*"; exit 1; }

setup_is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

setup_find_python() {
    local name
    for name in python3.11 python3.12 python3; do
        if command -v "$name" >/dev/null && setup_is_recent "$name"; then
            command -v "$name"
            return
        fi
    done
    setup_fail "needs Python 3.11 or newer, and none of python3.11, python3.12, python3 is; install it"
}

# The folder of the megalong installed in an environment: the checkout if it is editable; empty without megalong.
setup_installed() {
    "$1" -I -c '
import importlib.metadata, json, sys, urllib.parse
try:
    found = importlib.metadata.distribution("megalong")
except importlib.metadata.PackageNotFoundError:
    sys.exit()
url = json.loads(found.read_text("direct_url.json") or "{}").get("url", "")
print(urllib.parse.unquote(url.removeprefix("file://")) if url.startswith("file://") else found.locate_file(""))'
}

# Whether an environment has megalong of another checkout that still exists; sets `setup_other` to its folder.
setup_has_another() {
    setup_other=$(setup_installed "$1")
    [ -n "$setup_other" ] && [ -d "$setup_other" ] && ! [ "$setup_other" -ef "$setup_root" ]
}

setup_is_active() {
    [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ] || return 1
    [ "$VIRTUAL_ENV" -ef "$setup_root/.venv" ] && return 0
    setup_is_recent "$VIRTUAL_ENV/bin/python" \
        || setup_fail "the active environment $VIRTUAL_ENV has a Python older than 3.11; deactivate it and start again"
    setup_has_another "$VIRTUAL_ENV/bin/python" || return 0
    setup_say "the active environment $VIRTUAL_ENV has megalong of $setup_other and is not changed; using" \
        "$setup_root/.venv (to use the active one for this checkout: pip install -e $setup_root)"
    return 1
}

setup_environment() {
    if ! setup_is_active; then
        export VIRTUAL_ENV="$setup_root/.venv"
        if ! setup_is_recent "$VIRTUAL_ENV/bin/python"; then
            local python
            python=$(setup_find_python) || exit 1
            setup_say "making $VIRTUAL_ENV with $python"
            "$python" -m venv "$VIRTUAL_ENV" \
                || setup_fail "could not make $VIRTUAL_ENV (on Debian and Ubuntu, install python3-venv)"
        fi
    fi
    export PATH="$VIRTUAL_ENV/bin:$PATH"
    hash -r
}

setup_has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

setup_pip() { python -m pip install -qq --disable-pip-version-check --no-input "$@"; }

# PyPI's torch for Linux needs gigabytes of CUDA libraries, so PyTorch's own index of CPU builds is tried first. If it
# cannot be reached, the same version is installed from pip's configured sources.
setup_cpu_torch() {
    local version
    version=$(sed -n 's/^torch==//p' "$setup_root/constraints.txt")
    if python -c "import sys, importlib.metadata as m; sys.exit(m.version('torch').split('+')[0] != '$version')" \
        2>/dev/null; then
        return
    fi
    setup_say "installing torch $version for CPU (no NVIDIA GPU found)"
    PIP_INDEX_URL=https://download.pytorch.org/whl/cpu setup_pip --no-deps --timeout 15 --retries 1 \
        "torch==$version" >/dev/null 2>&1 \
        || setup_pip "torch==$version" -c "$setup_root/constraints.txt" \
        || setup_fail "could not install torch $version; see pip's message above"
}

setup_main() {
    setup_environment
    local accelerator=cpu stamp wanted
    setup_has_gpu && accelerator=gpu
    stamp="$VIRTUAL_ENV/.megalong-installed"
    wanted="$accelerator $(cd -- "$setup_root" && cksum setup.py constraints.txt) $setup_root"
    if setup_has_another "$VIRTUAL_ENV/bin/python"; then
        setup_say "$VIRTUAL_ENV has megalong of $setup_other; replacing it by this checkout, which owns the environment"
    elif [ "$setup_other" -ef "$setup_root" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return
    fi
    python -m pip --version >/dev/null 2>&1 || python -m ensurepip >/dev/null 2>&1 \
        || setup_fail "the environment $VIRTUAL_ENV has no pip; install pip into it"
    if [ "$accelerator" = cpu ] && [ "$(uname -s)" = Linux ]; then
        setup_cpu_torch
    fi
    setup_say "installing megalong and its dependencies into $VIRTUAL_ENV"
    setup_pip -e "$setup_root[test]" -c "$setup_root/constraints.txt" \
        || setup_fail "could not install megalong; see pip's message above"
    printf '%s\n' "$wanted" >"$stamp"
    setup_say "done"
}

setup_main
