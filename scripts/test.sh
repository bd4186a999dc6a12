#!/usr/bin/env bash
# Run the test suite in the environment that quickstart.sh uses, made first if it is not there.
#
#   bash scripts/test.sh [--slow | --oldest | --renew-golden] [arguments of pytest]
#
#   --slow     also the tests that take minutes: ranks, launchers, complete stages
#   --oldest   the core of the suite with the oldest transformers that is supported, in an environment of its own
#   --renew-golden   write the trajectories of tests/golden again, and run nothing else
#
# The suite and its directories run in a process for each core, as far as the memory reaches; `-n 0` runs them in one.
# Single files and the slow tests run in one: ranks and kills need the cores themselves.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/env.sh"

# Packaging, scripts and the tiny world do not depend on the version of transformers.
NOT_CORE=(--ignore=tests/test_package.py --ignore=tests/test_readme.py --ignore=tests/docs --ignore=tests/scripts --ignore=tests/playground)

constraints=$ROOT/constraints.txt markers="not slow" paths=(tests) parallel=(--dist loadfile)
while [ $# -gt 0 ]; do
    case $1 in
        --slow) markers="" parallel=() ;;
        --oldest) constraints=$ROOT/constraints-5.17.txt paths=(tests "${NOT_CORE[@]}") ;;
        --renew-golden) paths=(tests/train/test_golden.py -k kept --renew-golden) parallel=() ;;
        --help | -h) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" && exit 0 ;;
        *) break ;;
    esac
    shift
done

cd "$ROOT"
ensure_environment "$constraints"
has_gpu || markers="${markers:+$markers and }not gpu"
build_ops
fetch_model_tests
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
for argument in "$@"; do
    [ ! -e "${argument%%::*}" ] || paths=()
    [ ! -f "${argument%%::*}" ] || parallel=()
done
[ ${#parallel[@]} -eq 0 ] ||
    parallel+=(-n "$(python -c 'import psutil; print(max(1, min(psutil.cpu_count(), psutil.virtual_memory().available >> 32)))')")
exec python -m pytest -m "$markers" "${parallel[@]}" "${paths[@]}" "$@"
