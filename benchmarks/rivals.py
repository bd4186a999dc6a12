"""Build our model and transformers' with the same seeded weights, and step through their training.

A rival is a function (size, stage, schedule, options, on_step): it builds model and optimizer, calls `on_step(None)`
when it is ready, and then `on_step(Step)` after each step. schedule: a batch of examples for each step.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

import torch

from benchmarks.workload import PAD, Size, fill, moe_config, padded


@dataclass
class Step:
    """What is compared between rivals: the language loss and the norm of the gradient before clipping."""

    loss: float
    gradient_norm: float


def our_model(size: Size, stage: int, attn_implementation=None, dtype=None, plain_paths=(), packed=True, draws=True):
    """Return our model in training mode; packed: a sequence holds several samples; draws: initialise its weights."""
    from transformers.initialization import no_init_weights

    from llava_lite.model.attention import choose_attention
    from llava_lite.model.language_model.llava_llama import LlavaLlamaConfig, LlavaLlamaForCausalLM
    from llava_lite.model.plain_paths import install_fast_paths, set_plain_paths

    config = LlavaLlamaConfig(
        **size.text_config(),
        vision_config=size.vision_config() | {"model_type": "clip_vision_model"},
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        moe=moe_config() if stage == 3 else None,
    )
    options = {} if dtype is None else {"dtype": dtype}
    with no_init_weights():
        model = LlavaLlamaForCausalLM._from_config(
            config, attn_implementation=choose_attention(attn_implementation, packed=packed), **options
        )
    # As loading does.
    install_fast_paths(model)
    if draws:
        fill({full_name(name): parameter for name, parameter in model.named_parameters()})
    set_plain_paths(model, plain_paths)
    return model.train()


def hf_model(size: Size, stage: int, experts: str | None = None, dtype=None, attn_implementation=None):
    """Return transformers' LlavaForConditionalGeneration with the same weights, in training mode.

    In stage 3 its text model is Mixtral, whose odd layers get a dense MLP in place of experts: transformers' modules
    throughout, and the same function as ours except for the balance loss, which LlavaForConditionalGeneration leaves
    out. experts: eager or grouped_mm.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, MixtralConfig
    from transformers.initialization import no_init_weights
    from transformers.models.llama.modeling_llama import LlamaMLP

    from benchmarks.workload import NUM_EXPERTS, TOP_K

    dense = text = LlamaConfig(**size.text_config())
    if stage == 3:
        text = MixtralConfig(**size.text_config(), num_local_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K)
        text.sliding_window = None
    config = LlavaConfig(
        text_config=text,
        vision_config=CLIPVisionConfig(**size.vision_config()),
        image_token_id=size.vocab_size - 1,
        image_seq_length=size.num_features,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    options = {"attn_implementation": attn_implementation, "dtype": dtype}
    options = {key: value for key, value in options.items() if value is not None}
    with no_init_weights():
        model = LlavaForConditionalGeneration._from_config(config, **options)
        if stage == 3:
            for layer in model.model.language_model.layers[1::2]:
                layer.mlp = LlamaMLP(dense).to(model.dtype)
    if experts is not None:
        # Set last: building the model sets it again for all parts.
        model.model.language_model.config._experts_implementation = experts
    fill({our_name(name): parameter for name, parameter in model.named_parameters()})
    # As transformers' Trainer does: a cache is of no use in training.
    model.config.use_cache = model.config.text_config.use_cache = False
    return model.train()


def full_name(name: str) -> str:
    """Return LLaVA's name of one of our weights: transformers 5 leaves out the tower's `vision_model`."""
    short = "model.vision_tower.vision_tower."
    return name if "vision_model." in name else name.replace(short, f"{short}vision_model.")


def our_name(name: str) -> str:
    """Return LLaVA's name of a weight of LlavaForConditionalGeneration."""
    name = name.replace("multi_modal_projector.linear_1", "mm_projector.0")
    name = name.replace("multi_modal_projector.linear_2", "mm_projector.2")
    if name.startswith("model.vision_tower."):
        inner = name.removeprefix("model.vision_tower.").removeprefix("vision_model.")
        return f"model.vision_tower.vision_tower.vision_model.{inner}"
    return name.replace("model.language_model.", "model.")


def choose_what_trains(model, stage: int) -> list[torch.nn.Parameter]:
    """Set requires_grad for a stage, by our names or by transformers', and return the trainable weights."""
    for name, parameter in model.named_parameters():
        tower, connector = "vision_tower" in name, "projector" in name
        parameter.requires_grad_(connector or (stage == 2 and not tower) or (stage == 3 and _is_mlp(name)))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _is_mlp(name: str) -> bool:
    return ".mlp." in name and "vision_tower" not in name


def make_optimizer(parameters, size: Size):
    """Return the optimizer that --optim of transformers' Trainer makes, with learning rate 0."""
    if size.optim == "sgd":
        return torch.optim.SGD(parameters, lr=0.0)
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)


def transformers_loop(size, stage, schedule, options, on_step):
    """Step through transformers' model in a plain loop, which adds the least to it."""
    model = hf_model(size, stage, options.get("experts"))
    parameters = choose_what_trains(model, stage)
    if options.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = make_optimizer(parameters, size)
    on_step(None)
    for examples in schedule:
        loss = model(**padded(examples, size.vocab_size - 1)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        on_step(Step(loss.item(), norm.item()))


FLAGS = (
    "--output_dir {directory} --use_cpu True --max_steps {steps} --learning_rate 0 --lr_scheduler_type constant "
    "--warmup_steps 0 --max_grad_norm 1 --optim {optim} --save_strategy no --report_to none --disable_tqdm True "
    "--per_device_train_batch_size {batch} --logging_steps 1 --train_sampling_strategy sequential"
)


class Examples(torch.utils.data.Dataset):
    """The examples of a schedule in order, with the lengths and modalities that a sampler reads."""

    def __init__(self, schedule):
        import numpy as np

        self.examples = [example for examples in schedule for example in examples]
        self.lengths = np.array([len(example["input_ids"]) for example in self.examples])
        self.has_image = np.ones(len(self.examples), dtype=bool)

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        """Return an example as the dataset of a run makes it; a trainer may change the dict."""
        return dict(self.examples[i])


def our_trainer(size, stage, schedule, options, on_step):
    """Step through LLaVATrainer, its collator and log, as a run does; options: flags, plain_paths."""
    from llava_lite.train.arguments.parse import parse_args
    from llava_lite.train.train import build_trainer
    from llava_lite.train.tuning import choose_what_trains, resolve_dtypes

    tunings = {1: "projector", 2: "full", 3: "moe"}
    with tempfile.TemporaryDirectory() as directory:
        flags = FLAGS.format(directory=directory, steps=len(schedule) + 1, optim=size.optim, batch=size.batch_size)
        model_args, data_args, training_args = parse_args(
            [*flags.split(), "--tuning", tunings[stage], *options.get("flags", [])]
        )
        plain, packed = options.get("plain_paths", ()), training_args.packing != "none"
        model = our_model(size, stage, model_args.attn_implementation, plain_paths=plain, packed=packed)
        model = choose_what_trains(model, model_args, training_args)
        resolve_dtypes(model, training_args)
        trainer = build_trainer(model, _Pad(), Examples(schedule), None, data_args, training_args)
        run_stepwise(trainer, on_step)


def transformers_trainer(size, stage, schedule, options, on_step):
    """Step through transformers' own Trainer over its own model."""
    from transformers import HfArgumentParser, Trainer, TrainingArguments

    model = hf_model(size, stage, options.get("experts"))
    choose_what_trains(model, stage)
    with tempfile.TemporaryDirectory() as directory:
        flags = FLAGS.format(
            directory=directory, steps=len(schedule) + 1, optim=size.optim, batch=size.batch_size
        ).split()
        (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
            [*flags, "--remove_unused_columns", "False", "--bf16", "False"]
        )
        trainer = Trainer(
            model,
            args,
            train_dataset=Examples(schedule),
            data_collator=lambda examples: padded(examples, size.vocab_size - 1),
        )
        run_stepwise(trainer, on_step)


class _Pad:
    """The part of a tokenizer that a trainer reads when it saves nothing."""

    pad_token_id = PAD


def run_stepwise(trainer, on_step):
    """Run `trainer.train()` and call `on_step` after every step, with what the trainer logged of it."""
    from transformers import TrainerCallback

    class EachStep(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                # Ours adds the balance loss to the loss of experts and logs both.
                on_step(Step(logs.get("lm_loss", logs["loss"]), logs["grad_norm"]))

    trainer.add_callback(EachStep())
    on_step(None)
    trainer.train()


RIVALS = {
    "ours": our_trainer,
    "transformers loop": transformers_loop,
    "transformers Trainer": transformers_trainer,
}
