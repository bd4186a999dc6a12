"""Turn --push_to_hub True into one commit of the finished folder; a state to resume from goes up only if asked for."""

import logging
from pathlib import Path

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from llava_lite.hub import in_words
from llava_lite.share import push_folder, shareable_config

logger = logging.getLogger(__name__)


def refuse_unshareable(model_args, training_args) -> None:
    """Raise ValueError, before anything is loaded, if nobody else could open what --push_to_hub True would upload."""
    whole = training_args.save_full or training_args.tuning in ("full", "moe")
    if training_args.push_to_hub and not whole:
        named = {
            "base_model_name_or_path": model_args.model_name_or_path,
            "mm_vision_tower": model_args.vision_tower,
        }
        shareable_config(named, training_args.output_dir)


class PushingMixin:
    """Trainer overrides: `class LLaVATrainer(PushingMixin, ..., Trainer)`.

    --hub_strategy end and every_save upload the model once, when it is finished: a run's folder holds no model before.
    checkpoint and all_checkpoints also upload checkpoint-N, optimizer included, as last-checkpoint or under its name.
    """

    def init_hf_repo(self, token=None, private=None):
        """Make the repository, before the first step."""
        if not self.is_world_process_zero():
            return
        args, self.push_in_progress = self.args, None
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        token, private = token or args.hub_token, args.hub_private_repo if private is None else private
        with in_words(name, token=token):
            self.hub_model_id = HfApi(token=token).create_repo(name, private=private, exist_ok=True).repo_id

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        """Upload the final folder; return the CommitInfo on the first rank, None on the others."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        args = self.args
        return push_folder(
            args.output_dir,
            self.hub_model_id or args.hub_model_id or Path(args.output_dir).absolute().name,
            commit_message=commit_message or "End of training",
            private=args.hub_private_repo if private is None else private,
            token=token or args.hub_token,
            revision=revision or args.hub_revision,
            **kwargs,
        )

    def _push_from_checkpoint(self, checkpoint_folder):
        """Upload the state to resume from in the background, if the strategy says so."""
        args = self.args
        asks = args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
        if not asks or not self.is_world_process_zero():
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done() and not args.hub_always_push:
            return
        self._finish_current_push()
        self.callback_handler.on_push_begin(args, self.state, self.control)
        name = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else Path(checkpoint_folder).name
        job = HfApi(token=args.hub_token).upload_folder(
            repo_id=self.hub_model_id,
            folder_path=checkpoint_folder,
            path_in_repo=name,
            commit_message=f"Training in progress, step {self.state.global_step}, checkpoint",
            revision=args.hub_revision,
            run_as_future=True,
        )
        self.push_in_progress = PushInProgress([job])

    def _finish_current_push(self):
        """Wait for an upload in the background; one that failed is told and stops nothing."""
        super()._finish_current_push()
        pushed = getattr(self, "push_in_progress", None)
        for job in () if pushed is None else pushed.jobs:
            if job.done() and not job.cancelled() and job.exception() is not None:
                logger.warning("a checkpoint did not reach the Hub: %s", job.exception())
        self.push_in_progress = None
