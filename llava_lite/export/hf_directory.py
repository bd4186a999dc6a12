"""Turn a loaded model of ours into a directory that transformers opens by itself: weights, config, processor, card."""

import shutil
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import GenerationConfig

from llava_lite.checkpoints.config import is_llava
from llava_lite.conversation.end_tokens import end_ids, get_end_token
from llava_lite.export import verify
from llava_lite.export.hf_processor import (
    hf_image_processor,
    hf_processor,
    with_image_token,
    write_json,
    write_processor,
)
from llava_lite.formats import hf_llava as layout
from llava_lite.hub.card import front_matter, public_name
from llava_lite.inference import load
from llava_lite.model.generation_config import savable
from llava_lite.model.moe.config import read_moe_config
from llava_lite.tower_config import resolve_vision_config

# A vocabulary that grows is padded to a multiple of this many rows, as in the released llava-hf checkpoints.
ROWS_MULTIPLE = 64


def write_hf(checkpoint, directory, dtype=None, max_shard_size="5GB"):
    """Write a model of ours as transformers' LLaVA; return (its own answers, notes about differences)."""
    model, processor = load(checkpoint.path, device="cpu", dtype=dtype or "auto")
    fields = get_fields(model.config) | {"conv_template": processor.conv_template}
    expected_inputs = verify.readings(processor)
    tokenizer, image_token_index = with_image_token(processor.tokenizer)
    image_processor, notes = hf_image_processor(processor, fields)
    written, more = hf_processor(processor, tokenizer, image_processor, fields, expected_inputs)
    num_rows = rows_needed(model.get_input_embeddings().weight.shape[0], len(tokenizer))
    config = layout.config_to(
        fields | {"vocab_size": num_rows, "pad_token_id": tokenizer.pad_token_id}, image_token_index
    )
    weights = layout.weights_to(grown(own_weights(model), num_rows), fields)
    save_weights(weights, directory, max_shard_size)
    del weights
    write_processor(written, directory)
    notes += more + write_generation_config(model, processor, tokenizer, directory)
    notes += connector_note(fields) + experts_notes(fields)
    if processor.special_tokens_in_text == "text":
        notes.append(
            "Special tokens that are written in a question were trained as text; the processor of transformers reads "
            "them as tokens."
        )
    (Path(directory) / "README.md").write_text(card(checkpoint.path, fields, notes), encoding="utf-8")
    # What `--to llava` needs to give back the same weights and the same tokenizer.
    config[layout.RECORD]["vocabulary"] = {
        "num_rows": model.get_input_embeddings().weight.shape[0],
        "num_tokens": len(processor.tokenizer),
        "tokenizer_class": type(processor.tokenizer).__name__,
        "pad_token": processor.tokenizer.pad_token,
        "pad_token_id": model.config.pad_token_id,
        "chat_template": processor.tokenizer.chat_template,
    }
    write_json(Path(directory) / "config.json", config)
    for path in Path(directory).glob("*.safetensors"):
        # They are written for this user alone.
        shutil.copymode(Path(directory) / "config.json", path)
    answers = verify.answers(model.float(), expected_inputs, processor.image_token_index)
    return answers, notes


def get_fields(config):
    """Return our config as a plain dict, the tower's own config inside it and layers and experts written out."""
    fields = config.to_dict()
    moe = read_moe_config(config.moe, config.num_hidden_layers)
    fields["moe"] = moe and moe.to_dict()
    if config.has_vision_tower:
        fields["vision_config"] = resolve_vision_config(config).to_dict()
        # As pixels, whatever notation the checkpoint has them in.
        fields["image_grid_pinpoints"] = [list(pair) for pair in config.image_layout.pinpoints]
    return fields


def check_expressible(checkpoint):
    """Raise ValueError with the reason if the layout cannot express a model; only its config is read."""
    config = checkpoint.config
    if not is_llava(config):
        raise ValueError(f"{checkpoint.path!r} is a plain {config.model_type} and no LLaVA model; nothing to convert.")
    reason = layout.refusal(get_fields(config))
    if reason is not None:
        raise ValueError(reason)


def own_weights(model):
    """Return the model's weights by name, a tied head left out."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def rows_needed(num_rows, num_tokens):
    """Return the rows of the written vocabulary: as they are if all tokens have one."""
    return num_rows if num_tokens <= num_rows else -(-num_tokens // ROWS_MULTIPLE) * ROWS_MULTIPLE


def grown(weights, num_rows):
    """Return the weights with `num_rows` vocabulary rows; a new one is the mean of the others and never the argmax."""
    changed = {}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensor = weights.get(name)
        if tensor is not None and tensor.shape[0] < num_rows:
            mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
            changed[name] = torch.cat([tensor, mean.expand(num_rows - tensor.shape[0], -1)])
    return weights | changed


def save_weights(weights, directory, max_shard_size):
    """Write safetensors in files of at most `max_shard_size`, with an index where there are several."""
    pattern = "model{suffix}.safetensors"
    # Without storage: of views of one tensor, such as a layer's experts, it would count the first alone.
    shapes = {name: weight.to("meta") for name, weight in weights.items()}
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size, filename_pattern=pattern)
    for name, keys in plan.filename_to_tensors.items():
        save_file({key: weights[key].contiguous() for key in keys}, Path(directory) / name, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(Path(directory) / "model.safetensors.index.json", index)


def write_generation_config(model, processor, tokenizer, directory):
    """Write generation_config.json with the end tokens of the prompt format; return a note if that is not possible."""
    end, notes = get_end_token(processor.template(), tokenizer), []
    if end.text.strip() and not end.ids:
        notes.append(
            f"An answer ends with {end.text!r}, which is no token of its own: "
            f"generate(stop_strings=[{end.text!r}], tokenizer=...)."
        )
    config, note = savable(model.generation_config)
    settings = config.to_diff_dict() | {"pad_token_id": tokenizer.pad_token_id}
    settings["eos_token_id"] = sorted(end_ids(model.generation_config, tokenizer, end.ids))
    GenerationConfig.from_dict(settings).save_pretrained(directory)
    return [*notes, note] if note else notes


def connector_note(fields):
    """Return a note about a connector that the layout holds in another form."""
    if fields["mm_projector_type"] == "mlp2x_gelu":
        return []
    return [
        f"The connector {fields['mm_projector_type']!r} is written as two layers without an activation, one of which "
        "changes nothing. transformers reads that; vLLM knows no activation 'linear'."
    ]


def experts_notes(fields):
    """Return notes about what readers do otherwise with the experts of a model; none for a dense one."""
    if fields["moe"] is None:
        return []
    notes = [
        "The router is computed in float32 here and in the dtype of the model in transformers: in bfloat16 a token "
        "whose experts nearly tie may be sent to another one."
    ]
    if len(fields["moe"]["moe_layers_idx"]) < fields["num_hidden_layers"]:
        notes.append(
            "Some layers have no experts (mlp_only_layers). transformers and vLLM read that; SGLang's qwen3_moe makes "
            "experts in every layer and passes over the dense weights in silence, so serve it with vLLM."
        )
    return notes


def card(source, fields, notes):
    """Return the text of README.md."""
    kind = layout.ARCHITECTURES["llava_next" if layout.is_anyres(fields) else "llava"]
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["llava", "llava-lite"],
    }
    name = public_name(source)
    lines = [
        front_matter(metadata),
        f"# {name}\n",
        f"`{kind}` of transformers, written by `llava-lite convert` from `{name}`; opened again with transformers "
        "alone, it gave the same ids, pixels, logits and greedy tokens. Serving it with vLLM or SGLang is not "
        "measured.\n",
        f"- text model: `{layout.text_decoder(fields)}`",
        f"- vision tower: `{fields['vision_config']['model_type']}`",
        f"- connector: `{fields['mm_projector_type']}`",
        f"- prompt format: `{fields.get('conv_template')}`, written by its chat template\n",
        "```python",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        "model, processor = AutoModelForImageTextToText.from_pretrained(PATH), AutoProcessor.from_pretrained(PATH)",
        'content = [{"type": "image", "path": "x.jpg"}, {"type": "text", "text": "What is in this image?"}]',
        'conversation = [{"role": "user", "content": content}]',
        "inputs = processor.apply_chat_template(",
        '    conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"',
        ")",
        "print(processor.batch_decode(model.generate(**inputs, max_new_tokens=200))[0])",
        "```\n",
        *(f"- {note}" for note in notes),
    ]
    return "\n".join(lines) + "\n"
