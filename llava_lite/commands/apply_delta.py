"""Turn the flags of `llava-lite apply-delta` into a language model: a base and its published differences."""

from llava_lite.commands.parser import CommandParser


def build_parser():
    """Return the parser of `llava-lite apply-delta`."""
    parser = CommandParser(
        command="apply-delta",
        description="Add a delta, as Open-Chinese-LLaMA was published, to its base: both in Meta's layout "
        "(consolidated.*.pth, params.json) or both in Hugging Face's.",
    )
    parser.add_argument(
        "base", help="directory of the base, such as LLaMA's 7B; in Hugging Face's layout a hub id too"
    )
    parser.add_argument("delta", help="directory or hub id of the differences")
    parser.add_argument("out", help="directory to write, which must be new or empty")
    return parser


def main(argv=None):
    """Write the sum in float16; `llava_lite.cli` prints an error in one line."""
    options = build_parser().parse_args(argv)
    from llava_lite.export.apply_delta import apply_delta_to

    apply_delta_to(options.base, options.delta, options.out)
    return 0
