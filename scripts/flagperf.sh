#!/usr/bin/env bash
# FlagPerf's LLaVA-1.5 case: stages 1 and 2, MMMU, its printed lines, and our own figures beside the published ones.
#
#   bash scripts/flagperf.sh DATA_DIR CONFIG [--size 7b | 13b] [--from_log] [--json FILE] [--flags "FLAGS OF TRAIN"]
#
# DATA_DIR is laid out as FlagPerf's; CONFIG is a vendor's config, such as config_A800x1x8.py, which is read and not run.
# Variables: LAUNCHER, NUM_GPUS, HOSTFILE, NNODES, ZERO (a vendor's DeepSpeed JSON) in lib/launch.sh.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
command -v python >/dev/null || PATH="$ROOT/.venv/bin:$PATH"
exec python -m llava_lite.cli flagperf "$@"
