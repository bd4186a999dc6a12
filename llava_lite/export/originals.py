"""Write checkpoints of the adapter systems as directories of ours, and ours as a release of LLaMA-Adapter V2."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from llava_lite.checkpoints.copying import read_weights
from llava_lite.checkpoints.files import ADAPTER, ADAPTER_WEIGHTS, TRAINED
from llava_lite.checkpoints.source import Checkpoint
from llava_lite.export.verified_directory import check_empty, give_name, new_directory
from llava_lite.formats import llama_adapter
from llava_lite.formats.gated_prompts import plain_weights
from llava_lite.formats.llama_shapes import lora_fields
from llava_lite.model.assemble import IS_LORA, PEFT_PREFIX
from llava_lite.model.originals import open_original, open_tokenizer, read_original, tokenizer_places
from llava_lite.processing.processor import LlavaLiteProcessor

TRAINED_FILE = TRAINED[0]


def convert_original(
    source, target, base=None, vision_tower=None, tokenizer=None, dtype=None, max_shard_size="5GB", report=print
):
    """Write a file or directory of another system as a directory of ours; see model/originals.py.

    base: that of what holds only what was trained. On one in Hugging Face's layout only the trained weights are
    written, with its name; with Meta's directory as the base, or in the source, a complete model. Raises ValueError
    for a LoRA that its prompts do not pass and no base in Hugging Face's layout, beside which it could stand.
    """
    check_empty(target)
    original = read_original(source, base)
    lora = {name: weight for name, weight in original.weights.items() if IS_LORA.search(name)}
    if original.base is None and lora and not original.fields.get("adaption_prompt_lora", True):
        raise ValueError(
            f"{str(source)!r} has a LoRA of keys and values that its prompts do not pass, which no single weight "
            "holds. Convert its base first, llava-lite convert META_DIRECTORY BASE, and give --base BASE: the LoRA "
            "then stands beside it."
        )
    words = open_tokenizer([tokenizer] if tokenizer is not None else tokenizer_places(source, base))
    # All of it is checked here: a weight that is missing, unknown or of another shape is an error.
    model = open_original(source, base, vision_tower, dtype=dtype)
    tower = model.get_vision_tower()
    with new_directory(target) as unchecked:
        if original.base is None:
            model.save_pretrained(unchecked, max_shard_size=max_shard_size)
        else:
            write_trained(original, model.config, unchecked, lora)
        processor = LlavaLiteProcessor.from_config(
            model.config, words, None if tower is None else tower.image_processor
        )
        processor.save_pretrained(unchecked)
    give_name(target)
    what = "a complete model" if original.base is None else f"the trained weights, on {original.base.path}"
    report(f"{target}: {what}, {len(original.weights):,} weights of {source} ({original.kind}), every one used.")


def write_trained(original, config, directory: Path, lora: dict) -> None:
    """Write what was trained and the name of the base: config.json, trained.safetensors and, with LoRA, an adapter."""
    base = original.base.path
    config.base_model_name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    config.save_pretrained(directory)
    rest = {name: weight.contiguous() for name, weight in original.weights.items() if name not in lora}
    save_file(rest, directory / TRAINED_FILE, {"format": "pt"})
    if not lora:
        return
    from peft import LoraConfig

    options = lora_fields(lora)
    targets = "|".join(options.pop("target_modules"))
    pattern = rf"model\.layers\.\d+\.(self_attn|mlp)\.({targets})"
    adapter = LoraConfig(
        target_modules=pattern,
        base_model_name_or_path=config.base_model_name_or_path,
        task_type="CAUSAL_LM",
        **options,
    )
    adapter.save_pretrained(directory)
    halves = {f"{PEFT_PREFIX}{name}": weight.contiguous() for name, weight in lora.items()}
    save_file(halves, directory / ADAPTER_WEIGHTS[0], {"format": "pt"})


def write_release(source, target, report=print):
    """Write a model of ours with prompts as one .pth file in the layout of LLaMA-Adapter V2's releases.

    source: a directory or hub id; of trained weights, those of the directories that it stands on are written too.
    Raises ValueError for a model that this layout has no place for, and if the file exists.
    """
    checkpoint, path = Checkpoint(source), Path(target)
    checkpoint.require_config()
    if path.exists() or path.suffix != ".pth":
        raise ValueError(f"{str(target)!r}: name a new file that ends in .pth, such as {path.with_suffix('.pth')}.")
    fields = checkpoint.config.to_dict()
    if not (fields.get("mm_injection") == "adaption_prompt" and fields.get("mm_projector_type") == "query_vit"):
        raise ValueError(
            f"{checkpoint.path!r} has mm_injection {fields.get('mm_injection')!r} and connector "
            f"{fields.get('mm_projector_type')!r}; a release of LLaMA-Adapter V2 holds prompts and a query_vit."
        )
    reads = {"mm_vision_projection": True, "mm_vision_select_layer": -1, "mm_vision_select_feature": "cls_patch"}
    others = {key: fields.get(key) for key, value in reads.items() if fields.get(key) != value}
    if others:
        raise ValueError(
            f"{checkpoint.path!r} has {others}; LLaMA-Adapter V2 reads all of CLIP's tokens after its projection: "
            f"{reads}. It stays loadable here."
        )
    if not fields["model_type"].endswith("llama"):
        raise ValueError(f"{checkpoint.path!r} is a {fields['model_type']}; LLaMA-Adapter V2 knows LLaMA alone.")
    weights, has_lora = weights_of_chain(checkpoint)
    if has_lora and fields.get("adaption_prompt_lora"):
        raise ValueError(
            f"{checkpoint.path!r} has prompts that pass its LoRA (adaption_prompt_lora), which LLaMA-Adapter V2's do "
            "not: its answers would be others there. It stays loadable here."
        )
    release = llama_adapter.release(weights, fields)
    torch.save(release, path)
    report(f"{target}: {len(release['model']):,} weights in the layout of LLaMA-Adapter V2's releases.")
    if fields.get("image_channels", "rgb") != "bgr":
        report("NOTE: it was trained on images in RGB; the original reads them in BGR, and must be changed to RGB.")


def weights_of_chain(checkpoint: Checkpoint) -> tuple[dict, bool]:
    """Return (weights, whether LoRA is among them): what a directory and those that it stands on have trained.

    Of a complete model all weights.
    """
    base = checkpoint.base
    if base is None:
        return plain_weights(checkpoint.weights()), False
    weights, has_lora = {}, False
    if base.fields.get("model_type", "").startswith("llava_"):
        weights, has_lora = weights_of_chain(base)
    for name in reversed(TRAINED):
        if (file := checkpoint.file(name)) is not None:
            weights |= plain_weights(read_weights(file))
    if checkpoint.file(ADAPTER) is None:
        return weights, has_lora
    options = checkpoint.read_json(ADAPTER)
    scale = options["lora_alpha"] / options["r"]
    [file] = [file for name in ADAPTER_WEIGHTS if (file := checkpoint.file(name)) is not None]
    halves = plain_weights(read_weights(file))
    weights |= {name: weight * scale if "lora_B" in name and scale != 1 else weight for name, weight in halves.items()}
    return weights, True
