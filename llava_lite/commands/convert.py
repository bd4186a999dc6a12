"""Turn the flags of `llava-lite convert` into options."""

from llava_lite.commands.parser import CommandParser


def build_parser():
    """Return the parser of `llava-lite convert`."""
    parser = CommandParser(
        prog="llava-lite convert",
        command="convert",
        description="Write a model as transformers' LlavaForConditionalGeneration, or back, and check it.",
    )
    parser.add_argument("source", help="directory or hub id of the model")
    parser.add_argument("target", help="directory to write, which must be new or empty")
    parser.add_argument(
        "--to",
        choices=("transformers", "llava"),
        help="layout to write (default: transformers, llava for a model of transformers)",
    )
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as the model is stored)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-3, help="largest logit difference in float32 (default: 1e-3)"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="largest file of weights (default: 5GB)")
    parser.add_argument("--push-to-hub", metavar="USER/NAME", help="upload the directory once it has passed the check")
    return parser
