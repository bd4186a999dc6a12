"""Turn the flags of a run into its tokenizer and its model: decoder, tower, connector, experts."""

from llava_lite.checkpoints.source import Checkpoint
from llava_lite.checkpoints.tokenizer import load_tokenizer
from llava_lite.train.tuning import loading_dtype


def build_tokenizer(model_args, training_args):
    """Return the model's tokenizer, with a pad token.

    Any token will do: the collator makes the mask, so padding may have the id of <unk> or of the end token, and such
    a token in the text still counts (LLaVA derives the mask from the ids).
    """
    tokenizer = load_tokenizer(Checkpoint.of_flag(model_args.model_name_or_path, training_args.cache_dir))
    tokenizer.model_max_length, tokenizer.padding_side = training_args.model_max_length, "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def build_model(model_args, data_args, training_args):
    """Return the model with tower and connector, in training mode; the connector of stage 1 is loaded."""
    from llava_lite.model.assemble import assemble, load_connector
    from llava_lite.model.attention import choose_attention
    from llava_lite.model.builder import check_holds_model
    from llava_lite.model.quantization import stored_quantization

    checkpoint = Checkpoint.of_flag(model_args.model_name_or_path, training_args.cache_dir)
    check_holds_model(checkpoint.path)
    stored = stored_quantization(checkpoint)
    model = assemble(
        checkpoint,
        model_args.vision_tower,
        config_overrides=get_config_overrides(model_args, data_args, training_args),
        dtype=loading_dtype(training_args),
        attn_implementation=choose_attention(
            model_args.attn_implementation, training_args.device.type, packed=training_args.packing != "none"
        ),
        **quantization(training_args, stored, checkpoint.path),
    )
    if training_args.unfreeze_mm_vision_tower:
        model.config.unfreeze_mm_vision_tower = True
    if model_args.pretrain_mm_mlp_adapter is not None:
        load_connector(model, model_args.pretrain_mm_mlp_adapter)
    return model.train()


def get_config_overrides(model_args, data_args, training_args) -> dict:
    """Return the config keys that the flags of a run set."""
    return {
        **model_args.config_choices(),
        **data_args.config_choices(),
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": training_args.model_max_length,
        "conv_template": model_args.version,
        "chat_end_token": model_args.chat_end_token,
        "enable_thinking": bool(model_args.enable_thinking),
        "special_tokens_in_text": data_args.special_tokens_in_text,
        "mm_projector_lr": training_args.mm_projector_lr,
        "tune_mm_mlp_adapter": training_args.tuning == "projector",
        "freeze_mm_mlp_adapter": training_args.freeze_mm_mlp_adapter,
    }


def quantization(training_args, stored=None, path=None):
    """Return the keyword that loads the decoder's frozen weights in 4 or 8 bits (QLoRA, Dettmers et al. 2023).

    stored: quantization_config of the weights at `path`, or None. Raises ValueError if they have other bits than
    --bits: quantised weights are not trained themselves, and are not converted to other bits.
    """
    from llava_lite.model.quantization import bits_config, get_bits, get_quantization_kind, need_bitsandbytes

    bits = training_args.bits
    if stored is not None and get_bits(stored) != bits:
        known = get_bits(stored)
        advice = f"Train LoRA beside them (--lora_enable True --bits {known}), or s" if known else "S"
        raise ValueError(
            f"{str(path)!r} holds {get_quantization_kind(stored)} weights, and --bits is {bits}. {advice}tart from "
            "the weights in full precision."
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


def add_tokens(tokenizer, words):
    """Add the words of --new_tokens to the tokenizer, each as one token; return how many tokens it had before.

    They are not special tokens, which are left out of the text of an answer. Raises ValueError for a bad word.
    """
    from transformers import AddedToken

    num_known = len(tokenizer)
    bad = [word for word in words if word != word.strip() or not word]
    if bad or len(set(words)) < len(words):
        raise ValueError(
            f"--new_tokens {' '.join(map(repr, words))}: give different words without spaces around them."
        )
    tokenizer.add_tokens([AddedToken(word, normalized=False, special=False) for word in words])
    return num_known


def add_image_tokens(tokenizer, config):
    """Add the special tokens of LLaVA that the config asks for."""
    from llava_lite.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN

    words = [DEFAULT_IMAGE_PATCH_TOKEN] if config.mm_use_im_patch_token else []
    words += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN] if config.mm_use_im_start_end else []
    tokenizer.add_tokens(words, special_tokens=True)


def fit_vocabulary(model, tokenizer, num_known=None, named=(), adapter=None, seed=0):
    """Add LLaVA's image tokens, if the config asks for them, and resize the vocabulary to the tokenizer's.

    num_known: tokens that the tokenizer had before this run; default: all. named: those of --new_tokens, new to the
    model whether it has rows for them or not. adapter: weights of stage 1, which may hold rows of new tokens. seed: of
    the rows that are drawn.
    """
    from llava_lite.checkpoints.copying import read_weights
    from llava_lite.checkpoints.vocabulary import EMBEDDING, fit_rows, load_rows

    num_known = min(len(tokenizer) if num_known is None else num_known, model.config.vocab_size)
    add_image_tokens(tokenizer, model.config)
    fit_rows(model, len(tokenizer), num_known, seed=seed)
    fresh = {*range(num_known, len(tokenizer)), *tokenizer.convert_tokens_to_ids(list(named))}
    if fresh and adapter is not None and EMBEDDING in read_weights(adapter):
        load_rows(model, sorted(fresh), adapter)
    model.config.new_words = sorted(fresh | set(model.config.new_words or [])) or None
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id


def add_experts(model, model_args, training_args):
    """Turn MLPs into experts, if that is the tuning; a model that has experts keeps them."""
    if training_args.tuning != "moe":
        return
    if model.moe_layers():
        from llava_lite.model.moe.existing import keep_own_experts

        keep_own_experts(model, model_args.moe_choices())
    else:
        from llava_lite.model.moe.upcycle import upcycle

        upcycle(model, model_args.moe_config(), seed=training_args.seed)


def apply_plain_paths(model, model_args, training_args):
    """Turn off the faster paths that --plain_paths names, and install the kernels for the device."""
    from llava_lite.model.plain_paths import install_training_kernels, set_plain_paths

    set_plain_paths(model, model_args.plain_paths or ())
    install_training_kernels(model, training_args.device)


def gather_experts_together(model):
    """Let ZeRO-3 treat the experts of a layer as one leaf, whatever DeepSpeed JSON the run uses.

    Fetched one by one they would be gathered in the order of the tokens, which differs from rank to rank: a hang.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    if model.moe_layers() and is_deepspeed_zero3_enabled():
        from deepspeed.utils import set_z3_leaf_modules

        from llava_lite.model.moe.block import MoeBlock

        set_z3_leaf_modules(model, [MoeBlock])


def shard_experts(model, model_args, training_args):
    """Leave on this rank its experts of every layer, with --ep_size."""
    if model_args.ep_size > 1:
        from llava_lite.train.deepspeed.experts import split_experts

        split_experts(model, model_args.ep_size, training_args.deepspeed_plugin.deepspeed_config)
