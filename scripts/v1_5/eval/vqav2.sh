#!/usr/bin/env bash
# VQAv2 test-dev: answers for the server, in the format of its upload (EvalAI 830).
#
#   MODEL=checkpoints/llava-v1.5-7b bash scripts/v1_5/eval/vqav2.sh [flags of llava-lite eval]
#
# Variables: MODEL, DATA, NUM_GPUS in ../../lib/eval.sh. The data is that of LLaVA's playground/data/eval; what is missing is listed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/eval.sh"
evaluate vqav2 --split test-dev -- "$@"
