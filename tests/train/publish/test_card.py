"""A model card describes a run, in YAML that parses, and nothing of the machine it ran on."""

import dataclasses
import json
import os

import pytest
import yaml

from llava_lite.train.arguments.parse import parse_args
from llava_lite.train.publish.card import RunFacts, get_settings, hub_base, losses, public_name, write_card
from llava_lite.train.train import train

LOG = [{"step": step, "loss": 4.0 - step / 10} for step in range(1, 21)]
LOG += [{"step": 10, "eval_loss": 2.5}, {"step": 20, "train_loss": 2.95, "experts": {"2": {"load": [0.25, 0.75]}}}]


@pytest.fixture
def facts():
    """A MoE run on public models and local data."""
    return RunFacts(
        name="/home/someone/checkpoints/llava-moe",
        base="lmsys/vicuna-7b-v1.5",
        tuning="moe",
        conv_template="v1",
        tower="openai/clip-vit-large-patch14-336",
        connector="mlp2x_gelu",
        data=[("/home/someone/data/llava_image_tune.json", 624610)],
        weights={
            "mm_projector": {"trained": 20, "frozen": 0},
            "experts": {"trained": 3000, "frozen": 0},
            "decoder": {"trained": 0, "frozen": 10000},
        },
        log=LOG,
        settings={"learning_rate": 2e-5, "data_path": ["/home/someone/data/llava_image_tune.json"]},
        world_size=8,
    )


def front_matter(card):
    """Return the YAML at the head of a card."""
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def table_rows(card, title):
    """Return the cells of the table of a section, its header left out."""
    lines = card.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]


def test_the_front_matter_is_what_the_hub_reads(facts):
    assert front_matter(write_card(facts)) == {
        "library_name": "llava-lite",
        "pipeline_tag": "image-text-to-text",
        "tags": ["llava", "multimodal", "moe"],
        "base_model": "lmsys/vicuna-7b-v1.5",
        "base_model_relation": "finetune",
    }


def test_the_sections_state_the_facts(facts):
    card = write_card(facts)
    assert card.split("---\n")[2].startswith("\n# llava-moe\n")
    assert table_rows(card, "Data") == [["llava_image_tune.json", "624,610"]]
    assert ["all", "3,020", "10,000"] in table_rows(card, "What trained")
    assert table_rows(card, "Expert load") == [["2", "25.0%", "75.0%"]]
    assert ["ranks", "8"] in table_rows(card, "Recipe")
    assert ["`--learning_rate`", "2e-05"] in table_rows(card, "Recipe")
    assert {"torch", "transformers", "llava-lite"} <= {row[0] for row in table_rows(card, "Versions")}
    assert "/home" not in card


def test_losses_show_the_first_the_last_and_every_evaluation():
    table = losses(LOG)
    assert "Mean over the run: 2.9500." in table
    assert "| 1 | 3.9000 |  |" in table
    assert "| 20 | 2.0000 |  |" in table
    assert "| 10 |  | 2.5000 |" in table
    assert losses([]) == ""


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/data/llava/train.json", "train.json"),
        ("~/llava/train.json", "train.json"),
        ("C:\\data\\train.json", "train.json"),
        ("./checkpoints/stage1/", "stage1"),
        (["/a/b.json", "/c/d.json"], ["b.json", "d.json"]),
        ({"nvme_path": "/local/nvme"}, {"nvme_path": "nvme"}),
        ("openai/clip-vit-large-patch14-336", "openai/clip-vit-large-patch14-336"),
        ("v1", "v1"),
        (2, 2),
    ],
)
def test_of_a_local_path_only_the_last_part_is_public(value, shown):
    assert public_name(value) == shown


def test_directories_and_tokens_are_no_part_of_the_recipe(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--hub_token", "hf_secret", "--run_name", "mine", "--cache_dir", "/cache"]
    flags += ["--learning_rate", "0.01", "--model_name_or_path", "a/b", "--data_path", "x.json", "--use_cpu", "True"]
    settings = get_settings(*parse_args(flags))
    assert settings["learning_rate"] == 0.01
    assert not {"output_dir", "hub_token", "run_name", "cache_dir", "logging_dir"} & set(settings)
    assert "hf_secret" not in json.dumps(settings)


def test_the_base_of_a_local_stage_is_the_one_its_own_card_names(facts, tmp_path):
    assert hub_base("lmsys/vicuna-7b-v1.5") == "lmsys/vicuna-7b-v1.5"
    assert hub_base(str(tmp_path)) is None
    assert hub_base("vicuna") is hub_base(str(tmp_path / "gone")) is None
    (tmp_path / "README.md").write_text(write_card(facts))
    assert hub_base(str(tmp_path)) == "lmsys/vicuna-7b-v1.5"


def test_the_licence_of_the_base_and_published_data_are_named(facts, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: tongyi\nbase_model: a/b\n---\n\n# Base\n")
    data = [("/data/llava_v1_5_mix665k.json", 665298), ("/tiny/llava_v1_5_mix665k.json", 26700)]
    found = front_matter(write_card(dataclasses.replace(facts, base=str(base), data=data)))
    assert (found["license"], found["license_name"], found["base_model"]) == ("other", "tongyi", "a/b")
    assert found["datasets"] == ["liuhaotian/LLaVA-Instruct-150K"]


@pytest.mark.usefixtures("plots")
def test_a_real_run_leaves_a_card_without_any_path_of_this_machine(toy_llm_dir, toy_tower_dir, toy_data, tmp_path):
    data, images = toy_data(num_records=8)
    output = tmp_path / "stage one"
    flags = {
        "model_name_or_path": toy_llm_dir("llama"),
        "vision_tower": toy_tower_dir("clip"),
        "mm_projector_type": "mlp2x_gelu",
        "data_path": data,
        "image_folder": images,
        "version": "plain",
        "tuning": "projector",
        "output_dir": output,
        "max_steps": 3,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    train([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    card = (output / "README.md").read_text()
    assert front_matter(card)["tags"] == ["llava", "multimodal", "projector"]
    assert table_rows(card, "Data") == [["toy.json", "8"]]
    assert [row[0] for row in table_rows(card, "Losses")] == ["1", "2", "3"]
    assert dict(row[:2] for row in table_rows(card, "What trained"))["mm_projector"] != "0"
    assert os.path.dirname(tmp_path) not in card
    assert str(toy_llm_dir("llama")) not in card
    assert "![loss](loss.png)" in card
    assert 'model, processor = load("stage one")' in card
