"""Upload the finished directory in one commit, and checkpoints only if --hub_strategy asks for them."""

import logging
import shlex
from pathlib import Path

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy

from llava_lite.errors import get_sentence
from llava_lite.hub.errors import HubError, readable_errors
from llava_lite.hub.push import push_directory, shareable_config
from llava_lite.train.arguments.tuning import PARTIAL_TUNINGS

logger = logging.getLogger(__name__)


def check_can_push(model_args, training_args) -> None:
    """Raise ValueError, before anything is loaded, if others could not open what --push_to_hub True would upload."""
    is_full = training_args.save_full or training_args.tuning not in PARTIAL_TUNINGS
    if training_args.push_to_hub and not is_full:
        named = {
            "base_model_name_or_path": model_args.model_name_or_path,
            "mm_vision_tower": model_args.vision_tower,
        }
        shareable_config(named, training_args.output_dir)


class UploadError(HubError):
    """The upload of a finished run failed; no rank waits for another any more."""


def upload(trainer) -> None:
    """Upload the final directory. Raises UploadError, which says that the run itself is complete, and what to do."""
    try:
        trainer.push_to_hub()
    # Whatever kind: of a client's thread, of its library for transfers, of the disk.
    except Exception as error:
        reason = get_sentence(error).splitlines()[0].rstrip(".")
        raise UploadError(
            f"the run is complete in {trainer.args.output_dir}, and its upload failed: {reason}. Upload it later: "
            f"{push_command(trainer.args)}"
        ) from error


def push_command(args) -> str:
    """Return the command that uploads the final directory of a run as its flags say."""
    words = ["llava-lite", "push", args.output_dir, get_repository(args)]
    words += ["--revision", args.hub_revision] if args.hub_revision else []
    return shlex.join([*words, *(["--private"] if args.hub_private_repo else [])])


def get_repository(args) -> str:
    """Return the repository of a run."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


class PushingMixin:
    """Trainer overrides: `class LLaVATrainer(PushingMixin, ..., Trainer)`.

    --hub_strategy end and every_save upload the model once, when it is finished: before that the directory holds no
    model. checkpoint and all_checkpoints also upload checkpoint-N, optimizer included, as last-checkpoint or under its
    own name.
    """

    # The upload in the background, a Future.
    upload = None

    def init_hf_repo(self, token=None, private=None):
        """Create the repository, before the first step."""
        if not self.is_world_process_zero():
            return
        args, self.upload, self.push_in_progress = self.args, None, None
        name = get_repository(args)
        token, private = token or args.hub_token, args.hub_private_repo if private is None else private
        with readable_errors(name, token=token):
            self.hub_model_id = HfApi(token=token).create_repo(name, private=private, exist_ok=True).repo_id

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        """Upload the final directory; return the CommitInfo on the first rank, None on the others."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if not self.is_world_process_zero():
            return None
        self.finish_upload()
        args = self.args
        return push_directory(
            args.output_dir,
            self.hub_model_id or get_repository(args),
            commit_message=commit_message or "End of training",
            private=args.hub_private_repo if private is None else private,
            token=token or args.hub_token,
            revision=revision or args.hub_revision,
            **kwargs,
        )

    def push_checkpoint(self, path):
        """Upload a checkpoint in the background, if --hub_strategy asks for it."""
        args = self.args
        asks = args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
        if not asks or not self.is_world_process_zero():
            return
        if self.upload is not None and not self.upload.done() and not args.hub_always_push:
            return
        self.finish_upload()
        self.callback_handler.on_push_begin(args, self.state, self.control)
        name = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else Path(path).name
        self.upload = HfApi(token=args.hub_token).upload_folder(
            repo_id=self.hub_model_id,
            folder_path=path,
            path_in_repo=name,
            commit_message=f"Training in progress, step {self.state.global_step}, checkpoint",
            revision=args.hub_revision,
            run_as_future=True,
        )

    def finish_upload(self):
        """Wait for the upload in the background; one that failed is reported and stops nothing."""
        upload, self.upload = self.upload, None
        if upload is not None and not upload.cancelled() and upload.exception() is not None:
            logger.warning("a checkpoint did not reach the Hub: %s", upload.exception())
