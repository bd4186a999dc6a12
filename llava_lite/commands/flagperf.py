"""Turn the flags of `llava-lite flagperf` into FlagPerf's LLaVA-1.5 case, run or read from its logs."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from llava_lite.commands.asking_flags import at_least_1
from llava_lite.commands.parser import CommandParser

ROOT = Path(__file__).resolve().parents[2]


def build_parser():
    """Return the parser of `llava-lite flagperf`."""
    parser = CommandParser(
        prog="llava-lite flagperf",
        command="flagperf",
        holds_flags="--flags",
        description="Run FlagPerf's LLaVA-1.5 case: both stages, MMMU, tokens a second and MFU.",
    )
    parser.add_argument("data_dir", help="FlagPerf's data directory: LLaVA-Pretrain, LLaVA-Finetune, MMMU, Output")
    parser.add_argument("config", help="its vendor config, a .py file (read, not run) or YAML")
    parser.add_argument("--size", choices=["7b", "13b"], default="7b", help="which of its two cases (default: 7b)")
    parser.add_argument("--num_chips", type=at_least_1, help="chips of all nodes (default: NUM_GPUS x NNODES)")
    parser.add_argument("--from_log", action="store_true", help="run nothing: the figures of the run that is there")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--flags", default="", help="flags of llava-lite train for both stages, in one text")
    return parser


def main(argv=None):
    """Run the case or read its logs, and print FlagPerf's lines and the table; return 0."""
    flags = build_parser().parse_args(argv)
    # Imported here: a wrong flag is answered without torch.
    import shlex

    from llava_lite.commands import eval as evaluation
    from llava_lite.train.flagperf.case import Launch, Layout, read_case, run_case
    from llava_lite.train.flagperf.config import read_config
    from llava_lite.train.flagperf.report import our_figures, table, their_figures, their_lines

    scripts = ROOT / "scripts" / "v1_5"
    if not flags.from_log and not scripts.is_dir():
        raise FileNotFoundError(f"there is no {scripts}: the case runs the recipes of a clone of llava-lite.")
    check_json(flags.json)
    layout = Layout(Path(flags.data_dir), flags.size, read_config(Path(flags.config)))
    if flags.from_log:
        case = read_case(layout)
    else:
        launch = Launch(scripts, flags.num_chips or count_chips(), tuple(shlex.split(flags.flags)))
        case = run_case(layout, launch, evaluation.main)
    print("\n".join([*their_lines(case), "", *table(case)]))
    if flags.json:
        found = {"flagperf": their_figures(case), "llava_lite": our_figures(case), "case": asdict(case)}
        Path(flags.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def check_json(name):
    """Raise OSError for a file that cannot be written when the run, hours later, has ended; None is none."""
    path = Path(name or ".").absolute()
    if name and path.is_dir():
        raise IsADirectoryError(f"--json {name} is a directory; name a file.")
    if name and not path.parent.is_dir():
        raise FileNotFoundError(f"--json {name}: there is no directory {path.parent}. Make it, or name another file.")
    if name and not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"--json {name}: you may not write there. Name another file.")


def count_chips():
    """Return the chips of all nodes, by the variables of the recipes, else those of this machine."""
    import torch

    here = os.environ.get("NUM_GPUS") or max(1, torch.cuda.device_count())
    return int(here) * int(os.environ.get("NNODES", "1"))
