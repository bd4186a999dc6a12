#!/usr/bin/env bash
# Q-Bench dev: accuracy.
#
#   MODEL=checkpoints/llava-v1.5-7b bash scripts/v1_5/eval/qbench.sh [flags of llava-lite eval]
#
# Variables: MODEL, DATA, NUM_GPUS in ../../lib/eval.sh. The data is that of LLaVA's playground/data/eval; what is missing is listed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/eval.sh"
evaluate qbench -- "$@"
