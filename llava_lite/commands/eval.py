"""Turn the flags of `llava-lite eval` into the scores of a model on a benchmark."""

from llava_lite.commands.asking_flags import add_asking_flags, at_least_1
from llava_lite.commands.parser import CommandParser


def build_parser():
    """Return the parser of `llava-lite eval`."""
    parser = CommandParser(
        prog="llava-lite eval",
        command="benchmark",
        description="Score a model on a benchmark; `llava-lite eval list`.",
    )
    parser.add_argument("benchmark", help="name of the benchmark, or list")
    parser.add_argument("--model", help="directory or hub id of the model")
    parser.add_argument("--data", help="directory of the benchmark, or the one of all benchmarks, laid out as LLaVA's")
    parser.add_argument("--out", help="directory of answers and results (default: DATA/answers/MODEL/BENCHMARK)")
    parser.add_argument("--split", help="part of the benchmark (default: the first in `llava-lite eval list`)")
    parser.add_argument("--variant", help="way of asking or scoring (default: the first in `llava-lite eval list`)")
    parser.add_argument("--questions", help="another question file, below the benchmark's directory")
    parser.add_argument("--limit", type=at_least_1, help="ask the first questions alone")
    parser.add_argument("--judge", help="address of an OpenAI-compatible server that judges free answers")
    parser.add_argument("--judge-model", help="model that the judge is asked for (default: the paper's)")
    add_asking_flags(parser)
    return parser


def main(argv=None):
    """Score a model, or list the benchmarks; return 0."""
    parser = build_parser()
    flags = parser.parse_args(argv)
    # Imported here: a wrong flag is answered without torch.
    from llava_lite.eval.benchmarks import get_benchmark
    from llava_lite.eval.run import evaluate, list_benchmarks

    if flags.benchmark == "list":
        print(list_benchmarks())
        return 0
    get_benchmark(flags.benchmark)
    if flags.model is None:
        parser.error("--model is missing: a directory or hub id")
    if flags.data is None:
        parser.error("--data is missing: the directory of the benchmark, or the one of all benchmarks")
    evaluate(flags)
    return 0
