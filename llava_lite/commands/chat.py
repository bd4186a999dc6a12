"""Turn the flags of `llava-lite chat`, which are those of LLaVA's serve.cli, into options."""

from llava_lite.commands.parser import CommandParser


def build_parser():
    """Return the parser of `llava-lite chat` and `python -m llava_lite.serve.cli`."""
    parser = CommandParser(command="chat", description="Chat with a model in the terminal.")
    parser.add_argument("model", nargs="?", help="directory or hub id of the model")
    parser.add_argument("--model-path", help="the same, as in LLaVA")
    parser.add_argument("--model-base", help="base of a directory that holds only what was trained")
    parser.add_argument("--image-file", action="append", default=[], help="image to ask about; may be repeated")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: the GPU where there is one)")
    parser.add_argument("--conv-mode", help="prompt format (default: the one that trained the model)")
    parser.add_argument("--temperature", type=float, default=0.2, help="0 for greedy decoding (default: 0.2)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default: 512)")
    parser.add_argument("--load-8bit", action="store_true", help="quantise to 8 bit (bitsandbytes)")
    parser.add_argument("--load-4bit", action="store_true", help="quantise to 4 bit (bitsandbytes)")
    parser.add_argument("--revision", help="branch, tag or commit of the repository (default: main)")
    parser.add_argument("--subfolder", help="directory of the repository that holds the model")
    parser.add_argument("--cache-dir", help="where downloads are kept (default: the Hub client's own cache)")
    parser.add_argument("--local-files-only", action="store_true", help="open what is in the cache, ask no Hub")
    parser.add_argument("--debug", action="store_true", help="show the prompt and the answer as the model sees them")
    return parser
