"""What a checkpoint and the run that resumes it must have in common, and which files it must hold."""

import json
import os
import zlib

import numpy as np
import torch

from llava_lite.train.deepspeed.experts import parallel_experts
from llava_lite.train.saving import manifest as paper
from llava_lite.train.saving import other_ranks as other
from llava_lite.train.saving.resume import AS_EXAMPLES, GROUPS, IMAGES, RECORDS, check_complete, check_same_run
from llava_lite.train.saving.trained_weights import TRAINED, trained_names

TRAINER_STATE = "trainer_state.json"
# Flags without which the state of the optimizer, the weights beside it or the order of records are another run's.
AS_STEPS = ("optim", "bf16", "fp16", "bits", "train_sampling_strategy")
AS_STEPS_OF_ACCELERATE = ("split_batches", "even_batches", "use_seedable_sampler")
AS_STEPS_OF_LORA = ("lora_alpha", "lora_r")
AS_STEPS_OF_4_BITS = ("quant_type", "double_quant")
# Flags that may be changed on purpose, at the price of another run.
AS_SCHEDULE = (
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "mm_projector_lr",
    "mm_vision_tower_lr",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "optim_args",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "lora_dropout",
    "average_tokens_across_devices",
    "ignore_data_skip",
    "dataloader_drop_last",
)
EXPERT_SCHEDULE = ("router_aux_loss_coef", "eval_capacity_factor")


class SameRunMixin:
    """The part of CheckpointMixin that compares a checkpoint with the run that is about to resume it."""

    _checked_checkpoint = None

    # A subclass extends these two.

    def step_settings(self) -> dict:
        """Return what must be equal for a step to be the same step."""
        args, data = self.args, self.train_dataset
        lengths, checksums = getattr(data, "lengths", None), getattr(data, "checksums", None)
        sizes, groups = getattr(data, "image_bytes", None), getattr(data, "groups", None)
        # None without expert parallelism: a checkpoint from before this key can be resumed.
        ep_sizes = {experts.num_ranks for experts in parallel_experts(self.model).values()}
        return {
            "--ep_size": ep_sizes.pop() if ep_sizes else None,
            "world_size": args.world_size,
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "seed": args.seed,
            "data_seed": args.data_seed,
            "group_by_modality_length": getattr(args, "group_by_modality_length", None),
            # None in a checkpoint from before there were packs, too.
            "--packing_tokens": args.packing_tokens if getattr(args, "packing", None) == "tokens" else None,
            "samples": len(data) if hasattr(data, "__len__") else None,
            "checksum of the samples' lengths": None if lengths is None else zlib.crc32(np.asarray(lengths).tobytes()),
            IMAGES: None if sizes is None else zlib.crc32(np.ascontiguousarray(sizes).tobytes()),
            RECORDS: None if checksums is None else zlib.crc32(np.asarray(checksums).tobytes()),
            GROUPS: None if groups is None else zlib.crc32(json.dumps(groups).encode()),
            other.ZERO_STAGE: self.get_zero_stage(),
            **{f"--{name}": as_json(value) for name, value in self.get_flags_of_steps().items()},
            "trained parameters": trained_names(self.model),
            **{key: getattr(self.model.config, key, None) for key in AS_EXAMPLES},
            "--image_resize": getattr(data, "image_resize", None),
        }

    def why_as_many_ranks(self) -> str | None:
        """Return why this run can be resumed by as many ranks only, None where any number will do."""
        if parallel_experts(self.model):
            return "its experts are divided among ranks (--ep_size)"
        if self.args.save_on_each_node:
            return "--save_on_each_node keeps the files of the ranks apart"
        if self.get_zero_stage() == 3 and self.has_optimizer_on_nvme():
            return "its optimizer lies on the NVMe of each node"
        return None

    def get_flags_of_steps(self) -> dict:
        """Return the flags that must be equal, those of LoRA, 4 bits and experts where there are some."""
        args, experts = self.args, getattr(self.model.config, "moe", None) or {}
        names = list(AS_STEPS)
        names += AS_STEPS_OF_LORA if getattr(args, "tuning", None) == "lora" else ()
        names += AS_STEPS_OF_4_BITS if getattr(args, "bits", 16) == 4 else ()
        flags = {name: getattr(args, name) for name in names if hasattr(args, name)}
        order = {f"accelerator_config {n}": getattr(args.accelerator_config, n) for n in AS_STEPS_OF_ACCELERATE}
        return flags | order | {name: value for name, value in experts.items() if name not in EXPERT_SCHEDULE}

    def get_schedule(self) -> dict:
        """Return what may be changed on purpose, at the price of another run."""
        schedule = {name: getattr(self.args, name) for name in AS_SCHEDULE if hasattr(self.args, name)}
        experts = getattr(self.model.config, "moe", None) or {}
        schedule |= {name: experts[name] for name in EXPERT_SCHEDULE if name in experts}
        return {name: as_json(value) for name, value in schedule.items()}

    def check_checkpoint(self, path) -> None:
        """Raise ValueError if a checkpoint, where there is one, is of another run or incomplete; once for each path.

        A run checks before it fills the feature cache, and would check again when it trains.
        """
        if path and path is not self._checked_checkpoint:
            check_same_run(path, self.step_settings(), self.get_schedule())
            check_complete(path, self.get_needed_files(path))
            self.check_same_ranks(path)
            self.check_due(path)
            self._checked_checkpoint = path

    def get_needed_files(self, path: str) -> list[str]:
        """Return the files of a checkpoint without which a run cannot be resumed as it was."""
        saved_by = get_num_ranks(path)
        ranks = self.get_directory_ranks() if saved_by == self.args.world_size else range(saved_by)
        needed = [TRAINER_STATE, *(f"progress_{rank}.pt" for rank in ranks)]
        needed += [other.rng_file("", saved_by, rank).name for rank in ranks]
        return needed + (["latest"] if self.is_deepspeed_enabled else [TRAINED, "optimizer.pt", "scheduler.pt"])

    def check_due(self, path: str) -> None:
        """Raise ValueError if an evaluation was due when a checkpoint was saved, and this run has nothing for it."""
        rank = 0 if get_num_ranks(path) != self.args.world_size else self.get_directory_ranks().start
        progress = torch.load(os.path.join(path, f"progress_{rank}.pt"), map_location="cpu", weights_only=True)
        # A checkpoint from before it was kept has none.
        if progress.get("due", {}).get("evaluate") and self.eval_dataset is None:
            step = paper.read_manifest(path)["step"]
            raise ValueError(
                f"{path} was saved when the evaluation after step {step:,} was still to be made, and this run has no "
                "records to evaluate on: give --eval_data_path (or --eval_split) and --eval_strategy again as in the "
                "run that saved it, or an earlier checkpoint as --resume_from_checkpoint."
            )

    def check_same_ranks(self, path: str) -> None:
        """Log what changes with another number of ranks; ValueError for a run that must have as many as before."""
        saved, now = paper.read_manifest(path)["steps"], self.step_settings()
        if not other.has_other_ranks(saved, now):
            return
        if reason := self.why_as_many_ranks():
            raise ValueError(
                f"{path} was saved by {saved[other.RANKS]} ranks and cannot be resumed by {now[other.RANKS]}: "
                f"{reason}. Start {saved[other.RANKS]} ranks, or give it as --model_name_or_path of a new run."
            )
        has_experts = any(".mlp.gate." in name for name in now["trained parameters"])
        # With packs their number counts, not that of the records in them.
        num_samples = 0 if self.args.dataloader_drop_last else len(self._get_train_sampler())
        other.log_what_changes(path, saved, now, has_experts, num_samples)

    def get_zero_stage(self) -> int | None:
        """Return the stage of ZeRO, None without DeepSpeed."""
        return self.accelerator.state.deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else None

    def has_optimizer_on_nvme(self) -> bool:
        """Tell whether the DeepSpeed JSON offloads the optimizer to disks."""
        zero = self.accelerator.state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
        return (zero.get("offload_optimizer") or {}).get("device") == "nvme"

    def get_directory_ranks(self) -> range:
        """Return the ranks whose files lie in the directory that this rank sees: all, or those of its node."""
        if not self.args.save_on_each_node:
            return range(self.args.world_size)
        first = self.args.process_index - self.args.local_process_index
        return range(first, first + self.get_ranks_a_node())

    def get_ranks_a_node(self) -> int:
        """Return how many ranks run on this node."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.args.world_size))


def get_num_ranks(path: str) -> int:
    """Return how many ranks saved a checkpoint."""
    return paper.read_manifest(path)["steps"][other.RANKS]


def as_json(value):
    """Return a value as a manifest holds it: names for members of an enumeration, lists for tuples."""
    return json.loads(json.dumps(value))
