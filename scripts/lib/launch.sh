# shellcheck shell=bash
# Start llava_lite/train/train_mem.py on the devices of one or many nodes with the launcher that the caller names.
# Sourced by the recipes. Variables, all optional:
#   LAUNCHER     deepspeed (default) | torchrun | accelerate
#   NUM_GPUS     processes on each node; default: every GPU (one process where there is none)
#   HOSTFILE     nodes and their slots, for LAUNCHER=deepspeed: scripts/hostfile.example
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT    one call a node, for torchrun and accelerate: scripts/slurm
#                (with deepspeed and HOSTFILE, NODE_RANK starts this node only, without ssh)
#   ZERO         2 | 3, or the path of a DeepSpeed JSON; default: the recipe's
#   LAUNCHER_CMD a command to use in place of the launcher and its options

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

zero_config() { # the recipe's stage
    case ${ZERO:-$1} in
        2 | 3) echo "$ROOT/zero${ZERO:-$1}.json" ;;
        *) echo "$ZERO" ;;
    esac
}

deepspeed_options() {
    [ -z "${NUM_GPUS:-}" ] || printf '%s\n' --num_accelerators "$NUM_GPUS"
    [ -z "${HOSTFILE:-}" ] || printf '%s\n' --hostfile "$HOSTFILE"
    [ -z "${NODE_RANK:-}" ] || printf '%s\n' --no_ssh --node_rank "$NODE_RANK"
    [ -z "${MASTER_ADDR:-}" ] || printf '%s\n' --master_addr "$MASTER_ADDR"
    [ -z "${MASTER_PORT:-}" ] || printf '%s\n' --master_port "$MASTER_PORT"
}

torchrun_options() {
    printf '%s\n' --nnodes "${NNODES:-1}" --nproc_per_node "${NUM_GPUS:-gpu}" --node_rank "${NODE_RANK:-0}"
    printf '%s\n' --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}"
}

# accelerate counts the processes of all nodes, and asks for a number where the others find one.
accelerate_options() {
    local per_node=${NUM_GPUS:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
    printf '%s\n' launch --num_machines "${NNODES:-1}" --num_processes $((per_node * ${NNODES:-1})) --machine_rank "${NODE_RANK:-0}"
    printf '%s\n' --main_process_ip "${MASTER_ADDR:-127.0.0.1}" --main_process_port "${MASTER_PORT:-29500}"
    printf '%s\n' --mixed_precision no --dynamo_backend no
}

launch_train() { # flags of llava-lite train
    local launcher=${LAUNCHER:-deepspeed} command options
    case $launcher in
        deepspeed | torchrun | accelerate) ;;
        *) echo "error: unknown LAUNCHER '$launcher'; known: deepspeed, torchrun, accelerate." >&2 && exit 2 ;;
    esac
    if [ -n "${LAUNCHER_CMD:-}" ]; then
        read -ra command <<<"$LAUNCHER_CMD"
    else
        command -v "$launcher" >/dev/null || PATH="$ROOT/.venv/bin:$PATH"
        command -v "$launcher" >/dev/null || { echo "error: no '$launcher' on PATH. Install it: pip install -e '${ROOT}[train]' -c '$ROOT/constraints.txt', or bash scripts/quickstart.sh." >&2 && exit 127; }
        mapfile -t options < <("${launcher}_options")
        command=("$launcher" "${options[@]}")
    fi
    exec "${command[@]}" "$ROOT/llava_lite/train/train_mem.py" "$@"
}
