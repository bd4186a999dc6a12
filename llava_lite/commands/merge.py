"""Turn the flags of `llava-lite merge`, LLaVA's among them, into options."""

from llava_lite.commands.parser import CommandParser


def build_parser():
    """Return the parser of `llava-lite merge`."""
    parser = CommandParser(
        prog="llava-lite merge",
        command="merge",
        description="Fold LoRA, or a directory of what was trained, into a whole model; check it.",
    )
    parser.add_argument("source", nargs="?", help="directory or hub id of what was trained")
    parser.add_argument("target", nargs="?", help="directory to write, which must be new or empty")
    parser.add_argument("--model-path", help="the source, as in LLaVA")
    parser.add_argument("--model-base", dest="base", help="the base model (default: the one that the source names)")
    parser.add_argument("--save-model-path", help="the target, as in LLaVA")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as the base is stored)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-3, help="largest logit difference in float32 (default: 1e-3)"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="largest file of weights (default: 5GB)")
    parser.add_argument("--push-to-hub", metavar="USER/NAME", help="upload the directory once it has passed the check")
    return parser
