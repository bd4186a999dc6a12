"""Turn the flags of `llava-lite answer` into a file of answers: batch inference in LLaVA's formats."""

from llava_lite.commands.asking_flags import add_asking_flags
from llava_lite.commands.parser import CommandParser


def build_parser():
    """Return the parser of `llava-lite answer`."""
    parser = CommandParser(
        prog="llava-lite answer",
        command="answer",
        description="Answer a file of questions, one JSON object a line; a run that was stopped goes on.",
    )
    parser.add_argument("model", metavar="MODEL", help="directory or hub id of the model")
    parser.add_argument(
        "questions",
        metavar="QUESTIONS.jsonl",
        help="lines of {question_id, image, text, category}; image is a name, a list of names, or left out",
    )
    parser.add_argument("out", metavar="OUT.jsonl", help="file of answers, in the order of the questions")
    parser.add_argument("--image-folder", help="directory of the images (default: the one of the questions)")
    add_asking_flags(parser, "1024 tokens")
    return parser


def main(argv=None) -> int:
    """Answer the questions; return 0."""
    flags = build_parser().parse_args(argv)
    # Imported here: a wrong flag is answered without torch.
    from llava_lite.eval.answer import answer_file

    answer_file(flags)
    return 0
