#!/usr/bin/env bash
# The whole story on this machine, on CPU, without a download beyond the Python packages themselves:
# corpus, tokenizer, dataset, import, pretraining, context extension, export, fine-tuning, report.
#
#     bash examples/quickstart.sh [--output DIR]      (default: quickstart-run)
#
# Started again with the same folder it goes on where it stopped.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"
exec python -m megalong quickstart "$@"
