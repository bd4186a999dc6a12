"""Turn the folder of a finished model into one commit on the Hub: what opens it, not the inner state of its run."""

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

from llava_lite.commands.push import build_parser
from llava_lite.hub import in_words
from llava_lite.model_source import check_directory

CARD, CONFIG, ADAPTER = "README.md", "config.json", "adapter_config.json"
# Everything else in a training folder (optimizer, trainer state, ledgers with paths, logs) stays at home.
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
# What transformers writes where it finds no card; such a one may be replaced.
GENERATED = "has been automatically generated"
# The line of a run's card that says what to open.
OPENED = re.compile(r'load\(".*"\)')


def push_folder(
    folder,
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
    """Upload the model of a folder to `repo_id`, which is made if it is not there; return the CommitInfo.

    folder: what a stage left, whole or a part (projector, LoRA), or what `save_pretrained` wrote; of its files those
    that open the model, its card and its plots are uploaded. revision: a branch, made if it is not there. create_pr:
    open a pull request, which needs no right to write. base, tower: hub ids to name in place of folders of this
    machine that a part stands on. path_in_repo: a folder of the repository, for `subfolder=`. Raises ValueError if
    nobody else could open the upload, HubError if the Hub refuses it.
    """
    folder = Path(folder)
    names = files_to_share(folder)
    texts = texts_to_share(folder, names, repo_id, base, tower)
    operations = [
        CommitOperationAdd(os.path.join(path_in_repo, name), texts[name].encode() if name in texts else folder / name)
        for name in names
    ]
    with in_words(repo_id, token=token, revision=revision):
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


def files_to_share(folder: Path) -> list[str]:
    """Return the names of the files of a folder that are for everybody, none from folders inside it."""
    check_directory(str(folder), "the directory to upload,")
    found = sorted(path.name for path in folder.glob("*") if path.is_file())
    names = [name for name in found if any(fnmatch(name, pattern) for pattern in PUBLISHED)]
    if not names:
        raise ValueError(f"{str(folder)!r} holds nothing to upload: no config.json, no weights, no tokenizer.")
    return names


def prepare_repository(api: HfApi, repo_id: str, private: bool | None, revision: str | None, create_pr: bool) -> str:
    """Make the repository and the branch if they are not there; return the repository's full name."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def texts_to_share(
    folder: Path, names: list[str], repo_id: str, base: str | None, tower: str | None
) -> dict[str, str]:
    """Return the files that are rewritten: configs without paths of this machine, a card that names the repository."""
    texts = {}
    if CONFIG in names:
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        texts[CONFIG] = as_json(shareable_config(fields, folder, base, tower))
    if ADAPTER in names:
        fields = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        named = fields.get("base_model_name_or_path")
        if named and os.path.isdir(named):
            fields["base_model_name_or_path"] = base
        if CONFIG in names and "/" in repo_id:
            # transformers' Auto classes go where this points and read nothing else: to the text model, if that were
            # named. config.json, which is read here, names the base.
            fields["base_model_name_or_path"] = repo_id
        texts[ADAPTER] = as_json(fields)
    if CARD in names:
        texts[CARD] = OPENED.sub(f'load("{repo_id}")', (folder / CARD).read_text(encoding="utf-8"))
    return texts


def as_json(fields: dict) -> str:
    """Return fields as transformers writes them."""
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def shareable_config(fields: dict, folder, base: str | None = None, tower: str | None = None) -> dict:
    """Return the fields of a config.json without paths of this machine, as somebody else can open it.

    Raises ValueError where a path is needed to open the model and no hub id is given in its place.
    """
    named_base, named_tower = fields.get("base_model_name_or_path"), fields.get("mm_vision_tower")
    fields = {key: value for key, value in fields.items() if key != "_name_or_path"}
    if named_base is not None:
        if base is None and is_local(named_base):
            raise ValueError(
                f"{str(folder)!r} holds only what was trained, and its base {named_base!r} is a folder of this "
                "machine. Push the base first and name it: base='user/base'. Or train with --save_full True."
            )
        fields["base_model_name_or_path"] = base or named_base
    if named_tower is not None and is_local(named_tower):
        is_inside = holds_tower(base or named_base) if named_base else has_tower_weights(fields, folder)
        if tower is None and not is_inside:
            raise ValueError(
                f"the vision tower {named_tower!r} of {str(folder)!r} is a folder of this machine. Name the "
                "repository that holds it: tower='openai/clip-vit-large-patch14-336'. Or train with --save_full True."
            )
        if tower is None and fields.get("vision_config") is None and named_base is None:
            fields["vision_config"] = vision_fields(named_tower)
        # Where the weights are in the upload the name is for people only.
        fields["mm_vision_tower"] = tower or os.path.basename(named_tower.rstrip("/"))
    elif tower is not None:
        fields["mm_vision_tower"] = tower
    return fields


def has_tower_weights(fields: dict, folder) -> bool:
    """Tell whether a whole model brings its own vision tower along, and the tower's shape is known."""
    if fields.get("vision_config") is not None:
        return True
    is_inside = any(name.startswith("model.vision_tower.") for name in weight_names(Path(folder)))
    return is_inside and os.path.isfile(os.path.join(fields["mm_vision_tower"], CONFIG))


def weight_names(folder: Path) -> list[str]:
    """Return the names of the weights in the safetensors of a folder."""
    index, file = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return list(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if not file.is_file():
        return []
    with safe_open(file, framework="np") as weights:
        return list(weights.keys())


def vision_fields(tower: str) -> dict:
    """Return the config of a tower's folder, of a picture-and-text model the vision part."""
    fields = json.loads(Path(tower, CONFIG).read_text(encoding="utf-8"))
    return fields.get("vision_config", fields)


def is_local(name: str) -> bool:
    """Tell a folder of this machine, there or gone, from a hub id."""
    return os.path.isdir(name) or os.path.isabs(name) or name.startswith((".", "~"))


def holds_tower(base: str) -> bool:
    """Tell whether a base brings its own vision tower along."""
    try:
        path = os.path.join(base, CONFIG) if is_local(base) else hf_hub_download(base, CONFIG)
        with open(path, encoding="utf-8") as file:
            return json.load(file).get("vision_config") is not None
    except (OSError, EntryNotFoundError):
        return False


def written_card(repo_id: str, revision: str | None, token) -> ModelCard | None:
    """Return the card of a repository if somebody wrote it."""
    try:
        path = hf_hub_download(repo_id, CARD, revision=revision, token=token)
    except EntryNotFoundError:
        return None
    card = ModelCard(Path(path).read_text(encoding="utf-8"))
    return None if GENERATED in card.text else card


class ProcessorSharing:
    """`push_to_hub` for a processor: it leaves the model's card alone."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = "Upload processor",
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ):
        """Upload tokenizer, image processor and settings to `repo_id`, beside the model or alone; as `push_folder`."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(
                folder,
                repo_id,
                commit_message=commit_message or "Upload processor",
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )


def main(argv=None):
    """Upload a folder and say where it is; the token is that of `hf auth login`."""
    options = vars(build_parser().parse_args(argv))
    commit = push_folder(options.pop("folder"), options.pop("repo_id"), **options)
    print(commit.pr_url or commit.commit_url)
