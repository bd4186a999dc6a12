"""Write the state of a running Trainer to checkpoint-N, which is complete or absent whatever fails on any rank."""

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.trainer_callback import ExportableState

from llava_lite.distributed.activity import note
from llava_lite.distributed.ranks import everyone, raise_together
from llava_lite.errors import get_free_space
from llava_lite.train.deepspeed.experts import parallel_experts
from llava_lite.train.monitor.finite import NonFiniteError, find_non_finite, list_names
from llava_lite.train.saving import manifest as paper
from llava_lite.train.saving.engine import save_engine
from llava_lite.train.saving.run_facts import FACTS
from llava_lite.train.saving.same_run import TRAINER_STATE
from llava_lite.train.saving.trained_weights import PROJECTOR, TRAINED, projector_state, trained_state
from llava_lite.train.tuning import count

logger = logging.getLogger(__name__)

# A directory can show up late on another node: network file systems cache names for some seconds.
_SHARED_DIRECTORY_WAIT_S = 30


class CheckpointWriter:
    """Writes the checkpoints of a trainer, a CheckpointMixin; all ranks must call it."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.last_bytes = None

    @property
    def is_model_only(self) -> bool:
        """Whether a checkpoint leaves out what a resume needs (--save_only_model).

        After a signal it never does: the code that ends the process says that the same command continues the run.
        """
        return self.trainer.args.save_only_model and self.trainer.progress.stop_requested is None

    def write(self, final: Path) -> None:
        """Write a checkpoint beside its place, then give it its name; an error stops all ranks and loses nothing."""
        staged = final.with_name(paper.STAGING_PREFIX + final.name)
        self.check_finite(final)
        self.in_step(staged, "prepare", lambda: self.make_room(staged))
        self.in_step(staged, "see", lambda: wait_for_directory(staged))
        self.in_step(staged, "write", lambda: self.write_state(staged))
        shards = everyone(self.in_step(staged, "flush", lambda: self.flush(staged)))
        self.in_step(staged, "publish", lambda: self.publish(staged, final, shards))

    def check_finite(self, final: Path) -> None:
        """Raise NonFiniteError on all ranks if a number that would be written on one is not finite."""
        names = find_non_finite(self.trainer.model, self.trainer.optimizer)
        error = NonFiniteError(f"not finite: {list_names(names)}") if names else None
        raise_together(error, NonFiniteError, f"{final} is not written; earlier checkpoints are untouched.")

    def in_step(self, staged: Path, doing: str, work: Callable):
        """Do one part of a save on every rank; if it fails on one, clean up and raise SaveError on all.

        `work` must not end early between two collectives: the other ranks would wait in the second.
        """
        note(f"checkpoint of step {self.trainer.state.global_step}: {doing}")
        result, error = None, None
        try:
            result = work()
        except Exception as problem:
            error = problem
        failed = any(everyone(error is not None))
        if failed and self.trainer.args.should_save:
            shutil.rmtree(staged, ignore_errors=True)
        if failed:
            advice = (
                f"Could not {doing} {staged}: about {self.get_needed_bytes():,} bytes are needed"
                f"{get_free_space(staged.parent)}. Earlier checkpoints are untouched; make room and resume."
            )
            raise_together(error, paper.SaveError, advice)
        return result

    def make_room(self, staged: Path) -> None:
        """On the writer, clear what is left of earlier saves, compare free space with the need, make the directory."""
        if self.trainer.args.should_save:
            staged.parent.mkdir(parents=True, exist_ok=True)
            paper.finish_saves(staged.parent)
            paper.check_room(staged.parent, self.get_needed_bytes())
            staged.mkdir()

    def get_needed_bytes(self) -> int:
        """Return the size of the last checkpoint; before the first, that of the weights and of Adam in fp32."""
        if self.last_bytes is not None:
            return self.last_bytes
        params = [p for p in self.trainer.model.parameters() if p.requires_grad]
        master_bytes = 4 if self.trainer.is_deepspeed_enabled else 0
        return sum(count(p) * (p.element_size() + 8 + master_bytes) for p in params)

    def write_state(self, staged: Path) -> None:
        """Write every file of the checkpoint but the manifest."""
        trainer, args = self.trainer, self.trainer.args
        is_writer = args.should_save
        projector = projector_state(trainer.model, keep=is_writer)
        # The engine writes what trains into its own files, but with expert parallelism this rank's experts only.
        in_engine = trainer.is_deepspeed_enabled and not self.is_model_only and not parallel_experts(trainer.model)
        trained = {} if in_engine else trained_state(trainer.model, keep=is_writer)
        if not self.is_model_only:
            self.write_optimizer(staged)
            # Trainer's own: it knows the random states of every kind of device.
            trainer._save_rng_state(str(staged))
            torch.save(trainer.progress.state(), staged / f"progress_{args.process_index}.pt")
        if is_writer:
            if projector:
                torch.save(projector, staged / PROJECTOR)
            if trainer.opening is not None:
                trainer.opening(staged, args)
            export_callbacks(trainer)
            trainer.state.save_to_json(str(staged / TRAINER_STATE))
            if trainer.facts is not None:
                paper.write_json(staged / FACTS, trainer.facts.state())
            if trained:
                save_file(trained, staged / TRAINED, metadata={"format": "pt"})
                paper.as_readable_as(staged, [TRAINED], staged / TRAINER_STATE)

    def write_optimizer(self, staged: Path) -> None:
        """Write optimizer, scheduler and loss scale under the Trainer's names; of an engine without frozen weights."""
        trainer = self.trainer
        is_writer, in_engine = trainer.args.should_save, trainer.is_deepspeed_enabled
        if in_engine:
            save_engine(trainer.model_wrapped, trainer.model, str(staged), is_writer)
        elif is_writer:
            torch.save(trainer.optimizer.state_dict(), staged / "optimizer.pt")
        # With a scheduler in its JSON the engine saves it itself.
        if is_writer and not (in_engine and type(trainer.lr_scheduler).__name__ == "DeepSpeedSchedulerWrapper"):
            torch.save(trainer.lr_scheduler.state_dict(), staged / "scheduler.pt")
        scaler = getattr(trainer.accelerator, "scaler", None)
        if is_writer and scaler is not None:
            torch.save(scaler.state_dict(), staged / "scaler.pt")

    def flush(self, staged: Path) -> tuple[int, dict]:
        """Flush and hash this rank's part of the files; return the node that they are on and their digests."""
        trainer, args, names = self.trainer, self.trainer.args, paper.list_files(staged)
        # A flush concerns what this node wrote, a hash can be computed anywhere.
        paper.fsync_tree(staged, names[args.local_process_index :: trainer.get_ranks_a_node()])
        ranks = trainer.get_directory_ranks()
        return ranks.start, paper.digests(staged, names[ranks.index(args.process_index) :: len(ranks)])

    def publish(self, staged: Path, final: Path, shards: list[tuple[int, dict]]) -> None:
        """On the writer, write the manifest, rename the directory and delete the oldest checkpoints."""
        trainer = self.trainer
        here = trainer.get_directory_ranks().start
        files = {name: digest for node, shard in shards if node == here for name, digest in shard.items()}
        self.last_bytes = sum(digest["size"] for digest in files.values())
        if not trainer.args.should_save:
            return
        earlier = [paper.get_serial(path) for path in paper.checkpoints_in(final.parent)]
        # One whose manifest cannot be read has a serial too, which no other one may get.
        num_unknown = sum(serial < 0 for serial in earlier)
        manifest = {
            "step": trainer.state.global_step,
            "world_size": trainer.args.world_size,
            "serial": max(earlier, default=-1) + 1 + num_unknown,
            "steps": trainer.step_settings(),
            "schedule": trainer.get_schedule(),
            "files": files,
        }
        paper.write_manifest(staged, manifest)
        paper.publish(staged, final)
        self.prune(final.parent, [final])

    def prune(self, output_dir: Path, keep: list[Path]) -> None:
        """On the writer, delete the oldest checkpoints beyond --save_total_limit, but not the best one or `keep`.

        What cannot be deleted is named; the checkpoint that was written is complete.
        """
        best = self.trainer.state.best_model_checkpoint
        try:
            if self.trainer.args.should_save:
                paper.prune(output_dir, self.trainer.args.save_total_limit, keep=[*keep, *([best] if best else [])])
        except OSError as error:
            logger.warning("checkpoints beyond --save_total_limit are left, delete them yourself: %s", error)


def wait_for_directory(staged: Path) -> None:
    """Return once this rank sees the directory that the writer made; OSError if it does not."""
    deadline = time.monotonic() + _SHARED_DIRECTORY_WAIT_S
    while not staged.is_dir():
        if time.monotonic() > deadline:
            raise OSError(f"{staged} is on another node; share --output_dir, or set --save_on_each_node True")
        time.sleep(0.2)


def export_callbacks(trainer) -> None:
    """Put the state of callbacks that have one into the trainer state, as the Trainer's own save does."""
    callbacks = (*trainer.callback_handler.callbacks, trainer.control)
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            trainer.state.stateful_callbacks[type(callback).__name__] = callback.state()
