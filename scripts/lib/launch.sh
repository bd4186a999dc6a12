# shellcheck shell=bash
# Start llava_lite/train/train_mem.py on the devices of one or many nodes with the launcher that the caller names.
# Sourced by the recipes. Variables, all optional:
#   LAUNCHER     deepspeed (default) | torchrun | accelerate | srun (this call is one rank, a task of srun: scripts/slurm)
#   NUM_GPUS     processes on each node; default: every GPU (one process where there is none)
#   HOSTFILE     nodes and their slots, for LAUNCHER=deepspeed: scripts/hostfile.example
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT    one call a node, for torchrun and accelerate: scripts/slurm
#                (with deepspeed and HOSTFILE, NODE_RANK starts this node only, without ssh)
#   ZERO         2 | 3, or the path of a DeepSpeed JSON; default: the recipe's. scripts/zero3_offload_nvme.json wants a directory, or a
#                link to one, /local_nvme on the disk of every node, and libaio (apt-get install libaio-dev)
#   LAUNCHER_ARGS  further options of the launcher: LAUNCHER_ARGS="--include worker-0:0,1"
#   LAUNCHER_CMD a command to use in place of the launcher and its options
#   DRY_RUN      anything: print the command, start nothing
# Where a node has several networks, NCCL_SOCKET_IFNAME names the one on which ranks meet and NCCL_IB_HCA the adapters that
# carry their data; a wrong guess of NCCL's is slow, or hangs. All launchers hand NCCL_* on to the other nodes.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
# DeepSpeed calls collectives by names that torch 2.13 calls old; the warning is not for users.
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning:torch.distributed.c10d_logger}

die() {
    echo "error: $*" >&2
    exit 2
}

zero_config() { # the recipe's stage
    case ${ZERO:-$1} in
        2 | 3) echo "$ROOT/zero${ZERO:-$1}.json" ;;
        *) echo "$ZERO" ;;
    esac
}

deepspeed_options() {
    [ -z "${NODE_RANK:-}" ] || [ -n "${HOSTFILE:-}" ] || die "NODE_RANK=$NODE_RANK with LAUNCHER=deepspeed needs HOSTFILE; or use LAUNCHER=torchrun."
    [ -z "${NUM_GPUS:-}" ] || printf '%s\n' --num_accelerators "$NUM_GPUS"
    [ -z "${HOSTFILE:-}" ] || printf '%s\n' --hostfile "$HOSTFILE"
    [ -z "${NODE_RANK:-}" ] || printf '%s\n' --no_ssh --node_rank "$NODE_RANK"
    [ -z "${MASTER_ADDR:-}" ] || printf '%s\n' --master_addr "$MASTER_ADDR"
    [ -z "${MASTER_PORT:-}" ] || printf '%s\n' --master_port "$MASTER_PORT"
}

processes_per_node() { echo "${NUM_GPUS:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"; }

torchrun_options() {
    printf '%s\n' --nnodes "${NNODES:-1}" --nproc_per_node "$(processes_per_node)" --node_rank "${NODE_RANK:-0}"
    printf '%s\n' --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}"
}

# accelerate counts the processes of all nodes. --multi_gpu is its word for several processes; a CPU will do.
accelerate_options() {
    local total
    total=$(($(processes_per_node) * ${NNODES:-1}))
    printf '%s\n' launch --num_machines "${NNODES:-1}" --num_processes "$total" --machine_rank "${NODE_RANK:-0}"
    printf '%s\n' --main_process_ip "${MASTER_ADDR:-127.0.0.1}" --main_process_port "${MASTER_PORT:-29500}"
    printf '%s\n' --mixed_precision no --dynamo_backend no
    [ "$total" -eq 1 ] || printf '%s\n' --multi_gpu
}

# One rank, which srun has started: nothing stands between a signal and the process that saves a checkpoint when it comes.
srun_ranks() { # sets the variables that a launcher would
    [ -n "${SLURM_PROCID:-}" ] || die "LAUNCHER=srun is for a task of srun, which has SLURM_PROCID; see scripts/slurm/finetune.sbatch."
    [ -n "${MASTER_ADDR:-}" ] && [ -n "${MASTER_PORT:-}" ] || die "LAUNCHER=srun needs MASTER_ADDR and MASTER_PORT, equal on all nodes."
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    # "8(x4)": eight tasks on each of four nodes.
    export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[^0-9]*}
}

# The command that the flags of training are added to.
launcher_command() { # sets COMMAND
    local launcher=${LAUNCHER:-deepspeed} options
    if [ -n "${LAUNCHER_CMD:-}" ]; then
        read -ra COMMAND <<<"$LAUNCHER_CMD"
        return
    fi
    case $launcher in
        deepspeed | torchrun | accelerate) ;;
        srun)
            srun_ranks
            COMMAND=(python)
            return
            ;;
        *) die "unknown LAUNCHER '$launcher'; known: deepspeed, torchrun, accelerate, srun." ;;
    esac
    command -v "$launcher" >/dev/null || PATH="$ROOT/.venv/bin:$PATH"
    command -v "$launcher" >/dev/null || die "no '$launcher' on PATH; bash scripts/quickstart.sh makes an environment, or: pip install -e '${ROOT}[train]' -c '$ROOT/constraints.txt'"
    options=$("${launcher}_options")
    mapfile -t COMMAND <<<"$launcher${options:+$'\n'$options}"
    # shellcheck disable=SC2206  # Several options in one variable.
    COMMAND+=(${LAUNCHER_ARGS:-})
}

launch_train() { # flags of llava-lite train
    local COMMAND
    launcher_command
    if [ -n "${DRY_RUN:-}" ]; then
        printf '%q ' "${COMMAND[@]}" "$ROOT/llava_lite/train/train_mem.py" "$@"
        echo
        return
    fi
    exec "${COMMAND[@]}" "$ROOT/llava_lite/train/train_mem.py" "$@"
}
