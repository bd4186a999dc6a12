"""The recipes: each states the published numbers in flags that parse, for data where either system keeps them."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "scripts/v1_5").glob("*.sh"))

# LLaMA-Adapter exps/{pretrain,finetune}.sh, imagebind_LLM exps/*.sh, LLaMA2-Accessory exps/finetune/mm/*.sh, in the
# terms of Hugging Face.
ADAPTER = {
    "adam_beta2": 0.95,
    "max_grad_norm": 0,
    "version": "alpaca",
    "image_aspect_ratio": "random_crop",
    "global_batch": 32,
    "zero": "zero2.json",
}
ADAPTER_FIRST = {
    **ADAPTER,
    "tuning": "prompts",
    "mm_injection": "adaption_prompt",
    "mm_text_only": "blank",
    "num_train_epochs": 3,
    "warmup_steps": 0.0333,
    "learning_rate": 1.25e-5,
    "weight_decay": 0.05,
    "model_max_length": 96,
}
ADAPTER_SECOND = {
    **ADAPTER,
    "tuning": "bias_norm",
    "bias_linears": ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "num_train_epochs": 4,
    "warmup_steps": 0.25,
    "learning_rate": 1.25e-4,
    "weight_decay": 0.02,
    "model_max_length": 512,
}
LORA_16 = {"lora_enable": True, "lora_r": 16, "lora_alpha": 16, "lora_dropout": 0.0}
ACCESSORY = {
    "adam_beta2": 0.95,
    "max_grad_norm": 2,
    "version": "alpaca",
    "image_aspect_ratio": "random_crop",
    "num_train_epochs": 3,
    "warmup_steps": 0.0667,
    "weight_decay": 0.02,
    "model_max_length": 512,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.16667},
    "group_by_modality_length": True,
}
FULL = {**ACCESSORY, "tuning": "full", "learning_rate": 3e-5, "global_batch": 32, "zero": "zero3.json"}
PEFT = {
    **ACCESSORY,
    **LORA_16,
    "tuning": "bias_norm",
    "bias_linears": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    # Its rule: what has "bias" in its name and is not of the Q-Former.
    "bias_connector": True,
    "learning_rate": 5e-5,
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "global_batch": 128,
    "zero": "zero2.json",
}
OTHER_SYSTEMS = {
    "adapter_pretrain": {
        **ADAPTER_FIRST,
        "vision_tower": "openai/clip-vit-large-patch14",
        "mm_vision_projection": True,
        "mm_vision_select_layer": -1,
        "mm_vision_select_feature": "cls_patch",
        "mm_projector_type": "query_vit",
        "mm_query_len": 10,
        "adaption_prompt_len": 10,
        "adaption_prompt_layers": 31,
    },
    "adapter_finetune": ADAPTER_SECOND,
    "imagebind_pretrain": {
        **ADAPTER_FIRST,
        "mm_vision_select_feature": "pooled",
        "mm_vision_projection": False,
        "mm_projector_type": "gated_mlp3x",
        "adaption_prompt_len": 1,
        "adaption_prompt_layers": 32,
    },
    "imagebind_finetune": {**ADAPTER_SECOND, **LORA_16},
    "accessory_caption": {
        **FULL,
        "version": "caption",
        "vision_tower": "Salesforce/blip2-opt-2.7b",
        "mm_projector_type": "linear_norm",
        "mm_boundary_vectors": True,
        "mm_image_position": "front",
    },
    "accessory_finetune": FULL,
    "accessory_finetune_peft": PEFT,
    "accessory_finetune_qlora": {**PEFT, "bits": 4},
}
# Read from the originals: LLaVA scripts/v1_5/*.sh and MoE-LLaVA scripts/v1/*/finetune_moe.sh.
COMMON = {
    "num_train_epochs": 1,
    "weight_decay": 0,
    "warmup_steps": 0.03,
    "lr_scheduler_type": "cosine",
    "model_max_length": 2048,
    # The originals set True, which keeps less and computes more; the numbers are the same.
    "auto_checkpointing": True,
    "dataloader_num_workers": 4,
    "logging_steps": 1,
    "max_grad_norm": 0,
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
}
TOWER = {"vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": "mlp2x_gelu"}
ANSWERS = {"version": "v1", "image_aspect_ratio": "pad", "group_by_modality_length": True}
PUBLISHED = {
    "pretrain": {
        **TOWER,
        "version": "plain",
        "image_aspect_ratio": "square",
        "group_by_modality_length": False,
        "tuning": "projector",
        "learning_rate": 1e-3,
        "global_batch": 256,
        "zero": "zero2.json",
    },
    "finetune": {
        **TOWER,
        **ANSWERS,
        "tuning": "full",
        "learning_rate": 2e-5,
        "global_batch": 128,
        "zero": "zero3.json",
    },
    "finetune_lora": {
        **TOWER,
        **ANSWERS,
        "tuning": "lora",
        "lora_r": 128,
        "lora_alpha": 256,
        "learning_rate": 2e-4,
        "mm_projector_lr": 2e-5,
        "global_batch": 128,
        "zero": "zero3.json",
    },
    "moe-finetune": {
        **ANSWERS,
        "tuning": "moe",
        "moe_mode": "sparse",
        "num_experts": [4],
        "top_k_experts": 2,
        "capacity_factor": 1.5,
        "use_residual": False,
        "router_aux_loss_coef": 0.01,
        "train_modules": ["gate_proj", "up_proj", "down_proj", "wg"],
        "learning_rate": 2e-5,
        "global_batch": 128,
        "zero": "zero2.json",
    },
}


def parsed(flags, tmp_path):
    """Return {name: value} of a recipe's flags; DeepSpeed's JSON is put beside, since opening it would start ranks."""
    from llava_lite.configuration import LlavaConfigMixin
    from llava_lite.train.arguments.parse import parse_args

    at = flags.index("--deepspeed")
    flags, config = flags[:at] + flags[at + 2 :], flags[at + 1]
    arguments = parse_args([*flags, "--output_dir", str(tmp_path / "out"), "--use_cpu", "True"])
    values = {name: value for group in arguments for name, value in vars(group).items()}
    # A flag that is left out leaves the model's config as it is; a plain LLM has these.
    fresh = LlavaConfigMixin.__dataclass_fields__
    values |= {name: fresh[name].default for name, value in values.items() if value is None and name in fresh}
    values["zero"] = Path(config).name
    values["global_batch"] = 8 * values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
    return values


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_states_the_published_numbers(recipe, launched, tmp_path):
    _, flags = launched(recipe)
    values = parsed(flags, tmp_path)
    expected = {**COMMON, **(OTHER_SYSTEMS | PUBLISHED)[recipe]}
    assert {name: values[name] for name in expected} == expected


def test_recipe_for_phi_names_its_two_matrices(launched, tmp_path):
    _, flags = launched("moe-finetune", TRAIN_MODULES="fc1 fc2 wg", VERSION="phi")
    values = parsed(flags, tmp_path)
    assert (values["train_modules"], values["version"]) == (["fc1", "fc2", "wg"], "phi")


@pytest.mark.parametrize("recipe", RECIPES)
def test_flags_and_variables_of_the_caller_win(recipe, launched, tmp_path):
    flags = ["--learning_rate", "0.5", "--data_path", "a b.json", "c.json", "--model_max_length", "77"]
    _, flags = launched(recipe, *flags, MODEL="my/model", OUTPUT="my out", IMAGE_FOLDER="images", ZERO="3")
    values = parsed(flags, tmp_path)
    assert values["learning_rate"] == 0.5
    assert values["data_path"] == ["a b.json", "c.json"]
    assert values["model_max_length"] == 77
    assert values["model_name_or_path"] == "my/model"
    assert flags[flags.index("--output_dir") + 1] == "my out"
    assert values["image_folder"] == "images"
    assert values["zero"] == "zero3.json"


MIX = "llava_v1_5_mix665k.json"
HYBRID = ["la_tune_256k.json", "lrv_tune_331k.json", "lvis_tune_220k_.json", "svit_tune_157k.json", "nlp_tune.json"]
MOE_IMAGES = ["llava_image/", "llava_image_tune/", "train_json/"]


@pytest.mark.parametrize(
    ("made", "recipe", "data", "directory"),
    [
        (["LLaVA-Pretrain/"], "pretrain", ["LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"], "LLaVA-Pretrain/images"),
        (["LLaVA-Finetune/data/"], "finetune", [f"LLaVA-Finetune/{MIX}"], "LLaVA-Finetune/data"),
        (["LLaVA-Finetune/data/"], "moe-finetune", [f"LLaVA-Finetune/{MIX}"], "LLaVA-Finetune/data"),
        (["coco/", MIX], "finetune_lora", [MIX], "."),
        (MOE_IMAGES, "pretrain", ["train_json/llava_image_.json"], "."),
        (MOE_IMAGES, "finetune", [f"train_json/{name}" for name in HYBRID], "."),
        (MOE_IMAGES, "moe-finetune", ["train_json/llava_image_tune_.json", "train_json/nlp_tune.json"], "."),
        (["llava_image/", "pt_json/", "ft_json/"], "pretrain", ["pt_json/llava_image_.json"], "."),
        (["llava_image/", "pt_json/", "ft_json/"], "finetune", [f"ft_json/{name}" for name in HYBRID], "."),
    ],
)
def test_data_root_may_be_laid_out_as_llava_or_as_moe_llava(made, recipe, data, directory, launched, tmp_path):
    root = tmp_path / "data root"
    for name in made:
        (root / name).mkdir(parents=True)
    _, flags = launched(recipe, DATA_ROOT=str(root))
    values = parsed(flags, tmp_path)
    assert values["data_path"] == [str(root / name) for name in data]
    assert Path(values["image_folder"]) == root / directory
