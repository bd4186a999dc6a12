"""Declare every knob of a training run: type, default, unit, source.

Defaults are those of the published scripts (LLaVA-1.5 `scripts/v1_5/*.sh`, MoE-LLaVA `scripts/v1/*/finetune_moe.sh`)
where all scripts agree, and those of the two `train.py` where they do not.
"""

# ruff: noqa: RUF009 - `knob` returns a dataclass field.
import dataclasses
import json
import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import transformers

from llava_lite.commands.words import bare, unknown_flags, words_left
from llava_lite.contradictions import (
    check_data,
    check_loggers,
    check_model,
    check_together,
    check_training,
    fold_tuning,
    settle_packing,
    without_effect,
)
from llava_lite.deepspeed_files import deepspeed_advice
from llava_lite.flag_help import FlagParser
from llava_lite.flags import machine_has, open_yaml, split_flags, translate

logger = logging.getLogger(__name__)

MOE_KEYS = (
    "moe_enable moe_mode moe_layers_idx ep_size top_k_experts capacity_factor eval_capacity_factor "
    "min_capacity use_residual router_aux_loss_coef train_modules moe_drop_tokens moe_count_padding"
)


def knob(default, text, **metadata):
    """Return a dataclass field with its default and its one sentence for `--help`."""
    return dataclasses.field(default=default, metadata={"help": text, **metadata})


CONFIG_KEYS = (
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "mm_projector_type",
    "mm_patch_merge_type",
    "mm_use_im_start_end",
    "mm_use_im_patch_token",
)


@dataclass
class ModelArguments:
    """What is built: decoder, vision tower, connector, experts. Names are LLaVA's and MoE-LLaVA's."""

    model_name_or_path: str | None = knob(None, "Hub id or folder of a language model or of an earlier stage.")
    version: str = knob("v1", "Conversation template: plain in stage 1, v1 after it; chat is the tokenizer's own.")
    chat_end_mark: str | None = knob(
        None,
        "With --version chat: a token that ends every answer, for chat templates that write none (GLM-4, SOLAR, "
        "MiniCPM), such as the tokenizer's end of text.",
    )
    enable_thinking: bool | None = knob(
        None,
        "With --version chat: whether the trained model is asked for reasoning (Qwen3); default: if all records have "
        "some in their answers, <think>...</think>.",
        nargs="?",
        const=True,
    )
    vision_tower: str | None = knob(None, "Hub id or folder of a CLIP, SigLIP or DINOv2 tower (alias image_tower).")
    mm_vision_select_layer: int | None = knob(None, "Layer of the tower that is read; default: the model's, else -2.")
    mm_vision_select_feature: Literal["patch", "cls_patch"] | None = knob(
        None, "Whether the CLS token is read too; default: the model's, else patch."
    )
    mm_projector_type: str | None = knob(
        None, "Connector: identity, linear, mlpNx_gelu (LLaVA-1.5: mlp2x_gelu); default: the model's, else linear."
    )
    pretrain_mm_mlp_adapter: str | None = knob(None, "Connector weights of stage 1, mm_projector.bin.")
    mm_patch_merge_type: Literal["flat", "spatial", "spatial_unpad"] | None = knob(
        None, "How crops of one picture are joined (LLaVA-1.6: spatial_unpad); default: the model's, else flat."
    )
    mm_use_im_start_end: bool | None = knob(
        None, "Put <im_start> and <im_end> around pictures (LLaVA v1); default: as the model.", nargs="?", const=True
    )
    new_tokens: list[str] | None = knob(
        None,
        "Words to add to the tokenizer, one token each (<seg> <loc_1>). Their rows of both vocabulary matrices train "
        "with every --tuning, as do those of any word that the tokenizer has and the model has no row for.",
    )
    mm_use_im_patch_token: bool | None = knob(
        None, "Add <im_patch> to the vocabulary (LLaVA v0); default: as the model.", nargs="?", const=True
    )
    attn_implementation: Literal["auto", "flash_attention_2", "varlen", "sdpa", "eager"] = knob(
        "auto", "Attention kernel; auto takes the best that is installed for the device and logs which."
    )
    tune_mm_mlp_adapter: bool = knob(False, "LLaVA's word for --tuning projector.")
    freeze_backbone: bool = knob(False, "Keep the decoder; its vocabulary head and the connector train.")
    moe_enable: bool = knob(False, "MoE-LLaVA's word for --tuning moe: turn MLPs of a dense model into experts.")
    train_modules: list[str] | None = knob(
        None, "Parts of MoE-LLaVA's parameter names that train beside router and connector; default: all MLPs."
    )
    moe_mode: Literal["first_half", "second_half", "sparse", "dense"] = knob(
        "second_half",
        "Layers that get experts; sparse: every other one from 0 (MoE-LLaVA's scripts). Of a model that has experts "
        "this and the next four are its own; a flag that says otherwise is refused.",
    )
    moe_layers_idx: list[int] | None = knob(None, "Layers that get experts, counted from 0; wins over --moe_mode.")
    num_experts: list[int] | None = knob(None, "Experts a layer: one number, or one for each layer; default 4.")
    top_k_experts: int = knob(2, "Experts that a token visits (MoE-LLaVA).")
    use_residual: bool = knob(False, "Keep the dense MLP beside the experts (DeepSpeed-MoE, Rajbhandari et al. 2022).")
    router_aux_loss_coef: float = knob(
        0.01,
        "Weight of the balance loss summed over layers (MoE-LLaVA). Of a model that has experts this and the next six "
        "are its own unless a flag says otherwise.",
    )
    moe_drop_tokens: bool = knob(False, "Drop tokens over an expert's capacity, as DeepSpeed's gate does.")
    capacity_factor: float = knob(1.0, "Capacity in training in even shares of the tokens; with moe_drop_tokens.")
    eval_capacity_factor: float = knob(2.0, "Capacity outside training; with moe_drop_tokens.")
    min_capacity: int = knob(0, "Least capacity in tokens; with moe_drop_tokens.")
    moe_second_expert_sampling: Literal["never", "training", "always"] = knob(
        "never", "When the second of two experts is drawn with Gumbel noise (DeepSpeed's gate: always)."
    )
    moe_count_padding: bool = knob(False, "Route and count padding too, as MoE-LLaVA does.")
    ep_size: int = knob(
        1, "Ranks that share the experts of a layer, with ZeRO-2 or 3; 1: every rank holds all (MoE-LLaVA's scripts)."
    )
    only_lora_ffn: bool = knob(True, "MoE-LLaVA's; has no effect, since LoRA and experts are two tunings.")
    plain_paths: list[str] | None = knob(
        None,
        "Leave a faster path for the plain one: loss, experts; for a doubt.",
        choices=("loss", "experts"),
    )

    # Names of the flags that were given, their defaults too; None where flags were not what it was made of.
    said: ClassVar[frozenset[str] | None] = None

    def __post_init__(self):
        """Refuse what contradicts itself."""
        check_model(self)

    def config_choices(self):
        """Return the config keys of the model that a flag says something about; the others are the model's own."""
        return {key: getattr(self, key) for key in CONFIG_KEYS if getattr(self, key) is not None}

    def moe_config(self):
        """Return the nested `moe` dict of the model's config, with MoE-LLaVA's keys."""
        sampling = {"never": False, "training": True, "always": "always"}[self.moe_second_expert_sampling]
        values = {key: getattr(self, key) for key in MOE_KEYS.split()}
        # A folder holds all experts, on however many ranks they were trained.
        values |= {"num_experts": self.num_experts or [4], "ep_size": 1}
        return {**values, "moe_second_expert_sampling": sampling}

    def moe_choices(self):
        """Return the keys of `config.moe` that a flag says something about."""
        said = self.said
        if said is None:
            fields = type(self).__dataclass_fields__
            said = {key for key in fields if getattr(self, key) != fields[key].default}
        return {key: value for key, value in self.moe_config().items() if key in said}


@dataclass
class DataArguments:
    """What is learned from, and what is held out."""

    data_path: list[str] | None = knob(
        None,
        "JSON or JSONL files of LLaVA's records or messages, or YAML mixtures of them; or shards with images inside "
        "(WebDataset .tar, .parquet, a directory saved by `datasets`): paths, globs, {00000..00331}, "
        "hf://datasets/user/name. Shards need --max_steps. Other formats: llava-lite data convert.",
    )
    special_tokens_in_text: Literal["token", "text"] = knob(
        "token",
        "What a special token spelled in a question or an answer is: the token, as in LLaVA, or text like any other.",
    )
    shuffle_window: int = knob(512, "Records of a shard that are shuffled together, and held in memory, a worker.")
    image_folder: str | None = knob(None, "Folder that the records' picture paths start from.")
    image_aspect_ratio: str | None = knob(
        None,
        "square: crop as the tower's processor does (stage 1); pad (stage 2); anyres: a picture is several crops "
        "(LLaVA-1.6); default: as the model, else square.",
    )
    image_grid_pinpoints: str | None = knob(
        None,
        "Resolutions that anyres cuts pictures at, [(width, height), ...] in pixels or (1x1),...,(6x6) in crops; "
        "default: the model's, else LLaVA-1.6's five.",
    )
    picture_resize: Literal["exact", "fast"] = knob(
        "exact", "exact: the bytes of the image processor's own filter; fast: torch's, up to 1e-3 away in the mean."
    )
    feature_cache: str = knob(
        "off",
        "Keep a frozen tower's features on disk and read them: a folder for them; auto: in the cache folder, where "
        "more than one epoch reads them, or an earlier run left them, and half the free disk holds them; off.",
    )
    bad_record: Literal["raise", "skip"] = knob("raise", "A broken record or image stops the run, or is left out.")
    max_bad_share: float = knob(0.01, "Largest share of records that --bad_record skip may leave out.")
    placeholder_as_text: bool = knob(
        False, "Take <image> in a record without any image for plain text (LLaVA); default: such a record is refused."
    )
    follow_links: bool = knob(False, "Read pictures through links that lead out of image_folder.")
    eval_data_path: list[str] | None = knob(None, "Files of records to evaluate on.")
    eval_split: float = knob(0.0, "Records held out of data_path to evaluate on: below 1 a share, else a number.")
    num_eval_generations: int = knob(4, "Answers generated and written at each evaluation.")
    eval_max_new_tokens: int = knob(64, "Longest of those answers, in tokens.")
    lazy_preprocess: bool = knob(True, "LLaVA's; has no effect, records are always read when they are needed.")
    is_multimodal: bool = knob(True, "LLaVA's; has no effect, a vision tower makes it so.")

    def __post_init__(self):
        """Refuse what contradicts itself."""
        check_data(self)

    def config_choices(self):
        """Return the config keys of the model that a flag says something about; the others are the model's own."""
        choices = {"image_aspect_ratio": self.image_aspect_ratio, "image_grid_pinpoints": self.image_grid_pinpoints}
        return {key: value for key, value in choices.items() if value is not None}


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """How it is trained: transformers' own flags, LLaVA's, and ours."""

    tuning: Literal["projector", "full", "lora", "moe"] | None = knob(
        None, "What trains: projector, full, lora, moe; default: what the older flags mean, else full."
    )
    cache_dir: str | None = knob(None, "Where downloaded weights are kept.")
    model_max_length: int = knob(2048, "Longest sequence in tokens, pictures included.")
    freeze_mm_mlp_adapter: bool = knob(False, "Keep the connector as it is.")
    unfreeze_mm_vision_tower: bool = knob(False, "Train the vision tower too (LLaVA-NeXT).")
    mm_projector_lr: float | None = knob(None, "Learning rate of the connector; default: --learning_rate.")
    mm_vision_tower_lr: float | None = knob(None, "Learning rate of the vision tower; default: --learning_rate.")
    packing: Literal["none", "samples", "tokens"] | None = knob(
        None,
        "What a micro-batch is: none, records padded to the longest; samples, the same records in one row without "
        "padding; tokens, one row of records up to --packing_tokens; default: samples where no other flag needs "
        "padding.",
    )
    packing_tokens: int | None = knob(
        None, "Most tokens of a micro-batch with --packing tokens; default: 4 times --model_max_length."
    )
    group_by_modality_length: bool = knob(False, "Batches of like length, pictures and text apart (LLaVA-1.5).")
    lora_enable: bool = knob(False, "LLaVA's word for --tuning lora.")
    lora_r: int = knob(64, "Rank of LoRA (Hu et al. 2022; LLaVA-1.5: 128).")
    lora_alpha: int = knob(16, "Scale of LoRA before it is divided by the rank (LLaVA-1.5: 256).")
    lora_dropout: float = knob(0.05, "Dropout before LoRA.")
    lora_bias: Literal["none", "all", "lora_only"] = knob("none", "Which biases train beside LoRA.")
    lora_vision_tower: bool = knob(False, "Put LoRA into the vision tower too.")
    bits: Literal[4, 8, 16] = knob(16, "Bits of the frozen decoder's weights; 4 and 8 need LoRA and bitsandbytes.")
    double_quant: bool = knob(True, "Quantise the scales of 4-bit weights too (QLoRA, Dettmers et al. 2023).")
    quant_type: Literal["fp4", "nf4"] = knob("nf4", "4-bit number format (QLoRA).")
    auto_checkpointing: bool = knob(
        False, "What --gradient_checkpointing auto sets: recompute as few decoder layers as memory makes necessary."
    )
    save_full: bool = knob(False, "Write the whole model at the end, also where only a part of it trained.")
    # The rest are fields of transformers, with the defaults of the published scripts.
    bf16: bool | None = knob(None, "Compute in bfloat16; default: where the device can.", nargs="?", const=True)
    tf32: bool | None = knob(
        None, "Compute float32 products in TF32; default: where it exists.", nargs="?", const=True
    )
    num_train_epochs: float = knob(1.0, "Passes over the data.")
    lr_scheduler_type: transformers.SchedulerType | str = knob("cosine", "Schedule of the learning rate.")
    warmup_steps: float = knob(0.03, "Steps of linear warm-up; below 1 a share of all steps.")
    logging_steps: float = knob(1, "Optimizer steps between two lines of the log.")
    remove_unused_columns: bool = knob(False, "Drop what the model's forward does not name; sample ids would go.")
    logging_nan_inf_filter: bool = knob(False, "Hide losses that are not finite; here they stop the run.")

    def __post_init__(self):
        """Refuse what contradicts itself; take from the machine what was not said."""
        self.settle_checkpointing()
        check_training(self)
        # Before transformers opens it, which would say only that a file is missing.
        read_deepspeed(self.deepspeed)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and self.default_bf16()
        if self.tf32 is None and not self.use_cpu and machine_has("tf32"):
            self.tf32 = True
        # Said aloud, accelerate starts gloo for ranks on a CPU, under DeepSpeed too; else it would see one process.
        self.use_cpu = self.use_cpu or not machine_has("device")
        if self.deepspeed and "LOCAL_RANK" not in os.environ:
            stand_alone()
        super().__post_init__()
        check_loggers(self.report_to)

    @property
    def device(self):
        """The device of this process; ranks on a CPU get "cpu:0" from a launcher, where torch restores nothing to."""
        device = super().device
        return type(device)("cpu") if device.type == "cpu" else device

    def settle_checkpointing(self):
        """Take the word `auto` out of transformers' flag, which knows yes and no."""
        for name in ("gradient_checkpointing", "activation_checkpointing"):
            if getattr(self, name, None) == "auto":
                setattr(self, name, False)
                self.auto_checkpointing = True

    def default_bf16(self):
        """Return what the launcher, the DeepSpeed JSON or else the device says about bfloat16."""
        launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launcher != "no":
            return launcher == "bf16"
        enabled = read_deepspeed(self.deepspeed).get("bf16", {}).get("enabled", "auto")
        return enabled if isinstance(enabled, bool) else not self.use_cpu and machine_has("bf16")

    @property
    def uses_deepspeed(self):
        """Whether DeepSpeed drives the run, by --deepspeed or by the config of `accelerate launch`."""
        return self.deepspeed_plugin is not None

    @property
    def zero_stage(self):
        """Return the ZeRO stage of the run, 0 without DeepSpeed."""
        return int(self.deepspeed_plugin.zero_stage) if self.uses_deepspeed else 0


def stand_alone():
    """Set what a launcher would set for a single process: without it, DeepSpeed asks MPI who it is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})


def read_deepspeed(config):
    """Return a DeepSpeed config (path, JSON text, dict or None) as a dict."""
    if not config:
        return {}
    if isinstance(config, dict):
        return config
    is_text = config.lstrip().startswith("{")
    if not is_text and not Path(config).is_file():
        raise ValueError(f"--deepspeed {config}: there is no such file. {deepspeed_advice()}")
    try:
        found = json.loads(config if is_text else Path(config).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--deepspeed {config} is no JSON ({error}). {deepspeed_advice()}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--deepspeed {config} holds a {type(found).__name__} and no fields. {deepspeed_advice()}")
    return found


def build_parser():
    """Return the parser of every flag; none may be abbreviated."""
    return FlagParser(
        (ModelArguments, DataArguments, TrainingArguments),
        prog="llava-lite train",
        allow_abbrev=False,
        usage="llava-lite train [run.yaml] [--flag value ...]",
    )


def refuse_unknown(command, words, known, more_flags=()):
    """Raise ValueError for the flags of a command line that are none, each with the one that is meant."""
    unknown = [f"--{name}" for name, _ in split_flags(words) if name and name not in known]
    if unknown:
        raise ValueError(unknown_flags(command, unknown, [*(f"--{name}" for name in known), *more_flags]))


def parse_args(argv, command="train", more_flags=()):
    """Return (model_args, data_args, training_args) from flags, or from a YAML file and flags that override it.

    Flags of LLaVA, MoE-LLaVA and transformers 4 are translated. command: the verb, for its messages; more_flags:
    those that it has read itself. Raises ValueError for an unknown flag and for flags that contradict each other.
    """
    argv = open_yaml(argv)
    parser = build_parser()
    known = {action.dest for action in parser._actions}
    words = translate(argv, known)
    spelled = {bare(flag) for action in parser._actions for flag in action.option_strings}
    refuse_unknown(command, words, known | spelled, more_flags)
    model_args, data_args, training_args, left = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    if left:
        raise ValueError(words_left(command, left))
    model_args.said = frozenset(bare(name) for name, _ in split_flags(words) if name)
    fold_tuning(model_args, training_args)
    settle_packing(model_args, training_args)
    check_together(model_args, data_args, training_args)
    for flag, reason in without_effect(model_args, training_args):
        logger.info("%s has no effect: %s.", flag, reason)
    return model_args, data_args, training_args
