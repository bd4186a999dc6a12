"""Train one stage: from flags to a directory that a model is opened from."""

import logging
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from transformers import set_seed

from llava_lite.conversation.end_tokens import add_end_token, check_end_token, get_end_token
from llava_lite.data.errors import DataError
from llava_lite.distributed.activity import note
from llava_lite.distributed.ranks import leave
from llava_lite.distributed.watch import LostRankError, stop_watch, watched
from llava_lite.errors import DiskError
from llava_lite.train.arguments.parse import build_parser, parse_args
from llava_lite.train.arguments.paths import check_enough_records, check_needed, check_paths
from llava_lite.train.arguments.short_help import asks_for_help, main_page
from llava_lite.train.arguments.tuning import PARTIAL_TUNINGS
from llava_lite.train.base_weights import check_weights
from llava_lite.train.build import (
    add_experts,
    add_tokens,
    apply_plain_paths,
    build_model,
    build_tokenizer,
    fit_vocabulary,
    gather_experts_together,
    shard_experts,
)
from llava_lite.train.estimate.checkpointing import choose_checkpointing
from llava_lite.train.estimate.plan import plan_run
from llava_lite.train.inputs.features import use_features
from llava_lite.train.inputs.load import load_data
from llava_lite.train.inputs.shards import check_shard_flags
from llava_lite.train.inputs.template import get_run_template
from llava_lite.train.monitor.finite import NonFiniteError
from llava_lite.train.monitor.guards import NoGradientError
from llava_lite.train.monitor.report.page import write_report
from llava_lite.train.monitor.report.record import open_record
from llava_lite.train.monitor.summary import finished_before, peak_memory_gib, start_again, summary
from llava_lite.train.publish.push import UploadError, check_can_push, upload
from llava_lite.train.saving.interrupt import EXIT_RESUMABLE
from llava_lite.train.saving.lock import hold_output, release_output
from llava_lite.train.saving.manifest import BrokenCheckpoint, SaveError
from llava_lite.train.startup import (
    FOR_PEOPLE,
    check_installed,
    errors_in_one_line,
    installed_attention,
    join_ranks,
    same_for_the_node,
    start_logging,
    use_one_device,
)
from llava_lite.train.tuning import choose_what_trains, compute_dtype, describe, resolve_dtypes

# By its full name: started by `python -m`, __name__ is "__main__", whose log is not shown.
logger = logging.getLogger("llava_lite.train.train")

# Errors of a run that trains which are for people; another ValueError would be a fault of ours.
OF_STEPS = (DataError, LostRankError, NonFiniteError, NoGradientError)
IN_A_RUN = (*OF_STEPS, DiskError, SaveError, BrokenCheckpoint, UploadError)

# The files that hold the names which scripts written for LLaVA import from here.
_LLAVA_NAMES = {
    "train.arguments.fields": "ModelArguments DataArguments TrainingArguments",
    "train.llava_trainer": "LLaVATrainer",
    "train.compat.state": "find_all_linear_names get_mm_adapter_state_maybe_zero_3 get_peft_state_maybe_zero_3 "
    "get_peft_state_non_lora_maybe_zero_3 maybe_zero_3 safe_save_model_for_hf_trainer "
    "smart_tokenizer_and_embedding_resize",
    "train.compat.preprocess": "preprocess preprocess_llama_2 preprocess_mpt preprocess_multimodal preprocess_plain "
    "preprocess_v1",
    "train.compat.data": "LazySupervisedDataset DataCollatorForSupervisedDataset make_supervised_data_module "
    "conversation_lib",
    "mm_utils": "tokenizer_image_token",
}


def __getattr__(name):
    """Return what one of LLaVA's names stands for (PEP 562)."""
    homes = {one: home for home, names in _LLAVA_NAMES.items() for one in names.split()}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; known: {', '.join(homes)}.")
    return getattr(import_module(f"llava_lite.{homes[name]}"), name)


def train(attn_implementation=None, argv=None):
    """Train a stage by the flags `argv` (default: the command line) and return its trainer.

    attn_implementation: LLaVA's argument, the attention kernel where no flag names one. A list in its place is `argv`.
    """
    if isinstance(attn_implementation, list):
        attn_implementation, argv = None, attn_implementation
    argv = sys.argv[1:] if argv is None else argv
    if attn_implementation is not None and "--attn_implementation" not in argv:
        argv = [*argv, "--attn_implementation", installed_attention(attn_implementation)]
    return run(prepare(argv), argv)


class Stage(NamedTuple):
    """A trainer and what its final directory needs; checkpoint: the one to resume from, or False."""

    trainer: object
    model_args: object
    data_args: object
    checkpoint: str | bool


def prepare(argv):
    """Return the stage that the flags describe, ready for its first step; its output directory is kept for it."""
    flags = read_flags(argv)
    try:
        return build_stage(*flags)
    except BaseException:
        release_output(flags[-1])
        raise


def read_flags(argv):
    """Return (model_args, data_args, training_args); raise what can be found wrong before anything is loaded.

    From here on this process holds the lock of the output directory.
    """
    start_logging()
    with same_for_the_node():
        model_args, data_args, training_args = parse_args(argv)
        check_needed(argv)
        check_can_push(model_args, training_args)
        check_shard_flags(data_args, training_args)
        check_paths(model_args, data_args, training_args)
        check_installed(data_args, training_args)
    use_one_device(argv, training_args)
    join_ranks(training_args)
    hold_output(training_args)
    return model_args, data_args, training_args


def build_stage(model_args, data_args, training_args):
    """Return the stage: tokenizer, model, records, trainer, and the checkpoint to resume from."""
    from llava_lite.train.saving.final import write_opening
    from llava_lite.train.saving.run_facts import load_run_facts

    note("choosing the checkpoint to resume from")
    set_seed(training_args.seed)
    checkpoint = checkpoint_to_resume(training_args)
    facts = load_run_facts(checkpoint)
    tokenizer = build_tokenizer(model_args, training_args)
    num_known = add_tokens(tokenizer, model_args.new_tokens or [])
    template = get_run_template(model_args, data_args, facts.moment)
    check_end_token(template, tokenizer, model_args.version)
    note("building the model")
    model = build_model(model_args, data_args, training_args)
    fit_vocabulary(
        *(model, tokenizer, num_known, model_args.new_tokens or []),
        *(model_args.pretrain_mm_mlp_adapter, training_args.seed),
    )
    add_end_token(model.generation_config, get_end_token(template, tokenizer), tokenizer)
    note("checking the weights")
    check_weights(model, model_args, training_args)
    add_experts(model, model_args, training_args)
    apply_plain_paths(model, model_args, training_args)
    gather_experts_together(model)
    model = choose_what_trains(model, model_args, training_args)
    resolve_dtypes(model, training_args)
    note("reading the records")
    train_set, eval_set = load_data(model, tokenizer, model_args, data_args, training_args, facts)
    check_enough_records(train_set, eval_set, training_args)
    logger.info("what trains (--tuning %s):\n%s", training_args.tuning, describe(model, training_args))
    num_checkpointed = choose_checkpointing(model, train_set, training_args, model_args.ep_size)
    logger.info("plan:\n%s", plan_run(model, train_set, training_args, num_checkpointed, model_args.ep_size))
    note("preparing the trainer")
    shard_experts(model, model_args, training_args)
    trainer = build_trainer(model, tokenizer, train_set, eval_set, data_args, training_args, facts)
    parts = get_processors(trainer)
    trainer.opening = partial(write_opening, model, parts, model_args.model_name_or_path, model_args.version)
    with same_for_the_node():
        trainer.check_checkpoint(checkpoint)
    if data_args.feature_cache != "off":
        use_features(trainer, train_set, data_args.feature_cache)
    return Stage(trainer, model_args, data_args, checkpoint)


def run(stage, argv=()):
    """Train from the start or from the checkpoint, save, write the report, and return the trainer.

    argv: the flags as they were typed, for the report.
    """
    args = stage.trainer.args
    hold_output(args)
    try:
        return run_alone(stage, argv)
    finally:
        release_output(args)


def run_alone(stage, argv):
    """Do what `run` does, in an output directory that no other run uses."""
    trainer, args = stage.trainer, stage.trainer.args
    start_again(args, stage.checkpoint)
    record = open_record(trainer, stage.model_args, stage.data_args, argv)
    trainer.add_callback(record)
    note("beginning to train")
    with watched(), record.ending(write_report):
        result = trainer.train(resume_from_checkpoint=stage.checkpoint)
        trainer.raise_log_error()
        is_full = save(trainer, stage.model_args, stage.data_args)
        record.end("finished", memory_gib=peak_memory_gib(args.device))
    stop_watch()
    logger.info("%s", summary(trainer, result, is_full, record.facts["end"]["memory_gib"], record.page))
    if args.push_to_hub:
        upload(trainer)
    return trainer


def main(argv=None):
    """Train a stage; for the command line and launchers, where an error is reported in one line.

    Where the output directory holds the complete run already, nothing is trained; `train` would replace it.
    """
    argv = sys.argv[1:] if argv is None else argv
    if asks_for_help(argv):
        print(main_page() if asks_for_help(argv) == "main" else build_parser().format_help(), end="")
        return
    with errors_in_one_line((*FOR_PEOPLE, LostRankError)):
        flags = read_flags(argv)
    try:
        run_flags(flags, argv)
    finally:
        release_output(flags[-1])


def run_flags(flags, argv):
    """Train a stage by flags that have been read, unless the output directory holds the complete run."""
    with errors_in_one_line((*FOR_PEOPLE, LostRankError, NonFiniteError)):
        done = finished_before(flags[-1])
        with watched():
            stage = build_stage(*flags) if done is None else None
    if stage is None:
        logger.info("%s", done)
        stop_watch()
        leave()
        return
    # A second signal must not end what has been saved with another code.
    stage.trainer.progress.leaves_process = True
    try:
        with errors_in_one_line(IN_A_RUN):
            run(stage, argv)
    except SystemExit as end:
        # After a signal all ranks have saved, before an upload all have ended; after an error some may be anywhere.
        if end.code == EXIT_RESUMABLE or isinstance(end.__context__, UploadError):
            leave()
        raise
    leave()


def build_trainer(model, tokenizer, train_set, eval_set, data_args, training_args, facts=None):
    """Return the trainer."""
    from llava_lite.data.collator import DataCollatorForSupervisedDataset, PackedCollator
    from llava_lite.train.llava_trainer import LLaVATrainer
    from llava_lite.train.monitor.evaluation import readable_examples

    pads = training_args.packing == "none"
    num_examples = 0 if eval_set is None else min(data_args.num_eval_generations, len(eval_set))
    return LLaVATrainer(
        model,
        training_args,
        processing_class=tokenizer,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=DataCollatorForSupervisedDataset(tokenizer.pad_token_id) if pads else PackedCollator(),
        eval_examples=readable_examples(eval_set, num_examples, facts),
        eval_max_new_tokens=data_args.eval_max_new_tokens,
        facts=facts,
    )


def get_processors(trainer):
    """Return what is saved beside the weights: the processor (tokenizer and image processor), and the latter alone."""
    from llava_lite.processing.processor import LlavaLiteProcessor

    config, tower = trainer.unwrapped.config, trainer.unwrapped.get_vision_tower()
    image_processor = None if tower is None else tower.image_processor
    return [LlavaLiteProcessor.from_config(config, trainer.processing_class, image_processor), image_processor]


def checkpoint_to_resume(training_args):
    """Return the checkpoint to resume from, or False: the newest complete one, unless a flag names another or none."""
    from llava_lite.train.saving.resume import find_checkpoint

    path = find_checkpoint(training_args.output_dir, training_args.resume_from_checkpoint, training_args.should_save)
    if path is not None:
        logger.info("resuming from %s", path)
    return path or False


def save(trainer, model_args, data_args):
    """Write the final directory and return whether it holds every weight, or those that trained."""
    from llava_lite.train.publish.card import make_card
    from llava_lite.train.saving.final import save_final, set_averaged_weights, write_state

    note("writing the final directory")
    args, model = trainer.args, trainer.unwrapped
    set_averaged_weights(trainer)
    is_full = args.save_full or args.tuning not in PARTIAL_TUNINGS
    if not args.uses_deepspeed and args.bits == 16:
        # Trained weights were kept in float32 for small updates; a model is saved in the dtype of its forward pass.
        trainer.model.to(compute_dtype(args))
    if model.config.vision_config is not None:
        # transformers opens a tower in the dtype that its own config names.
        model.config.vision_config.dtype = model.get_vision_tower().dtype
    save_final(
        trainer.model,
        args.output_dir,
        parts=get_processors(trainer),
        base=model_args.model_name_or_path,
        full=is_full,
        conv_template=model_args.version,
        card=make_card(trainer, model_args, data_args, is_full),
        is_writer=args.should_save,
    )
    # Last: it says that the run is complete, which the model of an earlier run would not be.
    write_state(trainer)
    return is_full


if __name__ == "__main__":
    if not __package__:
        # Started as a file: this directory is first on the path, where its neighbours would pass for packages.
        sys.path[0] = str(Path(__file__).resolve().parents[2])
    main()
