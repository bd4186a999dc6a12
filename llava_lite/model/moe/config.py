"""Read `config.moe`, MoE-LLaVA's nested dict, into one validated object: layers, number of experts, routing."""

from dataclasses import asdict, dataclass, fields

LAYER_MODES = {
    "first_half": lambda num_layers: range(num_layers // 2),
    "second_half": lambda num_layers: range(num_layers // 2, num_layers),
    "sparse": lambda num_layers: range(0, num_layers, 2),
    "dense": lambda num_layers: range(num_layers),
}
SECOND_EXPERT_SAMPLING = (False, True, "always")


@dataclass(frozen=True)
class MoeConfig:
    """The fields of `config.moe`, with MoE-LLaVA's keys and the defaults of its command line."""

    # Decoder layers that have experts, ascending; worked out from the keys below, not stored.
    layers: tuple[int, ...]
    # Number of experts of each of these layers; in config.json one number for all (absent: 4), or a list.
    num_experts: tuple[int, ...]
    # False: the model is dense, whatever the other keys say.
    moe_enable: bool = True
    # Layers that have experts: first_half, second_half, sparse (every second one from 0 on), dense (all) or custom.
    moe_mode: str = "second_half"
    # Layers that have experts, counted from 0; takes precedence over moe_mode.
    moe_layers_idx: tuple[int, ...] | None = None
    # Ranks that the experts of a layer were distributed over (MoE-LLaVA); a checkpoint of ours has 1, all experts.
    ep_size: int = 1
    # Number of experts that each token is routed to.
    top_k_experts: int = 2
    # With moe_drop_tokens, in training: capacity of an expert; 1.0 is an equal split of the routed tokens.
    capacity_factor: float = 1.0
    # With moe_drop_tokens, outside training: capacity of an expert in the same unit.
    eval_capacity_factor: float = 2.0
    # With moe_drop_tokens: least capacity of an expert, in tokens.
    min_capacity: int = 0
    # Keep the dense MLP beside the experts and add up both outputs, weighted by a trained gate.
    use_residual: bool = False
    # Weight of the load-balancing loss, which is summed over layers.
    router_aux_loss_coef: float = 0.01
    # Parts of the names of the parameters that training changed besides router and connector; None: all MLPs.
    train_modules: tuple[str, ...] | None = None
    # Drop the tokens that exceed an expert's capacity. Ours; MoE-LLaVA always does.
    moe_drop_tokens: bool = False
    # When the second of two experts is sampled: False, never; True, in training; "always". Ours; MoE-LLaVA: "always".
    moe_second_expert_sampling: bool | str = False
    # Route padding tokens and count them in the load-balancing loss. Ours; MoE-LLaVA always does.
    moe_count_padding: bool = False

    def to_dict(self):
        """Return the dict for `config.moe`: lists instead of tuples, the layers written out as MoE-LLaVA does."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        layers = values.pop("layers")
        return values | {"moe_layers_idx": layers}


def moe_layer_indices(mode, num_layers, custom=None):
    """Return the layers that get experts, ascending.

    mode: first_half | second_half | sparse (every other one, from 0) | dense | custom. A list in `custom` takes
    precedence over the mode: MoE-LLaVA stores both, and its mode then only repeats the command line.
    """
    if mode != "custom" and mode not in LAYER_MODES:
        raise ValueError(f"unknown moe_mode {mode!r}; known: {', '.join(LAYER_MODES)}, custom.")
    if custom is None and mode == "custom":
        raise ValueError("moe_mode 'custom' needs moe_layers_idx, the list of layers that get experts.")
    layers = tuple(LAYER_MODES[mode](num_layers)) if custom is None else tuple(sorted(custom))
    if not layers:
        raise ValueError(f"moe_mode {mode!r} with moe_layers_idx {custom} chooses none of {num_layers} layers.")
    outside = [layer for layer in layers if not 0 <= layer < num_layers]
    if outside or len(set(layers)) < len(layers):
        raise ValueError(f"moe_layers_idx must be different layers of 0..{num_layers - 1}; got {list(custom)}.")
    return layers


def read_moe_config(moe, num_hidden_layers):
    """Return the MoeConfig of a `config.moe` dict, or None for a dense model (no dict, or moe_enable false).

    num_experts may be one number or a list of one, for all layers, or a list with one number a layer.
    Raises ValueError with the value found and the values allowed.
    """
    if not moe or not moe.get("moe_enable", True):
        return None
    known = [field.name for field in fields(MoeConfig) if field.name != "layers"]
    unknown = sorted(set(moe) - set(known))
    if unknown:
        raise ValueError(f"unknown keys in config.moe: {', '.join(unknown)}; known: {', '.join(known)}.")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in moe.items()}
    given = values.get("moe_layers_idx")
    layers = moe_layer_indices(values.get("moe_mode", MoeConfig.moe_mode), num_hidden_layers, given)
    values["num_experts"] = _get_num_experts(values.get("num_experts", 4), layers, given)
    config = MoeConfig(layers=layers, **values)
    _check_routing(config)
    return config


def _get_num_experts(num_experts, layers, given):
    """Return one number of experts for each layer; a list follows the order in which the layers were given."""
    counts = (num_experts,) if isinstance(num_experts, int) else num_experts
    if len(counts) == 1:
        counts = counts * len(layers)
    if len(counts) != len(layers):
        raise ValueError(
            f"num_experts names {len(counts)} numbers {list(counts)} for {len(layers)} MoE layers {list(layers)}; "
            "give one number for all or one a layer."
        )
    if min(counts) < 1:
        raise ValueError(f"num_experts must be at least 1; got {list(counts)}.")
    of_layer = dict(zip(given or layers, counts, strict=True))
    return tuple(of_layer[layer] for layer in layers)


def _check_routing(config):
    """Raise ValueError for a number that no router can use."""
    if not 1 <= config.top_k_experts <= min(config.num_experts):
        raise ValueError(
            f"top_k_experts must be 1..{min(config.num_experts)}, the smallest of num_experts "
            f"{list(config.num_experts)}; got {config.top_k_experts}."
        )
    for name in ("capacity_factor", "eval_capacity_factor"):
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} must be above 0; got {getattr(config, name)}.")
    for name, least in (("min_capacity", 0), ("router_aux_loss_coef", 0), ("ep_size", 1)):
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}; got {getattr(config, name)}.")
    sampling = config.moe_second_expert_sampling
    if sampling not in SECOND_EXPERT_SAMPLING:
        raise ValueError(f"moe_second_expert_sampling must be one of {SECOND_EXPERT_SAMPLING}; got {sampling!r}.")
    if sampling and config.top_k_experts != 2:
        raise ValueError(
            f"moe_second_expert_sampling={sampling!r} draws the second of two experts; "
            f"got top_k_experts {config.top_k_experts}."
        )
