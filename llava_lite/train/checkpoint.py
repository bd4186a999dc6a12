"""Turn a running Trainer into checkpoint-N, whole or absent, and checkpoint-N back into the same run, bit for bit."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llava_lite.train import manifest as paper
from llava_lite.train.interrupt import EXIT_RESUMABLE, ProgressCallback, start_worker
from llava_lite.train.manifest import newest_whole_checkpoint
from llava_lite.train.ranks import everyone, raise_together
from llava_lite.train.trained_weights import (
    check_frozen,
    drop_frozen,
    frozen_prints,
    load_trained,
    trained_names,
    trained_state,
)

__all__ = ["CheckpointError", "CheckpointMixin", "find_checkpoint", "newest_whole_checkpoint"]

logger = logging.getLogger(__name__)

TRAINED = "trained.safetensors"
PROJECTOR = "mm_projector.bin"
TRAINER_STATE = "trainer_state.json"
# A folder can show up late on another node: network file systems cache names for some seconds.
_SHARED_FOLDER_WAIT_S = 30


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the ones before it are untouched."""


class WholeCheckpoint(str):
    """The path of a checkpoint that this process has compared with its manifest."""


def find_checkpoint(output_dir: str | Path, wanted: str | bool | None, is_writer: bool = True) -> str | None:
    """Return the checkpoint to go on from, the same on every rank, or None to start from the beginning.

    wanted (--resume_from_checkpoint): a path must be whole; True takes the newest whole checkpoint of `output_dir` and
    there must be one; None does so too, but starts anew where there is no checkpoint-N at all (as LLaVA does); False
    starts anew. All ranks must call this; those with `is_writer` (one, or one a node) look.
    """
    if isinstance(wanted, WholeCheckpoint):
        return wanted
    wanted = {"true": True, "false": False}.get(str(wanted).lower(), wanted)
    if wanted is False:
        return None
    found, error = None, None
    try:
        found = _look_for_checkpoint(output_dir, wanted) if is_writer else None
    except ValueError as problem:
        error = problem
    raise_together(error, ValueError, "Nothing was changed.")
    answers = {path for path, looked in everyone((found, is_writer)) if looked}
    if len(answers) > 1:
        raise ValueError(f"the nodes hold different checkpoints: {sorted(map(str, answers))}. Name one that all have.")
    path = answers.pop()
    return path if path is None else WholeCheckpoint(path)


def _look_for_checkpoint(output_dir: str | Path, wanted: str | bool | None) -> str | None:
    """Return the verified path on this node."""
    if isinstance(wanted, (str, Path)):
        inside = [path.name for path in paper.checkpoints_in(wanted)]
        if inside and not (Path(wanted) / paper.MANIFEST).is_file():
            raise ValueError(f"{wanted} is no checkpoint but holds some: name one of {inside}.")
        paper.verify(wanted)
        return str(wanted)
    paper.settle(output_dir)
    found = newest_whole_checkpoint(output_dir)
    if found is None and wanted is True:
        raise ValueError(f"--resume_from_checkpoint True, but {output_dir} holds no checkpoint-N. Give its path.")
    return found


class CheckpointMixin:
    """Trainer overrides: `class LLaVATrainer(CheckpointMixin, Trainer)`.

    checkpoint-N holds what trains, the optimizer, the scheduler, the random state and the unlogged loss of every rank,
    and manifest.json, written last. One process, DDP and DeepSpeed; a subclass with counters of its own adds them in
    `progress_state` and takes them back in `load_progress_state`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            raise ValueError("--fsdp: checkpoints of FSDP runs are not written here; use --deepspeed zero3.json.")
        if self.args.enable_jit_checkpoint:
            raise ValueError("--enable_jit_checkpoint: SIGTERM always saves a whole checkpoint here; drop the flag.")
        self.progress = ProgressCallback(self)
        self.add_callback(self.progress)
        self._checkpoint_bytes = None

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
        if path is not None:
            self._refuse_other_run(path)
        return super().train(resume_from_checkpoint=path, **kwargs)

    def _refuse_other_run(self, path: str) -> None:
        """Raise ValueError if the checkpoint lacks state or was saved by a run that divides its work differently."""
        manifest = paper.read_manifest(path)
        missing = [name for name in self._needed_files(manifest) if name not in manifest["files"]]
        if missing:
            raise ValueError(
                f"{path} cannot be resumed: it holds no {', '.join(missing)} (saved with --save_only_model?). "
                "Name an older checkpoint, or train from its weights with a new --output_dir."
            )
        saved, now = manifest["run"], self._run_settings()
        different = [_difference(key, saved.get(key), now[key]) for key in now if saved.get(key) != now[key]]
        if different:
            raise ValueError(
                f"{path} cannot be resumed exactly: {'; '.join(different)}. Start this run as that one was started "
                "(ranks, batch, accumulation, DeepSpeed stage, data, --tuning), or choose a new --output_dir."
            )

    def _needed_files(self, manifest: dict) -> list[str]:
        """Return the files without which a run does not go on as it was."""
        ranks = self._ranks_of_folder()
        needed = [TRAINER_STATE, *(f"progress_{rank}.pt" for rank in ranks)]
        needed += ["rng_state.pth"] if self.args.world_size == 1 else [f"rng_state_{rank}.pth" for rank in ranks]
        return needed + (["latest"] if self.is_deepspeed_enabled else [TRAINED, "optimizer.pt", "scheduler.pt"])

    def _run_settings(self) -> dict:
        """Return what must be equal for a step to be the same step."""
        stage = self.accelerator.state.deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else None
        return {
            "world_size": self.args.world_size,
            "per_device_train_batch_size": self.args.per_device_train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "seed": self.args.seed,
            "train_samples": len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None,
            "deepspeed_zero_stage": stage,
            "trained_parameters": trained_names(self.model),
        }

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
            self.progress.load(os.path.join(path, f"progress_{self.args.process_index}.pt"))
            check_frozen(self._frozen_prints, self.progress.saved["frozen"], path)
        return prepared

    def _load_engine(self, path: str) -> None:
        """Load weights, master weights and optimizer of the DeepSpeed engine."""
        loaded, _ = self.model_wrapped.load_checkpoint(path, load_module_strict=False)
        if loaded is None:
            raise ValueError(f"DeepSpeed found no state it can use in {path}; name an older checkpoint.")

    def _load_best_model(self) -> None:
        """Load the trained weights of the best checkpoint."""
        path = self.state.best_model_checkpoint
        paper.verify(path)
        self._load_engine(path) if self.is_deepspeed_enabled else self._load_from_checkpoint(path)

    def get_train_dataloader(self):
        """Return the stock loader, its workers deaf to SIGTERM so that the last step can end."""
        loader = super().get_train_dataloader()
        loader.worker_init_fn = start_worker(loader.worker_init_fn)
        return loader

    def _run_epoch(self, *args, **kwargs):
        """Tell the innermost sampler its epoch; the loader that skips batches after a resume hides it on 2 ranks."""
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
            self._in_step(staged, "prepare the checkpoint", lambda: self._make_room(staged))
            self._in_step(staged, "see the checkpoint's folder", lambda: self._see(staged))
            self._in_step(staged, "write the checkpoint", lambda: self._write_state(staged))
            shares = everyone(self._in_step(staged, "flush the checkpoint", lambda: self._digests(staged)))
            self._in_step(staged, "publish the checkpoint", lambda: self._publish(staged, final, shares))
            self.progress.last_saved = final
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(final))
        if self.progress.stop_requested:
            logger.warning("SIGTERM: %s is saved, leaving with code %d.", final, EXIT_RESUMABLE)
            raise SystemExit(EXIT_RESUMABLE)

    def _in_step(self, staged: Path, doing: str, work: Callable):
        """Do one part of a save on every rank; if it fails on one, clean up and raise CheckpointError on all.

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
            free = shutil.disk_usage(self.args.output_dir).free
            raise_together(
                error,
                CheckpointError,
                f"Could not {doing} in {staged.parent}: it needs {self._needed_bytes()} bytes, {free} are free. "
                "Earlier checkpoints are untouched; make room and resume.",
            )
        return result

    def _make_room(self, staged: Path) -> None:
        """On the writer, clear what is left of earlier saves, compare free space with the need, make the folder."""
        if self.args.should_save:
            staged.parent.mkdir(parents=True, exist_ok=True)
            paper.settle(staged.parent)
            free, needed = shutil.disk_usage(staged.parent).free, self._needed_bytes()
            if free < needed:
                raise OSError(f"{staged.parent} has {free} bytes free, the checkpoint needs {needed}")
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
        return sum(getattr(p, "ds_numel", p.numel()) * (p.element_size() + 8 + master_bytes) for p in params)

    def _write_state(self, staged: Path) -> None:
        """Write every file of the checkpoint but the manifest."""
        folder = str(staged)
        projector = projector_state(self.model, keep=self.args.should_save)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(folder)
            self._save_scaler(folder)
            self._save_rng_state(folder)
            torch.save(self.progress.state(), staged / f"progress_{self.args.process_index}.pt")
        if self.args.should_save:
            if projector:
                torch.save(projector, staged / PROJECTOR)
            if not self.is_deepspeed_enabled:
                save_file(trained_state(self.model), staged / TRAINED, metadata={"format": "pt"})
            self._export_callbacks()
            self.state.save_to_json(str(staged / TRAINER_STATE))

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
        engine = self.model_wrapped
        with _errors_kept(engine, self.model) as errors:
            engine.save_checkpoint(output_dir, exclude_frozen_parameters=True, save_latest=False)
        if errors:
            raise errors[0]
        if self.args.should_save:
            Path(output_dir, "latest").write_text(f"global_step{engine.global_steps}")
            if type(self.lr_scheduler).__name__ != "DeepSpeedSchedulerWrapper":
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
            "run": self._run_settings(),
            "files": files,
        }
        paper.write_json(staged / paper.MANIFEST, manifest)
        paper.publish(staged, final)
        keep = [self.state.best_model_checkpoint] if self.state.best_model_checkpoint else []
        paper.prune(final.parent, self.args.save_total_limit, keep=[final, *keep])


def _difference(key: str, saved, now) -> str:
    """Say how one setting of the run differs; of long lists, what is in one only."""
    if isinstance(saved, list) and isinstance(now, list):
        gone, added = sorted(set(saved) - set(now)), sorted(set(now) - set(saved))
        return f"{key}: no longer {gone[:3]} ({len(gone)} in all), now also {added[:3]} ({len(added)} in all)"
    return f"{key} was {saved}, is {now}"


def projector_state(model, keep: bool = True) -> dict[str, torch.Tensor]:
    """Return LLaVA's mm_projector.bin: the connector's weights under `model.mm_projector.*`, on the CPU.

    All ranks must call it under ZeRO-3; those without `keep` get an empty table.
    """
    from llava_lite.model.weights import gathered

    found = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        _, mark, rest = name.partition("mm_projector.")
        if mark:
            with gathered([weight]):
                if keep:
                    found[f"model.mm_projector.{rest}"] = weight.detach().to("cpu", copy=True)
    return found


@contextmanager
def _errors_kept(engine, model):
    """Make DeepSpeed's writer collect errors: a rank that raised inside its save would leave the others in a barrier.

    Also drops what comes from the base model from the module's file: tied names and 4-bit tables.
    """
    writer, errors = engine.checkpoint_engine, []
    stock_save, stock_scripts = writer.save, engine._copy_recovery_script

    def save(state_dict, path):
        try:
            if "module" in state_dict:
                state_dict = {**state_dict, "module": drop_frozen(model, state_dict["module"])}
            stock_save(state_dict, path)
        except Exception as error:
            errors.append(error)

    writer.save, engine._copy_recovery_script = save, lambda save_path: None
    try:
        yield errors
    finally:
        writer.save, engine._copy_recovery_script = stock_save, stock_scripts
