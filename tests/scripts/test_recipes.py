"""The recipes: each states the published numbers in flags that parse, for data where either system keeps them."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "scripts/v1_5").glob("*.sh"))

# Read from the originals: LLaVA scripts/v1_5/*.sh and MoE-LLaVA scripts/v1/*/finetune_moe.sh.
COMMON = {
    "num_train_epochs": 1,
    "weight_decay": 0,
    "warmup_steps": 0.03,
    "lr_scheduler_type": "cosine",
    "model_max_length": 2048,
    # The originals say True, which keeps less and computes more; the numbers are the same.
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
    from llava_lite.arguments import parse_args
    from llava_lite.model.configuration import LlavaConfigMixin

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
    expected = {**COMMON, **PUBLISHED[recipe]}
    assert {name: values[name] for name in expected} == expected


def test_recipe_for_phi_names_its_two_matrices(launched, tmp_path):
    _, flags = launched("moe-finetune", TRAIN_MODULES="fc1 fc2 wg", VERSION="phi")
    values = parsed(flags, tmp_path)
    assert (values["train_modules"], values["version"]) == (["fc1", "fc2", "wg"], "phi")


@pytest.mark.parametrize("recipe", RECIPES)
def test_flags_and_variables_of_the_caller_win(recipe, launched, tmp_path):
    flags = ["--learning_rate", "0.5", "--data_path", "a b.json", "c.json", "--model_max_length", "77"]
    _, flags = launched(recipe, *flags, MODEL="my/model", OUTPUT="my out", IMAGE_FOLDER="pictures", ZERO="3")
    values = parsed(flags, tmp_path)
    assert values["learning_rate"] == 0.5
    assert values["data_path"] == ["a b.json", "c.json"]
    assert values["model_max_length"] == 77
    assert values["model_name_or_path"] == "my/model"
    assert flags[flags.index("--output_dir") + 1] == "my out"
    assert values["image_folder"] == "pictures"
    assert values["zero"] == "zero3.json"


MIX = "llava_v1_5_mix665k.json"
HYBRID = ["la_tune_256k.json", "lrv_tune_331k.json", "lvis_tune_220k_.json", "svit_tune_157k.json", "nlp_tune.json"]
MOE_PICTURES = ["llava_image/", "llava_image_tune/", "train_json/"]


@pytest.mark.parametrize(
    ("made", "recipe", "data", "folder"),
    [
        (["LLaVA-Pretrain/"], "pretrain", ["LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"], "LLaVA-Pretrain/images"),
        (["LLaVA-Finetune/data/"], "finetune", [f"LLaVA-Finetune/{MIX}"], "LLaVA-Finetune/data"),
        (["LLaVA-Finetune/data/"], "moe-finetune", [f"LLaVA-Finetune/{MIX}"], "LLaVA-Finetune/data"),
        (["coco/", MIX], "finetune_lora", [MIX], "."),
        (MOE_PICTURES, "pretrain", ["train_json/llava_image_.json"], "."),
        (MOE_PICTURES, "finetune", [f"train_json/{name}" for name in HYBRID], "."),
        (MOE_PICTURES, "moe-finetune", ["train_json/llava_image_tune_.json", "train_json/nlp_tune.json"], "."),
        (["llava_image/", "pt_json/", "ft_json/"], "pretrain", ["pt_json/llava_image_.json"], "."),
        (["llava_image/", "pt_json/", "ft_json/"], "finetune", [f"ft_json/{name}" for name in HYBRID], "."),
    ],
)
def test_data_root_may_be_laid_out_as_llava_or_as_moe_llava(made, recipe, data, folder, launched, tmp_path):
    root = tmp_path / "data root"
    for name in made:
        (root / name).mkdir(parents=True)
    _, flags = launched(recipe, DATA_ROOT=str(root))
    values = parsed(flags, tmp_path)
    assert values["data_path"] == [str(root / name) for name in data]
    assert Path(values["image_folder"]) == root / folder
