"""LLaVA's helpers of train.py, and a stage that a script written for LLaVA builds with them."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from llava_lite import conversation as conversation_lib
from llava_lite.model import LlavaLlamaForCausalLM
from llava_lite.model.builder import load_pretrained_model
from llava_lite.train import train as llava_train
from llava_lite.train.compat.state import (
    find_all_linear_names,
    get_mm_adapter_state_maybe_zero_3,
    get_peft_state_maybe_zero_3,
    get_peft_state_non_lora_maybe_zero_3,
    maybe_zero_3,
    smart_tokenizer_and_embedding_resize,
)

LORA_NAMES = (
    "layers.0.q_proj.lora_A.default.weight",
    "layers.0.q_proj.lora_B.default.weight",
    "layers.0.q_proj.base_layer.weight",
    "layers.0.q_proj.base_layer.bias",
    "layers.0.k_proj.bias",
    "mm_projector.0.weight",
)


def named_params():
    return [(name, nn.Parameter(torch.full((2,), float(i)))) for i, name in enumerate(LORA_NAMES)]


def test_value_is_a_copy_on_the_cpu():
    param = nn.Parameter(torch.ones(3))
    value = maybe_zero_3(param, ignore_status=True, name="x")
    param.data += 1
    assert torch.equal(value, torch.ones(3))
    assert not value.requires_grad


@pytest.mark.parametrize(("bias", "places"), [("none", [0, 1]), ("all", [0, 1, 3, 4]), ("lora_only", [0, 1, 3])])
def test_lora_weights_come_with_the_biases_that_were_asked_for(bias, places):
    state = get_peft_state_maybe_zero_3(named_params(), bias)
    assert list(state) == [LORA_NAMES[i] for i in places]
    assert [int(value[0]) for value in state.values()] == places


def test_unknown_bias_is_refused():
    with pytest.raises(ValueError, match="unknown bias 'some'; known: none, all, lora_only"):
        get_peft_state_maybe_zero_3(named_params(), "some")


def test_other_weights_come_if_they_train_or_all():
    named = named_params()
    named[3][1].requires_grad_(False)
    assert list(get_peft_state_non_lora_maybe_zero_3(iter(named))) == [LORA_NAMES[i] for i in (2, 4, 5)]
    every = get_peft_state_non_lora_maybe_zero_3(iter(named), require_grad_only=False)
    assert list(every) == [LORA_NAMES[i] for i in (2, 3, 4, 5)]


def test_weights_come_by_parts_of_their_names():
    state = get_mm_adapter_state_maybe_zero_3(iter(named_params()), ["mm_projector", "k_proj"])
    assert list(state) == [LORA_NAMES[4], LORA_NAMES[5]]


def test_linear_layers_of_the_decoder_are_named(toy_model):
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert find_all_linear_names(toy_model()) == names
    assert find_all_linear_names(toy_model("phi")) == ["dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj"]


def test_lora_on_these_names_stays_out_of_the_tower_where_it_is_excluded(toy_model):
    peft = pytest.importorskip("peft", reason="LoRA is an extra")
    model = toy_model()
    config = peft.LoraConfig(target_modules=find_all_linear_names(model), exclude_modules=r".*vision_tower.*")
    reached = [name for name, _ in peft.get_peft_model(model, config).named_parameters() if "lora_" in name]
    assert reached
    assert not [name for name in reached if "vision_tower" in name]


def test_new_special_tokens_get_the_mean_row(toy_model, toy_tokenizer):
    model = toy_model()
    before = model.lm_head.weight.clone()
    smart_tokenizer_and_embedding_resize({"pad_token": "[PAD]"}, toy_tokenizer, model)
    assert toy_tokenizer.pad_token_id == len(before)
    assert torch.allclose(model.lm_head.weight[-1], before.mean(0), atol=1e-6)
    assert torch.equal(model.lm_head.weight[:-1], before)


# A stage as LLaVA's own train() writes it, step by step.


@pytest.fixture
def v1(monkeypatch):
    monkeypatch.setattr(conversation_lib, "default_conversation", conversation_lib.conv_templates["v1"])


@dataclass
class ScriptsOwnArguments(transformers.TrainingArguments):
    """What LLaVA's train.py declares, and a copy of it in a script; none of ours."""

    cache_dir: str | None = None
    model_max_length: int = 512
    lora_enable: bool = False
    mm_projector_lr: float | None = None
    group_by_modality_length: bool = False


def build(toy_llm_dir, toy_tower_dir, toy_data, output_dir, tune_mm_mlp_adapter, args_class=None):
    """Return the trainer that LLaVA's statements make."""
    path, directory = toy_data(num_records=12)
    model_args = llava_train.ModelArguments(
        model_name_or_path=str(toy_llm_dir("llama")),
        version="v1",
        vision_tower=str(toy_tower_dir()),
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        mm_projector_type="mlp2x_gelu",
        mm_use_im_start_end=False,
        mm_use_im_patch_token=False,
        tune_mm_mlp_adapter=tune_mm_mlp_adapter,
    )
    data_args = llava_train.DataArguments(data_path=path, image_folder=directory, image_aspect_ratio="pad")
    training_args = (args_class or llava_train.TrainingArguments)(
        output_dir=str(output_dir),
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=1e-2,
        remove_unused_columns=False,
        logging_steps=1,
        group_by_modality_length=True,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
    )
    model = LlavaLlamaForCausalLM.from_pretrained(model_args.model_name_or_path, cache_dir=training_args.cache_dir)
    model.config.use_cache = False
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        model_args.model_name_or_path, model_max_length=training_args.model_max_length, padding_side="right"
    )
    tokenizer.pad_token = tokenizer.unk_token
    model.get_model().initialize_vision_modules(model_args=model_args, fsdp=training_args.fsdp)
    vision_tower = model.get_vision_tower()
    vision_tower.to(dtype=torch.float32, device=training_args.device)
    data_args.image_processor = vision_tower.image_processor
    data_args.is_multimodal = True
    model.config.image_aspect_ratio = data_args.image_aspect_ratio
    model.config.tokenizer_padding_side = tokenizer.padding_side
    model.config.tokenizer_model_max_length = tokenizer.model_max_length
    if tune_mm_mlp_adapter:
        model.requires_grad_(False)
        for param in model.get_model().mm_projector.parameters():
            param.requires_grad = True
    model.config.mm_use_im_start_end = data_args.mm_use_im_start_end = model_args.mm_use_im_start_end
    model.initialize_vision_tokenizer(model_args, tokenizer=tokenizer)
    data_module = llava_train.make_supervised_data_module(tokenizer=tokenizer, data_args=data_args)
    return llava_train.LLaVATrainer(model=model, tokenizer=tokenizer, args=training_args, **data_module)


@pytest.mark.parametrize("args_class", [None, ScriptsOwnArguments])
def test_stage_built_in_llavas_steps_trains_and_is_opened_again(
    args_class, toy_llm_dir, toy_tower_dir, toy_data, tmp_path, v1
):
    trainer = build(toy_llm_dir, toy_tower_dir, toy_data, tmp_path / "out", False, args_class)
    before = {name: param.detach().clone() for name, param in trainer.model.named_parameters()}
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 3
    changed = {name for name, param in trainer.model.named_parameters() if not torch.equal(param, before[name])}
    assert any("mm_projector" in name for name in changed)
    assert any("layers.3.mlp" in name for name in changed)
    assert not any("vision_tower" in name for name in changed)
    trainer.model.config.use_cache = True
    llava_train.safe_save_model_for_hf_trainer(trainer=trainer, output_dir=str(tmp_path / "out"))
    again = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "out")
    for name, param in again.named_parameters():
        assert torch.equal(param, dict(trainer.model.named_parameters())[name]), name
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_the_newline_is_in_the_file_of_the_connector_and_read_from_it(toy_llm_dir, toy_tower_dir, tmp_path):
    """LLaVA leaves it out: the newline that the connector was trained with was lost."""

    def with_newline(adapter=None):
        model = LlavaLlamaForCausalLM.from_pretrained(str(toy_llm_dir("llama")))
        asked = SimpleNamespace(
            vision_tower=str(toy_tower_dir()),
            mm_vision_select_layer=-2,
            mm_vision_select_feature="patch",
            mm_projector_type="linear",
            mm_patch_merge_type="spatial_unpad",
            pretrain_mm_mlp_adapter=adapter,
        )
        model.get_model().initialize_vision_modules(asked)
        return model

    model, args = with_newline(), SimpleNamespace(tune_mm_mlp_adapter=True, should_save=True)
    llava_train.safe_save_model_for_hf_trainer(SimpleNamespace(model=model, args=args), str(tmp_path))
    newline = model.get_model().image_newline
    assert torch.equal(with_newline(str(tmp_path / "mm_projector.bin")).get_model().image_newline, newline)
    opened = load_pretrained_model(tmp_path, str(toy_llm_dir("llama")), device="cpu")[1]
    assert torch.equal(opened.get_model().image_newline, newline)


def test_stage_of_the_connector_alone_leaves_llavas_file(toy_llm_dir, toy_tower_dir, toy_data, tmp_path, v1):
    trainer = build(toy_llm_dir, toy_tower_dir, toy_data, tmp_path / "out", tune_mm_mlp_adapter=True)
    trainer.train()
    expected = {
        f"model.mm_projector.{name}": weight
        for name, weight in trainer.model.get_model().mm_projector.state_dict().items()
    }
    llava_train.safe_save_model_for_hf_trainer(trainer, str(tmp_path / "out"))
    llava_train.safe_save_model_for_hf_trainer(trainer, str(tmp_path / "out" / "checkpoint-3"))
    for path in ("mm_projector.bin", "mm_projector/checkpoint-3.bin"):
        saved = torch.load(tmp_path / "out" / path, weights_only=True)
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[name], expected[name]) for name in saved)
    assert (tmp_path / "out" / "config.json").is_file()
    model = LlavaLlamaForCausalLM.from_pretrained(str(toy_llm_dir("llama")))
    asked = SimpleNamespace(
        vision_tower=str(toy_tower_dir()),
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        mm_projector_type="mlp2x_gelu",
        mm_patch_merge_type="flat",
        pretrain_mm_mlp_adapter=str(tmp_path / "out" / "mm_projector.bin"),
    )
    model.get_model().initialize_vision_modules(asked)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(model.encode_images(images), trainer.model.encode_images(images))


def test_attention_may_be_chosen_as_llavas_train_mem_does(stage_flags, tmp_path):
    """By keyword or by position; a flag counts more."""
    flags = stage_flags("projector", tmp_path / "out", "--max_steps", 1)
    for call in (
        {"attn_implementation": "eager", "argv": flags},
        {"argv": [*flags, "--attn_implementation", "eager"]},
    ):
        assert llava_train.train(**call).model.config._attn_implementation == "eager"
    overruled = llava_train.train("flash_attention_2", [*flags, "--attn_implementation", "sdpa"])
    assert overruled.model.config._attn_implementation == "sdpa"
