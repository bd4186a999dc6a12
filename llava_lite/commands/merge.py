"""Turn the flags of `llava-lite merge`, LLaVA's among them, into a full model."""

from llava_lite.commands.parser import CommandParser


def build_parser():
    """Return the parser of `llava-lite merge`."""
    parser = CommandParser(
        command="merge",
        description="Merge LoRA, or a directory of trained weights, into a full model; check it.",
    )
    parser.add_argument("source", nargs="?", help="directory or hub id of the trained weights")
    parser.add_argument("target", nargs="?", help="directory to write, which must be new or empty")
    parser.add_argument("--model-path", help="the source, as in LLaVA")
    parser.add_argument("--model-base", dest="base", help="the base model (default: the one that the source names)")
    parser.add_argument("--save-model-path", help="the target, as in LLaVA")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as the base is stored)")
    parser.add_checked_output()
    return parser


def main(argv=None):
    """Merge with the values of the flags; `llava_lite.cli` prints an error in one line."""
    parser = build_parser()
    options = vars(parser.parse_args(argv))
    for name, as_in_llava in (("source", "model_path"), ("target", "save_model_path")):
        options[name] = options.pop(as_in_llava) or options[name]
        if options[name] is None:
            parser.error(f"{name.upper()} (or --{as_in_llava.replace('_', '-')}) is needed")
    from llava_lite.export.merge import merge

    merge(**options)
    return 0
