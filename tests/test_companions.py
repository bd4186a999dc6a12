"""What stands beside the weights: the prompt format, the tokenizer, the image processor."""

import json
import shutil

import pytest
from transformers import AutoConfig

from llava_lite.companions import image_processor_of, load_tokenizer, read_json, template_of
from llava_lite.processing import LlavaLiteProcessor


@pytest.mark.parametrize(
    ("model_type", "template"),
    [("llama", "v1"), ("mistral", "mistral_instruct"), ("qwen2", "qwen"), ("phi", "phi"), ("stablelm", "stablelm")],
)
def test_checkpoint_that_names_no_template_is_asked_as_its_recipe_was(toy_model, toy_tokenizer, model_type, template):
    config = toy_model(model_type, tower=None).config
    assert LlavaLiteProcessor.from_config(config, toy_tokenizer).conv_template == template


def test_stored_template_goes_before_any_guess(toy_model, toy_tokenizer_for):
    assert template_of(toy_model("mistral", tower=None, conv_template="plain").config) == "plain"
    # Qwen3's recipe is the tokenizer's own format, which not every tokenizer has.
    config = toy_model("qwen3", tower=None).config
    assert template_of(config, toy_tokenizer_for("qwen")) == "chat"
    assert template_of(config, toy_tokenizer_for("llama")) == "v1"


def test_folder_without_a_tokenizer_takes_that_of_its_base(toy_model, toy_llm_dir, tmp_path):
    base = str(toy_llm_dir("llama"))
    config = toy_model().config
    config.base_model_name_or_path = base
    config.save_pretrained(tmp_path)
    words = load_tokenizer(base).get_vocab()
    assert load_tokenizer(tmp_path, AutoConfig.from_pretrained(tmp_path)).get_vocab() == words
    assert load_tokenizer(tmp_path, base).get_vocab() == words
    load_tokenizer(base).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path, "nowhere/at-all").get_vocab() == words


def test_image_processor_is_the_folders_own_or_the_towers(toy_model, toy_tower_dir, tmp_path):
    config = toy_model().config
    config.save_pretrained(tmp_path)
    assert image_processor_of(tmp_path, config).crop_size["height"] == 32
    shutil.copy(toy_tower_dir("clip") / "preprocessor_config.json", tmp_path)
    fields = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields | {"crop_size": {"height": 8, "width": 8}}))
    assert image_processor_of(tmp_path, config).crop_size["height"] == 8
    assert image_processor_of(tmp_path, toy_model(tower=None).config) is None


def test_folder_that_cannot_name_an_image_processor_says_so(toy_model, tmp_path):
    config = toy_model().config
    config.mm_vision_tower = None
    with pytest.raises(OSError, match=r"no preprocessor_config\.json and names no mm_vision_tower"):
        image_processor_of(tmp_path, config)
    assert read_json(tmp_path, "preprocessor_config.json", {}) == {}
