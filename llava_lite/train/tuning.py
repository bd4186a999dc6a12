"""Choose which weights train, group them by learning rate, and report both in one table."""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from llava_lite.formats.moe_llava import match_train_modules
from llava_lite.model.adaption_prompt import gates_are_open
from llava_lite.model.new_words import grow
from llava_lite.train.arguments.tuning import PARTIAL_TUNINGS

logger = logging.getLogger(__name__)

# The part of the model that a parameter belongs to: the first pattern that its name contains.
PARTS = {
    "vision_tower": re.compile(r"(^|\.)vision_tower\."),
    "mm_projector": re.compile(r"(^|\.)(mm_projector\.|image_(newline|start|end)$)"),
    "prompts": re.compile(r"(^|\.)(adaption_prompt\.|adaption_(new_)?gate$)"),
    "lora": re.compile(r"\.lora_"),
    "router": re.compile(r"\.mlp\.(gate|coefficient)\."),
    "experts": re.compile(r"\.mlp\.experts\."),
    "new_words": re.compile(r"\.new_rows$"),
    "embeddings": re.compile(r"(^|\.)(embed_tokens|lm_head)\."),
    "decoder": re.compile(""),
}
# Of the decoder: norms, and biases of its linear layers (LLaMA-Adapter V2, arXiv 2304.15010, section 3.1).
NORM_OR_BIAS = re.compile(r"norm\.weight$|\.bias$")


def get_part(name):
    """Return the part of the model that a parameter of this name belongs to, one of PARTS."""
    return next(part for part, pattern in PARTS.items() if pattern.search(name))


def count(param):
    """Return the number of elements of a parameter, those on other ranks (ZeRO-3, --ep_size) included."""
    return getattr(param, "ds_numel", param.numel()) * getattr(param, "num_shards", 1)


def train_projector(model, model_args, training_args):
    """Train the connector alone (LLaVA stage 1)."""
    return train_parts(model, ("mm_projector",))


def train_full(model, model_args, training_args):
    """Train connector and decoder, experts included (LLaVA stage 2); with freeze_backbone only its vocabulary head."""
    if model_args.freeze_backbone:
        train_parts(model, ("mm_projector",))
        model.get_output_embeddings().requires_grad_(True)
        return model
    return train_parts(model, ("mm_projector", "prompts", "decoder", "embeddings", "experts", "router"))


def train_moe(model, model_args, training_args):
    """Train routers, connector and the MLPs that `train_modules` names (MoE-LLaVA stage 3)."""
    train_parts(model, ("mm_projector", "router"))
    outside = ("vision_tower", "mm_projector", "prompts")
    own = {name: param for name, param in model.named_parameters() if get_part(name) not in outside}
    num_experts = {index: block.num_experts for index, block in model.moe_layers().items()}
    for name in match_train_modules(list(own), model_args.train_modules, num_experts):
        own[name].requires_grad_(True)
    return model


def train_prompts(model, model_args, training_args):
    """Train prompts, gates and the connector (LLaMA-Adapter V2 and ImageBind-LLM, first phase)."""
    if not model.config.has_prompts:
        raise ValueError(
            "--tuning prompts trains the prompts of --mm_injection adaption_prompt, and the model has none; give that "
            "flag, or another --tuning."
        )
    return train_parts(model, ("mm_projector", "prompts"))


def train_bias_norm(model, model_args, training_args):
    """Train the decoder's norms and biases, with lora_enable low-rank updates too (LLaMA-Adapter V2, second phase).

    bias_connector: train the biases of the connector too. Raises ValueError if it has none.
    """
    tuned = add_lora(model, training_args) if training_args.lora_enable else model
    for name, param in tuned.named_parameters():
        part = get_part(name)
        if part == "decoder":
            param.requires_grad_(bool(NORM_OR_BIAS.search(name)))
        elif part == "mm_projector" and model_args.bias_connector:
            param.requires_grad_(name.endswith(".bias"))
        elif part != "lora":
            param.requires_grad_(False)
    if model_args.bias_connector and not any_trains(tuned, "mm_projector"):
        raise ValueError(
            f"--bias_connector True trains the biases of the connector, and {model.config.mm_projector_type!r} has "
            "none; leave the flag out, or start from a model with another connector."
        )
    return tuned


def train_lora(model, model_args, training_args):
    """Train low-rank updates of the decoder's linear layers, and the connector (LLaVA, finetune_lora.sh)."""
    tuned = add_lora(model, training_args)
    for name, param in tuned.named_parameters():
        part = get_part(name)
        if part == "mm_projector":
            param.requires_grad_(True)
        elif part == "vision_tower" and ".lora_" not in name:
            # lora_bias="all" means the decoder's biases; PEFT takes the tower's too.
            param.requires_grad_(False)
    return tuned


def add_lora(model, training_args):
    """Return the model in PEFT's wrapping, with the low-rank updates that the flags ask for.

    They apply to prompts too, so that merged weights are the model that was trained.
    """
    if model.config.has_prompts and not model.config.adaption_prompt_lora:
        model.config.adaption_prompt_lora = True
        logger.info("LoRA of the key and value projections applies to the prompts too (adaption_prompt_lora).")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs peft; pip install 'llava-lite[peft]'.") from error
    config = LoraConfig(
        r=training_args.lora_r,
        lora_alpha=training_args.lora_alpha,
        lora_dropout=training_args.lora_dropout,
        bias=training_args.lora_bias,
        target_modules=lora_pattern(model, training_args.lora_vision_tower),
        task_type="CAUSAL_LM",
    )
    # In the model's dtype: ZeRO-3 puts all trained weights into one buffer. Without DeepSpeed see resolve_dtypes.
    return get_peft_model(model, config, autocast_adapter_dtype=False)


TUNINGS = {
    "projector": train_projector,
    "full": train_full,
    "lora": train_lora,
    "moe": train_moe,
    "prompts": train_prompts,
    "bias_norm": train_bias_norm,
}


def choose_what_trains(model, model_args, training_args):
    """Set which parameters train and return the model, wrapped by PEFT where the tuning is lora.

    Raises ValueError if nothing trains, or if an entry of train_modules trains nothing.
    """
    plain, tower = model, model.get_vision_tower()
    model.requires_grad_(False)
    model = TUNINGS[training_args.tuning](model, model_args, training_args)
    train_new_words(plain)
    check_prompts_train(plain, model, training_args.tuning)
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


def check_prompts_train(plain, model, tuning):
    """Raise ValueError if the gates of all prompts are closed and stay so: no image would reach the loss.

    plain: the model without PEFT's wrapping, model: with it.
    """
    if plain.config.has_prompts and not any_trains(model, "prompts") and not gates_are_open(plain):
        raise ValueError(
            f"the gates of mm_injection adaption_prompt are closed and --tuning {tuning} leaves them so: no image "
            "would be seen. Train --tuning prompts first, and start this run from its output."
        )


def any_trains(model, part):
    """Return whether a parameter of a part of the model trains."""
    return any(get_part(name) == part and param.requires_grad for name, param in model.named_parameters())


def train_new_words(model):
    """Let the vocabulary rows of new tokens train where their matrix does not; where all rows train, drop the list."""
    tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    if all(table.requires_grad for table in tables):
        model.config.new_words = None
    grow(model)


def train_parts(model, parts, trains=True):
    """Train (or freeze) every parameter of `parts`; return the model."""
    for name, param in model.named_parameters():
        if get_part(name) in parts:
            param.requires_grad_(trains)
    return model


def train_read_layers(tower):
    """Train the tower up to the layer whose output is used; later ones never get a gradient."""
    unread = tower.unread()
    for param in tower.parameters():
        param.requires_grad_(param not in unread)


def lora_pattern(model, with_tower):
    """Return a regular expression for the full names of the linear layers that get LoRA.

    PEFT matches it against full names: a bare "q_proj" would reach the vision tower, which has one too.
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
    patterns = map(re.escape, names)
    if not with_tower:
        # Layers differ only in their number, so a few patterns name them all.
        patterns = (re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", pattern) for pattern in patterns)
    return "|".join(sorted(set(patterns)))


@dataclass(frozen=True)
class Group:
    """Parameters with the same learning rate and weight decay."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    learning_rate: float
    weight_decay: float

    def for_optimizer(self):
        """Return the group for an optimizer; one of expert-parallel weights is marked as DeepSpeed requires."""
        expert_group = getattr(self.parameters[0], "group_name", None)
        return {
            **({"name": self.name} if expert_group is None else {"name": expert_group, "moe": True}),
            "params": list(self.parameters),
            "lr": self.learning_rate,
            "weight_decay": self.weight_decay,
        }


def get_learning_rate(part, training_args):
    """Return the learning rate of a part of the model."""
    own = {"mm_projector": training_args.mm_projector_lr, "vision_tower": training_args.mm_vision_tower_lr}.get(part)
    return training_args.learning_rate if own is None else own


def parameter_groups(model, training_args, decay_names: Iterable[str]) -> list[Group]:
    """Return the groups of what trains: one for each part of the model, with and without weight decay.

    decay_names: parameters that decay; norms and biases do not.
    """
    decays = set(decay_names) if training_args.weight_decay else set()
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            members.setdefault((get_part(name), name in decays), []).append(param)
    return [
        Group(
            name=part if has_decay or not decays else f"{part}_no_decay",
            parameters=tuple(params),
            learning_rate=get_learning_rate(part, training_args),
            weight_decay=training_args.weight_decay if has_decay else 0.0,
        )
        for (part, has_decay), params in members.items()
    ]


def compute_dtype(training_args):
    """Return the dtype of the forward and backward pass."""
    return torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32


def loading_dtype(training_args):
    """Return the dtype to load weights in.

    DeepSpeed keeps float32 copies of trained weights; without it the weights themselves are in float32.
    """
    keeps_master = training_args.uses_deepspeed or training_args.tuning in PARTIAL_TUNINGS
    return compute_dtype(training_args) if keeps_master else torch.float32


def resolve_dtypes(model, training_args):
    """Without DeepSpeed: keep trained weights in float32, for small updates, and frozen ones in the run's dtype.

    A norm whose bias alone trains is in float32 as a whole: torch's norms do not mix dtypes.
    """
    if training_args.uses_deepspeed or compute_dtype(training_args) == torch.float32:
        return
    for module in model.modules():
        own = [param for param in module.parameters(recurse=False) if param.is_floating_point()]
        trains_norm = isinstance(module, nn.LayerNorm) and any(param.requires_grad for param in own)
        for param in own:
            in_full = param.requires_grad or trains_norm
            param.data = param.data.to(torch.float32 if in_full else compute_dtype(training_args))


def table_rows(model, training_args) -> Mapping[str, dict]:
    """Return for each part of the model: trained and frozen parameters, learning rate, dtypes."""
    rows = {}
    for name, param in model.named_parameters():
        row = rows.setdefault(get_part(name), {"trained": 0, "frozen": 0, "dtypes": set()})
        row["trained" if param.requires_grad else "frozen"] += count(param)
        row["dtypes"].add(str(param.dtype).removeprefix("torch."))
    for part, row in rows.items():
        row["learning_rate"] = get_learning_rate(part, training_args) if row["trained"] else None
    return rows


def describe(model, training_args) -> str:
    """Return the table of trained and frozen parameters."""
    lines = [f"{'part':<14}{'trained':>16}{'frozen':>16}{'learning rate':>15}{'decay':>8}  dtype"]
    for part, row in table_rows(model, training_args).items():
        rate = "-" if row["learning_rate"] is None else f"{row['learning_rate']:g}"
        decay = f"{training_args.weight_decay:g}" if row["trained"] else "-"
        dtypes = ", ".join(sorted(row["dtypes"]))
        lines.append(f"{part:<14}{row['trained']:>16,}{row['frozen']:>16,}{rate:>15}{decay:>8}  {dtypes}")
    return "\n".join(lines)
