"""Turn the flags of LLaVA's run_llava.py into options."""

from llava_lite.commands.parser import CommandParser


def build_parser():
    """Return the parser of `python -m llava_lite.eval.run_llava`, with LLaVA's flags and defaults."""
    parser = CommandParser(prog="python -m llava_lite.eval.run_llava", command="eval", description="Ask about images.")
    parser.add_argument("--model-path", required=True, help="directory or hub id of the model")
    parser.add_argument("--model-base", help="base of a directory that holds only what was trained")
    parser.add_argument("--image-file", required=True, help="images: files and addresses, joined by --sep")
    parser.add_argument("--query", required=True, help="the question")
    parser.add_argument("--conv-mode", help="prompt format (default: the one that trained the model)")
    parser.add_argument("--sep", default=",", help="what joins the images (default: a comma)")
    parser.add_argument("--temperature", type=float, default=0.2, help="0 for greedy decoding (default: 0.2)")
    parser.add_argument(
        "--top_p", type=float, help="sample from the most probable tokens whose probabilities add up to this"
    )
    parser.add_argument("--num_beams", type=int, default=1, help="beams of beam search (default: 1)")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="longest answer (default: 512)")
    return parser
