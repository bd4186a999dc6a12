"""Turn the flags of `llava-lite convert` into a converted directory."""

from llava_lite.commands.parser import CommandParser


def build_parser():
    """Return the parser of `llava-lite convert`."""
    parser = CommandParser(
        command="convert",
        description="Write a model in another layout, and check it: transformers' LlavaForConditionalGeneration, or "
        "back; Meta's LLaMA, LLaMA-Adapter V2, ImageBind-LLM and LLaMA2-Accessory as a directory of ours, or back to "
        "a release of LLaMA-Adapter V2.",
    )
    parser.add_argument("source", help="directory or hub id of the model; a .pth file or directory of another system")
    parser.add_argument("target", help="directory to write, which must be new or empty; for llama-adapter a .pth file")
    parser.add_argument(
        "--to",
        choices=("transformers", "llava", "llama-adapter"),
        help="layout to write (default: transformers, llava for a model in another layout)",
    )
    parser.add_argument("--base", help="what a .pth file of trained weights stands on: Meta's directory, or a hub id")
    parser.add_argument("--vision_tower", help="encoder of a .pth file that does not hold it")
    parser.add_argument("--tokenizer", help="directory or hub id of the tokenizer, where the base has none")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as the model is stored)")
    parser.add_checked_output()
    return parser


def main(argv=None):
    """Convert with the values of the flags; `llava_lite.cli` prints an error in one line."""
    options = build_parser().parse_args(argv)
    from llava_lite.export.convert import convert

    convert(**vars(options))
    return 0
