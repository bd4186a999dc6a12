#!/usr/bin/env bash
# Make or reuse an environment with lmms-eval for tests/eval/test_lmms.py, and print its Python.
#
#   bash scripts/lib/lmms_eval.sh PYTHON DIRECTORY
#
# Of what lmms-eval names as its needs only what it imports to run a task is installed.
set -euo pipefail

REQUIREMENTS=(
    lmms-eval==0.7.3
    loguru evaluate sacrebleu portalocker lxml tabulate pytz tenacity
    aiohttp aiosignal aiohappyeyeballs frozenlist multidict propcache yarl
    pytablewriter DataProperty mbstrdecoder pathvalidate tabledata tcolorpy typepy chardet
)
exec bash "$(dirname "${BASH_SOURCE[0]}")/overlay.sh" "$1" "$2" "${REQUIREMENTS[@]}"
