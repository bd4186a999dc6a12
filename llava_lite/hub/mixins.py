"""Push a model to the Hub in one commit: weights, config, and the card that its run wrote."""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import HfApi, ModelCard

from llava_lite.hub.card import CARD, front_matter, usage
from llava_lite.hub.errors import readable_errors
from llava_lite.hub.push import is_local, prepare_repository, push_directory, written_card


class SharingMixin:
    """`push_to_hub` for a LLaVA model class."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = "Upload model",
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "5GB",
        tags: list[str] | str | None = None,
    ):
        """Upload the complete model to `repo_id`, which is created if it does not exist; return the CommitInfo.

        The card is the README.md of the directory that the model was loaded from, as training writes it, else a short
        one; a card that a person wrote in the repository stays. revision: a branch, created if it does not exist. The
        processor is pushed by its own `push_to_hub`. Raises HubError if the Hub refuses.
        """
        with readable_errors(repo_id, token=token, revision=revision):
            repo_id = prepare_repository(HfApi(token=token), repo_id, private, revision, create_pr)
            written = written_card(repo_id, revision, token)
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory, max_shard_size=max_shard_size)
            tags = [tags] if isinstance(tags, str) else list(tags or [])
            (Path(directory) / CARD).write_text(
                str(choose_card(self.config, repo_id, written, tags)), encoding="utf-8"
            )
            return push_directory(
                directory,
                repo_id,
                commit_message=commit_message,
                commit_description=commit_description,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )


def choose_card(config, repo_id: str, written: ModelCard | None, tags: list[str]) -> ModelCard:
    """Return the card to push: the repository's, the run's, or a short one; with `tags` added."""
    own = Path(config.name_or_path or "") / CARD
    if written is not None:
        card = written
    elif config.name_or_path and own.is_file():
        card = ModelCard(own.read_text(encoding="utf-8"))
    else:
        card = short_card(config, repo_id)
    card.data.tags = sorted({*(card.data.tags or []), *tags})
    return card


def short_card(config, repo_id: str) -> ModelCard:
    """Return a card with what the model is and how to ask it."""
    experts = "" if config.moe is None else ", sparse experts"
    tower = config.mm_vision_tower
    seen_by = f" Vision tower: {tower}." if tower and not is_local(tower) else ""
    front = {
        "library_name": "llava-lite",
        "pipeline_tag": "image-text-to-text" if config.has_vision_tower else "text-generation",
        "tags": ["llava", *(["moe"] if experts else [])],
    }
    facts = f"A `{config.model_type}` model{experts}, saved by llava-lite.{seen_by}"
    return ModelCard(f"{front_matter(front)}\n# {repo_id}\n\n{facts}\n\n{usage(repo_id, config.has_vision_tower)}\n")
