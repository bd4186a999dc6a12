"""Turn the flags of `llava-lite report` into the page of a training run."""

from llava_lite.commands.parser import CommandParser


def build_parser():
    """Return the parser of `llava-lite report`."""
    parser = CommandParser(
        command="report",
        description="Write the page of a training run, which may still be in progress.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="--output_dir of the run")
    parser.add_argument("--out", metavar="FILE", help="page to write (default: RUN_DIR/report.html)")
    parser.add_argument(
        "--scores",
        metavar="DIR",
        nargs="+",
        default=[],
        help="directories with results.json of `llava-lite eval`, beside RUN_DIR and eval/ next to it",
    )
    return parser


def main(argv=None) -> int:
    """Write the page and print its path; return 0."""
    options = build_parser().parse_args(argv)
    # Imported here: a wrong flag is answered without torch.
    from llava_lite.train.monitor.report.page import write_report

    print(write_report(options.run_dir, options.out, options.scores))
    return 0
