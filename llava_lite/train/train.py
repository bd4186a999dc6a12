"""Train one stage: from flags to a folder that a model is opened from."""

import atexit
import logging
import os
import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from transformers import set_seed

from llava_lite.arguments import parse_args
from llava_lite.commands.train import asks_for_help, main_page
from llava_lite.data.scan import DataError
from llava_lite.end_marks import add_end_mark, end_mark_of, refuse_unfit
from llava_lite.flag_help import full_page
from llava_lite.flags import machine_has
from llava_lite.train.build import (
    add_experts,
    add_words,
    build_model,
    build_tokenizer,
    fit_vocabulary,
    gather_experts_together,
    share_out_experts,
    take_plain_paths,
)
from llava_lite.train.ending import begin_anew, finished_before, summary
from llava_lite.train.inputs import check_enough_records, check_needed, check_paths
from llava_lite.train.launching import launch_hint
from llava_lite.train.load_data import load_data, template_of_run
from llava_lite.train.opening import Opening
from llava_lite.train.pushing import refuse_unshareable
from llava_lite.train.ranks import leave
from llava_lite.train.refusal import same_for_the_node, told_in_a_line
from llava_lite.train.tuning import choose_what_trains, compute_dtype, describe, settle_dtypes

# By its full name: as `python -m` starts it, __name__ is "__main__" and the table of what trains would go unseen.
logger = logging.getLogger("llava_lite.train.train")

# What scripts written for LLaVA import from here, and the file it lives in.
_LLAVA_NAMES = {
    "ModelArguments": "arguments",
    "DataArguments": "arguments",
    "TrainingArguments": "arguments",
    "LLaVATrainer": "train.llava_trainer",
    "find_all_linear_names": "train.llava_state",
    "get_mm_adapter_state_maybe_zero_3": "train.llava_state",
    "get_peft_state_maybe_zero_3": "train.llava_state",
    "get_peft_state_non_lora_maybe_zero_3": "train.llava_state",
    "maybe_zero_3": "train.llava_state",
    "safe_save_model_for_hf_trainer": "train.llava_state",
    "smart_tokenizer_and_embedding_resize": "train.llava_state",
    "preprocess": "train.llava_preprocess",
    "preprocess_llama_2": "train.llava_preprocess",
    "preprocess_mpt": "train.llava_preprocess",
    "preprocess_multimodal": "train.llava_preprocess",
    "preprocess_plain": "train.llava_preprocess",
    "preprocess_v1": "train.llava_preprocess",
    "LazySupervisedDataset": "train.llava_data",
    "DataCollatorForSupervisedDataset": "train.llava_data",
    "make_supervised_data_module": "train.llava_data",
    "conversation_lib": "train.llava_preprocess",
    "tokenizer_image_token": "mm_utils",
}


def __getattr__(name):
    """Open LLaVA's name for something that lives elsewhere (PEP 562)."""
    if name not in _LLAVA_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; known: {', '.join(_LLAVA_NAMES)}.")
    return getattr(import_module(f"llava_lite.{_LLAVA_NAMES[name]}"), name)


def train(attn_implementation=None, argv=None):
    """Train a stage as the flags `argv` say (default: the command line) and return its trainer.

    attn_implementation: LLaVA's, the attention kernel where no flag names one. A list in its place is `argv`.
    """
    if isinstance(attn_implementation, list):
        attn_implementation, argv = None, attn_implementation
    argv = sys.argv[1:] if argv is None else argv
    if attn_implementation is not None and "--attn_implementation" not in argv:
        argv = [*argv, "--attn_implementation", installed_attention(attn_implementation)]
    return run(prepare(argv))


def installed_attention(name):
    """Return an attention kernel that a program asks for, or auto where it is flash-attn and that is not here.

    LLaVA's train_mem.py asks for it whatever the machine.
    """
    if name != "flash_attention_2" or (find_spec("flash_attn") is not None and machine_has("fp16")):
        return name
    logger.warning("flash-attn is not installed, or there is no GPU for it: the attention is chosen for the device.")
    return "auto"


class Stage(NamedTuple):
    """A trainer and what its final folder needs; checkpoint: where it goes on, False for the start."""

    trainer: object
    tokenizer: object
    model_args: object
    data_args: object
    checkpoint: str | bool


def prepare(argv=None):
    """Return the stage that the flags describe, ready for its first step."""
    return build_stage(*read_flags(argv))


def read_flags(argv=None):
    """Return (model_args, data_args, training_args); raise what can be seen to be wrong before anything is loaded."""
    start_logging()
    argv = sys.argv[1:] if argv is None else argv
    with same_for_the_node():
        model_args, data_args, training_args = parse_args(argv)
        check_needed(argv)
        refuse_unshareable(model_args, training_args)
        refuse_without_length(data_args, training_args)
        check_paths(model_args, data_args, training_args)
        refuse_absent(data_args, training_args)
    use_one_device(argv, training_args)
    join_ranks(training_args)
    return model_args, data_args, training_args


def build_stage(model_args, data_args, training_args):
    """Return the stage: tokenizer, model, records and trainer, and the checkpoint that it goes on from."""
    from llava_lite.train.run_facts import facts_of_run

    set_seed(training_args.seed)
    checkpoint = checkpoint_to_resume(training_args)
    facts = facts_of_run(checkpoint)
    tokenizer = build_tokenizer(model_args, training_args)
    num_known = add_words(tokenizer, model_args.new_tokens or [])
    template = template_of_run(model_args, data_args, facts.moment)
    refuse_unfit(template, tokenizer, model_args.version)
    model = build_model(model_args, data_args, training_args)
    fit_vocabulary(
        *(model, tokenizer, num_known, model_args.new_tokens or []),
        *(model_args.pretrain_mm_mlp_adapter, training_args.seed),
    )
    add_end_mark(model.generation_config, end_mark_of(template, tokenizer), tokenizer)
    add_experts(model, model_args, training_args)
    take_plain_paths(model, model_args)
    gather_experts_together(model)
    model = choose_what_trains(model, model_args, training_args)
    settle_dtypes(model, training_args)
    train_set, eval_set = load_data(model, tokenizer, model_args, data_args, training_args, facts)
    check_enough_records(train_set, eval_set, training_args)
    logger.info("what trains (--tuning %s):\n%s", training_args.tuning, describe(model, training_args))
    checkpoint_as_needed(model, train_set, model_args, training_args)
    log_plan(model, train_set, model_args, training_args)
    share_out_experts(model, model_args, training_args)
    trainer = build_trainer(model, tokenizer, train_set, eval_set, data_args, training_args, facts)
    parts = companions_of(trainer, tokenizer)
    trainer.opening = Opening(model, parts, model_args.model_name_or_path, model_args.version)
    trainer.refuse_unfit(checkpoint)
    read_features(trainer, train_set, data_args)
    return Stage(trainer, tokenizer, model_args, data_args, checkpoint)


def run(stage):
    """Train from the start or from the checkpoint, save, and return the trainer."""
    trainer = stage.trainer
    begin_anew(trainer.args, stage.checkpoint)
    result = trainer.train(resume_from_checkpoint=stage.checkpoint)
    whole = save(trainer, stage.tokenizer, stage.model_args, stage.data_args)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    logger.info("%s", summary(trainer, result, whole))
    return trainer


def main(argv=None):
    """Train a stage; for the command line and the launchers, where a refusal is one line.

    A run that its output directory holds already, complete, is left alone: only `train` would replace it.
    """
    argv = sys.argv[1:] if argv is None else argv
    if asks_for_help(argv):
        print(main_page() if asks_for_help(argv) == "main" else full_page(), end="")
        return
    with told_in_a_line():
        flags = read_flags(argv)
        done = finished_before(flags[-1])
        stage = build_stage(*flags) if done is None else None
    if stage is None:
        logger.info("%s", done)
        if flags[-1].world_size > 1:
            leave()
        return
    with told_in_a_line((DataError,)):
        accelerator = run(stage).accelerator
    # A rank that leaves while another still uses what they share may end that one with an abort.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.num_processes > 1:
        leave()


def start_logging():
    """Show the log of this package beside the progress bars."""
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    # The launcher's word, since flags are read, and spoken of, before the ranks know each other.
    logging.getLogger("llava_lite").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    # Of torch's, DeepSpeed's and PEFT's use of one another, a page on every rank: nobody who trains can act on them.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|transformers|deepspeed|peft)\.")


def refuse_without_length(data_args, training_args):
    """Refuse what cannot be asked of shards, whose records nobody has counted."""
    from llava_lite.train.stream_run import refuse_of_shards

    refuse_of_shards(data_args, training_args)


def refuse_absent(data_args, training_args):
    """Refuse records that are not there and folders that cannot be written, before a model is loaded for them."""
    from llava_lite.train.features import refuse_unusable
    from llava_lite.train.load_data import refuse_blind, refuse_missing
    from llava_lite.train.offload import refuse_unusable_nvme, warn_of_old_locks

    refuse_missing(data_args)
    refuse_blind(data_args, training_args)
    refuse_unusable(data_args.feature_cache)
    if training_args.uses_deepspeed:
        refuse_unusable_nvme(training_args.deepspeed_plugin.deepspeed_config)
        warn_of_old_locks()


def use_one_device(argv, training_args):
    """Keep this process to one device, and say how the same flags run on all that are there."""
    if training_args.n_gpu > 1:
        logger.warning("%s", launch_hint(argv, training_args.n_gpu))
        training_args._n_gpu = 1


def join_ranks(training_args):
    """Let DeepSpeed know the ranks, and leave the log to the first; warnings and errors come from all."""
    if training_args.uses_deepspeed:
        import deepspeed

        # accelerate does this on a GPU only; unaware of the ranks, ZeRO-3 would take the first for all there are.
        deepspeed.init_distributed(auto_mpi_discovery=False)
        atexit.register(free_shared_memory)
    if training_args.process_index != 0:
        logging.getLogger("llava_lite").setLevel(logging.WARNING)


def free_shared_memory():
    """Remove the shared memory through which DeepSpeed's ranks on a CPU exchange sums; it would stay for good."""
    place = f"{os.environ.get('MASTER_ADDR')}_{os.environ.get('MASTER_PORT')}_{os.environ.get('LOCAL_RANK', '0')}"
    Path("/dev/shm", f"deepspeed_allreduce_buffer_{os.getuid()}_{place}").unlink(missing_ok=True)


def checkpoint_as_needed(model, train_set, model_args, training_args):
    """Recompute as few layers in the backward pass as memory makes necessary, if that is left to us."""
    from llava_lite.train.memory import choose_checkpointing

    if training_args.auto_checkpointing:
        choose_checkpointing(model, train_set, training_args, model_args.ep_size)


def log_plan(model, train_set, model_args, training_args):
    """Log what the run is estimated to need."""
    from llava_lite.train.plan import plan_of_run

    logger.info("plan:\n%s", plan_of_run(model, train_set, training_args, model_args.ep_size))


def build_trainer(model, tokenizer, train_set, eval_set, data_args, training_args, facts=None):
    """Return the trainer."""
    from llava_lite.data.collator import DataCollatorForSupervisedDataset, PackedCollator
    from llava_lite.train.evaluation import readable_examples
    from llava_lite.train.llava_trainer import LLaVATrainer

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


def companions_of(trainer, tokenizer):
    """Return what is saved beside the weights: tokenizer and image processor, as a processor and alone."""
    from llava_lite.processing import LlavaLiteProcessor

    config, tower = trainer.unwrapped.config, trainer.unwrapped.get_vision_tower()
    image_processor = None if tower is None else tower.image_processor
    return [LlavaLiteProcessor.from_config(config, tokenizer, image_processor), image_processor]


def read_features(trainer, train_set, data_args):
    """Let the records to learn from bring what the frozen tower makes of their pictures, if that is to be kept."""
    if data_args.feature_cache != "off":
        from llava_lite.train.features import use_features

        use_features(trainer, train_set, data_args.feature_cache)


def checkpoint_to_resume(training_args):
    """Return the checkpoint that the run goes on from, or False: the newest whole one unless a flag says otherwise."""
    from llava_lite.train.resume import find_checkpoint

    path = find_checkpoint(training_args.output_dir, training_args.resume_from_checkpoint, training_args.should_save)
    if path is not None:
        logger.info("going on from %s", path)
    return path or False


def save(trainer, tokenizer, model_args, data_args):
    """Write the final directory: weights, config, tokenizer, image processor, card; return whether it holds all."""
    from llava_lite.train.card import card_of_run
    from llava_lite.train.final import save_final

    args, model = trainer.args, trainer.unwrapped
    whole = args.save_full or args.tuning in ("full", "moe")
    trainer.save_state()
    if not args.uses_deepspeed and args.bits == 16:
        # What trained was kept in float32 for its small updates; a checkpoint is as wide as the run's products.
        trainer.model.to(compute_dtype(args))
    if model.config.vision_config is not None:
        # transformers opens a tower in the dtype that its own config names.
        model.config.vision_config.dtype = model.get_vision_tower().dtype
    save_final(
        trainer.model,
        args.output_dir,
        parts=companions_of(trainer, tokenizer),
        base=model_args.model_name_or_path,
        whole=whole,
        conv_template=model_args.version,
        card=card_of_run(trainer, model_args, data_args, whole),
        is_writer=args.should_save,
    )
    return whole


if __name__ == "__main__":
    main()
