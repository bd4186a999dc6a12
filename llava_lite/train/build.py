"""Turn the flags of a run into its tokenizer and its model: decoder, tower, connector, experts."""

from importlib import import_module

from llava_lite.companions import load_tokenizer, refuse_missing_model
from llava_lite.train.tuning import loading_dtype


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
    from llava_lite.model.builder import base_named
    from llava_lite.model.quantization import stored_quantization

    hub = {"cache_dir": training_args.cache_dir}
    name = model_args.model_name_or_path
    stored = stored_quantization(name, base_named(name, None, hub), hub)
    model = assemble(
        model_args.model_name_or_path,
        model_args.vision_tower,
        config_overrides={
            **model_args.config_choices(),
            **data_args.config_choices(),
            "tokenizer_padding_side": "right",
            "tokenizer_model_max_length": training_args.model_max_length,
            "conv_template": model_args.version,
            "chat_end_mark": model_args.chat_end_mark,
            "enable_thinking": bool(model_args.enable_thinking),
            "special_tokens_in_text": data_args.special_tokens_in_text,
            "mm_projector_lr": training_args.mm_projector_lr,
            "tune_mm_mlp_adapter": training_args.tuning == "projector",
            "freeze_mm_mlp_adapter": training_args.freeze_mm_mlp_adapter,
        },
        dtype=loading_dtype(training_args),
        attn_implementation=choose_attention(
            model_args.attn_implementation, training_args.device.type, packed=training_args.packing != "none"
        ),
        cache_dir=training_args.cache_dir,
        **quantization(training_args, stored, name),
    )
    if training_args.unfreeze_mm_vision_tower:
        model.config.unfreeze_mm_vision_tower = True
    if model_args.pretrain_mm_mlp_adapter is not None:
        load_connector(model, model_args.pretrain_mm_mlp_adapter)
    return model.train()


def quantization(training_args, stored=None, path=None):
    """Return the keyword that loads the decoder's frozen weights in 4 or 8 bits (QLoRA, Dettmers et al. 2023).

    stored: quantization_config of the weights at `path`, or None. Raises ValueError if they are in other bits than
    --bits says: weights in few bits cannot be trained themselves, and are not brought to other bits.
    """
    from llava_lite.model.quantization import bits_config, bits_of, kind_of, need_bitsandbytes

    bits = training_args.bits
    if stored is not None and bits_of(stored) != bits:
        known = bits_of(stored)
        advice = f"Train LoRA beside them (--lora_enable True --bits {known}), or s" if known else "S"
        raise ValueError(
            f"{str(path)!r} holds {kind_of(stored)} weights, and --bits is {bits}. {advice}tart from the weights in "
            "full precision."
        )
    if bits == 16:
        return {}
    need_bitsandbytes(f"--bits {bits}")
    if stored is not None:
        return {}
    compute = {
        "bnb_4bit_compute_dtype": loading_dtype(training_args),
        "bnb_4bit_use_double_quant": training_args.double_quant,
        "bnb_4bit_quant_type": training_args.quant_type,
    }
    return {"quantization_config": bits_config(bits, **compute)}


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
