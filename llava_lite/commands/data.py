"""Turn records of another format into LLaVA's: `llava-lite data convert IN OUT.json`."""

import argparse
import shlex
import sys

from llava_lite.commands.parser import CommandParser, yes_or_no
from llava_lite.data.converters.base import ANSWER_CHOICES, Options

DESCRIPTION = """Rewrite records of another format as a JSON or JSONL file in LLaVA's format, which `llava-lite check`
and a training run read. It ends with how many records were written, what was left out and why.

read directly by training (no conversion needed): LLaVA, ShareGPT, OpenAI messages with text and image parts, ms-swift
messages, TRL prompt and completion, The Cauldron and FineVision, Alpaca, an image with its caption; in JSON, JSONL,
and with the images inside in parquet, WebDataset tar files and directories that `datasets` saved.

converted here, beside all of these: Alpaca with a history, query and response, question and answer, COCO captions,
VQAv2, InternVL meta files, LLaMA-Factory's dataset_info.json, CSV and TSV tables, ImageFolder."""

EXAMPLES = """examples:
  llava-lite data convert captions_train2017.json coco.json --answers first --image_folder train2017
  llava-lite data convert v2_OpenEnded_mscoco_train2014_questions.json vqa.json \\
      --annotations v2_mscoco_train2014_annotations.json --answers majority --image_folder train2014
  llava-lite data convert LLaMA-Factory/data/dataset_info.json demo.json --dataset mllm_demo
  llava-lite data convert mine.jsonl out.jsonl --image_key img_path
  llava-lite data convert saved_by_datasets/ out.json"""


def build_parser() -> CommandParser:
    """Return the parser of `llava-lite data convert`."""
    one = CommandParser(
        prog="llava-lite data convert",
        command="data",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.add_argument("source", metavar="IN", help="file, directory, or hf://datasets/user/name")
    one.add_argument("out", metavar="OUT", help="file to write, .json or .jsonl; it must not exist")
    one.add_argument("--image_folder", help="directory that image paths start from; with it every file is looked for")
    one.add_argument("--image_out", metavar="DIR", help="where images go that records hold (default: OUT_images)")
    one.add_argument(
        "--answers",
        choices=ANSWER_CHOICES,
        help="of several answers or captions: all (a record each), the first, or the most frequent",
    )
    one.add_argument(
        "--image_key",
        metavar="KEY",
        nargs="+",
        help="keys or columns of the images, where they are not image or images",
    )
    one.add_argument("--drop", metavar="KEY", nargs="+", help="keys or columns to leave out of every record")
    one.add_argument("--image_name", metavar="PATTERN", help="name of an image out of its value, e.g. '{:012d}.jpg'")
    one.add_argument("--image_prefix", default="", metavar="TEXT", help="put in front of image paths, e.g. train2014/")
    one.add_argument(
        "--images_first", action="store_true", help="put images without a placeholder in front of the first question"
    )
    one.add_argument("--question", default="", help="what is asked of an image that has a caption (default: nothing)")
    one.add_argument("--annotations", metavar="FILE", help="answers to the questions of a VQA data set")
    one.add_argument("--dataset", metavar="NAME", help="which of the data sets of a dataset_info.json")
    one.add_argument("--columns", nargs="+", metavar="NAME", help="columns of a table without a header")
    one.add_argument(
        "--placeholder_as_text",
        type=yes_or_no,
        nargs="?",
        const=True,
        default=False,
        metavar="True|False",
        help="keep records that hold <image> as text and have no image",
    )
    one.add_argument(
        "--bad_record",
        choices=("raise", "skip"),
        default="raise",
        help="skip: exit with 0 although records were left out (default raise: 1)",
    )
    return one


def main(argv=None) -> int:
    """Run `llava-lite data`; 0 if all records were written, else 1."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    if words[:1] != ["convert"]:
        if words[:1] in (["--help"], ["-h"]):
            parser.parse_args(["--help"])
        parser.exit(2, "llava-lite data: one thing can be done: llava-lite data convert IN OUT.json\n")
    flags = vars(parser.parse_args(words[1:]))
    source, out, image_out = flags.pop("source"), flags.pop("out"), flags.pop("image_out")
    placeholder_as_text, bad_record = flags.pop("placeholder_as_text"), flags.pop("bad_record")
    from llava_lite.data.converters.convert import convert

    written = convert(source, out, Options(**flags), image_out, placeholder_as_text)
    print("\n".join(written.lines(out)))
    if not written.num_records:
        print(f"nothing was written to {out}")
        return 1
    directory = f" --image_folder {shlex.quote(written.image_folder)}" if written.image_folder else ""
    if written.num_with_image and not directory:
        directory = " --image_folder DIR"
    flags = f"--data_path {shlex.quote(out)}{directory} --model_name_or_path MODEL --vision_tower TOWER"
    print(f"next: llava-lite check {flags}")
    if written.left_out and bad_record == "raise":
        print("exit status 1, since records were left out; --bad_record skip accepts that")
        return 1
    return 0
