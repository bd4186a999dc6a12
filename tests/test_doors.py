"""The functions of LLaMA-Adapter V2, ImageBind-LLM and LLaMA2-Accessory under their own names."""

import importlib
import inspect
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import draw_image
from test_media_inputs import build
from toy_originals import ADAPTER_PARAMS, VOCAB, adapter_release, meta_state, write_clip

from llava_lite import accessory, imagebind_llm, llama_adapter
from llava_lite.model.originals import open_original

# What programs written for these systems call -> the parameters it takes; a further one has a default.
PUBLISHED = {
    "formats.meta_llama.config_from_params": "params vocab_size",
    "formats.meta_llama.weights_from": "state num_heads num_key_value_heads prefix",
    "formats.openai_clip.config_from_shapes": "shapes prefix num_heads",
    "formats.openai_clip.weights_from": "state prefix",
    **{f"formats.{system}.config_from": "params state" for system in ("llama_adapter", "imagebind_llm", "accessory")},
    **{f"formats.{system}.weights_from": "state config" for system in ("llama_adapter", "imagebind_llm", "accessory")},
    **{f"formats.{system}.weights_to": "state config" for system in ("llama_adapter", "imagebind_llm", "accessory")},
    **{f"formats.{system}.peer_name": "name config" for system in ("llama_adapter", "imagebind_llm", "accessory")},
    "model.assemble.model_from_weights": "fields weights",
    "model.mixing.mix_embeddings": "parts bank top_k temperature weight",
    "conversation.alpaca_prompt": "instruction input name blank_is_none",
    "data.encode.expand_image_tokens": "input_ids labels lengths",
    "data.encode.RecordEncoder": "tokenizer conv_template",
    "data.index.open_annotations": "data_path",
    "data.records.open_sources": "data_path image_folder",
    "data.single_turn.single_turn": "records newlines",
    "llama_adapter.load": "name llama_dir llama_type device",
    "llama_adapter.available_models": "",
    "llama_adapter.format_prompt": "instruction input",
    "imagebind_llm.load": "name llama_dir",
    "accessory.MetaModel.from_pretrained": "pretrained_path",
    "accessory.MetaModel.generate": "self prompts images max_gen_len temperature top_p additional_stop_symbols",
    "accessory.MetaModel.compute_logits": "self examples images",
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_published_names_open_and_take_what_they_are_said_to(name, parameters):
    path, _, attribute = name.rpartition(".")
    owner = importlib.import_module(f"llava_lite.{path.removesuffix('.MetaModel')}")
    owner = owner.MetaModel if path.endswith("MetaModel") else owner
    found = inspect.signature(getattr(owner, attribute)).parameters
    expected = parameters.split()
    assert list(found)[: len(expected)] == expected
    empty, various = inspect.Parameter.empty, (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    further = list(found.values())[len(expected) :]
    assert all(one.default is not empty or one.kind in various for one in further)


@pytest.fixture
def release(tmp_path, toy_tokenizer):
    """Directory as users of LLaMA-Adapter have it: 7B, ckpts/DIGEST_BIAS-7B.pth, and a tower beside."""
    (tmp_path / "llama" / "7B").mkdir(parents=True)
    params = ADAPTER_PARAMS | {"vocab_size": len(toy_tokenizer)}
    state = meta_state(ADAPTER_PARAMS)
    for name in ("tok_embeddings.weight", "output.weight"):
        state[name] = 0.3 * torch.randn(len(toy_tokenizer), 32)
    torch.save(state, tmp_path / "llama" / "7B" / "consolidated.00.pth")
    (tmp_path / "llama" / "7B" / "params.json").write_text(json.dumps(params))
    (tmp_path / "ckpts").mkdir()
    torch.save({"model": adapter_release("BIAS")}, tmp_path / "ckpts" / "BIAS-7B.pth")
    toy_tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path, str(write_clip(tmp_path / "clip"))


def test_llama_adapter_loads_and_answers_under_its_names(release, caplog):
    root, tower = release
    assert "BIAS-7B" in llama_adapter.available_models()
    # As the original's demo has it: the device where the model size belongs.
    model, preprocess = llama_adapter.load(
        "BIAS-7B", root / "llama", "cpu", download_root=root / "ckpts", vision_tower=tower, mm_query_heads=2
    )
    assert "'cpu' in place of llama_type is a device" in caplog.text
    images = torch.stack([preprocess(draw_image(i)) for i in range(2)])
    prompts = [llama_adapter.format_prompt("Describe it."), llama_adapter.format_prompt("What is this?", "a hint")]
    both = model.generate(images, prompts, max_gen_len=4, temperature=0)
    alone = [model.generate(images[i : i + 1], prompts[i : i + 1], max_gen_len=4, temperature=0)[0] for i in range(2)]
    assert both == alone
    assert len(model.generate(images, prompts, max_gen_len=4)) == 2
    with pytest.raises(ValueError, match="are more than max_seq_len 512"):
        model.generate(images, prompts, max_gen_len=512)
    with pytest.raises(ValueError, match=r"model 'CAPTION-7B': its file is not in .*download it from https://github"):
        llama_adapter.load("CAPTION-7B", root / "llama", download_root=root / "ckpts")
    with pytest.raises(ValueError, match=r"model 'WRONG': unknown\. Known: BIAS-7B, LORA-BIAS-7B"):
        llama_adapter.load("WRONG", root / "llama", download_root=root / "ckpts")


def test_imagebind_llm_answers_about_mixed_inputs_and_a_bank(toy_tokenizer):
    from llava_lite.model.mixing import FeatureBank

    core = build(toy_tokenizer)
    model = imagebind_llm.BindAdapter(core, toy_tokenizer, bank=FeatureBank(torch.randn(20, 16)))
    inputs = {"Image": [torch.randn(2, 3, 28, 28), 1.0], "Audio": [torch.randn(2, 3, 1, 128, 204), 0.5]}
    prompts = [imagebind_llm.format_prompt("What is it?")] * 2
    assert len(model.generate(inputs, prompts, max_gen_len=3, temperature=0)) == 2
    pulled, plain = model.features(inputs), model.features(inputs, cache_weight=0.0)
    assert pulled.shape == (2, 1, 16)
    assert not torch.allclose(pulled, plain, atol=1e-3)
    with pytest.raises(ValueError, match="inputs are of Image, Video, Text, Audio, Point; got Smell"):
        model.generate({"Smell": [torch.zeros(1), 1]}, prompts)
    assert imagebind_llm.data.load_and_transform_vision_data(None, "cpu") is None


def test_accessorys_model_puts_an_image_after_the_first_token(toy_model, toy_tokenizer):
    core = toy_model("llama", mm_boundary_vectors=True, mm_image_position="front", conv_template="alpaca")
    tower = core.get_vision_tower()
    model = accessory.MetaModel(core, toy_tokenizer, 512, tower.image_processor)
    images = torch.randn(2, 3, tower.image_size, tower.image_size)
    prompts = ["What colour is the square?", "How many circles are there?"]
    logits = model.compute_logits(prompts, images)
    ids = [toy_tokenizer(one)["input_ids"] for one in prompts]
    assert [len(one) for one in logits] == [len(row) for row in ids]
    num_places = core.config.num_image_tokens + 2
    with torch.no_grad():
        given = torch.tensor([[ids[0][0], -200, *ids[0][1:]]])
        assert torch.allclose(logits[0], core(given, images=images[:1]).logits[0, num_places:], atol=1e-5)
    both = model.generate(prompts, images, max_gen_len=4)
    alone = [model.generate([prompts[i]], images[i : i + 1], max_gen_len=4)[0] for i in range(2)]
    assert both == alone
    stopped = model.generate(prompts, images, max_gen_len=4, additional_stop_symbols=["e"])
    assert stopped == [text.partition("e")[0] for text in both]
    pieces = list(model.stream_generate(prompts[0], draw_image(0), max_gen_len=4))
    assert pieces[-1]["end_of_content"]


def test_accessorys_model_opens_a_directory(tmp_path, toy_tokenizer):
    (tmp_path / "acc").mkdir()
    torch.save(meta_state(ADAPTER_PARAMS), tmp_path / "acc" / "consolidated.00.pth")
    (tmp_path / "acc" / "params.json").write_text(json.dumps(ADAPTER_PARAMS))
    toy_tokenizer.save_pretrained(tmp_path / "words")
    model = accessory.MetaModel.from_pretrained(
        str(tmp_path / "acc"), "llama", tokenizer_path=str(tmp_path / "words"), device="cpu"
    )
    ids = [[1, 5, 6]]
    # As the original's users call it, with a group of this process alone.
    more = {"tokenizer_path": str(tmp_path / "words"), "device": "cpu"}
    with pytest.raises(ValueError, match=r"with_visual=True, but the model of .* has no vision tower"):
        accessory.MetaModel.from_pretrained(str(tmp_path / "acc"), with_visual=True, **more)
    with pytest.raises(ValueError, match="mp_group has 2 processes"):
        accessory.MetaModel.from_pretrained(str(tmp_path / "acc"), mp_group=SimpleNamespace(size=lambda: 2), **more)
    with torch.no_grad():
        expected = open_original(tmp_path / "acc")(torch.tensor(ids)).logits[0]
    assert torch.allclose(model.compute_logits(ids)[0], expected, atol=1e-5)
    assert expected.shape[1] == VOCAB
