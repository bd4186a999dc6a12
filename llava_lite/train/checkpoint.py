"""Turn a running Trainer into checkpoint-N, whole or absent, and checkpoint-N back into the same run, bit for bit."""

from __future__ import annotations

import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from llava_lite.train import manifest as paper
from llava_lite.train import other_ranks as other
from llava_lite.train.engine_state import load_engine, save_engine
from llava_lite.train.expert_parallel import parallel_experts
from llava_lite.train.final import save_final
from llava_lite.train.interrupt import EXIT_RESUMABLE, ProgressCallback
from llava_lite.train.manifest import SaveError, newest_whole_checkpoint
from llava_lite.train.other_ranks_run import OtherRanksMixin
from llava_lite.train.ranks import everyone, raise_together
from llava_lite.train.resume import AS_EXAMPLES, find_checkpoint, refuse_incomplete, refuse_other_run
from llava_lite.train.run_facts import FACTS
from llava_lite.train.trained_weights import (
    PROJECTOR,
    TRAINED,
    check_frozen,
    frozen_prints,
    load_trained,
    projector_state,
    trained_names,
    trained_state,
)
from llava_lite.train.tuning import count

__all__ = ["CheckpointMixin", "SaveError", "find_checkpoint", "newest_whole_checkpoint", "save_final"]

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"
# A folder can show up late on another node: network file systems cache names for some seconds.
_SHARED_FOLDER_WAIT_S = 30


class CheckpointMixin(OtherRanksMixin):
    """Trainer overrides: `class LLaVATrainer(CheckpointMixin, Trainer)`.

    checkpoint-N holds what trains, the optimizer, the scheduler, the random state and the unlogged loss of every rank,
    and manifest.json, written last. One process, DDP and DeepSpeed; a subclass with counters of its own adds them in
    `progress_state` and takes them back in `load_progress_state`. opening: an Opening, where a checkpoint is to open
    as a model.
    """

    opening = None
    # A subclass that leaves out records that cannot be read has more to say: see SkipMixin.
    facts, has_news = None, False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            raise ValueError("--fsdp: checkpoints of FSDP runs are not written here; use --deepspeed zero3.json.")
        if self.args.enable_jit_checkpoint:
            raise ValueError("--enable_jit_checkpoint: SIGTERM always saves a whole checkpoint here; drop the flag.")
        self.progress = ProgressCallback(self)
        self.add_callback(self.progress)
        self._checkpoint_bytes = None
        self._fit_checkpoint = None

    # A subclass extends these two.

    def progress_state(self) -> dict:
        """Return what this rank must remember between two logged steps: tensors, numbers, strings, lists, tables."""
        return {}

    def load_progress_state(self, state: dict) -> None:
        """Take back what `progress_state` returned on this rank."""

    # Reading.

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Train; a checkpoint is verified and compared with this run before anything is loaded."""
        path = find_checkpoint(self.args.output_dir, resume_from_checkpoint or False, self.args.should_save)
        self.refuse_unfit(path)
        with self.progress.workers_ended():
            return super().train(resume_from_checkpoint=path, **kwargs)

    def refuse_unfit(self, path) -> None:
        """Raise ValueError if a checkpoint, where there is one, is of another run or lacks what a run goes on with."""
        # Once each: a run is told of its checkpoint before its features are made, and again when it trains.
        if path and path is not self._fit_checkpoint:
            refuse_other_run(path, self._step_settings(), self._schedule())
            refuse_incomplete(path, self._needed_files(path))
            self._refuse_other_ranks(path)
            self._fit_checkpoint = path

    def _needed_files(self, path: str) -> list[str]:
        """Return the files of a checkpoint without which a run does not go on as it was."""
        saved_by = self._saved_by(path)
        ranks = self._ranks_of_folder() if saved_by == self.args.world_size else range(saved_by)
        needed = [TRAINER_STATE, *(f"progress_{rank}.pt" for rank in ranks)]
        needed += [other.rng_file("", saved_by, rank).name for rank in ranks]
        return needed + (["latest"] if self.is_deepspeed_enabled else [TRAINED, "optimizer.pt", "scheduler.pt"])

    def _step_settings(self) -> dict:
        """Return what must be equal for a step to be the same step."""
        args, data = self.args, self.train_dataset
        lengths = getattr(data, "lengths", None)
        # None of whole experts: a checkpoint from before this key goes on.
        shared = {experts.num_ranks for experts in parallel_experts(self.model).values()}
        return {
            "--ep_size": shared.pop() if shared else None,
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
            "DeepSpeed ZeRO stage": self._zero_stage(),
            "trained parameters": trained_names(self.model),
            **{key: getattr(self.model.config, key, None) for key in AS_EXAMPLES},
        }

    def _schedule(self) -> dict:
        """Return what may be changed on purpose, at the price of another run."""
        keys = ("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay")
        return {key: getattr(self.args, key) for key in keys}

    def _zero_stage(self) -> int | None:
        """Return the stage of ZeRO, None without DeepSpeed."""
        return self.accelerator.state.deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else None

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Copy the trained weights into the model; the frozen ones are there, from the base model."""
        path = os.path.join(resume_from_checkpoint, TRAINED)
        load_trained(self.model, load_file(path), path)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """Wrap the model, then load the engine's state; the stock call demands frozen weights in the checkpoint."""
        path, in_engine = resume_from_checkpoint, self.is_deepspeed_enabled
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None if in_engine else path)
        self._frozen_prints = frozen_prints(self.model)
        if path is not None:
            if in_engine:
                self._load_engine(path)
                self._load_optimizer_and_scheduler(path)
            self._load_progress(path)
        return prepared

    def _load_engine(self, path: str) -> None:
        """Load the engine's state, whichever number of ranks saved it."""
        is_converter = self.args.process_index == 0
        load_engine(self.model_wrapped, path, self._saved_by(path), self.args.output_dir, is_converter)

    def _load_progress(self, path: str) -> None:
        """Read what this rank remembered, or its share of what other ranks did; compare the frozen weights."""
        saved_by, ranks = self._saved_by(path), self.args.world_size
        if saved_by == ranks:
            self.progress.load(os.path.join(path, f"progress_{self.args.process_index}.pt"))
            check_frozen(self._frozen_prints, self.progress.saved["frozen"], path)
            return
        self.progress.saved = other.share_of(other.read_progress(path, saved_by), ranks)
        # As the first of those ranks saw them: under ZeRO-3 that is a share.
        check_frozen(frozen_prints(self.model, saved_by), self.progress.saved["frozen"], path)

    def _load_best_model(self) -> None:
        """Load the trained weights of the best checkpoint."""
        path = self.state.best_model_checkpoint
        paper.verify(path)
        if self.is_deepspeed_enabled:
            self._load_engine(path)
        else:
            self._load_from_checkpoint(path)

    def _run_epoch(self, *args, **kwargs):
        """Tell the innermost sampler its epoch; the loader that skips batches after a resume hides it on 2 ranks.

        A finished run that is started again has nothing to train; the stock loop would do a step more, and a job that
        is queued again each time another.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        sampler = kwargs["train_dataloader"].batch_sampler
        while sampler is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(kwargs["epoch"])
            sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
        return super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial, num_train_samples, start_time):
        """Report loss and time of the whole run, the part before the resume included."""
        self._initial_global_step = self.progress.first_step
        return super()._finalize_training(trial, num_train_samples, start_time - self.progress.seconds_before)

    # Writing.

    def _save_checkpoint(self, model, trial):
        """Write checkpoint-N beside its place, then give it its name; an error stops all ranks and loses nothing."""
        final = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.progress.last_saved != final:
            self.store_flos()
            if self.state.best_global_step:
                best = final.with_name(f"checkpoint-{self.state.best_global_step}")
                self.state.best_model_checkpoint = str(best) if best == final or best.is_dir() else None
            staged = final.with_name(paper.STAGING_PREFIX + final.name)
            self._in_step(staged, "prepare", lambda: self._make_room(staged))
            self._in_step(staged, "see", lambda: self._see(staged))
            self._in_step(staged, "write", lambda: self._write_state(staged))
            shares = everyone(self._in_step(staged, "flush", lambda: self._digests(staged)))
            self._in_step(staged, "publish", lambda: self._publish(staged, final, shares))
            self.progress.last_saved = final
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(final))
        if self.progress.stop_requested:
            logger.warning("SIGTERM: %s is saved, leaving with code %d.", final, EXIT_RESUMABLE)
            raise SystemExit(EXIT_RESUMABLE)

    def _in_step(self, staged: Path, doing: str, work: Callable):
        """Do one part of a save on every rank; if it fails on one, clean up and raise SaveError on all.

        `work` must not end early between two collectives: the other ranks would wait in the second.
        """
        result, error = None, None
        try:
            result = work()
        except Exception as problem:
            error = problem
        failed = any(everyone(error is not None))
        if failed and self.args.should_save:
            shutil.rmtree(staged, ignore_errors=True)
        if failed:
            free_bytes = shutil.disk_usage(self.args.output_dir).free
            advice = (
                f"Could not {doing} {staged}: about {self._needed_bytes():,} bytes are needed, {free_bytes:,} free. "
                "Earlier checkpoints are untouched; make room and resume."
            )
            raise_together(error, paper.SaveError, advice)
        return result

    def _make_room(self, staged: Path) -> None:
        """On the writer, clear what is left of earlier saves, compare free space with the need, make the folder."""
        if self.args.should_save:
            staged.parent.mkdir(parents=True, exist_ok=True)
            paper.settle(staged.parent)
            paper.check_room(staged.parent, self._needed_bytes())
            staged.mkdir()

    def _see(self, staged: Path) -> None:
        """Raise if this rank does not see the folder that the writer made."""
        deadline = time.monotonic() + _SHARED_FOLDER_WAIT_S
        while not staged.is_dir():
            if time.monotonic() > deadline:
                raise OSError(f"{staged} is on another node; share --output_dir, or set --save_on_each_node True")
            time.sleep(0.2)

    def _needed_bytes(self) -> int:
        """Return the size of the last checkpoint; before the first, that of the weights and of Adam in fp32."""
        if self._checkpoint_bytes is not None:
            return self._checkpoint_bytes
        params = [p for p in self.model.parameters() if p.requires_grad]
        master_bytes = 4 if self.is_deepspeed_enabled else 0
        return sum(count(p) * (p.element_size() + 8 + master_bytes) for p in params)

    def _write_state(self, staged: Path) -> None:
        """Write every file of the checkpoint but the manifest."""
        folder, is_writer = str(staged), self.args.should_save
        projector = projector_state(self.model, keep=is_writer)
        # The engine writes what trains into its own files.
        # Not of experts that are shared out: of those DeepSpeed's converter makes no whole weights.
        in_engine = self.is_deepspeed_enabled and not self.args.save_only_model and not parallel_experts(self.model)
        trained = {} if in_engine else trained_state(self.model, keep=is_writer)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(folder)
            self._save_scaler(folder)
            self._save_rng_state(folder)
            torch.save(self.progress.state(), staged / f"progress_{self.args.process_index}.pt")
        if is_writer:
            if projector:
                torch.save(projector, staged / PROJECTOR)
            if self.opening is not None:
                self.opening.write(staged, self.args)
            self._export_callbacks()
            self.state.save_to_json(str(staged / TRAINER_STATE))
            if self.facts is not None:
                paper.write_json(staged / FACTS, self.facts.state())
            if trained:
                save_file(trained, staged / TRAINED, metadata={"format": "pt"})
                paper.as_readable_as(staged, [TRAINED], staged / TRAINER_STATE)

    def _export_callbacks(self) -> None:
        """Put the state of callbacks that have one into the trainer state, as the stock save does."""
        from transformers.trainer_callback import ExportableState

        stateful = [cb for cb in (*self.callback_handler.callbacks, self.control) if isinstance(cb, ExportableState)]
        for callback in stateful:
            self.state.stateful_callbacks[type(callback).__name__] = callback.state()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the optimizer; of a DeepSpeed engine without frozen weights, which the stock call writes too."""
        if not self.is_deepspeed_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        save_engine(self.model_wrapped, self.model, output_dir, self.args.should_save)
        # With a scheduler in its JSON the engine saves it itself.
        if self.args.should_save and type(self.lr_scheduler).__name__ != "DeepSpeedSchedulerWrapper":
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _digests(self, staged: Path) -> tuple[int, dict]:
        """Flush and hash this rank's share of the files; return the node that they are on and their digests."""
        args, names = self.args, paper.files_of(staged)
        # A flush concerns what this node wrote, a hash can be taken anywhere.
        paper.fsync_tree(staged, names[args.local_process_index :: self._ranks_a_node()])
        mine = self._ranks_of_folder()
        return mine.start, paper.digests(staged, names[mine.index(args.process_index) :: len(mine)])

    def _ranks_a_node(self) -> int:
        """Return how many ranks run on this node."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.args.world_size))

    def _ranks_of_folder(self) -> range:
        """Return the ranks whose files lie in the folder that this rank sees: all, or those of its node."""
        if not self.args.save_on_each_node:
            return range(self.args.world_size)
        first = self.args.process_index - self.args.local_process_index
        return range(first, first + self._ranks_a_node())

    def _publish(self, staged: Path, final: Path, shares: list[tuple[int, dict]]) -> None:
        """On the writer, write the manifest, rename the folder and prune the oldest."""
        here = self._ranks_of_folder().start
        files = {name: digest for node, share in shares if node == here for name, digest in share.items()}
        self._checkpoint_bytes = sum(digest["size"] for digest in files.values())
        if not self.args.should_save:
            return
        earlier = [paper.serial_of(path) for path in paper.checkpoints_in(final.parent)]
        manifest = {
            "step": self.state.global_step,
            "world_size": self.args.world_size,
            "serial": max(earlier, default=-1) + 1,
            "steps": self._step_settings(),
            "schedule": self._schedule(),
            "files": files,
        }
        paper.write_json(staged / paper.MANIFEST, manifest)
        paper.publish(staged, final)
        keep = [self.state.best_model_checkpoint] if self.state.best_model_checkpoint else []
        paper.prune(final.parent, self.args.save_total_limit, keep=[final, *keep])
