# shellcheck shell=bash
# Score a model on a benchmark, on all GPUs of this machine. Sourced by scripts/v1_5/eval.
#   MODEL   directory or hub id; also the first argument of a script
#   DATA    LLaVA's playground/data/eval (default), or the directory of the benchmark
#   NUM_GPUS, or CUDA_VISIBLE_DEVICES as in LLaVA's scripts: processes that share the questions

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
command -v python >/dev/null || PATH="$ROOT/.venv/bin:$PATH"

evaluate() { # benchmark, flags of its script, then those of the caller: [MODEL] [flags of llava-lite eval]
    local flags=() benchmark=$1 processes
    shift
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        flags+=("$1")
        shift
    done
    shift
    if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
        MODEL=$1
        shift
    fi
    if [ -z "${MODEL:-}" ]; then
        echo "error: no model. MODEL=DIR bash scripts/v1_5/eval/$benchmark.sh, or its directory as the first argument." >&2
        exit 2
    fi
    flags+=(--model "$MODEL" --data "${DATA:-./playground/data/eval}" "$@")
    processes=${NUM_GPUS:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
    if [ "$processes" -gt 1 ]; then
        exec python -m torch.distributed.run --standalone --nproc_per_node "$processes" -m llava_lite.cli eval "$benchmark" "${flags[@]}"
    fi
    exec python -m llava_lite.cli eval "$benchmark" "${flags[@]}"
}
