"""Declare every knob of a training run: type, default, unit, source.

Defaults are those of the published scripts (LLaVA-1.5 `scripts/v1_5/*.sh`, MoE-LLaVA `scripts/v1/*/finetune_moe.sh`)
where all scripts agree, and those of the two `train.py` where they do not.
"""

# ruff: noqa: RUF009 - `knob` and `switch` return a dataclass field.
import os
from dataclasses import dataclass
from typing import ClassVar, Literal

import transformers

from llava_lite.distributed.ranks import stand_alone
from llava_lite.train.arguments.injection import INJECTION_KEYS, InjectionArguments, knob, switch
from llava_lite.train.arguments.legacy import machine_has
from llava_lite.train.arguments.validate import (
    check_data,
    check_loggers,
    check_model,
    check_skipped_steps,
    check_training,
)
from llava_lite.train.deepspeed.files import CONFIGS, read_deepspeed, resolve_config

MOE_KEYS = (
    "moe_enable moe_mode moe_layers_idx ep_size top_k_experts capacity_factor eval_capacity_factor "
    "min_capacity use_residual router_aux_loss_coef train_modules moe_drop_tokens moe_count_padding"
)


CONFIG_KEYS = (
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "mm_projector_type",
    "mm_patch_merge_type",
    "mm_use_im_start_end",
    "mm_use_im_patch_token",
    *INJECTION_KEYS,
)


@dataclass
class ModelArguments(InjectionArguments):
    """What is built: decoder, vision tower, connector, experts. Names are LLaVA's and MoE-LLaVA's."""

    model_name_or_path: str | None = knob(
        "Language model to start from, or the output of an earlier stage: a Hub id or a directory."
    )
    version: str = knob(
        "Conversation template, which turns records into prompts: plain in stage 1, v1 (Vicuna) after it; chat is "
        "the tokenizer's own chat template.",
        "v1",
    )
    chat_end_token: str | None = knob(
        "With --version chat: the token that ends every answer, for chat templates that write none (GLM-4, SOLAR, "
        "MiniCPM), such as the tokenizer's end-of-text token."
    )
    enable_thinking: bool | None = switch(
        "With --version chat: whether the trained model is asked to reason before it answers (Qwen3). Default: yes "
        "if all records have reasoning in their answers, <think>...</think>."
    )
    vision_tower: str | None = knob(
        "Vision encoder, which turns an image into features: Hub id or directory of a CLIP, SigLIP or DINOv2 "
        "model. Also spelled --image_tower."
    )
    mm_vision_select_layer: int | None = knob(
        "Layer of the vision tower whose output is read; -2 is the last but one. Default: the model's, else -2."
    )
    mm_vision_select_feature: Literal["patch", "cls_patch", "pooled"] | None = knob(
        "patch: read the patch tokens; cls_patch: read the CLS token too; pooled: read one vector an image. Default: "
        "the model's, else patch."
    )
    mm_projector_type: str | None = knob(
        "Connector between vision tower and language model: identity; linear; linear_norm, with a norm "
        "(LLaMA2-Accessory); mlpNx_gelu, an MLP of N layers (LLaVA-1.5: mlp2x_gelu); gated_mlpNx, N gated MLPs "
        "(ImageBind-LLM: gated_mlp3x); query_vit, learned queries (LLaMA-Adapter V2). Default: the model's, else "
        "linear."
    )
    pretrain_mm_mlp_adapter: str | None = knob("File of connector weights to start from: mm_projector.bin of stage 1.")
    mm_patch_merge_type: Literal["flat", "spatial", "spatial_unpad"] | None = knob(
        "How the features of an image's crops are joined: flat, one crop after the other; spatial, as one grid; "
        "spatial_unpad, as one grid without its padding and with a newline after each row (LLaVA-1.6). Default: "
        "the model's, else flat."
    )
    mm_use_im_start_end: bool | None = switch(
        "Put the tokens <im_start> and <im_end> around each image (LLaVA v1). Default: as the model does."
    )
    new_tokens: list[str] | None = knob(
        "Words to add to the tokenizer, one token each, such as <seg> <loc_1>. Their rows of the input and output "
        "embeddings train with every --tuning, and so do the rows of any other token that the tokenizer has and "
        "the model does not."
    )
    mm_use_im_patch_token: bool | None = switch(
        "Add the token <im_patch> to the vocabulary (LLaVA v0). Default: as the model does."
    )
    attn_implementation: Literal["auto", "flash_attention_2", "varlen", "sdpa", "eager"] = knob(
        "Attention kernel. auto takes the best one that is installed for the device, and logs which.", "auto"
    )
    tune_mm_mlp_adapter: bool = knob("LLaVA's name for --tuning projector.", False)
    freeze_backbone: bool = knob(
        "Freeze the layers of the language model; its output embeddings and the connector train.", False
    )
    moe_enable: bool = knob(
        "MoE-LLaVA's name for --tuning moe: replace MLPs of a dense model with experts, and train them.", False
    )
    train_modules: list[str] | None = knob(
        "With --tuning moe: parts of parameter names, in MoE-LLaVA's spelling, that train besides the router and "
        "the connector. Default: all MLPs."
    )
    moe_mode: Literal["first_half", "second_half", "sparse", "dense"] = knob(
        "Layers that get experts: first_half, second_half, sparse (every second layer from 0 on; MoE-LLaVA's "
        "scripts) or dense (all). A model that has experts keeps its own moe_mode, moe_layers_idx, num_experts, "
        "top_k_experts and use_residual; a flag that differs is an error.",
        "second_half",
    )
    moe_layers_idx: list[int] | None = knob(
        "Layers that get experts, counted from 0. Takes precedence over --moe_mode."
    )
    num_experts: list[int] | None = knob(
        "Number of experts of a layer: one number, or one for each layer. Default: 4."
    )
    top_k_experts: int = knob("Number of experts that each token is routed to (MoE-LLaVA: 2).", 2)
    use_residual: bool = knob(
        "Keep the dense MLP beside the experts and add up both outputs, weighted by a trained gate (DeepSpeed-MoE, "
        "Rajbhandari et al. 2022).",
        False,
    )
    router_aux_loss_coef: float = knob(
        "Weight of the load-balancing loss, which is summed over layers (MoE-LLaVA: 0.01). A model that has "
        "experts keeps its own value of this flag and of those from moe_drop_tokens to moe_count_padding, unless a "
        "flag says otherwise.",
        0.01,
    )
    moe_drop_tokens: bool = knob("Drop the tokens that exceed an expert's capacity, as DeepSpeed's gate does.", False)
    capacity_factor: float = knob(
        "With --moe_drop_tokens, in training: capacity of an expert; 1.0 is an equal split of the routed tokens.", 1.0
    )
    eval_capacity_factor: float = knob(
        "With --moe_drop_tokens, outside training: capacity of an expert in the same unit.", 2.0
    )
    min_capacity: int = knob("With --moe_drop_tokens: least capacity of an expert, in tokens.", 0)
    moe_second_expert_sampling: Literal["never", "training", "always"] = knob(
        "When the second of two experts is sampled with Gumbel noise in place of the one with the next best score "
        "(DeepSpeed's gate: always).",
        "never",
    )
    moe_count_padding: bool = knob(
        "Route padding tokens too and count them in the load-balancing loss, as MoE-LLaVA does.", False
    )
    ep_size: int = knob(
        "Expert parallelism: number of ranks over which the experts of a layer are distributed; above 1 it needs "
        "ZeRO-2 or 3. 1: every rank holds all experts (MoE-LLaVA's scripts).",
        1,
    )
    only_lora_ffn: bool = knob(
        "Accepted for MoE-LLaVA's scripts; has no effect, because LoRA and experts are two tunings.", True
    )
    plain_paths: list[str] | None = knob(
        "Use the plain implementation in place of a faster one, to see whether a problem comes from there: loss, "
        "experts, matmul, liger.",
        choices=("loss", "experts", "matmul", "liger"),
    )

    # Names of the flags on the command line, also those with their default value; None if not made from one.
    given: ClassVar[frozenset[str] | None] = None

    def __post_init__(self):
        """Check the flags against each other."""
        check_model(self)

    def config_choices(self):
        """Return the config keys of the model that a flag sets; the others are the model's own."""
        choices = {key: getattr(self, key) for key in CONFIG_KEYS if getattr(self, key) is not None}
        return choices | ({} if self.bias_linears is None else {"decoder_bias": self.bias_linears})

    def moe_config(self):
        """Return the nested `moe` dict of the model's config, with MoE-LLaVA's keys."""
        sampling = {"never": False, "training": True, "always": "always"}[self.moe_second_expert_sampling]
        values = {key: getattr(self, key) for key in MOE_KEYS.split()}
        # A directory holds all experts, on however many ranks they were trained.
        values |= {"num_experts": self.num_experts or [4], "ep_size": 1}
        return {**values, "moe_second_expert_sampling": sampling}

    def moe_choices(self):
        """Return the keys of `config.moe` that a flag sets."""
        given = self.given
        if given is None:
            fields = type(self).__dataclass_fields__
            given = {key for key in fields if getattr(self, key) != fields[key].default}
        return {key: value for key, value in self.moe_config().items() if key in given}


@dataclass
class DataArguments:
    """Records to train and to evaluate on."""

    data_path: list[str] | None = knob(
        "Training records: JSON or JSONL files of LLaVA's records or of messages, or YAML mixtures of them; or "
        "shards with images inside (WebDataset .tar, .parquet, a directory saved by `datasets`): paths, globs, "
        "{00000..00331}, hf://datasets/user/name. Shards need --max_steps. `llava-lite data convert` reads other "
        "formats."
    )
    special_tokens_in_text: Literal["token", "text"] = knob(
        "How a special token that is spelled out in a question or an answer is encoded: as the token, as LLaVA "
        "does, or as text like any other.",
        "token",
    )
    shuffle_window: int = knob(
        "With shards: number of records that a data-loader worker holds in memory and shuffles together.", 512
    )
    image_folder: str | None = knob("Directory that the image paths of the records are relative to.")
    image_aspect_ratio: str | None = knob(
        "square: crop the image as the vision tower's processor does (stage 1); pad: pad it to a square (stage 2); "
        "anyres: cut it into several crops (LLaVA-1.6); random_crop: make a random part of it square, "
        "another in every epoch (LLaMA-Adapter V2). Default: the model's, else square."
    )
    image_grid_pinpoints: str | None = knob(
        "With anyres: resolutions that an image is cut at, [(width, height), ...] in pixels or (1x1),...,(6x6) in "
        "crops. Default: the model's, else LLaVA-1.6's five."
    )
    image_resize: Literal["exact", "fast"] = knob(
        "exact: the same bytes as the image processor's own filter; fast: torch's filter, up to 1e-3 away on average.",
        "exact",
    )
    feature_cache: str = knob(
        "Directory for the features of a frozen vision tower: each image is encoded once and its features are read "
        "from disk. auto: the cache directory, if more than one epoch reads the features or an earlier run wrote "
        "them, and if they fit into half of the free disk space. off: no cache.",
        "off",
    )
    bad_record: Literal["raise", "skip"] = knob(
        "raise: stop the run at a record or image that cannot be read; skip: leave it out and write it to "
        "skipped_records.jsonl.",
        "raise",
    )
    max_bad_fraction: float = knob(
        "With --bad_record skip: largest fraction of the records that may be left out; beyond it the run stops.", 0.01
    )
    placeholder_as_text: bool = knob(
        "Encode <image> in a record without images as plain text, as LLaVA does. Default: such a record is an error.",
        False,
    )
    follow_links: bool = knob("Read images through symbolic links that lead out of --image_folder.", False)
    eval_data_path: list[str] | None = knob("Files of records to evaluate on.")
    eval_split: float = knob(
        "Records of --data_path that are held out for evaluation: a fraction if below 1, else a number.", 0.0
    )
    num_eval_generations: int = knob("Number of answers that are generated and written at each evaluation.", 4)
    eval_max_new_tokens: int = knob("Maximum length of these answers, in tokens.", 64)
    lazy_preprocess: bool = knob(
        "Accepted for LLaVA's scripts; has no effect, because records are always read when they are needed.", True
    )
    is_multimodal: bool = knob(
        "Accepted for LLaVA's scripts; has no effect, because a vision tower makes a model multimodal.", True
    )

    def __post_init__(self):
        """Check the flags against each other."""
        check_data(self)

    def config_choices(self):
        """Return the config keys of the model that a flag sets; the others are the model's own."""
        choices = {"image_aspect_ratio": self.image_aspect_ratio, "image_grid_pinpoints": self.image_grid_pinpoints}
        return {key: value for key, value in choices.items() if value is not None}


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """How to train: transformers' own flags, LLaVA's, and ours."""

    tuning: Literal["projector", "full", "lora", "moe", "prompts", "bias_norm"] | None = knob(
        "What trains: projector, the connector alone (stage 1); full, connector and language model (stage 2); "
        "lora, connector and low-rank adapters; moe, experts, router, MLPs and connector (stage 3); prompts, "
        "connector, prompts and gates of --mm_injection adaption_prompt; bias_norm, norms and biases of the language "
        "model, with --lora_enable True low-rank adapters too (LLaMA-Adapter V2's two phases). Default: what "
        "the older flags mean, else full."
    )
    cache_dir: str | None = knob("Directory for downloaded weights. Default: the Hub client's cache.")
    model_max_length: int = knob("Longest sequence in tokens, image features included.", 2048)
    freeze_mm_mlp_adapter: bool = knob("Freeze the connector.", False)
    unfreeze_mm_vision_tower: bool = knob("Train the vision tower too (LLaVA-NeXT).", False)
    mm_projector_lr: float | None = knob("Learning rate of the connector. Default: --learning_rate.")
    mm_vision_tower_lr: float | None = knob("Learning rate of the vision tower. Default: --learning_rate.")
    packing: Literal["none", "samples", "tokens"] | None = knob(
        "What a micro-batch is. none: records, padded to the longest; samples: the same records in one sequence "
        "without padding; tokens: one sequence of as many records as fit into --packing_tokens. Default: samples, "
        "unless another flag needs padding."
    )
    packing_tokens: int | None = knob(
        "With --packing tokens: most tokens of a micro-batch. Default: 4 times --model_max_length."
    )
    group_by_modality_length: bool = knob(
        "Form batches of records of similar length, those with images apart from those without (LLaVA-1.5).", False
    )
    lora_enable: bool = knob("LLaVA's name for --tuning lora.", False)
    lora_r: int = knob("Rank of the low-rank adapters (Hu et al. 2022; LLaVA-1.5: 128).", 64)
    lora_alpha: int = knob(
        "Scale of the low-rank adapters: their output is multiplied by lora_alpha / lora_r (LLaVA-1.5: 256).", 16
    )
    lora_dropout: float = knob("Dropout on the input of the low-rank adapters.", 0.05)
    lora_bias: Literal["none", "all", "lora_only"] = knob(
        "Which bias terms train beside the low-rank adapters.", "none"
    )
    lora_vision_tower: bool = knob("Put low-rank adapters into the vision tower too.", False)
    bits: Literal[4, 8, 16] = knob(
        "Bits of the frozen language model's weights; 4 and 8 need --tuning lora and bitsandbytes.", 16
    )
    double_quant: bool = knob(
        "With --bits 4: quantize the scales of the weights too (QLoRA, Dettmers et al. 2023).", True
    )
    quant_type: Literal["fp4", "nf4"] = knob("With --bits 4: number format of the weights (QLoRA: nf4).", "nf4")
    auto_checkpointing: bool = knob(
        "Set by --gradient_checkpointing auto: recompute the activations of as few decoder layers as memory makes "
        "necessary.",
        False,
    )
    save_full: bool = knob("Write the complete model at the end, even where only a part of it was trained.", False)
    # The rest are fields of transformers, with the defaults of the published scripts.
    deepspeed: dict | str | None = knob(
        f"DeepSpeed config: {', '.join(CONFIGS)}; the path of a JSON file; or its text. Default: no DeepSpeed."
    )
    bf16: bool | None = switch("Compute in bfloat16. Default: where the device can.")
    tf32: bool | None = switch("Compute float32 matrix products in TF32. Default: where the device can.")
    num_train_epochs: float = knob("Passes over the data.", 1.0)
    lr_scheduler_type: transformers.SchedulerType | str = knob("Schedule of the learning rate.", "cosine")
    warmup_steps: float = knob("Optimizer steps of linear warm-up; below 1 a fraction of all steps.", 0.03)
    logging_steps: float = knob("Optimizer steps between two lines of the log.", 1)
    remove_unused_columns: bool = knob(
        "Drop the parts of a batch that the model's forward does not take. Keep it False: messages name records by "
        "their ids, which would be dropped.",
        False,
    )
    logging_nan_inf_filter: bool = knob(
        "Accepted for other scripts; has no effect, because a loss that is not finite ends the run or, with "
        "--max_skipped_steps, leaves out its step.",
        False,
    )

    max_skipped_steps: int = knob(
        "Number of steps whose loss or gradient may be NaN or infinite: each is left out on all ranks, of the logged "
        "means too, and logged with its records; a further one stops the run.",
        0,
    )

    def __post_init__(self):
        """Check the flags against each other; set precision and device by the machine where they are not given."""
        self.resolve_checkpointing()
        check_training(self)
        self.deepspeed = resolve_config(self.deepspeed)
        # Before transformers opens it, whose error would not name the flag.
        read_deepspeed(self.deepspeed)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and self.default_bf16()
        if self.tf32 is None and not self.use_cpu and machine_has("tf32"):
            self.tf32 = True
        # With use_cpu accelerate starts gloo for ranks on a CPU, under DeepSpeed too; else it would see one process.
        self.use_cpu = self.use_cpu or not machine_has("device")
        if self.deepspeed and "LOCAL_RANK" not in os.environ:
            stand_alone()
        super().__post_init__()
        check_skipped_steps(self)
        check_loggers(self.report_to)

    @property
    def device(self):
        """The device of this process; "cpu" for the "cpu:0" of a launcher, to which torch.load restores nothing."""
        device = super().device
        return type(device)("cpu") if device.type == "cpu" else device

    def resolve_checkpointing(self):
        """Move the value `auto` from transformers' flag, which is a boolean, to auto_checkpointing."""
        for name in ("gradient_checkpointing", "activation_checkpointing"):
            if getattr(self, name, None) == "auto":
                setattr(self, name, False)
                self.auto_checkpointing = True

    def default_bf16(self):
        """Return whether to compute in bfloat16: by the launcher, the DeepSpeed JSON, or else the device."""
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
