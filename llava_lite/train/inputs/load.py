"""Open the records of a run: those that it trains on and those that it is evaluated on."""

import copy
import logging
from pathlib import Path

import torch

from llava_lite.data.check.check import Before
from llava_lite.data.dataset import open_dataset
from llava_lite.data.index.sources import is_shards
from llava_lite.data.skipped import LeftOut
from llava_lite.distributed.ranks import everyone
from llava_lite.train.inputs.shards import open_stream
from llava_lite.train.inputs.skipped import SkipLog, get_bad
from llava_lite.train.inputs.template import example_settings
from llava_lite.train.saving.run_facts import LOGS

logger = logging.getLogger(__name__)


def load_data(model, tokenizer, model_args, data_args, training_args, facts, opener=open_dataset):
    """Return the training set and the evaluation set (or None); every record is checked, except those of shards.

    facts: the RunFacts of the run, which get its skipped-records logs. opener: opens annotation files as open_dataset
    does.
    """
    if data_args.data_path is None:
        raise ValueError("--data_path is needed: one or more files of records.")
    settings = example_settings(model, model_args, data_args, training_args, facts.moment)
    has_shards = is_shards(data_args.data_path)

    def open_files(paths, name):
        dataset, report = opener(
            paths,
            tokenizer,
            image_folder=data_args.image_folder,
            num_workers=training_args.dataloader_num_workers,
            follow_links=data_args.follow_links,
            bad_record=data_args.bad_record,
            max_bad_fraction=data_args.max_bad_fraction,
            before=get_before(facts, name),
            **settings,
        )
        check_ranks_read_media(report, training_args)
        if len(set(everyone(report.digest))) > 1:
            raise ValueError(f"the ranks see different files under {paths}; share them, or copy them to every node.")
        if not len(dataset):
            first = f"; the first: {report.bad[0]}" if report.bad else ""
            raise ValueError(f"{', '.join(paths)}: none of {len(report.bad):,} records can be used{first}.")
        logger.info("%s:\n%s", ", ".join(paths), report.summary())
        open_log(dataset, facts, name, data_args, training_args, report)
        return dataset, report

    if has_shards:
        train_set = open_stream(tokenizer, settings, data_args, training_args, facts)
    else:
        train_set, report = open_files(data_args.data_path, "train")
        model.config.enable_thinking = asks_for_reasoning(report, tokenizer, model_args)
    eval_set = None
    if data_args.eval_data_path is not None:
        eval_set, _ = open_files(data_args.eval_data_path, "eval")
    elif data_args.eval_split:
        train_set, eval_set = split(train_set, data_args.eval_split, training_args.seed)
        open_log(eval_set, facts, "eval", data_args, training_args)
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    (train_set.maker if has_shards else train_set).crop_randomly(seed)
    if training_args.tuning == "projector" and not has_shards and not train_set.has_image.any():
        raise ValueError(
            f"--tuning projector trains on images only, and none of the {len(train_set):,} records that are left has "
            "one."
        )
    return train_set, eval_set


def check_ranks_read_media(report, training_args):
    """Raise ValueError for records with media under ZeRO-3 on several ranks.

    ZeRO-3 gathers the weights of a branch of ImageBind where it runs, and ranks have media of different kinds.
    """
    if report.num_media and training_args.zero_stage == 3 and training_args.world_size > 1:
        raise ValueError(
            f"--deepspeed with ZeRO-3 on {training_args.world_size} ranks cannot train on records with media "
            f"({', '.join(report.num_media)}): ranks would wait for each other. Use ZeRO-2."
        )


def get_before(facts, name):
    """Return which records a resumed run leaves out of a data set; None for a new run."""
    kept = facts.before.get(name)
    if kept is None:
        return None
    return Before(*({line["place"]: get_bad(line) for line in kept[part]} for part in ("start", "later")))


def open_log(dataset, facts, name, data_args, training_args, report=None):
    """Open the skipped-records log of a data set, with what the check before the run found; all ranks must call it."""
    # Of files that were checked all records count, of a part split off the training set its own.
    num_records = len(dataset) if report is None else report.num_records + len(report.bad)
    writes = training_args.process_index == 0 and data_args.bad_record == "skip"
    dataset.left_out = LeftOut(dataset.annotations.starts[-1])
    log = facts.logs[name] = SkipLog(
        dataset.left_out,
        data_args.bad_record,
        data_args.max_bad_fraction,
        Path(training_args.output_dir, LOGS[name]) if writes else None,
        num_records,
    )
    start = {} if report is None else report.left_out
    later = facts.before.get(name, {}).get("later", [])
    log.begin([{"place": place, **bad._asdict()} for place, bad in start.items()], later)
    # Training counts epochs, evaluation counts steps.
    dataset.left_out.begin(facts.epoch if name == "train" else facts.step)
    late = {} if report is None else report.late
    mine = [{"place": place, **bad._asdict()} for place, bad in late.items()]
    log.leave_out([line for lines in everyone(mine) for line in lines], facts.step)


def asks_for_reasoning(report, tokenizer, model_args) -> bool:
    """Return whether the trained model is prompted for reasoning: by the flag, else if all records have some.

    Records of the other kind are trained after the other prompt, which is logged.
    """
    from llava_lite.conversation.chat_answers import prompts_differ

    if model_args.version != "chat":
        return False
    num_reasoned, num_records = report.texts.num_reasoned, report.num_records
    asks = num_reasoned == num_records > 0 if model_args.enable_thinking is None else model_args.enable_thinking
    num_others = num_records - num_reasoned if asks else num_reasoned
    if num_others and prompts_differ(tokenizer):
        logger.warning(
            "%d of %d records have %s in their last answer, and the model will be prompted for %s (--enable_thinking "
            "chooses; afterwards processor.enable_thinking = %s prompts as these records were trained)",
            num_others,
            num_records,
            *(("no reasoning", "reasoning") if asks else ("reasoning", "none")),
            not asks,
        )
    return asks


def split(dataset, held_out, seed):
    """Return (training part, held-out part) of a dataset; held_out: a fraction if below 1, else a number."""
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
