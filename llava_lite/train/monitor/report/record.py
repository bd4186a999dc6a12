"""Write run.json: what a run is and trains on, each of its starts, and how it ended; its report reads it."""

import json
import logging
import os
import re
import shlex
import sys
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from transformers.trainer_callback import TrainerCallback

from llava_lite.errors import get_sentence
from llava_lite.train.monitor.report.files import RUN, RunFiles
from llava_lite.train.monitor.report.samples import save_images
from llava_lite.train.monitor.report.words import count
from llava_lite.train.publish.card import get_settings, versions
from llava_lite.train.saving.interrupt import EXIT_RESUMABLE
from llava_lite.train.saving.other_ranks import RANKS, global_batch
from llava_lite.train.tuning import compute_dtype, table_rows

logger = logging.getLogger(__name__)

# Flags whose value is a secret.
SECRET = re.compile(r"(^|[-_])(token|password|secret|api[-_]?key)$")
NUM_BINS = 24


class RunRecord(TrainerCallback):
    """Keeps run.json up to date; the first rank writes. A resumed run keeps the starts of the run before it.

    page: the path of the report once it is written.
    """

    page: Path | None = None

    def __init__(self, facts: dict, command: str, path: Path, is_writer: bool = True):
        self.facts, self.command, self.path, self.is_writer = facts, command, path, is_writer

    def on_train_begin(self, args, state, control, **kwargs):
        """Write the facts with this start."""
        files = RunFiles(self.path.parent)
        kept = files.read_record() if state.global_step else {}
        if files.damaged:
            logger.warning("%s The starts of the run before this one are lost to its report.", files.damaged[0])
        before = kept.get("starts", [])
        if before:
            before[-1]["end"] = kept.get("end")
        start = {"date": now(), "step": state.global_step, "command": self.command}
        self.facts |= {
            "starts": [*before, start | {"ranks": args.world_size, "device": get_device(args.device)}],
            "max_steps": state.max_steps,
        }
        self.write()

    def write(self) -> None:
        """Write the file, complete or not at all; a disk that is full must not stop the run."""
        if not self.is_writer:
            return
        draft = self.path.with_name(f"{self.path.name}.part")
        try:
            # In ASCII: a flag that is no UTF-8 has surrogates, which have no bytes.
            draft.write_text(json.dumps(self.facts, indent=1, default=str) + "\n", encoding="utf-8")
            os.replace(draft, self.path)
        except OSError as error:
            draft.unlink(missing_ok=True)
            logger.warning("%s is not written: %s", self.path, get_sentence(error))

    def end(self, state: str, **more) -> None:
        """Write how the run ended: finished, stopped (it can be resumed) or failed."""
        self.facts["end"] = {"date": now(), "state": state, **more}
        self.write()

    @contextmanager
    def ending(self, write_report):
        """Write how the run ended where an error or a signal ends it, and then the report.

        write_report: called with the directory, on the first rank.
        """
        try:
            yield
        except BaseException as error:
            is_stopped = isinstance(error, KeyboardInterrupt) or getattr(error, "code", None) == EXIT_RESUMABLE
            # One that has not begun leaves the record of the run before it.
            if "starts" in self.facts:
                reason = f"{type(error).__name__}: {get_sentence(error)}"
                self.end("stopped" if is_stopped else "failed", reason=reason)
                self.report(write_report)
            raise
        self.report(write_report)

    def report(self, write_report) -> None:
        """Write the report, on the first rank; what fails here is one line of the log, never the end of a run."""
        if not self.is_writer:
            return
        try:
            self.page = write_report(self.path.parent)
        except Exception as error:
            reason = f"{type(error).__name__}: {get_sentence(error).rstrip('.')}"
            logger.warning("%s has no report (%s); `llava-lite report` makes one.", self.path.parent, reason)


def now() -> str:
    """Return the date and time, to a second, with its zone."""
    return datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")


def open_record(trainer, model_args, data_args, argv) -> RunRecord:
    """Return the record of a run that is about to train. argv: the flags as they were typed."""
    args, directory = trainer.args, Path(trainer.args.output_dir)
    is_writer = trainer.is_world_process_zero()
    data = {"train": trainer.train_dataset, "eval": trainer.eval_dataset}
    settings = get_settings(model_args, data_args, args)
    facts = {
        **get_model(trainer.unwrapped, model_args),
        "tuning": args.tuning,
        "dtype": str(compute_dtype(args)).removeprefix("torch."),
        "zero_stage": args.zero_stage if args.uses_deepspeed else None,
        "records_a_step": None if args.packing == "tokens" else global_batch(vars(args) | {RANKS: args.world_size}),
        "parameters": table_rows(trainer.model, args),
        "settings": settings,
        # The other settings were chosen by the run: a device, a packing, a tuning.
        "given": sorted(settings.keys() if model_args.given is None else settings.keys() & model_args.given),
        "versions": dict(versions()),
        "data": {name: get_data(dataset) for name, dataset in data.items() if dataset is not None},
    }
    for row in facts["parameters"].values():
        row["dtypes"] = sorted(row["dtypes"])
    if is_writer:
        # The log is the first file that must be written; it reports a directory that cannot be.
        with suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
        facts["images"] = save_images(trainer.eval_dataset, trainer.eval_examples, directory)
    return RunRecord(facts, get_command(argv), directory / RUN, is_writer)


def get_command(argv) -> str:
    """Return the command of a run with its secrets left out, and without what a launcher adds."""
    words, hides = [], False
    for word in argv:
        name, equals, _ = word.partition("=")
        is_secret = name.startswith("--") and SECRET.search(name) is not None
        if not name.startswith("--local_rank"):
            words.append("..." if hides else f"{name}=..." if is_secret and equals else word)
        hides = is_secret and not equals
    return f"llava-lite train {shlex.join(words)}" if words else " ".join([Path(sys.argv[0]).name, "(from Python)"])


def get_device(device) -> str:
    """Return the name of a device: of the GPU, or that it is a CPU and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {count(torch.get_num_threads(), 'thread')} a rank"


def get_model(model, model_args) -> dict:
    """Return what a model is made of: base, its kind, encoder, connector, template and experts."""
    config, blocks = model.config, model.moe_layers()
    sees = config.has_vision_tower
    experts = {
        str(layer): {"num": block.num_experts, "top_k": block.moe.top_k_experts} for layer, block in blocks.items()
    }
    return {
        "base": model_args.model_name_or_path,
        "model_type": config.model_type,
        "tower": config.mm_vision_tower if sees else None,
        "connector": config.mm_projector_type if sees else None,
        "conv_template": model_args.version,
        "experts": experts,
    }


def get_data(dataset) -> dict:
    """Return what a data set holds: files with their records, and of files that are counted images and tokens."""
    found = {"sources": [[str(name), int(num)] for name, num in dataset.sources]}
    if not hasattr(dataset, "annotations"):
        return found | {"is_stream": True}
    annotations, lengths = dataset.annotations, dataset.lengths
    # Lengths are integers: bins of as many each, the last one may reach beyond the longest record.
    width = -(-(int(lengths.max()) - int(lengths.min()) + 1) // NUM_BINS)
    edges = np.arange(int(lengths.min()), int(lengths.max()) + width + 1, width)
    counts, _ = np.histogram(lengths, bins=edges)
    marks = np.percentile(lengths, (5, 50, 95), method="lower").astype(int).tolist()
    return found | {
        "records": len(dataset),
        "with_image": int(annotations.has_image.sum()),
        "images": int(annotations.num_images.sum()),
        "media": annotations.count_media(),
        "tokens": int(lengths.sum()),
        "supervised_fraction": annotations.supervised_fraction,
        "truncated": int((annotations.token_lengths > dataset.max_length).sum()),
        "max_length": dataset.max_length,
        "lengths": {"p5": marks[0], "p50": marks[1], "p95": marks[2], "longest": int(lengths.max())},
        "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
    }
