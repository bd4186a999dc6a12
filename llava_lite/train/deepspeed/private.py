"""The parts of DeepSpeed that this package uses and that have no public name: all of them, each with its reason.

A run that needs one which the installed DeepSpeed lacks ends at its start, with the name of the part and the version.
"""

from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name

from llava_lite.checkpoints.engine_files import read_state

# The version that these were written for and are tested with.
TESTED = "0.19.8"
ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
# The engine's save raises on one rank while the others wait in a barrier, and it writes frozen weights twice.
SAVING = (
    f"{ENGINE}._copy_recovery_script",
    "deepspeed.runtime.checkpoint_engine.checkpoint_engine:CheckpointEngine.save",
)
# The engine unpickles whatever a file holds.
LOADING = ("deepspeed.runtime.checkpoint_engine.checkpoint_engine:CheckpointEngine.load",)
# A universal checkpoint is read by all runs or by none: `load_universal` in the JSON holds for every load of a run.
UNIVERSAL = (f"{ENGINE}.load_universal_checkpoint",)
# deepspeed.moe, whose convention of expert parameters is public, has no ZeRO-3. AutoEP has, but builds blocks of its
# own from a table of model families that ours are not in.
GROUPS = "deepspeed.utils.groups:"
PLACEMENT = "deepspeed.checkpoint.autoep_affine:"
KEYS = ("AUTOEP_EXPERT_PLACEMENT", "AFFINE_MAP", "AUTOEP_PARAM_LOGICAL_SHAPE", "AUTOEP_PARAM_EP_RANK",
        "AUTOEP_PARAM_LOCAL_EXPERTS", "DS_AUTOEP_UC_META")  # fmt: skip
EXPERTS = (
    f"{GROUPS}_get_expert_parallel_group_dict",
    f"{GROUPS}_create_expert_and_data_parallel",
    f"{GROUPS}_get_expert_parallel_group",
    f"{GROUPS}_get_expert_data_parallel_group",
    "deepspeed.module_inject.auto_ep_layer:AutoEPMoELayer",
    f"{PLACEMENT}legacy_uniform_autoep_placement_descriptor",
    f"{PLACEMENT}autoep_placement_to_affine_map",
    f"{PLACEMENT}autoep_experts_for_rank",
    *(f"deepspeed.checkpoint.constants:{key}" for key in KEYS),
)


def check_private_parts(purpose: str, parts) -> None:
    """Raise ImportError that names the parts which the installed DeepSpeed lacks, its version, and what to do.

    purpose: what needs them, as the message begins.
    """
    missing = [part for part in parts if find_part(part) is None]
    if missing:
        raise ImportError(
            f"{purpose} uses {', '.join(missing)}, and DeepSpeed {version('deepspeed')} has no such part; install "
            f"deepspeed=={TESTED}."
        )


def find_part(part: str):
    """Return what `module:name.name` names, None where it does not exist."""
    try:
        return resolve_name(part)
    except (ImportError, AttributeError):
        return None


@contextmanager
def collected_errors(engine, change_state):
    """Let the engine's saves inside collect errors instead of raising them; yield the list of errors.

    change_state: what turns the state of a file into what is written. No script for recovery is copied.
    """
    writer, errors = engine.checkpoint_engine, []
    their_save, their_copy = writer.save, engine._copy_recovery_script

    def save(state_dict, path):
        try:
            their_save(change_state(state_dict), path)
        except Exception as error:
            errors.append(error)

    writer.save, engine._copy_recovery_script = save, lambda save_path: None
    try:
        yield errors
    finally:
        writer.save, engine._copy_recovery_script = their_save, their_copy


@contextmanager
def safe_load(engine):
    """Let the engine's loads inside read files that hold tensors, plain values and DeepSpeed's own states alone.

    They raise ValueError for any other file, before it is used.
    """
    reader = engine.checkpoint_engine
    # Not mapped: the optimizer keeps some of the tensors, and the file may be deleted later.
    reader.load = lambda path, map_location=None: read_state(Path(path), mmap=False)
    try:
        yield
    finally:
        del reader.load


@contextmanager
def universal_load(engine):
    """Let the engine's loads inside read a universal checkpoint, as `"checkpoint": {"load_universal": true}` does."""
    engine.load_universal_checkpoint = lambda: True
    try:
        yield
    finally:
        del engine.load_universal_checkpoint


def get_expert_groups(ep_size: int):
    """Return DeepSpeed's name for groups of `ep_size` ranks, and this rank's two groups.

    The first shares the experts of a layer; in the expert-data-parallel group all ranks hold the same experts.
    """
    from deepspeed.utils import groups

    name = f"ep_size_{ep_size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size)
    return name, groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)


@cache
def get_parallel_block_class():
    """Return the class of our MoE blocks that the engine takes for AutoEP's; made here, since it needs DeepSpeed."""
    from deepspeed.checkpoint import autoep_affine
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from torch import distributed as dist
    from torch import nn

    from llava_lite.model.moe.block import MoeBlock

    class ParallelMoeBlock(MoeBlock, AutoEPMoELayer):
        """A MoeBlock whose experts are shared by the ranks of a group."""

        def __init__(self, block, experts, name):
            # Of both parents' constructors none: everything of `block` is taken over, hooks included.
            nn.Module.__init__(self)
            vars(self).update(vars(block))
            self.experts = experts
            self.ep_size, self.ep_rank = experts.num_ranks, dist.get_rank(experts.group)
            self.ep_group_name, self.ep_group = name, experts.group
            self.num_local_experts = experts.num_experts
            # AutoEP's description of which rank holds which experts: equally many, in order.
            self.expert_placement_descriptor = autoep_affine.legacy_uniform_autoep_placement_descriptor(
                self.num_experts, self.num_local_experts, self.ep_size
            )

    return ParallelMoeBlock


def describe_for_checkpoint(block, weight) -> None:
    """Give a weight [E / R, ...] of a parallel block the description that the engine's checkpoints keep of it."""
    from deepspeed.checkpoint import autoep_affine, constants

    placement = block.expert_placement_descriptor
    shape = [block.num_experts, *weight.shape[1:]]
    held = {
        constants.AUTOEP_EXPERT_PLACEMENT: placement,
        constants.AFFINE_MAP: autoep_affine.autoep_placement_to_affine_map(placement, shape).to_dict(),
        constants.AUTOEP_PARAM_LOGICAL_SHAPE: shape,
        constants.AUTOEP_PARAM_EP_RANK: block.ep_rank,
        constants.AUTOEP_PARAM_LOCAL_EXPERTS: autoep_affine.autoep_experts_for_rank(placement, block.ep_rank),
    }
    setattr(weight, constants.DS_AUTOEP_UC_META, held)
