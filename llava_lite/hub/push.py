"""Upload the directory of a finished model in one commit: the files that open it, not the state of its run."""

from __future__ import annotations

import json
import os
import re
import tempfile
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open

from llava_lite.hub.card import CARD
from llava_lite.hub.errors import CONFIG, readable_errors
from llava_lite.hub.json_files import read_fields
from llava_lite.hub.source import check_directory

ADAPTER = "adapter_config.json"
# Everything else in a training directory (optimizer, trainer state, skipped-records logs with paths) is not uploaded.
PUBLISHED = (
    "README.md",
    "LICENSE*",
    "*.png",
    "metrics.jsonl",
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "mm_projector.bin",
    "non_lora_trainables.bin",
    "adapter_config.json",
    "adapter_model.bin",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.*",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
)
# In the card that transformers writes if there is none; such a card may be replaced.
GENERATED = "has been automatically generated"
# The line of a card that opens the model.
OPENED = re.compile(r'load\(".*"\)')


def push_directory(
    directory,
    repo_id: str,
    *,
    commit_message: str | None = "Upload model",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    base: str | None = None,
    tower: str | None = None,
    path_in_repo: str = "",
):
    """Upload the model of a directory to `repo_id`, which is created if it does not exist; return the CommitInfo.

    directory: the output of a stage, complete or trained weights alone (projector, LoRA), or of `save_pretrained`; the
    files that open the model, its card and its plots are uploaded. revision: a branch, created if it does not exist.
    create_pr: open a pull request, which needs no write access. base, tower: hub ids to name in place of local
    directories that trained weights stand on. path_in_repo: a directory of the repository, for `subfolder=`. Raises
    ValueError if the upload could not be opened elsewhere, HubError if the Hub refuses it.
    """
    directory = Path(directory)
    names = files_to_share(directory)
    texts = texts_to_share(directory, names, repo_id, base, tower)
    operations = [
        CommitOperationAdd(
            os.path.join(path_in_repo, name), texts[name].encode() if name in texts else directory / name
        )
        for name in names
    ]
    with readable_errors(repo_id, token=token, revision=revision):
        api = HfApi(token=token)
        repo_id = prepare_repository(api, repo_id, private, revision, create_pr)
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def files_to_share(directory: Path) -> list[str]:
    """Return the names of the files to upload, none from directories inside the directory."""
    check_directory(str(directory), "the directory to upload,")
    found = sorted(path.name for path in directory.glob("*") if path.is_file())
    names = [name for name in found if any(fnmatch(name, pattern) for pattern in PUBLISHED)]
    if not names:
        raise ValueError(f"{str(directory)!r} holds nothing to upload: no config.json, no weights, no tokenizer.")
    return names


def prepare_repository(api: HfApi, repo_id: str, private: bool | None, revision: str | None, create_pr: bool) -> str:
    """Create the repository and the branch if they do not exist; return the repository's full name."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def texts_to_share(
    directory: Path, names: list[str], repo_id: str, base: str | None, tower: str | None
) -> dict[str, str]:
    """Return the files that are rewritten: configs without local paths, a card that names the repository."""
    texts = {}
    if CONFIG in names:
        fields = read_fields(directory / CONFIG)
        texts[CONFIG] = as_json(shareable_config(fields, directory, base, tower))
    if ADAPTER in names:
        fields = read_fields(directory / ADAPTER)
        named = fields.get("base_model_name_or_path")
        if named and os.path.isdir(named):
            fields["base_model_name_or_path"] = base
        if CONFIG in names and "/" in repo_id:
            # transformers' Auto classes follow this name and read nothing else; it must not lead to the text model.
            # This package reads the base from config.json.
            fields["base_model_name_or_path"] = repo_id
        texts[ADAPTER] = as_json(fields)
    if CARD in names:
        texts[CARD] = OPENED.sub(f'load("{repo_id}")', (directory / CARD).read_text(encoding="utf-8"))
    return texts


def as_json(fields: dict) -> str:
    """Return fields as transformers writes them."""
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def shareable_config(fields: dict, directory, base: str | None = None, tower: str | None = None) -> dict:
    """Return the fields of a config.json without local paths, as they can be opened elsewhere.

    Raises ValueError if a path is needed to open the model and no hub id is given in its place.
    """
    named_base, named_tower = fields.get("base_model_name_or_path"), fields.get("mm_vision_tower")
    fields = {key: value for key, value in fields.items() if key != "_name_or_path"}
    if named_base is not None:
        if base is None and is_local(named_base):
            raise ValueError(
                f"{str(directory)!r} holds only what was trained, and its base {named_base!r} is a directory of this "
                "machine. Push the base first and name it: base='user/base'. Or train with --save_full True."
            )
        fields["base_model_name_or_path"] = base or named_base
    if named_tower is not None and is_local(named_tower):
        is_inside = holds_tower(base or named_base) if named_base else has_tower_weights(fields, directory)
        if tower is None and not is_inside:
            raise ValueError(
                f"the vision tower {named_tower!r} of {str(directory)!r} is a directory of this machine. Name the "
                "repository that holds it: tower='openai/clip-vit-large-patch14-336'. Or train with --save_full True."
            )
        if tower is None and fields.get("vision_config") is None and named_base is None:
            fields["vision_config"] = vision_fields(named_tower)
        # If the weights are in the upload, the name is information only.
        fields["mm_vision_tower"] = tower or os.path.basename(named_tower.rstrip("/"))
    elif tower is not None:
        fields["mm_vision_tower"] = tower
    return fields


def has_tower_weights(fields: dict, directory) -> bool:
    """Tell whether a complete model holds its vision tower, and the tower's shape is known."""
    if fields.get("vision_config") is not None:
        return True
    is_inside = any(name.startswith("model.vision_tower.") for name in weight_names(Path(directory)))
    return is_inside and os.path.isfile(os.path.join(fields["mm_vision_tower"], CONFIG))


def weight_names(directory: Path) -> list[str]:
    """Return the names of the weights in the safetensors of a directory."""
    index, file = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        return list(read_fields(index)["weight_map"])
    if not file.is_file():
        return []
    with safe_open(file, framework="np") as weights:
        return list(weights.keys())


def vision_fields(tower: str) -> dict:
    """Return the config of a tower's directory, of an image-and-text model the vision part."""
    fields = read_fields(Path(tower, CONFIG))
    return fields.get("vision_config", fields)


def is_local(name: str) -> bool:
    """Tell a local directory, existing or not, from a hub id."""
    return os.path.isdir(name) or os.path.isabs(name) or name.startswith((".", "~"))


def holds_tower(base: str) -> bool:
    """Tell whether a base holds its own vision tower."""
    try:
        path = os.path.join(base, CONFIG) if is_local(base) else hf_hub_download(base, CONFIG)
        return read_fields(path).get("vision_config") is not None
    except (OSError, EntryNotFoundError):
        return False


def written_card(repo_id: str, revision: str | None, token) -> ModelCard | None:
    """Return the card of a repository, None if it has none or a generated one."""
    try:
        path = hf_hub_download(repo_id, CARD, revision=revision, token=token)
    except EntryNotFoundError:
        return None
    card = ModelCard(Path(path).read_text(encoding="utf-8"))
    return None if GENERATED in card.text else card


class ProcessorSharing:
    """`push_to_hub` for a processor; the model's card stays."""

    def push_to_hub(self, repo_id: str, *, commit_message: str | None = "Upload processor", **options):
        """Upload tokenizer, image processor and settings to `repo_id`, with or without a model beside them.

        options: the other keywords of `push_directory`.
        """
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            return push_directory(directory, repo_id, commit_message=commit_message or "Upload processor", **options)
