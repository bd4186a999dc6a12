#!/usr/bin/env bash
# VizWiz test: answers for the server, in the format of its upload (EvalAI 2185).
#
#   MODEL=checkpoints/llava-v1.5-7b bash scripts/v1_5/eval/vizwiz.sh [flags of llava-lite eval]
#
# Variables: MODEL, DATA, NUM_GPUS in ../../lib/eval.sh. The data is that of LLaVA's playground/data/eval; what is missing is listed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/eval.sh"
evaluate vizwiz --split test -- "$@"
