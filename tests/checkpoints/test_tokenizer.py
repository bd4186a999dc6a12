"""What stands beside the weights: the prompt format, the tokenizer, the image processor."""

import json
import shutil
import sys

import pytest

from llava_lite.checkpoints.source import Checkpoint
from llava_lite.checkpoints.tokenizer import (
    check_vocabulary_of_base,
    get_image_processor,
    get_template_name,
    load_tokenizer,
)
from llava_lite.mm_utils import tokenizer_image_token
from llava_lite.processing.processor import LlavaLiteProcessor


@pytest.mark.parametrize(
    ("model_type", "template"),
    [("llama", "v1"), ("mistral", "mistral_instruct"), ("qwen2", "qwen"), ("phi", "phi"), ("stablelm", "stablelm")],
)
def test_checkpoint_that_names_no_template_is_asked_as_its_recipe_was(toy_model, toy_tokenizer, model_type, template):
    config = toy_model(model_type, tower=None).config
    assert LlavaLiteProcessor.from_config(config, toy_tokenizer).conv_template == template


def test_stored_template_goes_before_any_guess(toy_model, toy_tokenizer_for):
    assert get_template_name(toy_model("mistral", tower=None, conv_template="plain").config) == "plain"
    # Qwen3's recipe is the tokenizer's own format, which not every tokenizer has.
    config = toy_model("qwen3", tower=None).config
    assert get_template_name(config, toy_tokenizer_for("qwen")) == "chat"
    assert get_template_name(config, toy_tokenizer_for("llama")) == "v1"


@pytest.mark.parametrize("module", ["sentencepiece", "google.protobuf"])
def test_what_reads_a_vocabulary_of_sentencepiece_is_named_where_it_is_missing(tmp_path, monkeypatch, module):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "tokenizer.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"as tokenizer.model and not.*pip install .*{module.split('.')[-1]}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("legacy", [True, False])
def test_vocabulary_of_sentencepiece_alone_gives_its_own_ids(tmp_path, legacy):
    import sentencepiece
    from conftest import toy_corpus

    with open(tmp_path / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(toy_corpus()),
            model_writer=file,
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, **specials}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load_tokenizer(tmp_path)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    before, after = "A chat: USER:", "\nWhat colour is the square? ASSISTANT:"
    assert tokenizer(before)["input_ids"] == [1, *pieces.encode(before)]
    ids = tokenizer_image_token(f"{before}<image>{after}", tokenizer)
    assert ids == [1, *pieces.encode(before), -200, *pieces.encode(after)]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (None, b"", "holds no tokenizer: none of tokenizer.json"),
        ("tokenizer.model", b"no such thing", r"tokenizer.model' cannot be read as a tokenizer; copy it again"),
        ("tokenizer.json", b'{"version": ', r"tokenizer.json' cannot be read as a tokenizer; copy it again"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer: run git lfs pull"),
    ],
)
def test_a_tokenizer_that_is_missing_or_broken_is_reported(toy_model, tmp_path, file, content, words):
    if file == "tokenizer.model":
        pytest.importorskip("sentencepiece", reason="the message without it is about sentencepiece")
    toy_model(tower=None).config.save_pretrained(tmp_path)
    if file is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises((OSError, ValueError), match=words):
        load_tokenizer(tmp_path)


def test_a_tower_that_is_missing_with_the_image_processor_is_reported(toy_model, tmp_path):
    config = toy_model().config
    config.mm_vision_tower = str(tmp_path / "gone")
    with pytest.raises(
        OSError, match=r"has no preprocessor_config.json, and the vision tower .*gone'?.* is not there"
    ):
        get_image_processor(tmp_path, config)


def test_directory_without_a_tokenizer_takes_that_of_its_base(toy_model, toy_llm_dir, tmp_path):
    base = str(toy_llm_dir("llama"))
    config = toy_model().config
    config.base_model_name_or_path = base
    config.save_pretrained(tmp_path)
    words = load_tokenizer(base).get_vocab()
    assert load_tokenizer(tmp_path).get_vocab() == words
    assert load_tokenizer(tmp_path, base).get_vocab() == words
    load_tokenizer(base).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path, "nowhere/at-all").get_vocab() == words


@pytest.mark.parametrize(
    ("kind", "num_rows", "fits"), [("llama", 512, True), ("llama", 462, True), ("qwen", 512, False)]
)
def test_trained_weights_on_a_base_of_another_vocabulary_are_refused(
    kind, num_rows, fits, toy_model, toy_tokenizer_for, tmp_path
):
    config = toy_model().config
    for directory, tokenizer in (("tuned", toy_tokenizer_for("llama")), ("base", toy_tokenizer_for(kind))):
        tokenizer.save_pretrained(tmp_path / directory)
        config.save_pretrained(tmp_path / directory)
        config.vocab_size = num_rows
        config.base_model_name_or_path = None
    (tmp_path / "base" / "model.safetensors").touch()
    checkpoint = Checkpoint(str(tmp_path / "tuned"), base=str(tmp_path / "base"))
    tokenizer = load_tokenizer(checkpoint)
    if fits:
        check_vocabulary_of_base(checkpoint, tokenizer)
        return
    with pytest.raises(
        ValueError, match=r"another vocabulary than that of .*base.* tokens of the base have another id"
    ):
        check_vocabulary_of_base(checkpoint, tokenizer)


def test_image_processor_is_the_directories_own_or_the_towers(toy_model, toy_tower_dir, tmp_path):
    config = toy_model().config
    config.save_pretrained(tmp_path)
    assert get_image_processor(tmp_path, config).crop_size["height"] == 32
    shutil.copy(toy_tower_dir("clip") / "preprocessor_config.json", tmp_path)
    fields = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields | {"crop_size": {"height": 8, "width": 8}}))
    assert get_image_processor(tmp_path, config).crop_size["height"] == 8
    assert get_image_processor(tmp_path, toy_model(tower=None).config) is None


def test_directory_that_cannot_name_an_image_processor_says_so(toy_model, tmp_path):
    config = toy_model().config
    config.mm_vision_tower = None
    with pytest.raises(OSError, match=r"no preprocessor_config\.json and names no mm_vision_tower"):
        get_image_processor(tmp_path, config)
    assert Checkpoint(tmp_path).read_json("preprocessor_config.json") == {}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen"])
@pytest.mark.parametrize(
    "model_type", ["qwen2", "llava_qwen2", "moe_llava_qwen1_5", "qwen3", "mistral", "llava_llama"]
)
def test_a_tokenizer_comes_back_with_the_ids_that_were_saved(kind, model_type, toy_tokenizer_for, tmp_path):
    """AutoTokenizer makes a Qwen2Tokenizer of whatever stands beside a qwen2."""
    saved = toy_tokenizer_for(kind)
    saved.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    for saved_as in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        fields = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": saved_as}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
        found = load_tokenizer(tmp_path)
        for text in ("Hello! What colour is the square?", "  two  blanks <|im_start|>user\nHi 12345 it's\u00e9"):
            assert found(text)["input_ids"] == saved(text)["input_ids"]
        assert found.special_tokens_map == saved.special_tokens_map
        assert found.chat_template == saved.chat_template


def test_directory_of_a_lora_takes_the_tokenizer_of_the_base_that_its_adapter_names(toy_model, toy_llm_dir, tmp_path):
    toy_model().config.save_pretrained(tmp_path)
    adapter = {"base_model_name_or_path": str(toy_llm_dir("llama"))}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    words = load_tokenizer(toy_llm_dir("llama")).get_vocab()
    assert load_tokenizer(tmp_path).get_vocab() == words
    assert LlavaLiteProcessor.from_pretrained(tmp_path).tokenizer.get_vocab() == words


@pytest.mark.parametrize(("text", "output"), [("{", "is no JSON"), ("", "is no JSON"), ("[1]", "holds a list")])
def test_broken_config_is_named(text, output, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json {output}.*Copy it again"):
        _ = Checkpoint(tmp_path).fields
