"""Read `config.moe`, MoE-LLaVA's nested dict, into one checked object: which layers, how many experts, how routed."""

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
    """What `config.moe` says, with MoE-LLaVA's keys and the defaults of its command line."""

    layers: tuple[int, ...]  # the decoder layers that have experts, ascending
    num_experts: tuple[int, ...]  # one number for each of `layers`
    moe_enable: bool = True
    moe_mode: str = "second_half"
    moe_layers_idx: tuple[int, ...] | None = None  # as given; counts more than moe_mode
    ep_size: int = 1
    top_k_experts: int = 2
    capacity_factor: float = 1.0  # of the balanced share, in training
    eval_capacity_factor: float = 2.0
    min_capacity: int = 0  # tokens
    use_residual: bool = False
    router_aux_loss_coef: float = 0.01
    train_modules: tuple[str, ...] | None = None
    # Ours. MoE-LLaVA does the first and the third always, and the second even at inference ("always").
    moe_drop_tokens: bool = False
    moe_second_expert_sampling: bool | str = False
    moe_count_padding: bool = False

    def to_dict(self):
        """Return the dict for `config.moe`: lists instead of tuples, the layers written out as MoE-LLaVA does."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        layers = values.pop("layers")
        return values | {"moe_layers_idx": layers}


def moe_layer_indices(mode, num_layers, custom=None):
    """Return the layers that get experts, ascending.

    mode: first_half | second_half | sparse (every other one, from 0) | dense | custom. A list in `custom` counts
    more than the mode: MoE-LLaVA stores both, and its mode is then only what the command line said.
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
    Raises ValueError that names the value and what is allowed.
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
    values["num_experts"] = _experts_of_layers(values.get("num_experts", 4), layers, given)
    config = MoeConfig(layers=layers, **values)
    _check_routing(config)
    return config


def _experts_of_layers(num_experts, layers, given):
    """Return one number of experts for each layer; a list belongs to the layers in the order they were given in."""
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
    """Raise ValueError for a number that no router can follow."""
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
