"""LLaVA's and MoE-LLaVA's public names: that each opens under `llava` too, and can be called as theirs can."""

import dataclasses
import enum
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import llava_lite

ROOT = Path(llava_lite.__file__).resolve().parents[1]

# Module -> {name: value}, of both.
CONSTANTS = {
    "CONTROLLER_HEART_BEAT_EXPIRATION": 30,
    "WORKER_HEART_BEAT_INTERVAL": 15,
    "LOGDIR": ".",
    "IGNORE_INDEX": -100,
    "IMAGE_TOKEN_INDEX": -200,
    "DEFAULT_IMAGE_TOKEN": "<image>",
    "DEFAULT_IMAGE_PATCH_TOKEN": "<im_patch>",
    "DEFAULT_IM_START_TOKEN": "<im_start>",
    "DEFAULT_IM_END_TOKEN": "<im_end>",
    "IMAGE_PLACEHOLDER": "<image-placeholder>",
    "DEFAULT_VIDEO_TOKEN": "<video>",
    "DEFAULT_VIDEO_PATCH_TOKEN": "<im_patch>",
    "DEFAULT_VID_START_TOKEN": "<vid_start>",
    "DEFAULT_VID_END_TOKEN": "<vid_end>",
    "VIDEO_PLACEHOLDER": "<video-placeholder>",
    "MAX_IMAGE_LENGTH": 16,
    "MAX_VIDEO_LENGTH": 1,
    "PAD_LENGTH": 620,
}

# Module -> {function: its parameters as in the originals, in order: a bare name is required, name=default is not}.
FUNCTIONS = {
    "utils": {
        "build_logger": "logger_name logger_filename",
        "disable_torch_init": "",
        "violates_moderation": "text",
        "pretty_print_semaphore": "semaphore",
        "order_pick_k": "lst k",
        "get_gating_logit_by_hook": "model",
        "StreamToLogger": "logger log_level=20",
        "HookTool": "",
    },
    "mm_utils": {
        "select_best_resolution": "original_size possible_resolutions",
        "resize_and_pad_image": "image target_resolution",
        "divide_to_patches": "image patch_size",
        "get_anyres_image_grid_shape": "image_size grid_pinpoints patch_size",
        "process_anyres_image": "image processor grid_pinpoints",
        "load_image_from_base64": "image",
        "expand2square": "pil_img background_color",
        "process_images": "images image_processor model_cfg",
        "tokenizer_image_token": "prompt tokenizer image_token_index=-200 return_tensors=None",
        "get_model_name_from_path": "model_path",
        "KeywordsStoppingCriteria": "keywords tokenizer input_ids",
    },
    "model.builder": {
        "load_pretrained_model": "model_path model_base model_name load_8bit=False load_4bit=False "
        "device_map='auto' device='cuda' use_flash_attn=False",
    },
    "model.compat.moellava_builder": {
        "load_pretrained_model": "model_path model_base model_name load_8bit=False load_4bit=False "
        "device_map='auto' device='cuda' padding_side='right' merge=False",
    },
    "model.llava_arch": {
        "unpad_image": "tensor original_size",
        "LlavaMetaModel.get_vision_tower": "self",
        "LlavaMetaModel.get_image_tower": "self",
        "LlavaMetaModel.initialize_vision_modules": "self model_args fsdp=None",
        "LlavaMetaForCausalLM.get_model": "self",
        "LlavaMetaForCausalLM.get_vision_tower": "self",
        "LlavaMetaForCausalLM.get_image_tower": "self",
        "LlavaMetaForCausalLM.encode_images": "self images",
        "LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal": "self input_ids position_ids attention_mask "
        "past_key_values labels images image_sizes=None",
        "LlavaMetaForCausalLM.initialize_vision_tokenizer": "self model_args tokenizer",
        "LlavaMetaForCausalLM.initialize_moe_modules": "self model_args",
        "LlavaMetaForCausalLM.forward": "self input_ids=None attention_mask=None position_ids=None "
        "past_key_values=None inputs_embeds=None labels=None use_cache=None output_attentions=None "
        "output_hidden_states=None images=None image_sizes=None return_dict=None",
    },
    "eval.run_llava": {
        "eval_model": "args",
        "image_parser": "args",
        "load_image": "image_file",
        "load_images": "image_files",
    },
    "train.train": {
        "train": "attn_implementation=None",
        "preprocess": "sources tokenizer has_image=False",
        "preprocess_multimodal": "sources data_args",
        "preprocess_llama_2": "sources tokenizer has_image=False",
        "preprocess_v1": "sources tokenizer has_image=False",
        "preprocess_mpt": "sources tokenizer has_image=False",
        "preprocess_plain": "sources tokenizer",
        "LazySupervisedDataset": "data_path tokenizer data_args",
        "DataCollatorForSupervisedDataset": "tokenizer",
        "make_supervised_data_module": "tokenizer data_args",
        "safe_save_model_for_hf_trainer": "trainer output_dir",
        "find_all_linear_names": "model",
        "maybe_zero_3": "param ignore_status=False name=None",
        "get_peft_state_maybe_zero_3": "named_params bias",
        "get_peft_state_non_lora_maybe_zero_3": "named_params require_grad_only=True",
        "get_mm_adapter_state_maybe_zero_3": "named_params keys_to_match",
        "smart_tokenizer_and_embedding_resize": "special_tokens_dict tokenizer model",
    },
    "train.llava_trainer": {
        "LengthGroupedSampler": "batch_size world_size lengths=None generator=None group_by_modality=False",
        "get_length_grouped_indices": "lengths batch_size world_size generator=None merge=True",
        "get_modality_length_grouped_indices": "lengths batch_size world_size generator=None",
        "split_to_even_chunks": "indices lengths num_chunks",
        "maybe_zero_3": "param ignore_status=False name=None",
        "get_mm_adapter_state_maybe_zero_3": "named_params keys_to_match",
    },
    "conversation": {
        "Conversation.get_prompt": "self",
        "Conversation.append_message": "self role message",
        "Conversation.process_image": "self image image_process_mode return_pil=False image_format='PNG' "
        "max_len=1344 min_len=672",
        "Conversation.get_images": "self return_pil=False",
        "Conversation.to_gradio_chatbot": "self",
        "Conversation.copy": "self",
        "Conversation.dict": "self",
    },
    "serve.cli": {"main": "args"},
}

# Module -> {dataclass: its fields}.
FIELDS = {
    "conversation": {
        "Conversation": "system roles messages offset sep_style sep sep2 version skip_next",
    },
    "train.train": {
        "ModelArguments": "model_name_or_path version freeze_backbone tune_mm_mlp_adapter vision_tower "
        "mm_vision_select_layer pretrain_mm_mlp_adapter mm_projector_type mm_use_im_start_end mm_use_im_patch_token "
        "mm_patch_merge_type mm_vision_select_feature",
        "DataArguments": "data_path lazy_preprocess is_multimodal image_folder image_aspect_ratio",
        "TrainingArguments": "cache_dir optim remove_unused_columns freeze_mm_mlp_adapter model_max_length "
        "double_quant quant_type bits lora_enable lora_r lora_alpha lora_dropout lora_bias mm_projector_lr "
        "group_by_modality_length",
    },
}

# What else is imported by name.
OTHERS = {
    "": "LlavaLlamaForCausalLM",
    "model": "LlavaLlamaForCausalLM LlavaConfig LlavaMistralForCausalLM LlavaMistralConfig",
    "model.language_model.llava_llama": "LlavaLlamaForCausalLM LlavaConfig",
    "model.llava_arch": "LlavaMetaModel LlavaMetaForCausalLM",
    "conversation": "Conversation SeparatorStyle conv_templates default_conversation",
    "utils": "server_error_msg moderation_msg",
    "train.train": "LLaVATrainer conversation_lib tokenizer_image_token",
    "train.llava_trainer": "LLaVATrainer",
    "serve.cli": "main",
}

# Ours begin otherwise: flags may be given to them, and both places have room for LLaVA's argument.
RENAMED = {("serve.cli", "main", "args"): "argv"}


def opened(module, name):
    """Return what a dotted name in a module of the package stands for."""
    value = importlib.import_module(f"llava_lite.{module}".rstrip("."))
    for part in name.split("."):
        value = getattr(value, part)
    return value


def each(table):
    return [(module, name, value) for module, names in table.items() for name, value in names.items()]


@pytest.mark.parametrize(("name", "value"), CONSTANTS.items())
def test_constants_have_their_values(name, value):
    assert opened("constants", name) == value


@pytest.mark.parametrize(("module", "name", "theirs"), each(FUNCTIONS))
def test_calls_written_for_the_originals_fit(module, name, theirs):
    """Same names in the same order, and the same defaults; what only we have has a default."""
    ours = list(inspect.signature(opened(module, name)).parameters.values())
    for place, word in enumerate(theirs.split()):
        parameter, _, default = word.partition("=")
        parameter = RENAMED.get((module, name, parameter), parameter)
        assert ours[place].name == parameter
        if default:
            assert repr(ours[place].default) == default
    for more in ours[len(theirs.split()) :]:
        is_open = more.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        assert is_open or more.default is not inspect.Parameter.empty, f"{more.name} is needed here and unknown there"


@pytest.mark.parametrize(("module", "name", "theirs"), each(FIELDS))
def test_dataclasses_have_the_fields(module, name, theirs):
    ours = [field.name for field in dataclasses.fields(opened(module, name))]
    assert set(theirs.split()) <= set(ours)


def test_a_conversation_can_be_made_by_position():
    fields = [field.name for field in dataclasses.fields(opened("conversation", "Conversation"))]
    assert fields[:9] == FIELDS["conversation"]["Conversation"].split()


@pytest.mark.parametrize(("module", "names"), OTHERS.items())
def test_other_names_open(module, names):
    for name in names.split():
        assert opened(module, name) is not None


def test_separator_styles_are_five_and_ours():
    styles = opened("conversation", "SeparatorStyle")
    assert issubclass(styles, enum.Enum)
    assert {"SINGLE", "TWO", "MPT", "PLAIN", "LLAMA_2"} <= set(styles.__members__)


def test_generate_takes_llavas_arguments_by_position():
    """inputs, images, image_sizes; `images` left out is not None, which would be LLaVA's call without images."""
    generate = inspect.signature(opened("model", "LlavaLlamaForCausalLM").generate)
    assert list(generate.parameters)[:4] == ["self", "inputs", "images", "image_sizes"]
    assert generate.parameters["inputs"].default is None
    assert generate.parameters["image_sizes"].default is None


def test_every_name_opens_from_llava_and_is_the_same():
    """All at once, in a process of its own, by the statements that clients write."""
    tables = (FUNCTIONS, FIELDS, {m: dict.fromkeys(n.split()) for m, n in OTHERS.items()}, {"constants": CONSTANTS})
    lines = ["import llava_lite.alias", "llava_lite.alias.install()"]
    for table in tables:
        for module, names in table.items():
            for name in sorted({name.partition(".")[0] for name in names}):
                llava, own = (f"{top}.{module}".rstrip(".") for top in ("llava", "llava_lite"))
                lines += [f"from {llava} import {name} as theirs", f"from {own} import {name} as ours"]
                lines += [f"assert theirs is ours or theirs == ours, {llava + '.' + name!r}"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
