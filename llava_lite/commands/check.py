"""Turn annotation files and the flags of a run into what a check finds: `llava-lite check`."""

import argparse
import dataclasses
import math
import os
from types import SimpleNamespace

from llava_lite.commands.check_flags import build_parser
from llava_lite.conversation import get_template
from llava_lite.conversation.end_tokens import check_end_token
from llava_lite.data.check.check import NUM_NAMED, check_annotations, write_skipped_log
from llava_lite.data.check.report import get_kinds, number
from llava_lite.data.encode import RecordEncoder
from llava_lite.data.errors import DataError
from llava_lite.data.index.annotations import open_annotations
from llava_lite.media.layout import ImageLayout
from llava_lite.train.arguments.legacy import RENAMED, TRANSLATED, WITHOUT_EFFECT, open_yaml, split_flags
from llava_lite.train.arguments.words import meant_by, unknown_flags, words_left


def parse_flags(argv) -> argparse.Namespace:
    """Return the flags; those of training without effect on the data are named under `passed_over`."""
    parser = build_parser()
    words = [
        word
        for name, values in split_flags(open_yaml(argv))
        for word in ([f"--{RENAMED.get(name, name)}"] if name else []) + values
    ]
    flags, rest = parser.parse_known_args(words)
    flags.passed_over = [name for name, _ in split_flags(rest) if name]
    known = {action.dest for action in parser._actions} | training_flags() if rest else set()
    unknown = [f"--{name}" for name in flags.passed_over if name not in known]
    if unknown:
        names = [*parser.flags.values(), *(f"--{name}" for name in known)]
        # What `check` has no flag for may be one of the run's.
        parser.error(
            " ".join(
                unknown_flags("check" if meant_by("check", flag, names) else "train", [flag], names)
                for flag in dict.fromkeys(unknown)
            )
        )
    if rest[:1] and not rest[0].startswith("--"):
        parser.error(words_left("check", rest))
    for name in ("data_path", "model_name_or_path"):
        if getattr(flags, name) is None:
            what = "one or more files of records" if name == "data_path" else "whose tokenizer counts the tokens"
            raise ValueError(f"--{name} is needed: {what}.")
    if flags.image_folder is not None and not os.path.isdir(flags.image_folder):
        raise ValueError(f"--image_folder {flags.image_folder}: there is no such directory.")
    if "tune_mm_mlp_adapter" in flags.passed_over:
        flags.tuning = flags.tuning or "projector"
    return flags


def training_flags() -> set[str]:
    """Return the names of all flags of a training run."""
    from llava_lite.train.arguments.fields import DataArguments, ModelArguments, TrainingArguments

    classes = (DataArguments, ModelArguments, TrainingArguments)
    return {*WITHOUT_EFFECT, *TRANSLATED, "local_rank"} | {
        field.name for one in classes for field in dataclasses.fields(one)
    }


def model_config(flags):
    """Return the config of the run's model, as training would make it; None if there is neither model nor tower."""
    from llava_lite.checkpoints.source import Checkpoint
    from llava_lite.configuration import config_class_for, get_text_fields
    from llava_lite.tower_config import get_tower_fields

    checkpoint = Checkpoint(flags.model_name_or_path, cache_dir=flags.cache_dir)
    has_model = bool(checkpoint.fields)
    if not has_model and flags.vision_tower is None:
        return None
    config = checkpoint.config if has_model else None
    if config is None or not config.model_type.startswith("llava_"):
        fields = get_tower_fields(flags.vision_tower, flags.cache_dir)
        fields |= {} if config is None else get_text_fields(config)
        config = config_class_for("llama" if config is None else config.model_type)(**fields)
    for key in (
        "image_aspect_ratio",
        "image_grid_pinpoints",
        "mm_patch_merge_type",
        "mm_vision_select_feature",
        "mm_projector_type",
        "mm_query_len",
        "mm_injection",
        "mm_image_position",
        "mm_boundary_vectors",
        "mm_use_im_start_end",
        "mm_use_im_patch_token",
    ):
        if getattr(flags, key) is not None:
            setattr(config, key, getattr(flags, key))
    return config


def get_layout(flags, config) -> ImageLayout | None:
    """Return how an image becomes features; None where nothing names an encoder."""
    if flags.num_image_tokens is None:
        return config.image_layout if config is not None and config.has_vision_tower else None
    return ImageLayout.read(
        flags.num_image_tokens,
        math.isqrt(flags.num_image_tokens),
        flags.image_size,
        flags.image_aspect_ratio,
        flags.mm_patch_merge_type or "flat",
        flags.image_grid_pinpoints,
    )


def record_encoder(flags, config) -> RecordEncoder:
    """Return what makes tokens of records, with the tokens that training would add to the tokenizer."""
    from llava_lite.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
    from llava_lite.train.build import add_tokens, build_tokenizer

    names = SimpleNamespace(model_name_or_path=flags.model_name_or_path)
    tokenizer = build_tokenizer(
        names, SimpleNamespace(cache_dir=flags.cache_dir, model_max_length=flags.model_max_length)
    )
    add_tokens(tokenizer, flags.new_tokens or [])
    wraps = bool(flags.mm_use_im_start_end if config is None else config.mm_use_im_start_end)
    has_patch = bool(flags.mm_use_im_patch_token if config is None else config.mm_use_im_patch_token)
    words = [DEFAULT_IMAGE_PATCH_TOKEN] * has_patch + [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN] * wraps
    tokenizer.add_tokens(words, special_tokens=True)
    choices = {"chat_end_token": flags.chat_end_token, "special_tokens_in_text": flags.special_tokens_in_text}
    template = get_template(flags.version, **choices)
    check_end_token(template, tokenizer, flags.version)
    places = {} if config is None else {"injection": config.mm_injection, "image_position": config.mm_image_position}
    return RecordEncoder(tokenizer, template, wraps, **places)


def check_files(paths, flags, encoder, layout):
    """Print what the check finds in some files, and return its report."""
    annotations = open_annotations(paths, flags.image_folder, num_workers=flags.num_workers)
    if layout is None and annotations.has_image.any():
        raise DataError(
            f"{', '.join(paths)}: {int(annotations.has_image.sum()):,} records have images, and "
            f"{flags.model_name_or_path} has no vision tower, so that nobody knows how many features an image has. "
            "Name the tower of the run with --vision_tower, or give --num_image_tokens."
        )
    report = check_annotations(
        annotations,
        encoder,
        layout or ImageLayout(0),
        flags.model_max_length,
        bad_record="skip",
        max_bad_fraction=1.0,
        decode=flags.decode,
        follow_links=flags.follow_links,
        num_workers=flags.num_workers,
        placeholder_as_text=flags.placeholder_as_text,
    )
    if report.bad:
        total = report.num_records + len(report.bad)
        print(f"{len(report.bad):,} of {total:,} records cannot be used ({get_kinds(report.bad)}):")
        print("\n".join(f"  {entry}" for entry in report.bad[:NUM_NAMED]))
        if len(report.bad) > NUM_NAMED:
            more = "" if flags.bad_records_file else "; --bad_records_file FILE writes all of them"
            print(f"  ... and {len(report.bad) - NUM_NAMED:,} more{more}")
    print(report.summary())
    return report


def verdict(report, flags) -> tuple[bool, str]:
    """Return whether a run with these flags could start, and the message about it."""
    num_bad, total = len(report.bad), report.num_records + len(report.bad)
    if not report.num_records:
        return False, f"not ready: none of {number(total, 'record')} can be used."
    if flags.tuning == "projector" and not report.num_with_image:
        return False, "not ready: --tuning projector trains on records with images, and no record has one."
    if not num_bad:
        return True, f"ready to train: {'all ' * (total > 1)}{number(total, 'record')} can be used."
    if flags.bad_record == "raise":
        what = "record must" if num_bad == 1 else "records must"
        return False, f"not ready: {num_bad:,} {what} be mended, or left out with --bad_record skip."
    if num_bad > flags.max_bad_fraction * total:
        return False, (
            f"not ready: {num_bad:,} of {total:,} records ({num_bad / total:.2%}) cannot be used, and --bad_record "
            f"skip leaves out at most {flags.max_bad_fraction:.2%}. Mend them, or raise --max_bad_fraction."
        )
    return True, f"ready to train: {number(report.num_records, 'record')}; {num_bad:,} left out (--bad_record skip)."


def main(argv=None) -> int:
    """Check the data of a run from the command line; 0 if the run could start, else 1."""
    import sys

    flags = parse_flags(sys.argv[1:] if argv is None else argv)
    from llava_lite.checkpoints.source import Checkpoint

    Checkpoint.of_flag(flags.model_name_or_path)
    config = model_config(flags)
    encoder, layout = record_encoder(flags, config), get_layout(flags, config)
    if layout is not None:
        length = f"{layout.num_features:,}" if not layout.is_anyres else f"up to {layout.most_tokens:,} (anyres)"
        print(f"an image is {length} tokens; template {flags.version}, at most {flags.model_max_length:,} tokens")
    ready, lines, bad = True, [], []
    for paths in filter(None, (flags.data_path, flags.eval_data_path)):
        if flags.eval_data_path:
            print(f"{', '.join(paths)}:")
        report = check_files(paths, flags, encoder, layout)
        # What is evaluated on may be text alone.
        relaxed = {"tuning": None} if paths is flags.eval_data_path else {}
        is_ready, line = verdict(report, SimpleNamespace(**vars(flags) | relaxed))
        ready, lines, bad = ready and is_ready, [*lines, line], bad + report.bad
    if flags.bad_records_file:
        write_skipped_log(flags.bad_records_file, bad)
    print("\n".join(lines if ready or len(lines) == 1 else [line for line in lines if line.startswith("not")]))
    return 0 if ready else 1
