#!/usr/bin/env bash
# The whole pipeline on this machine, on CPU; only Python packages are downloaded:
# corpus, tokenizer, dataset, import, pretraining, context extension, export, fine-tuning, report.
#
#     bash examples/quickstart.sh [--output DIR]      (default: quickstart-run)
#
# Start it again with the same folder to resume.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"
exec python -m megalong quickstart "$@"
