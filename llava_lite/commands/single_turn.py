"""Turn conversations into records of one question each: `llava-lite single-turn IN OUT`."""

from llava_lite.commands.parser import CommandParser

# As in data/single_turn.py, which is imported only when it works.
NEWLINES = ("keep", "space", "drop")


def build_parser():
    """Return the parser of `llava-lite single-turn`."""
    parser = CommandParser(
        command="single-turn",
        description="Write a record of each question and its answer, for templates of one question (alpaca).",
    )
    parser.add_argument("source", metavar="IN", help="file of LLaVA's records, .json or .jsonl")
    parser.add_argument("out", metavar="OUT", help="file to write, .json or .jsonl; it must not exist")
    parser.add_argument(
        "--newlines",
        choices=NEWLINES,
        default="keep",
        help="line breaks in the texts: keep them, write a space, or drop them as LLaMA2-Accessory's "
        "llava_to_single_turn.py does, byte for byte (default: keep)",
    )
    return parser


def main(argv=None) -> int:
    """Write the file; `llava_lite.cli` prints an error in one line."""
    flags = build_parser().parse_args(argv)
    from llava_lite.data.single_turn import convert_file

    num_read, num_written = convert_file(flags.source, flags.out, flags.newlines)
    print(f"wrote {num_written:,} records of one question, out of {num_read:,}, to {flags.out}")
    print(
        f"next: name it in a YAML file, META: [{{path: {flags.out}, type: image_text, preprocess: single_turn_llava}}]"
    )
    return 0
