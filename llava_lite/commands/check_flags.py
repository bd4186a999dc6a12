"""Turn the command line of `llava-lite check` into its flags, without importing what the check itself needs."""

import argparse
import os

from llava_lite.commands.parser import CommandParser, yes_or_no
from llava_lite.constants import ASPECT_RATIOS, MERGE_TYPES

# The flags that a run does not have.
OWN = ("decode", "bad_records_file", "num_workers", "num_image_tokens", "image_size", "report", "show", "page")
DESCRIPTION = """Look at every record and image of a training run before any GPU time is spent.

Give it the flags of the run, or the YAML file that holds them: flags without effect on the data are ignored. It
reports how many records can be used, how long they are with the features of the model's own vision tower, and what
is wrong with each of the others. It ends with one line. Exit status: 0, `ready to train`: the run would reach its
first step; 1, `not ready`: it would stop before, and why; 2: the command line itself is wrong."""


def at_least_one(text: str) -> int:
    """Read a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 on")
    return int(text)


def build_parser() -> CommandParser:
    """Return the parser of the flags that matter to the data."""
    parser = CommandParser(
        command="check",
        usage="llava-lite check [run.yaml] --data_path FILE ... --image_folder DIR --model_name_or_path MODEL [flags]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    switch = {"type": yes_or_no, "nargs": "?", "const": True, "default": False, "metavar": "True|False"}
    data = parser.add_argument_group("data, as in `llava-lite train`")
    data.add_argument("--data_path", metavar="FILE", nargs="+", help="JSON or JSONL files, or YAML mixtures of them")
    data.add_argument(
        "--eval_data_path", metavar="FILE", nargs="+", help="files of records to evaluate on, checked after the others"
    )
    data.add_argument("--image_folder", metavar="DIR", help="directory that image paths start from")
    data.add_argument(
        "--bad_record", choices=("raise", "skip"), default="raise",
        help="skip: records that cannot be used are left out of the run, up to --max_bad_fraction (default raise)",
    )  # fmt: skip
    data.add_argument(
        "--max_bad_fraction",
        metavar="N",
        type=float,
        default=0.01,
        help="largest fraction of the records left out (default 0.01)",
    )
    data.add_argument("--follow_links", help="allow links that lead out of the image directory", **switch)
    data.add_argument("--placeholder_as_text", help="<image> in a record without images is plain text", **switch)
    model = parser.add_argument_group("model, as in `llava-lite train`")
    model.add_argument(
        "--model_name_or_path", metavar="MODEL", help="whose tokenizer and vision tower count the tokens"
    )
    model.add_argument(
        "--vision_tower", metavar="TOWER", help="tower of a run that starts from a plain language model"
    )
    model.add_argument("--version", metavar="TEMPLATE", default="v1", help="conversation template (default v1)")
    model.add_argument(
        "--chat_end_token",
        metavar="TOKEN",
        help="with --version chat: token that ends answers, where it has none",
    )
    model.add_argument(
        "--special_tokens_in_text", choices=("token", "text"), default="token",
        help="what a special token spelled in a question or an answer is (default token)",
    )  # fmt: skip
    model.add_argument("--enable_thinking", metavar="True|False", help="with --version chat; no effect on a check")
    model.add_argument(
        "--model_max_length", metavar="N", type=int, default=2048, help="tokens of a sequence (default 2048)"
    )
    model.add_argument("--image_aspect_ratio", choices=ASPECT_RATIOS, help="anyres counts the crops of an image")
    model.add_argument("--image_grid_pinpoints", metavar="...", help="resolutions of anyres (default: the model's)")
    model.add_argument("--mm_patch_merge_type", choices=MERGE_TYPES, help="how crops are joined; default: the model's")
    model.add_argument(
        "--mm_vision_select_feature", choices=("patch", "cls_patch", "pooled"), help="default: the model's"
    )
    model.add_argument(
        "--mm_projector_type", metavar="NAME", help="connector; query_vit has features of its own number"
    )
    model.add_argument("--mm_query_len", metavar="N", type=int, help="features of a query_vit; default: the model's")
    model.add_argument(
        "--mm_injection", choices=("tokens", "adaption_prompt"), help="with adaption_prompt an image takes no token"
    )
    model.add_argument("--mm_image_position", choices=("placeholder", "front"), help="default: the model's")
    model.add_argument("--mm_boundary_vectors", **(switch | {"default": None}), help="default: as the model")
    model.add_argument("--mm_use_im_start_end", **(switch | {"default": None}), help="default: as the model")
    model.add_argument("--new_tokens", metavar="TOKEN", nargs="+", help="tokens that the run adds to the tokenizer")
    model.add_argument("--mm_use_im_patch_token", **(switch | {"default": None}), help="default: as the model")
    model.add_argument("--tuning", metavar="...", help="projector: data without a single image are not ready")
    model.add_argument("--cache_dir", metavar="DIR", help="where downloaded files are kept")
    own = parser.add_argument_group("of the check alone")
    own.add_argument("--decode", help="decode every image too; slow", **switch)
    own.add_argument(
        "--bad_records_file", metavar="FILE", help="write the bad records to this file, one JSON object a line"
    )
    own.add_argument("--report", metavar="FILE.json", help="write what the check finds to this file, as JSON")
    own.add_argument(
        "--show",
        metavar="N",
        type=at_least_one,
        help="write the first N batches of the run as an HTML page, to --page",
    )
    own.add_argument("--page", metavar="FILE.html", default="batches.html", help="that page (default batches.html)")
    own.add_argument(
        "--num_workers", "--dataloader_num_workers", metavar="N", type=int, default=os.cpu_count(),
        help="processes that count tokens of large files (default: one for each CPU)",
    )  # fmt: skip
    own.add_argument(
        "--num_image_tokens", metavar="N", type=int, help="features of an image, where no encoder is named"
    )
    own.add_argument(
        "--image_size", metavar="N", type=int, default=336, help="then pixels along a side of a crop (default 336)"
    )
    return parser
