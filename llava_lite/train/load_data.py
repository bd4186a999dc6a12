"""Turn the flags of a run into the records that it learns from and those that it is evaluated on."""

import copy
import logging
import os
from pathlib import Path

import torch

logger = logging.getLogger(__name__)


def load_data(model, tokenizer, model_args, data_args, training_args, facts=None):
    """Return the records to learn from and those held out (or None), every one of them checked but for shards.

    facts: the RunFacts of a run, which then opens its logs of skipped records; None has records that cannot be read
    raise an error where they are read.
    """
    from llava_lite.anyres import PictureLayout
    from llava_lite.data.dataset import open_dataset
    from llava_lite.data.sources import is_shards
    from llava_lite.train.ranks import everyone
    from llava_lite.train.stream_run import open_stream

    if data_args.data_path is None:
        raise ValueError("--data_path is needed: one or more files of records.")
    tower = model.get_vision_tower()
    template = template_of_run(model_args, data_args, None if facts is None else facts.moment)

    def open_files(paths, name):
        before = None if facts is None else before_of(facts, name)
        dataset, report = open_dataset(
            paths,
            tokenizer,
            None if tower is None else tower.image_processor,
            template,
            image_folder=data_args.image_folder,
            layout=PictureLayout(0) if tower is None else model.config.picture_layout,
            max_length=training_args.model_max_length,
            mm_use_im_start_end=model.config.mm_use_im_start_end,
            num_workers=training_args.dataloader_num_workers,
            follow_links=data_args.follow_links,
            picture_resize=data_args.picture_resize,
            placeholder_as_text=data_args.placeholder_as_text,
            bad_record=data_args.bad_record,
            max_bad_share=data_args.max_bad_share,
            before=before,
        )
        if len(set(everyone(report.digest))) > 1:
            raise ValueError(f"the ranks see different files under {paths}; share them, or copy them to every node.")
        if not len(dataset):
            first = f"; the first: {report.bad[0]}" if report.bad else ""
            raise ValueError(f"{', '.join(paths)}: none of {len(report.bad):,} records can be used{first}.")
        logger.info("%s:\n%s", ", ".join(paths), report.summary())
        if facts is not None:
            open_log(dataset, facts, name, data_args, training_args, report)
        return dataset, report

    if is_shards(data_args.data_path):
        train_set = open_stream(model, tokenizer, model_args, data_args, training_args, facts)
    else:
        train_set, report = open_files(data_args.data_path, "train")
        model.config.enable_thinking = asks_for_reasoning(report, tokenizer, model_args)
    eval_set = None
    if data_args.eval_data_path is not None:
        eval_set, _ = open_files(data_args.eval_data_path, "eval")
    elif data_args.eval_split:
        train_set, eval_set = split(train_set, data_args.eval_split, training_args.seed)
        if facts is not None:
            open_log(eval_set, facts, "eval", data_args, training_args)
    if training_args.tuning == "projector" and not is_shards(data_args.data_path) and not train_set.has_picture.any():
        raise ValueError(
            f"--tuning projector learns from images alone, and none of the {len(train_set):,} records that are left "
            "has one."
        )
    return train_set, eval_set


def before_of(facts, name):
    """Return what a run that goes on leaves out of a data set; None at a first start."""
    from llava_lite.data.check import Before
    from llava_lite.train.skipped import bad_of

    kept = facts.before.get(name)
    if kept is None:
        return None
    return Before(*({line["place"]: bad_of(line) for line in kept[part]} for part in ("start", "later")))


def open_log(dataset, facts, name, data_args, training_args, report=None):
    """Open the log of what a run leaves out of a data set, with what the check before it found; on all ranks."""
    from llava_lite.data.left_out import LeftOut
    from llava_lite.train.ranks import everyone
    from llava_lite.train.run_facts import LOGS
    from llava_lite.train.skipped import SkipLog

    # Where its own file has been checked: all of it, for a part of the training set its records.
    num_records = len(dataset) if report is None else report.num_records + len(report.bad)
    writes = training_args.process_index == 0 and data_args.bad_record == "skip"
    dataset.left_out = LeftOut(dataset.annotations.starts[-1])
    log = facts.logs[name] = SkipLog(
        dataset.left_out,
        data_args.bad_record,
        data_args.max_bad_share,
        Path(training_args.output_dir, LOGS[name]) if writes else None,
        num_records,
    )
    start = {} if report is None else report.left_out
    later = facts.before.get(name, {}).get("later", [])
    log.begin([{"place": place, **bad._asdict()} for place, bad in start.items()], later)
    # A run in training counts epochs, an evaluation steps.
    dataset.left_out.begin(facts.epoch if name == "train" else facts.step)
    late = {} if report is None else report.late
    mine = [{"place": place, **bad._asdict()} for place, bad in late.items()]
    log.take([line for lines in everyone(mine) for line in lines], facts.step)


def template_of_run(model_args, data_args, moment=None):
    """Return the conversation template of a run with what its flags choose; moment: the date that it writes."""
    from dataclasses import replace

    from llava_lite.conversation import get_template

    template = get_template(
        model_args.version,
        enable_thinking=bool(model_args.enable_thinking),
        chat_end_mark=model_args.chat_end_mark,
        special_tokens_in_text=data_args.special_tokens_in_text,
    )
    return replace(template, options=template.options._replace(moment=moment))


def asks_for_reasoning(report, tokenizer, model_args) -> bool:
    """Return whether the trained model is asked for reasoning: as a flag says, else if all records have some.

    Records of the other kind are trained behind the other prompt, which is said.
    """
    from llava_lite.chat_answers import prompts_differ

    if model_args.version != "chat":
        return False
    num_reasoned, num_records = report.texts.num_reasoned, report.num_records
    asks = num_reasoned == num_records > 0 if model_args.enable_thinking is None else model_args.enable_thinking
    num_others = num_records - num_reasoned if asks else num_reasoned
    if num_others and prompts_differ(tokenizer):
        logger.warning(
            "%d of %d records have %s in their last answer, and the model will be asked for %s (--enable_thinking "
            "chooses; afterwards processor.enable_thinking = %s asks as these records were trained)",
            num_others,
            num_records,
            *(("no reasoning", "reasoning") if asks else ("reasoning", "none")),
            not asks,
        )
    return asks


def refuse_missing(data_args):
    """Raise an error if a file of records, or a shard of this machine, is not there.

    The first rank of a node looks at shards, of which there may be many; of an address the run itself asks.
    """
    from llava_lite.data.shards import find_shards
    from llava_lite.data.sources import is_shards

    for flag in ("data_path", "eval_data_path"):
        paths = getattr(data_args, flag)
        if paths and is_shards(paths):
            local = [path for path in paths if "://" not in path]
            if local and os.environ.get("LOCAL_RANK", "0") == "0":
                find_shards(local)
            continue
        missing = [path for path in paths or () if not Path(path).is_file()]
        if missing:
            raise FileNotFoundError(f"--{flag} {' '.join(missing)}: no such file.")


def refuse_blind(data_args, training_args):
    """Raise ValueError if a run that learns from images alone has none, before a model is loaded for it.

    All annotation files are looked at (and indexed, which the run needs anyway), of shards the first records; the
    first record of all must be one, unless bad ones are left out.
    """
    from llava_lite.data.index import open_annotations
    from llava_lite.data.sources import is_shards

    paths, found = data_args.data_path, None
    if paths and is_shards(paths):
        # Before the ranks know each other: every node looks by itself.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            found = look_at_shards(paths, data_args, training_args.tuning)
    elif paths and training_args.tuning == "projector":
        num_workers = training_args.dataloader_num_workers
        annotations = open_annotations(paths, data_args.image_folder, num_workers=num_workers)
        found = None if annotations.has_picture.any() else without_image(annotations)
    if found is not None:
        raise ValueError(
            f"{', '.join(paths)}: {found}. --tuning projector trains what turns image features into embeddings, and "
            "nothing else; for text alone use another --tuning. `llava-lite check` looks at each record."
        )


def look_at_shards(paths, data_args, tuning) -> str | None:
    """Return what is wrong if no image is among the first records and --tuning needs one."""
    from llava_lite.data.records import missing_images
    from llava_lite.data.shards import find_shards, first_image, first_record

    shards = find_shards(paths)
    if data_args.bad_record == "raise":
        record = first_record(shards)
        reason = None if record is None or data_args.placeholder_as_text else missing_images(record)
        if reason is not None:
            raise ValueError(reason)
    num_seen = first_image(shards) if tuning == "projector" else 0
    return f"none of the first {num_seen:,} records has an image" if num_seen else None


def without_image(annotations) -> str:
    """Return what is known about records of which none has an image, with the first that may have lost it."""
    from llava_lite.data.records import missing_images

    facts, total = annotations.record_facts(), len(annotations)
    lost = (facts.num_images < 0) | (facts.num_missing > 0)
    if not lost.any():
        return f"none of {total:,} records has an image"
    first = int(lost.argmax())
    try:
        reason = missing_images(annotations[first])
    except ValueError as error:
        reason = str(error)
    what = "can be used" if lost.all() else "has an image"
    return f"none of {total:,} records {what}; the first: {str(reason).rstrip('.')}"


def split(dataset, held_out, seed):
    """Return (the rest, what is held out) of a dataset: a share of it if below 1, else so many records."""
    num_held_out = round(held_out * len(dataset)) if held_out < 1 else int(held_out)
    if not 0 < num_held_out < len(dataset):
        raise ValueError(
            f"--eval_split {held_out} holds out {num_held_out} of {len(dataset)} records; leave some on each side."
        )
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).numpy()
    parts = []
    for chosen in (order[num_held_out:], order[:num_held_out]):
        part = copy.copy(dataset)
        part.annotations = dataset.annotations.select(sorted(chosen))
        parts.append(part)
    return tuple(parts)
