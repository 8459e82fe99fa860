# Sourced by run.sh and first_run.sh, in the checkout: `bring_wheels [FOLDER_OF_WHEELS] [other arguments]`.
#
# Packages that are missing here (megatron-core, pydantic, …) can be brought as wheels in a folder, .whl in the checkout
# by default. They go into a temporary folder that lies first on the path, and nothing is installed. What is left of the
# arguments is in the array `arguments`.
bring_wheels() {
    local folder=.whl
    if [ $# -gt 0 ] && [ -d "$1" ]; then
        folder=$1
        shift
    fi
    arguments=("$@")
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
    if compgen -G "$folder/*.whl" >/dev/null; then
        site=$(mktemp -d)
        trap 'rm -rf -- "$site"' EXIT
        python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$folder"/*.whl
        export PYTHONPATH="$site:$PYTHONPATH" NVTE_FRAMEWORK=pytorch
    fi
}
