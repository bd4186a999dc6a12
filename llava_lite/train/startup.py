"""What happens to a process before its first step: logging, checks of flags and machine, joining the other ranks.

An error of the preparation ends the process with one line on the terminal instead of a traceback on every rank.
"""

import atexit
import logging
import os
import re
import shlex
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from llava_lite.distributed.processes import is_mapped
from llava_lite.distributed.ranks import everyone, let_threads_finish
from llava_lite.distributed.watch import start_watch
from llava_lite.errors import get_sentence
from llava_lite.train.arguments.legacy import machine_has

logger = logging.getLogger(__name__)

# What transformers says in a ValueError of an optimizer that lacks a package or a flag, and not a model.
CANNOT_BE_MADE = re.compile("install|import|optim_target_modules")
# Optimizers, by a part of their name, with state in hooks or beside state_dict(), or with objects in it, which no safe
# load makes again.
NOT_RESUMED = ("galore", "apollo", "adalomo")
TRACEBACK = "LLAVA_LITE_TRACEBACK"
FOR_PEOPLE = (ValueError, OSError, ImportError)
# The attribute of an error that names an environment variable: the rank for which it is 0 reports the error.
REPORTED_BY_FIRST_OF = "reported_by_first_of"
# A start that makes shared memory has joined all ranks by then, or never will.
OLD_BUFFER_S = 600


@contextmanager
def same_for_the_node():
    """Mark an error raised inside as the same on every rank of a node, so that only the first one reports it."""
    try:
        yield
    except FOR_PEOPLE as error:
        setattr(error, REPORTED_BY_FIRST_OF, "LOCAL_RANK")
        raise


@contextmanager
def errors_in_one_line(kinds: tuple[type[Exception], ...] = FOR_PEOPLE):
    """End the process with status 1 and one line for an error raised inside: a ValueError, OSError or ImportError.

    These are for the person who wrote the flags. LLAVA_LITE_TRACEBACK=1 shows their traceback too; any other error is
    raised as it is. kinds: other errors than these, such as DataError once the run trains.
    """
    try:
        yield
    except kinds as error:
        if os.environ.get(TRACEBACK, "0") not in ("", "0"):
            raise
        rank = os.environ.get("RANK", "0")
        if os.environ.get(getattr(error, REPORTED_BY_FIRST_OF, ""), "0") == "0":
            # One write: the lines of several ranks do not mix.
            sys.stderr.write(f"llava-lite train{'' if rank == '0' else f' (rank {rank})'}: {get_sentence(error)}\n")
        sys.exit(1)


def start_logging():
    """Show the log of this package beside the progress bars."""
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    # The launcher's variable, since flags are read, and logged, before the process group exists.
    logging.getLogger("llava_lite").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    # Warnings about how these libraries use one another: a page on every rank, and no user can act on them.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|transformers|deepspeed|peft)\.")


def check_installed(data_args, training_args):
    """Raise for records that do not exist, directories that cannot be written and libraries that lack a part."""
    from llava_lite.train.deepspeed.build_locks import wait_for_builds
    from llava_lite.train.deepspeed.offload import check_nvme
    from llava_lite.train.deepspeed.private import LOADING, SAVING, UNIVERSAL, check_private_parts
    from llava_lite.train.inputs.check import check_images_exist, check_sees_images
    from llava_lite.train.inputs.features import check_feature_cache

    check_images_exist(data_args)
    check_sees_images(data_args, training_args)
    check_feature_cache(data_args.feature_cache)
    check_optimizer(training_args)
    if training_args.uses_deepspeed:
        check_private_parts("a run with DeepSpeed", (*SAVING, *LOADING, *UNIVERSAL))
        check_nvme(training_args.deepspeed_plugin.deepspeed_config)
        wait_for_builds()


def check_optimizer(training_args):
    """Raise ValueError for an --optim whose package is not installed, that needs another flag or cannot resume."""
    from transformers import Trainer

    if training_args.uses_deepspeed and "optimizer" in training_args.deepspeed_plugin.deepspeed_config:
        return
    optim = str(getattr(training_args.optim, "value", training_args.optim))
    if any(name in optim for name in NOT_RESUMED):
        raise ValueError(
            f"--optim {optim}: no checkpoint can hold its state, which is not only tensors in its state_dict(), and a "
            "stopped run would not go on as it was. Choose another; adafactor and lomo need little memory too."
        )
    if training_args.uses_deepspeed and optim.startswith("schedule_free"):
        raise ValueError(
            f"--optim {optim}: under DeepSpeed nothing sets the averaged weights with which it evaluates and "
            "ends. Leave --deepspeed out, or choose another --optim."
        )
    try:
        # Without a model, which some look for next: they are asked again when there is one.
        Trainer.get_optimizer_cls_and_kwargs(training_args)
    except (ImportError, NotImplementedError, ValueError) as error:
        if isinstance(error, ValueError) and not CANNOT_BE_MADE.search(str(error)):
            return
        raise ValueError(
            f"--optim {optim}: {str(error).rstrip('.')}. Or choose another, such as adamw_torch."
        ) from error


def installed_attention(name):
    """Return the attention kernel that a program asks for; auto for flash-attn where it cannot run.

    LLaVA's train_mem.py asks for it on every machine.
    """
    if name != "flash_attention_2" or (find_spec("flash_attn") is not None and machine_has("fp16")):
        return name
    logger.warning("flash-attn is not installed, or there is no GPU for it: using --attn_implementation auto.")
    return "auto"


def use_one_device(argv, training_args):
    """Use one device, and log the command that runs the same flags on all of them."""
    if training_args.n_gpu > 1:
        logger.warning("%s", launch_hint(argv, training_args.n_gpu))
        training_args._n_gpu = 1


def launch_hint(argv, num_devices: int) -> str:
    """Return the message that one of several devices is used, with the command for all of them."""
    argv = list(argv)
    if argv[:1] and argv[0].startswith("--local_rank="):
        argv = argv[1:]
    # A YAML file comes first and may name a DeepSpeed config itself, which a flag would override.
    has_file = bool(argv) and not argv[0].startswith("-")
    has_config = has_file or any(word.partition("=")[0] == "--deepspeed" for word in argv)
    flags = argv if has_config else ["--deepspeed", "zero2", *argv]
    command = f"deepspeed --module llava_lite.train.train {shlex.join(flags)}"
    return f"this process trains on 1 of {num_devices} devices. On all of them:\n  {command}"


def join_ranks(training_args):
    """Make DeepSpeed's process group and watch over it, with --ddp_timeout; all ranks must call it.

    From here on only the first rank logs, but warnings and errors of all show.
    """
    atexit.register(let_threads_finish)
    if training_args.uses_deepspeed:
        import deepspeed

        # accelerate does this on a GPU only; without it ZeRO-3 would build the model for a single rank.
        deepspeed.init_distributed(auto_mpi_discovery=False, timeout=training_args.ddp_timeout_delta)
        free_shared_memory()
    if training_args.process_index != 0:
        logging.getLogger("llava_lite").setLevel(logging.WARNING)
    start_watch(training_args.ddp_timeout, has_workers=training_args.dataloader_num_workers > 0)


def free_shared_memory():
    """Remove the names of the shared memory by which DeepSpeed reduces on a CPU; all ranks must call it.

    Every rank has opened those of all when it has joined, and keeps the memory; a name would stay, with the memory,
    until the machine restarts, if a rank is killed. Names of a start that was killed before this go too.
    """
    everyone(None)
    names = f"deepspeed_allreduce_buffer_{os.getuid()}_"
    own = f"{names}{os.environ.get('MASTER_ADDR')}_{os.environ.get('MASTER_PORT')}_{os.environ.get('LOCAL_RANK', '0')}"
    for path in Path("/dev/shm").glob(f"{names}*"):
        with suppress(OSError):
            is_old = time.time() - path.stat().st_mtime > OLD_BUFFER_S
            if path.name == own or (is_old and not is_mapped(path)):
                path.unlink()
