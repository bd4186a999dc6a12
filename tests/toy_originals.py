"""Tiny checkpoints in the names and shapes of the systems that their weights come from, made by hand and seeded."""

import torch

PARAMS = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": -1, "multiple_of": 16, "norm_eps": 1e-5}
VOCAB = 40
LINEARS = {"attention": ("wq", "wk", "wv", "wo"), "feed_forward": ("w1", "w2", "w3")}


def meta_state(params=PARAMS, inner=96, seed=0, extras=()):
    """Return a LLaMA under Meta's names. extras: bias, lora, gate."""
    torch.manual_seed(seed)
    width, heads = params["dim"], params["n_heads"]
    keys = width // heads * (params.get("n_kv_heads") or heads)
    shapes = {"wq": (width, width), "wk": (keys, width), "wv": (keys, width), "wo": (width, width)}
    shapes |= {"w1": (inner, width), "w2": (width, inner), "w3": (inner, width)}
    state = {"tok_embeddings.weight": torch.randn(VOCAB, width), "norm.weight": 1 + 0.2 * torch.randn(width)}
    state["output.weight"] = 0.3 * torch.randn(VOCAB, width)
    state["rope.freqs"] = torch.ones(width // heads // 2)
    for layer in range(params["n_layers"]):
        for block, linears in LINEARS.items():
            for linear in linears:
                place, (rows, columns) = f"layers.{layer}.{block}", shapes[linear]
                state[f"{place}.{linear}.weight"] = 0.3 * torch.randn(rows, columns)
                if "bias" in extras:
                    state[f"{place}.{linear}.bias"] = torch.randn(rows)
                if "lora" in extras:
                    state[f"{place}.lora_{linear}_l1.weight"] = 0.3 * torch.randn(3, columns)
                    state[f"{place}.lora_{linear}_l2.weight"] = 0.3 * torch.randn(rows, 3)
        for norm in ("attention_norm", "ffn_norm"):
            state[f"layers.{layer}.{norm}.weight"] = 1 + 0.2 * torch.randn(width)
        if "gate" in extras:
            state[f"layers.{layer}.attention.gate"] = torch.randn(1, heads, 1, 1)
            state[f"layers.{layer}.attention.new_gate"] = torch.randn(1, 1, 1, 1)
    return state


# Of CLIP.
WIDTH, INNER, LAYERS, HEADS, PATCH, SIDE, PROJECTION = 32, 48, 2, 4, 4, 3, 20


def openai_state(
    prefix="clip.visual.", width=WIDTH, inner=INNER, layers=LAYERS, side=SIDE, projection=PROJECTION, seed=0
):
    """Return CLIP's image encoder under OpenAI's names, tiny and seeded."""
    torch.manual_seed(seed)
    state = {"class_embedding": torch.randn(width), "positional_embedding": torch.randn(side * side + 1, width)}
    state |= {"proj": torch.randn(width, projection), "conv1.weight": torch.randn(width, 3, PATCH, PATCH)}
    norms = ["ln_pre", "ln_post"]
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}."
        norms += [f"{block}ln_1", f"{block}ln_2"]
        shapes = {"attn.in_proj_": (3 * width, width), "attn.out_proj.": (width, width)}
        shapes |= {"mlp.c_fc.": (inner, width), "mlp.c_proj.": (width, inner)}
        for name, shape in shapes.items():
            state[f"{block}{name}weight"] = 0.3 * torch.randn(*shape)
            state[f"{block}{name}bias"] = torch.randn(shape[0])
    for norm in norms:
        state[f"{norm}.weight"], state[f"{norm}.bias"] = 1 + 0.2 * torch.randn(width), 0.2 * torch.randn(width)
    return {f"{prefix}{name}": w for name, w in state.items()}


# Of LLaMA-Adapter V2's visual query: prompts of a layer, width, blocks, width of an MLP.
PROMPTS, QUERY_WIDTH, QUERY_DEPTH, QUERY_INNER = 3, 16, 2, 32


def visual_query_state(width=PARAMS["dim"], query="visual_query.weight", seed=1):
    """Return the connector of LLaMA-Adapter V2 and of Accessory's llama_adapter."""
    torch.manual_seed(seed)
    shapes = {"clip_proj": (QUERY_WIDTH, PROJECTION), "visual_proj": (width, QUERY_WIDTH)}
    norms = {"clip_proj_norm": QUERY_WIDTH, "visual_proj_norm": width}
    for block in range(QUERY_DEPTH):
        place = f"visual_blocks.{block}"
        norms |= {f"{place}.norm1": QUERY_WIDTH, f"{place}.norm2": QUERY_WIDTH}
        shapes |= {
            f"{place}.attn.qkv": (3 * QUERY_WIDTH, QUERY_WIDTH),
            f"{place}.attn.proj": (QUERY_WIDTH, QUERY_WIDTH),
        }
        shapes |= {f"{place}.mlp.fc1": (QUERY_INNER, QUERY_WIDTH), f"{place}.mlp.fc2": (QUERY_WIDTH, QUERY_INNER)}
    state = {query: torch.randn(PROMPTS, QUERY_WIDTH)}
    for name, shape in shapes.items():
        state |= {f"{name}.weight": torch.randn(*shape), f"{name}.bias": torch.randn(shape[0])}
    for name, size in norms.items():
        state |= {f"{name}.weight": torch.randn(size), f"{name}.bias": torch.randn(size)}
    return state


def trained_llama(params, inner=96, extras=(), new_gate=False, norms=True, prompted=None):
    """Return what a release holds of the LLaMA: gates of all layers, those without prompts 0; norms, biases, LoRA."""
    state = meta_state(params, inner, 2, (*extras, "gate"))
    parts = {"gate": True, "new_gate": new_gate, "norm": norms, "bias": True, "lora": True}
    kept = {}
    for name, tensor in state.items():
        linear = name.split(".")[-2]
        kind = next((kind for kind in ("new_gate", "gate", "norm", "lora") if kind in name.split("layers.")[-1]), "")
        kind = "bias" if name.endswith("bias") else kind
        # V2 and ImageBind-LLM give wk and wv no bias.
        if parts.get(kind) and not (kind == "bias" and linear in ("wk", "wv")):
            unused = kind.endswith("gate") and int(name.split(".")[1]) < params["n_layers"] - (prompted or 99)
            value = float(kind == "new_gate")
            kept[f"llama.{name}"] = torch.full_like(tensor, value) if unused else tensor
    return kept


ADAPTER_PARAMS = PARAMS | {"n_layers": 3}


def adapter_release(kind, params=ADAPTER_PARAMS, prompted=2):
    """Return the weights of a release of LLaMA-Adapter V2: BIAS, LORA-BIAS or CAPTION."""
    extras = {"BIAS": ("bias",), "LORA-BIAS": ("bias", "lora"), "CAPTION": ()}[kind]
    llama = trained_llama(params, extras=extras, new_gate=kind == "LORA-BIAS", norms=bool(extras), prompted=prompted)
    table = torch.randn(PROMPTS * prompted, params["dim"])
    return {**visual_query_state(params["dim"]), "adapter_query.weight": table, **llama}


def adapter_full(kind, params=ADAPTER_PARAMS, prefix="llma."):
    """Return the weights of a checkpoint of LLaMA-Adapter V2's training: base, CLIP and a rest of its text encoder."""
    base = {f"{prefix}{name}": w for name, w in meta_state(params).items() if name != "rope.freqs"}
    release = {name.replace("llama.", prefix): w for name, w in adapter_release(kind, params).items()}
    text = {"clip.logit_scale": torch.ones(()), "clip.token_embedding.weight": torch.ones(2, 2)}
    return {**base, **openai_state(), **text, **release}


def imagebind_release(legacy=False, extras=("bias", "lora"), params=PARAMS, depth=3, in_width=12, expansion=2):
    """Return the weights of a release of ImageBind-LLM; legacy: the first, with LayerNorm and biases in the bridge."""
    torch.manual_seed(3)
    width, kinds = params["dim"], ("weight", "bias") if legacy else ("weight",)
    state = {"image_bind_proj.weight": torch.randn(width, in_width), "image_bind_proj.bias": torch.randn(width)}
    for i in range(1, depth + 1):
        inner = expansion * width
        shapes = {"norm": (width,), "f1": (inner, width), "f2": (width, inner), "f3": (inner, width)}
        for part, shape in shapes.items():
            for kind in kinds:
                state[f"image_bind_{part}_{i}.{kind}"] = torch.randn(*(shape if kind == "weight" else shape[:1]))
    state["prefix_query.weight"] = torch.randn(params["n_layers"], width)
    return state | trained_llama(params, extras=extras, norms=bool(extras))


def accessory_state(kind, params=PARAMS, with_base=True, prompted=1, new_gate=True, visual=True):
    """Return the merged weights of an Accessory model: llama_qformerv2, llama_qformerv2_peft or llama_adapter."""
    extras = {"llama_qformerv2": (), "llama_qformerv2_peft": ("bias", "lora"), "llama_adapter": ("bias", "lora")}[kind]
    width, state = params["dim"], {}
    for name, tensor in meta_state(params, seed=4, extras=extras).items():
        block, _, last = name.rpartition(".lora_")
        # lora_wq_l1 of LLaMA-Adapter is wq.lora_a here.
        linear, _, half = last.partition("_l") if block else ("", "", "")
        half = f"lora_{'a' if half.startswith('1') else 'b'}.weight"
        # llama_adapter gives wk and wv no bias.
        if name != "rope.freqs" and not (kind == "llama_adapter" and name.endswith(("wk.bias", "wv.bias"))):
            state[f"{block}.{linear}.{half}" if block else name] = tensor
    if not with_base:
        state = {name: w for name, w in state.items() if "norm" in name or "bias" in name or "lora" in name}
    if kind == "llama_adapter":
        state |= visual_query_state(width, "visual_query") | openai_state() if visual else {}
        state["prefix"] = torch.randn(prompted, 1, PROMPTS, width)
        state["prefix_gate"] = torch.randn(prompted, params["n_heads"])
        state |= {"prefix_new_gate": torch.randn(prompted)} if new_gate else {}
    else:
        state |= {"qformer_proj.0.weight": torch.randn(width, 24), "start_img": torch.rand(1, 1, width)}
        state |= {f"qformer_proj.{name}": torch.randn(width) for name in ("0.bias", "1.weight", "1.bias")}
        state |= {"end_img": torch.rand(1, 1, width), "qformer.query_tokens": torch.randn(1, 4, 24)}
        state["qformer.vision_model.encoder.layers.0.self_attn.qkv.weight"] = torch.randn(6, 2)
    return {f"llma.{name}": tensor for name, tensor in state.items()}


def write_clip(directory):
    """Write the CLIP of these toys, with its projection, in Hugging Face's layout; return the directory."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from llava_lite.formats import openai_clip

    state = openai_state()
    fields = openai_clip.config_from_shapes(state, num_heads=HEADS)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**{k: v for k, v in fields.items() if k != "model_type"}))
    named = openai_clip.weights_from(state)
    model.load_state_dict({name: named[match] for name in model.state_dict() for match in named if same(name, match)})
    model.save_pretrained(directory)
    side = SIDE * PATCH
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
        directory
    )
    return directory


def same(name, other):
    """Tell whether two names of one weight differ in their prefixes alone, which versions of transformers change."""
    return name.removeprefix("vision_model.") == other.removeprefix("vision_model.")
