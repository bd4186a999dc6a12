"""Push a model to the Hub in one commit: weights, config, and the card that its run wrote."""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData

from llava_lite.hub import in_words
from llava_lite.model.generation_config import SavingMixin
from llava_lite.share import CARD, is_local, prepare_repository, push_folder, written_card


class SharingMixin(SavingMixin):
    """`push_to_hub` and `save_pretrained` for a LLaVA model class."""

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
        """Upload the whole model to `repo_id`, which is made if it is not there; return the CommitInfo.

        The card is the README.md of the folder that the model was loaded from, as training writes it, else a short
        one; a card that somebody wrote in the repository stays. revision: a branch, made if it is not there. The
        processor is pushed by its own `push_to_hub`. Raises HubError if the Hub refuses.
        """
        with in_words(repo_id, token=token, revision=revision):
            repo_id = prepare_repository(HfApi(token=token), repo_id, private, revision, create_pr)
            written = written_card(repo_id, revision, token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            tags = [tags] if isinstance(tags, str) else list(tags or [])
            (Path(folder) / CARD).write_text(str(choose_card(self.config, repo_id, written, tags)), encoding="utf-8")
            return push_folder(
                folder,
                repo_id,
                commit_message=commit_message,
                commit_description=commit_description,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )


def choose_card(config, repo_id: str, written: ModelCard | None, tags: list[str]) -> ModelCard:
    """Return the card to push: the repository's, the run's, or a short one; with `tags` added."""
    own = Path(config._name_or_path) / CARD
    if written is not None:
        card = written
    elif config._name_or_path and own.is_file():
        card = ModelCard(own.read_text(encoding="utf-8"))
    else:
        card = short_card(config, repo_id)
    card.data.tags = sorted({*(card.data.tags or []), *tags})
    return card


def short_card(config, repo_id: str) -> ModelCard:
    """Return a card that says what the model is and how to ask it."""
    experts = "" if config.moe is None else ", sparse experts"
    tower = config.mm_vision_tower
    sees = f"Vision tower: {tower}. " if tower and not is_local(tower) else ""
    data = ModelCardData(
        library_name="llava-lite",
        pipeline_tag="image-text-to-text" if config.has_vision_tower else "text-generation",
        tags=["llava", *(["moe"] if experts else [])],
    )
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {repo_id}\n\n"
        f"A `{config.model_type}` model{experts}, saved by llava-lite. {sees}\n\n"
        "```python\n"
        "from llava_lite import load, reply\n\n"
        f'model, processor = load("{repo_id}")\n'
        'print(reply(model, processor, "What is in the picture?", "picture.jpg"))\n'
        "```\n"
    )
