"""Turn the flags of `llava-lite push` into a commit on the Hub."""

from pathlib import Path

from llava_lite.commands.parser import CommandParser


def build_parser():
    """Return the parser of `llava-lite push`."""
    parser = CommandParser(command="push", description="Upload a finished directory to the Hub.")
    parser.add_argument("directory", help="what a stage left: a full model, a projector or LoRA")
    parser.add_argument("repo_id", help="user/name; made if it is not there")
    parser.add_argument("--private", action="store_true", default=None, help="make it private, if it is made now")
    parser.add_argument("--revision", help="branch, made if it is not there (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--commit-message", default="Upload model", help="message of the commit")
    parser.add_argument("--base", help="hub id to name as the base of a part, in place of a directory of this machine")
    parser.add_argument("--tower", help="hub id to name as its vision tower, in place of a directory of this machine")
    parser.add_argument("--path-in-repo", default="", help="directory of the repository to upload to")
    return parser


def main(argv=None):
    """Upload a directory and print its address; the token is that of `hf auth login`."""
    options = vars(build_parser().parse_args(argv))
    from llava_lite.checkpoints.step_weights import holds_step, verify_model
    from llava_lite.hub.push import push_directory
    from llava_lite.train.saving.final_files import FILES

    directory = options.pop("directory")
    if holds_step(directory):
        verify_model(directory)
    elif damage := find_damage_to_share(Path(directory)):
        raise ValueError(
            f"{damage} Nothing is uploaded. If you changed the model on purpose, remove {FILES} there and push again."
        )
    commit = push_directory(directory, options.pop("repo_id"), **options)
    print(commit.pr_url or commit.commit_url)


def find_damage_to_share(directory: Path):
    """Return the sentence for a model that has lost a file or is cut; None for a whole one, or a tokenizer alone."""
    from llava_lite.hub.errors import CONFIG
    from llava_lite.train.saving.final_files import FILES, find_damage

    holds_model = any((directory / name).is_file() for name in (FILES, CONFIG))
    return find_damage(directory) if holds_model else None
