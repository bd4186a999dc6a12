# shellcheck shell=bash
# Make one Python environment for everything in this repository, once, and report what a machine lacks before it is tried.
# Sourced by quickstart.sh and test.sh; ROOT is the clone.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
EXTRAS=train,peft,quant,eval,serve,dev,docs
MIN_FREE_GIB=4

say() { printf '%s\n' "$@" >&2; }

fail() {
    say "error: $*"
    exit 1
}

# The first interpreter that is new enough: $PYTHON, else python3, else a numbered one. transformers 5.23 needs 3.11, so 3.10 comes last.
find_python() {
    local candidate
    for minimum in 11 10; do
        for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
            if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, $minimum))" 2>/dev/null; then
                command -v "$candidate"
                return
            fi
        done
    done
    fail "no Python 3.10 or newer (tried ${PYTHON:-python3}). Install one: sudo apt-get install python3 python3-venv python3-dev; or set PYTHON=/path/to/python."
}

# Every missing thing at once, with the line that installs it.
check_machine() { # python
    local python=$1 lacks=() packages=()
    if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        lacks+=("the venv module of $python") packages+=(python3-venv)
    fi
    if ! "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'; then
        lacks+=("Python.h of $python") packages+=(python3-dev)
    fi
    if ! printf '#include <vector>\nint main() { return std::vector<int>{0}[0]; }\n' | ${CXX:-c++} -std=c++17 -fopenmp -fsyntax-only -x c++ - 2>/dev/null; then
        lacks+=("a C++ compiler (${CXX:-c++}), with which DeepSpeed builds its CPU communication") packages+=(g++)
    fi
    if [ ${#lacks[@]} -gt 0 ]; then
        say "This machine lacks:"
        printf '  - %s\n' "${lacks[@]}" >&2
        fail "install it with: sudo apt-get update && sudo apt-get install -y ${packages[*]}"
    fi
}

check_disk() { # directory that the environment goes to
    local parent=$1 free_gib
    while [ ! -d "$parent" ]; do parent=$(dirname "$parent"); done
    free_gib=$(($(df -Pk "$parent" | awk 'NR == 2 { print $4 }') / 1048576))
    if [ "$free_gib" -lt "$MIN_FREE_GIB" ]; then
        fail "$free_gib GiB free under $parent, $MIN_FREE_GIB needed (10 with a CUDA build of torch). Free some, or put the environment elsewhere: LLAVA_LITE_VENV=/path."
    fi
}

# Run a long command with its output in a log; one line of progress meanwhile, the log's end if it fails.
quietly() { # title, log, command...
    local title=$1 log=$2 status=0 start=$SECONDS
    shift 2
    say "$title (log: $log)"
    "$@" >"$log" 2>&1 &
    local pid=$!
    trap 'kill "$pid" 2>/dev/null; exit 130' INT TERM
    while kill -0 "$pid" 2>/dev/null; do
        [ -t 2 ] && printf '\r  %4d s  %-70.70s' $((SECONDS - start)) "$(tail -n 1 "$log" | tr -d '\r')" >&2
        sleep 1
    done
    wait "$pid" || status=$?
    trap - INT TERM
    [ -t 2 ] && printf '\r%80s\r' '' >&2
    if [ "$status" -ne 0 ]; then
        tail -n 20 "$log" >&2
        fail "$title: failed with status $status; the full output is in $log."
    fi
    say "  done in $((SECONDS - start)) s"
}

# What an environment was installed from; it is written last, so an interrupted installation is begun again.
stamp_of() { # constraints file
    { echo "$EXTRAS"; cat "$ROOT/pyproject.toml" "$1"; } | cksum
}

# Make or reuse the environment and put it first on PATH. LLAVA_LITE_VENV names another directory than ./.venv.
ensure_environment() { # constraints file
    local constraints=$1 default=.venv python index=()
    [ "$(basename "$constraints")" = constraints.txt ] || default=.venv-$(basename "$constraints" .txt | sed 's/^constraints-//')
    VENV=${LLAVA_LITE_VENV:-$ROOT/$default}
    if [ "$(cat "$VENV/.llava_lite" 2>/dev/null)" != "$(stamp_of "$constraints")" ]; then
        if [ -d "$VENV" ] && [ ! -f "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV")" ]; then
            fail "$VENV exists and is no Python environment. Name another directory: LLAVA_LITE_VENV=/path."
        fi
        check_disk "$VENV"
        if [ ! -x "$VENV/bin/python" ]; then
            python=$(find_python)
            check_machine "$python"
            "$python" -m venv "$VENV"
        else
            check_machine "$VENV/bin/python"
        fi
        [ -z "${TORCH_INDEX_URL:-}" ] || index=(--extra-index-url "$TORCH_INDEX_URL")
        quietly "Installing llava_lite into $VENV" "$VENV/install.log" \
            "$VENV/bin/python" -m pip install "${index[@]}" -c "$constraints" -e "${ROOT}[$EXTRAS]"
        rm -rf "$VENV/torch_extensions"
        stamp_of "$constraints" >"$VENV/.llava_lite"
    fi
    export VENV PATH="$VENV/bin:$PATH"
    # Two clones may share an environment: the code is always that of this clone.
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$VENV/torch_extensions}
}

has_gpu() { python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; }

# torch locks an extension while it builds it; a build that was killed leaves the lock, and every later run waits for ever.
remove_dead_locks() {
    local lock
    find "$TORCH_EXTENSIONS_DIR" -maxdepth 3 -name lock -type f 2>/dev/null | while read -r lock; do
        if [ -z "$(find /proc/[0-9]*/fd -lname "$lock" -print -quit 2>/dev/null)" ]; then
            say "Removing $lock, left by a build that was killed."
            rm -f "$lock"
        fi
    done
}

# DeepSpeed's ranks on a CPU exchange sums through shared memory, 69 MB a rank, and a run that ends leaves it there.
remove_dead_buffers() {
    local buffer
    for buffer in /dev/shm/deepspeed_allreduce_buffer_*; do
        [ -O "$buffer" ] && ! grep -qsF "$buffer" /proc/[0-9]*/maps && rm -f "$buffer"
    done
    return 0
}

# Fetch transformers' own tests of models, which only its source distribution holds; once a version, 10 MB, half a minute.
# Offline nothing is lost: tests/model/test_common.py reports that it is skipped.
fetch_model_tests() {
    local version directory parent
    version=$(python -c 'from importlib.metadata import version; print(version("transformers"))')
    parent=$(python -c 'import sys; print(sys.prefix)')/transformers_tests directory=$parent/$version
    [ ! -d "$directory" ] || return 0
    mkdir -p "$parent"
    say "Fetching the tests of transformers $version (log: $parent/fetch.log)"
    if python -m pip download --no-deps --no-binary transformers --dest "$parent/source" "transformers==$version" >"$parent/fetch.log" 2>&1 &&
        tar -xzf "$parent/source/transformers-$version.tar.gz" -C "$parent/source" "transformers-$version/tests"; then
        mv "$parent/source/transformers-$version/tests" "$directory"
    else
        say "  not there: $(tail -n 1 "$parent/fetch.log"). Its tests of models are skipped."
    fi
    rm -rf "$parent/source"
}

# Build DeepSpeed's shared-memory communication, which ranks on one CPU host use; seconds once, nothing afterwards.
build_ops() {
    mkdir -p "$TORCH_EXTENSIONS_DIR"
    remove_dead_locks
    remove_dead_buffers
    [ -z "$(find "$TORCH_EXTENSIONS_DIR" -name deepspeed_shm_comm.so -print -quit)" ] || return 0
    quietly "Building DeepSpeed's CPU communication" "$VENV/build.log" env DS_ACCELERATOR=cpu python -c \
        'from deepspeed.accelerator import get_accelerator; get_accelerator().create_op_builder("ShareMemCommBuilder").load()'
}
