"""Train one stage: from flags to a folder that a model is opened from."""

import copy
import logging
import os
import sys
import warnings
from importlib import import_module
from typing import NamedTuple

import torch
from transformers import set_seed

from llava_lite.arguments import parse_args
from llava_lite.companions import load_tokenizer, refuse_missing_model
from llava_lite.train.pushing import refuse_unshareable
from llava_lite.train.refusal import told_in_a_line
from llava_lite.train.tuning import choose_what_trains, compute_dtype, describe, loading_dtype, settle_dtypes

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
        argv = [*argv, "--attn_implementation", attn_implementation]
    return run(prepare(argv))


class Stage(NamedTuple):
    """A trainer and what its final folder needs; checkpoint: where it goes on, False for the start."""

    trainer: object
    tokenizer: object
    model_args: object
    data_args: object
    checkpoint: str | bool


def prepare(argv=None):
    """Return the stage that the flags describe, ready for its first step."""
    start_logging()
    model_args, data_args, training_args = parse_args(sys.argv[1:] if argv is None else argv)
    refuse_unshareable(model_args, training_args)
    refuse_without_length(data_args, training_args)
    join_ranks(training_args)
    set_seed(training_args.seed)
    tokenizer = build_tokenizer(model_args, training_args)
    model = build_model(model_args, data_args, training_args)
    fit_vocabulary(model, tokenizer)
    add_experts(model, model_args, training_args)
    take_plain_paths(model, model_args)
    gather_experts_together(model)
    model = choose_what_trains(model, model_args, training_args)
    settle_dtypes(model, training_args)
    train_set, eval_set = load_data(model, tokenizer, model_args, data_args, training_args)
    logger.info("what trains (--tuning %s):\n%s", training_args.tuning, describe(model, training_args))
    checkpoint_as_needed(model, train_set, training_args)
    log_plan(model, train_set, training_args)
    share_out_experts(model, model_args, training_args)
    trainer = build_trainer(model, tokenizer, train_set, eval_set, data_args, training_args)
    read_features(trainer, train_set, data_args)
    return Stage(trainer, tokenizer, model_args, data_args, checkpoint_to_resume(training_args))


def run(stage):
    """Train from the start or from the checkpoint, save, and return the trainer."""
    stage.trainer.train(resume_from_checkpoint=stage.checkpoint)
    save(stage.trainer, stage.tokenizer, stage.model_args, stage.data_args)
    if stage.trainer.args.push_to_hub:
        stage.trainer.push_to_hub()
    return stage.trainer


def main(argv=None):
    """Train a stage; for the command line and the launchers, where a refusal is one line."""
    with told_in_a_line():
        stage = prepare(argv)
    run(stage).accelerator.end_training()


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


def join_ranks(training_args):
    """Let DeepSpeed know the ranks, and leave the log to the first; warnings and errors come from all."""
    if training_args.uses_deepspeed:
        import deepspeed

        # accelerate does this on a GPU only; unaware of the ranks, ZeRO-3 would take the first for all there are.
        deepspeed.init_distributed(auto_mpi_discovery=False)
    if training_args.process_index != 0:
        logging.getLogger("llava_lite").setLevel(logging.WARNING)


def build_tokenizer(model_args, training_args):
    """Return the model's tokenizer, with a pad token.

    Which one does not matter: the collator makes the mask, so padding may share its id with <unk> or with the end mark
    and a real one in the text still counts (LLaVA took the mask from the ids).
    """
    refuse_missing_model(model_args.model_name_or_path)
    # Registers our model types, by which transformers finds a checkpoint's tokenizer.
    import_module("llava_lite.model")
    tokenizer = load_tokenizer(model_args.model_name_or_path, cache_dir=training_args.cache_dir)
    tokenizer.model_max_length, tokenizer.padding_side = training_args.model_max_length, "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def build_model(model_args, data_args, training_args):
    """Return the model with tower and connector, in training mode; a connector of stage 1 is filled in."""
    from llava_lite.model.assemble import assemble, load_connector
    from llava_lite.model.attention import choose_attention

    model = assemble(
        model_args.model_name_or_path,
        model_args.vision_tower,
        config_overrides={
            **model_args.config_choices(),
            **data_args.config_choices(),
            "tokenizer_padding_side": "right",
            "tokenizer_model_max_length": training_args.model_max_length,
            "conv_template": model_args.version,
            "mm_projector_lr": training_args.mm_projector_lr,
            "tune_mm_mlp_adapter": training_args.tuning == "projector",
            "freeze_mm_mlp_adapter": training_args.freeze_mm_mlp_adapter,
        },
        dtype=loading_dtype(training_args),
        attn_implementation=choose_attention(
            model_args.attn_implementation, training_args.device.type, packed=training_args.packing != "none"
        ),
        cache_dir=training_args.cache_dir,
        **quantization(training_args),
    )
    if training_args.unfreeze_mm_vision_tower:
        model.config.unfreeze_mm_vision_tower = True
    if model_args.pretrain_mm_mlp_adapter is not None:
        load_connector(model, model_args.pretrain_mm_mlp_adapter)
    return model.train()


def quantization(training_args):
    """Return the keyword that loads the decoder's frozen weights in 4 or 8 bits (QLoRA, Dettmers et al. 2023)."""
    if training_args.bits == 16:
        return {}
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"--bits {training_args.bits} needs bitsandbytes; pip install 'llava-lite[quant]', or use --bits 16."
        ) from error
    from transformers import BitsAndBytesConfig

    from llava_lite.model.loading import KEPT_WHOLE

    if training_args.bits == 8:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=KEPT_WHOLE)}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=loading_dtype(training_args),
        bnb_4bit_use_double_quant=training_args.double_quant,
        bnb_4bit_quant_type=training_args.quant_type,
        llm_int8_skip_modules=KEPT_WHOLE,
    )
    return {"quantization_config": config}


def fit_vocabulary(model, tokenizer):
    """Add the words that mark pictures, if asked for, and make room for all of the tokenizer's words.

    New rows start as the mean of the old ones, as LLaVA does; transformers would draw them.
    """
    from llava_lite.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
    from llava_lite.model.vocabulary import fit_rows

    words = [DEFAULT_IMAGE_PATCH_TOKEN] if model.config.mm_use_im_patch_token else []
    words += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN] if model.config.mm_use_im_start_end else []
    num_known = min(len(tokenizer), model.config.vocab_size)
    tokenizer.add_tokens(words, special_tokens=True)
    fit_rows(model, len(tokenizer), num_known)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id


def add_experts(model, model_args, training_args):
    """Turn MLPs into experts, if that is the tuning; a model that has experts is refused."""
    if training_args.tuning == "moe":
        from llava_lite.model.upcycle import upcycle

        upcycle(model, model_args.moe_config(), seed=training_args.seed)


def take_plain_paths(model, model_args):
    """Leave the faster paths that a flag names."""
    from llava_lite.model.plain_paths import set_plain_paths

    set_plain_paths(model, model_args.plain_paths or ())


def gather_experts_together(model):
    """Let ZeRO-3 treat the experts of a layer as one leaf, whatever DeepSpeed JSON the run uses.

    Fetched one by one they would come in the order of the tokens, which differs from rank to rank: a hang.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    if model.moe_layers() and is_deepspeed_zero3_enabled():
        from deepspeed.utils import set_z3_leaf_modules

        from llava_lite.model.moe import MoeBlock

        set_z3_leaf_modules(model, [MoeBlock])


def share_out_experts(model, model_args, training_args):
    """Leave on this rank its share of the experts, if several are to share them."""
    if model_args.ep_size > 1:
        from llava_lite.train.expert_parallel import split_experts

        split_experts(model, model_args.ep_size, training_args.deepspeed_plugin.deepspeed_config)


def load_data(model, tokenizer, model_args, data_args, training_args):
    """Return the records to learn from and those held out (or None), every one of them checked but for shards."""
    from llava_lite.anyres import PictureLayout
    from llava_lite.data.dataset import open_dataset
    from llava_lite.data.records import is_shards
    from llava_lite.train.ranks import everyone
    from llava_lite.train.stream_run import open_stream

    if data_args.data_path is None:
        raise ValueError("--data_path is needed: one or more files of records.")
    tower = model.get_vision_tower()

    def open_files(paths, ledger):
        dataset, report = open_dataset(
            paths,
            tokenizer,
            None if tower is None else tower.image_processor,
            model_args.version,
            image_folder=data_args.image_folder,
            layout=PictureLayout(0) if tower is None else model.config.picture_layout,
            max_length=training_args.model_max_length,
            mm_use_im_start_end=model.config.mm_use_im_start_end,
            num_workers=training_args.dataloader_num_workers,
            follow_links=data_args.follow_links,
            picture_resize=data_args.picture_resize,
            bad_record=data_args.bad_record,
            max_bad_share=data_args.max_bad_share,
            ledger_path=f"{training_args.output_dir}/{ledger}" if data_args.bad_record == "skip" else None,
        )
        if len(set(everyone(report.digest))) > 1:
            raise ValueError(f"the ranks see different files under {paths}; share them, or copy them to every node.")
        logger.info("%s:\n%s", ", ".join(paths), report.summary())
        return dataset

    if is_shards(data_args.data_path):
        train_set = open_stream(model, tokenizer, model_args, data_args, training_args)
    else:
        train_set = open_files(data_args.data_path, "skipped_records.jsonl")
    if data_args.eval_data_path is not None:
        return train_set, open_files(data_args.eval_data_path, "skipped_eval_records.jsonl")
    return split(train_set, data_args.eval_split, training_args.seed) if data_args.eval_split else (train_set, None)


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


def checkpoint_as_needed(model, train_set, training_args):
    """Recompute as few layers in the backward pass as memory makes necessary, if that is left to us."""
    from llava_lite.train.memory import choose_checkpointing

    if training_args.auto_checkpointing:
        choose_checkpointing(model, train_set, training_args)


def log_plan(model, train_set, training_args):
    """Log what the run is estimated to need."""
    from llava_lite.train.plan import plan_of_run

    logger.info("plan:\n%s", plan_of_run(model, train_set, training_args))


def build_trainer(model, tokenizer, train_set, eval_set, data_args, training_args):
    """Return the trainer."""
    from llava_lite.data.collator import DataCollatorForSupervisedDataset, PackedCollator
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
        eval_examples=[eval_set[i] for i in range(num_examples)],
        eval_max_new_tokens=data_args.eval_max_new_tokens,
    )


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
    """Write the final folder: weights, config, tokenizer, image processor, card."""
    from llava_lite.processing import LlavaLiteProcessor
    from llava_lite.train.card import card_of_run
    from llava_lite.train.final import save_final

    args, model = trainer.args, trainer.unwrapped
    whole = args.save_full or args.tuning in ("full", "moe")
    tower = model.get_vision_tower()
    image_processor = None if tower is None else tower.image_processor
    trainer.save_state()
    if not args.uses_deepspeed and args.bits == 16:
        # What trained was kept in float32 for its small updates; a checkpoint is as wide as the run's products.
        trainer.model.to(compute_dtype(args))
    if model.config.vision_config is not None:
        # transformers opens a tower in the dtype that its own config names.
        model.config.vision_config.dtype = tower.dtype
    save_final(
        trainer.model,
        args.output_dir,
        parts=[LlavaLiteProcessor.from_config(model.config, tokenizer, image_processor), image_processor],
        base=model_args.model_name_or_path,
        whole=whole,
        conv_template=model_args.version,
        card=card_of_run(trainer, model_args, data_args, whole),
        is_writer=args.should_save,
    )


if __name__ == "__main__":
    main()
