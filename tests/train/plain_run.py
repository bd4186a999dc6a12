"""A small run of Hugging Face's Trainer with our checkpoints: half frozen, dropout, shuffled, accumulating."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from llava_lite.train.saving.checkpoint import CheckpointMixin

NUM_SEQUENCES = 22


class PlainTrainer(CheckpointMixin, Trainer):
    """The mixin on Hugging Face's Trainer, nothing of LLaVA between."""


class Sequences(torch.utils.data.Dataset):
    """Sequences of 8 random token ids, each with its own seed."""

    def __len__(self):
        return NUM_SEQUENCES

    def __getitem__(self, i):
        ids = torch.randint(0, 50, (8,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def build_model(seed=0):
    """Return a two-layer model of which the embeddings and the first layer are frozen."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=0.1,
    )
    model = LlamaForCausalLM(config)
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    return model


def build_trainer(output_dir, model=None, callbacks=(), **arguments):
    """Return a trainer of 11 steps (2 micro-batches of 1 a step, 1 epoch) that saves every 2."""
    defaults = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "logging_steps": 3,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    args = TrainingArguments(output_dir=str(output_dir), **(defaults | arguments))
    model = build_model() if model is None else model
    return PlainTrainer(model, args, train_dataset=Sequences(), eval_dataset=Sequences(), callbacks=list(callbacks))


def get_weights(trainer):
    """Return copies of all weights."""
    return {name: weight.clone() for name, weight in trainer.model.state_dict().items()}


def get_losses(trainer):
    """Return what was logged, without what depends on the clock."""
    keys = ("step", "loss", "grad_norm", "learning_rate", "train_loss")
    return [{key: line[key] for key in keys if key in line} for line in trainer.state.log_history]
