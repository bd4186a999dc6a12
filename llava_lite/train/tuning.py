"""Choose what trains: name it, mark it, give it a learning rate, and put it in one table."""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from llava_lite.model.new_words import grow
from llava_lite.train.moe_names import match_train_modules

logger = logging.getLogger(__name__)

# The part of the model that a parameter belongs to: the first pattern that its name contains.
PARTS = {
    "vision_tower": re.compile(r"(^|\.)vision_tower\."),
    "mm_projector": re.compile(r"(^|\.)(mm_projector\.|image_newline$)"),
    "lora": re.compile(r"\.lora_"),
    "router": re.compile(r"\.mlp\.(gate|coefficient)\."),
    "experts": re.compile(r"\.mlp\.experts\."),
    "new_words": re.compile(r"\.new_rows$"),
    "embeddings": re.compile(r"(^|\.)(embed_tokens|lm_head)\."),
    "decoder": re.compile(""),
}


def part_of(name):
    """Return the part of the model that a parameter of this name belongs to, one of PARTS."""
    return next(part for part, pattern in PARTS.items() if pattern.search(name))


def count(param):
    """Return the number of elements of a parameter, whole, partitioned by ZeRO-3 or shared out by --ep_size."""
    return getattr(param, "ds_numel", param.numel()) * getattr(param, "num_shares", 1)


def train_projector(model, model_args, training_args):
    """Train the connector alone (LLaVA stage 1)."""
    return train_parts(model, ("mm_projector",))


def train_full(model, model_args, training_args):
    """Train connector and decoder, experts included (LLaVA stage 2); with freeze_backbone only its vocabulary head."""
    if model_args.freeze_backbone:
        train_parts(model, ("mm_projector",))
        model.get_output_embeddings().requires_grad_(True)
        return model
    return train_parts(model, ("mm_projector", "decoder", "embeddings", "experts", "router"))


def train_moe(model, model_args, training_args):
    """Train routers, connector and the MLPs that `train_modules` names (MoE-LLaVA stage 3)."""
    train_parts(model, ("mm_projector", "router"))
    named = dict(model.named_parameters())
    matched = match_train_modules([n for n in named if in_decoder(n)], model_args.train_modules, experts_of(model))
    for name in matched:
        named[name].requires_grad_(True)
    return model


def train_lora(model, model_args, training_args):
    """Train low-rank updates of the decoder's linear layers, and the connector (LLaVA, finetune_lora.sh)."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("--tuning lora needs peft; pip install 'llava-lite[peft]'.") from error
    config = LoraConfig(
        r=training_args.lora_r,
        lora_alpha=training_args.lora_alpha,
        lora_dropout=training_args.lora_dropout,
        bias=training_args.lora_bias,
        target_modules=lora_pattern(model, training_args.lora_vision_tower),
        task_type="CAUSAL_LM",
    )
    # In the model's dtype: ZeRO-3 puts what trains into one buffer. Without DeepSpeed see settle_dtypes.
    tuned = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, param in tuned.named_parameters():
        part = part_of(name)
        if part == "mm_projector":
            param.requires_grad_(True)
        elif part == "vision_tower" and ".lora_" not in name:
            # lora_bias="all" means the decoder's biases; PEFT takes the tower's too.
            param.requires_grad_(False)
    return tuned


TUNINGS = {"projector": train_projector, "full": train_full, "lora": train_lora, "moe": train_moe}


def choose_what_trains(model, model_args, training_args):
    """Mark the parameters that train and return the model, wrapped by PEFT where the tuning is lora.

    Raises ValueError if nothing trains, or if an entry of train_modules trains nothing.
    """
    plain, tower = model, model.get_vision_tower()
    model.requires_grad_(False)
    model = TUNINGS[training_args.tuning](model, model_args, training_args)
    train_new_words(plain)
    if training_args.freeze_mm_mlp_adapter:
        train_parts(model, ("mm_projector",), trains=False)
    if training_args.unfreeze_mm_vision_tower and tower is not None:
        train_read_layers(tower)
    if not any(param.requires_grad for param in model.parameters()):
        raise ValueError(
            f"--tuning {training_args.tuning} trains no parameter of {type(model).__name__}; it has "
            f"{'no connector: give --vision_tower' if tower is None else 'every part frozen: drop a --freeze flag'}."
        )
    return model


def train_new_words(model):
    """Let the rows of new words train where their matrix does not; forget the words where all rows train."""
    tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    if all(table.requires_grad for table in tables):
        model.config.new_words = None
    grow(model)


def train_parts(model, parts, trains=True):
    """Mark every parameter of `parts` as trained (or frozen); return the model."""
    for name, param in model.named_parameters():
        if part_of(name) in parts:
            param.requires_grad_(trains)
    return model


def train_read_layers(tower):
    """Mark the tower's parameters up to the layer that is read; the rest would never see a gradient."""
    unread = tower.unread()
    for param in tower.parameters():
        param.requires_grad_(param not in unread)


def in_decoder(name):
    """Whether a parameter of this name is the language model's own."""
    return part_of(name) not in ("vision_tower", "mm_projector")


def experts_of(model):
    """Return the number of experts by layer, {} for a dense model."""
    return {index: block.num_experts for index, block in model.moe_layers().items()}


def lora_pattern(model, with_tower):
    """Return a regular expression for the full names of the linear layers that get LoRA.

    PEFT matches it against whole names: a bare "q_proj" would reach the vision tower, which has one too.
    """
    prefixes = [re.compile(r"model\.layers\.\d+\.")]
    if with_tower:
        read = "|".join(map(str, range(model.get_vision_tower().num_read_layers)))
        prefixes.append(re.compile(rf"model\.vision_tower\..*\.layers?\.({read})\."))
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(prefix.match(name) for prefix in prefixes)
        and not name.endswith(".coefficient")
    ]
    # Layers differ only in their number, so a few patterns name them all.
    patterns = sorted({re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) for name in names})
    if with_tower:
        patterns = sorted({re.escape(name) for name in names})
    return "|".join(patterns)


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate and a weight decay."""

    name: str
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    learning_rate: float
    weight_decay: float

    def for_optimizer(self):
        """Return the group as torch's optimizers take it; one of shared out experts is marked for DeepSpeed."""
        shared = getattr(self.parameters[0], "group_name", None)
        return {
            **({"name": self.name} if shared is None else {"name": shared, "moe": True}),
            "params": list(self.parameters),
            "lr": self.learning_rate,
            "weight_decay": self.weight_decay,
        }


def learning_rate_of(part, training_args):
    """Return the learning rate of a part of the model."""
    own = {"mm_projector": training_args.mm_projector_lr, "vision_tower": training_args.mm_vision_tower_lr}.get(part)
    return training_args.learning_rate if own is None else own


def parameter_groups(model, training_args, decay_names: Iterable[str]) -> list[Group]:
    """Return the groups of what trains: one for each part of the model, with and without weight decay.

    decay_names: parameters that decay; norms and biases do not.
    """
    decays = set(decay_names) if training_args.weight_decay else set()
    members: dict[tuple[str, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            members.setdefault((part_of(name), name in decays), []).append((name, param))
    return [
        Group(
            name=part if has_decay or not decays else f"{part}_no_decay",
            names=tuple(name for name, _ in pairs),
            parameters=tuple(param for _, param in pairs),
            learning_rate=learning_rate_of(part, training_args),
            weight_decay=training_args.weight_decay if has_decay else 0.0,
        )
        for (part, has_decay), pairs in members.items()
    ]


def compute_dtype(training_args):
    """Return the dtype of the run's matrix products."""
    return torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32


def loading_dtype(training_args):
    """Return the dtype to load weights in.

    DeepSpeed keeps float32 copies of what trains; without it the weights themselves are those copies.
    """
    keeps_master = training_args.uses_deepspeed or training_args.tuning in ("projector", "lora")
    return compute_dtype(training_args) if keeps_master else torch.float32


def settle_dtypes(model, training_args):
    """Without DeepSpeed: keep what trains in float32, for small updates, and what does not in the run's dtype."""
    if training_args.uses_deepspeed or compute_dtype(training_args) == torch.float32:
        return
    for param in model.parameters():
        if param.is_floating_point():
            param.data = param.data.to(torch.float32 if param.requires_grad else compute_dtype(training_args))


def table_rows(model, training_args) -> Mapping[str, dict]:
    """Return for each part of the model: trained and frozen parameters, learning rate, dtypes."""
    rows = {}
    for name, param in model.named_parameters():
        row = rows.setdefault(part_of(name), {"trained": 0, "frozen": 0, "dtypes": set()})
        row["trained" if param.requires_grad else "frozen"] += count(param)
        row["dtypes"].add(str(param.dtype).removeprefix("torch."))
    for part, row in rows.items():
        row["learning_rate"] = learning_rate_of(part, training_args) if row["trained"] else None
    return rows


def describe(model, training_args) -> str:
    """Return the table of what trains."""
    lines = [f"{'part':<14}{'trained':>16}{'frozen':>16}{'learning rate':>15}{'decay':>8}  dtype"]
    for part, row in table_rows(model, training_args).items():
        rate = "-" if row["learning_rate"] is None else f"{row['learning_rate']:g}"
        decay = f"{training_args.weight_decay:g}" if row["trained"] else "-"
        dtypes = ", ".join(sorted(row["dtypes"]))
        lines.append(f"{part:<14}{row['trained']:>16,}{row['frozen']:>16,}{rate:>15}{decay:>8}  {dtypes}")
    return "\n".join(lines)
