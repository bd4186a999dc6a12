"""convert: the directory that it writes, opened by transformers alone, and the way back."""

import base64
import io
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

from llava_lite.export import verify
from llava_lite.export.convert import convert
from llava_lite.export.jinja import write_jinja
from llava_lite.inference import load, prepare, reply
from llava_lite.model.assemble import assemble
from llava_lite.processing.processor import LlavaLiteProcessor

MOE = {"moe_enable": True, "moe_mode": "sparse", "num_experts": [4], "top_k_experts": 2, "router_aux_loss_coef": 0.01}
WIDE, TALL = verify.draw(70, 33), verify.draw(31, 90)
QUESTIONS = [
    [{"role": "user", "content": [{"type": "image", "image": WIDE}, {"type": "text", "text": "How many circles?"}]}],
    [
        {"role": "user", "content": [{"type": "image", "image": TALL}, {"type": "text", "text": "What colour?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
        {"role": "user", "content": [{"type": "text", "text": "Hello! And now?"}]},
    ],
]


@pytest.fixture
def full_directory(toy_model, toy_tokenizer_for, tmp_path):
    """Return a function: kind of tokenizer, arguments of toy_model -> directory of a full model of ours."""

    def make(model_type="llama", tokenizer="llama", dtype=torch.float32, **kwargs):
        directory = tmp_path / "ours"
        model = toy_model(model_type, **kwargs)
        tokenizer = toy_tokenizer_for(tokenizer) if isinstance(tokenizer, str) else tokenizer
        if model.config.mm_use_im_start_end:
            tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
        if len(tokenizer) > model.config.vocab_size:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.to(dtype).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory

    return make


def first_space_only(tokenizer):
    """Return a Llama tokenizer that puts a space before a text's first word only, as `legacy: false` means."""
    from tokenizers import Tokenizer, pre_tokenizers

    fields = json.loads(tokenizer.backend_tokenizer.to_str()) | {"normalizer": None}
    backend = Tokenizer.from_str(json.dumps(fields))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=2048
    )


def assert_transformers_agrees(ours, theirs):
    """Ask both the same questions, batch of one, with code that knows nothing of convert's own check."""
    model, processor = load(ours, device="cpu", dtype="float32")
    hf = AutoModelForImageTextToText.from_pretrained(theirs, dtype=torch.float32).eval()
    assert type(hf).__module__.startswith("transformers.models.llava")
    hf_processor = AutoProcessor.from_pretrained(theirs)
    assert type(hf_processor).__module__.startswith("transformers.models.llava")
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    for conversation in QUESTIONS:
        mine = processor.apply_chat_template(conversation, **options)
        others = hf_processor.apply_chat_template(conversation, **options)
        ids = mine["input_ids"].masked_fill(mine["input_ids"] == -200, hf.config.image_token_index)
        assert torch.equal(ids, others["input_ids"])
        assert torch.equal(mine["attention_mask"], others["attention_mask"])
        assert torch.equal(mine["pixel_values"], others["pixel_values"])
        with torch.no_grad():
            logits, hf_logits = model(**mine).logits, hf(**others).logits
        torch.testing.assert_close(hf_logits[..., : logits.shape[-1]], logits, atol=1e-5, rtol=1e-5)
        greedy = {"do_sample": False, "max_new_tokens": 10}
        start = ids.shape[1]
        expected = model.generate(**mine, **greedy)[0, start:].tolist()
        assert hf.generate(**others, **greedy)[0, start:].tolist()[: len(expected)] == expected


@pytest.mark.parametrize(
    "arguments",
    [
        {"conv_template": "v1"},
        {"conv_template": "llava_llama_2", "image_aspect_ratio": "pad"},
        {"model_type": "mistral", "conv_template": "mistral_instruct", "tower": "siglip"},
        {
            "model_type": "qwen2",
            "tokenizer": "qwen",
            "conv_template": "chat",
            "tower": "siglip",
            "image_aspect_ratio": "pad",
        },
        {"model_type": "qwen3", "tokenizer": "qwen", "conv_template": "qwen"},
        {"model_type": "stablelm", "conv_template": "llava_v0"},
        {"mm_projector_type": "linear", "conv_template": "plain"},
        {"mm_projector_type": "identity", "mm_vision_select_layer": -1, "conv_template": "v1_mmtag"},
        {"mm_vision_select_feature": "cls_patch", "mm_use_im_start_end": True},
        {"mm_vision_select_feature": "drop_first", "tower": "siglip", "conv_template": "phi"},
    ],
    ids=lambda arguments: "-".join(map(str, arguments.values())),
)
def test_transformers_answers_the_same_and_the_round_trip_is_bit_equal(full_directory, tmp_path, arguments):
    source = full_directory(**arguments)
    output = []
    gap = convert(source, tmp_path / "hf", report=output.append)
    assert gap.logits <= 1e-5
    assert "greedy tokens agree" in output[-2]
    if arguments.get("conv_template") != "plain":
        assert_transformers_agrees(source, tmp_path / "hf")
    assert not (tmp_path / "hf.unchecked").exists()
    convert(tmp_path / "hf", tmp_path / "back", report=output.append)
    before, after = (load_file(directory / "model.safetensors") for directory in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["image_token_index"], config["model_type"]) == (
        -200,
        f"llava_{arguments.get('model_type', 'llama')}",
    )
    assert config["image_aspect_ratio"] == arguments.get("image_aspect_ratio", "square")


def set_head_width(directory, width):
    """Give a stored Qwen3 model heads of a width that is not hidden_size / num_attention_heads."""
    path = directory / "model.safetensors"
    weights = load_file(path)
    torch.manual_seed(4)
    heads = {
        "q_proj": (4 * width, 32),
        "k_proj": (2 * width, 32),
        "v_proj": (2 * width, 32),
        "o_proj": (32, 4 * width),
    }
    for layer in range(4):
        attention = f"model.layers.{layer}.self_attn."
        for name, shape in heads.items():
            weights[f"{attention}{name}.weight"] = 0.2 * torch.randn(shape)
        for name in ("q_norm", "k_norm"):
            weights[f"{attention}{name}.weight"] = torch.ones(width)
    save_file(weights, path, {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"head_dim": width}))


@pytest.mark.parametrize(
    ("moe", "arguments", "dense_layers"),
    [
        (MOE, {"conv_template": "qwen", "tower": "siglip"}, [1, 3]),
        ({**MOE, "top_k_experts": 1, "moe_mode": "second_half"}, {"image_aspect_ratio": "pad"}, [0, 1]),
        (
            {**MOE, "top_k_experts": 3, "num_experts": [5], "moe_layers_idx": [2]},
            {"use_sliding_window": True},
            [0, 1, 3],
        ),
        # In evaluation every expert has room for all tokens.
        ({**MOE, "moe_mode": "dense", "moe_drop_tokens": True, "moe_second_expert_sampling": True}, {}, []),
    ],
    ids=["top-2", "top-1", "top-3", "all layers"],
)
def test_experts_of_qwen3_become_qwen3_moe_and_the_round_trip_is_bit_equal(
    full_directory, tmp_path, moe, arguments, dense_layers
):
    windows = {"sliding_window": 8, "max_window_layers": 0, "layer_types": ["sliding_attention"] * 4}
    arguments |= windows if "use_sliding_window" in arguments else {}
    source = full_directory("qwen3", "qwen", moe=moe, **arguments)
    # upcycle makes copies; these differ, so that a wrong order of experts is seen.
    weights = load_file(source / "model.safetensors")
    torch.manual_seed(5)
    weights |= {name: 0.2 * torch.randn_like(w) for name, w in weights.items() if ".mlp.experts." in name}
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    set_head_width(source, 16)
    assert convert(source, tmp_path / "hf", report=str).logits <= 1e-5
    assert_transformers_agrees(source, tmp_path / "hf")
    text = json.loads((tmp_path / "hf" / "config.json").read_text())["text_config"]
    assert (text["model_type"], text["architectures"]) == ("qwen3_moe", ["Qwen3MoeForCausalLM"])
    assert (text["mlp_only_layers"], text["num_experts"]) == (dense_layers, moe["num_experts"][0])
    assert (text["num_experts_per_tok"], text["norm_topk_prob"]) == (moe["top_k_experts"], moe["top_k_experts"] > 1)
    names = load_file(tmp_path / "hf" / "model.safetensors").keys()
    assert "language_model.model.layers.2.mlp.experts.3.gate_proj.weight" in names
    assert not any("gate_up_proj" in name for name in names)
    convert(tmp_path / "hf", tmp_path / "back", report=str)
    before, after = (load_file(directory / "model.safetensors") for directory in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "back"))
    assert after["moe"] == before["moe"]
    assert [after[key] for key in ("model_type", "head_dim", "layer_types")] == [
        before[key] for key in ("model_type", "head_dim", "layer_types")
    ]


def test_shards_with_experts_keep_within_their_size(full_directory, tmp_path):
    source = full_directory("qwen3", "qwen", moe=MOE)
    convert(source, tmp_path / "hf", max_shard_size="100KB", report=str)
    sizes = [path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors")]
    # The two vocabulary matrices alone are larger.
    assert sorted(sizes)[-3] <= 110_000
    assert_transformers_agrees(source, tmp_path / "hf")


def test_tokenizer_that_reads_the_start_of_a_text_otherwise_gets_a_space(full_directory, toy_tokenizer, tmp_path):
    source, output = full_directory(tokenizer=first_space_only(toy_tokenizer), conv_template="v1"), []
    convert(source, tmp_path / "hf", report=output.append)
    assert any("writes a space after `<image>`" in line for line in output)
    assert_transformers_agrees(source, tmp_path / "hf")


def test_directory_as_llava_writes_it_is_converted_too(toy_model, toy_tokenizer, tmp_path):
    model = toy_model(conv_template=None, image_aspect_ratio="pad")
    source = tmp_path / "llava-v1.5-7b"
    source.mkdir()
    toy_tokenizer.save_pretrained(source)
    # No shape of the tower but its name, its weights in half precision, and a pickle.
    state = {k: v.half() if ".vision_tower." in k else v for k, v in model.state_dict().items()}
    torch.save(state, source / "pytorch_model.bin")
    fields = model.config.to_dict() | {"vision_config": None, "architectures": ["LlavaLlamaForCausalLM"]}
    (source / "config.json").write_text(json.dumps(fields))
    assert convert(source, tmp_path / "hf", report=str).logits <= 1e-5
    assert_transformers_agrees(source, tmp_path / "hf")


def test_vocabulary_grows_to_a_multiple_of_64_and_new_tokens_never_win(full_directory, tmp_path):
    source = full_directory()
    convert(source, tmp_path / "hf", report=str)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    old = load_file(source / "model.safetensors")["lm_head.weight"]
    head = weights["language_model.lm_head.weight"]
    rows = config["text_config"]["vocab_size"]
    assert rows % 64 == 0
    assert head.shape[0] == weights["language_model.model.embed_tokens.weight"].shape[0] == rows
    torch.testing.assert_close(head[len(old) :], old.mean(0).expand(rows - len(old), -1))
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    assert processor.image_token_id == config["image_token_index"] == len(old)
    assert processor.tokenizer.pad_token_id == config["pad_token_id"] == len(old) + 1


def test_tied_heads_half_precision_and_shards(toy_tokenizer_for, toy_tower_dir, tmp_path):
    from conftest import llm_config
    from transformers import AutoModelForCausalLM

    tokenizer = toy_tokenizer_for("qwen")
    config = llm_config("qwen2", len(tokenizer))
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    overrides = {"mm_projector_type": "mlp2x_gelu", "conv_template": "chat"}
    model = assemble(str(tmp_path / "llm"), str(toy_tower_dir()), config_overrides=overrides, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    gap = convert(tmp_path / "ours", tmp_path / "hf", max_shard_size="60KB", report=str)
    assert gap.logits <= 1e-5
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert "language_model.lm_head.weight" not in index["weight_map"]
    hf = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    assert hf.dtype == torch.bfloat16
    assert hf.lm_head.weight is hf.model.language_model.embed_tokens.weight
    half = convert(tmp_path / "ours", tmp_path / "half", dtype="float16", report=str)
    assert half.logits <= 1e-5
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "half").dtype == torch.float16


def test_directory_says_all_that_older_readers_look_for(full_directory, tmp_path):
    convert(full_directory(image_aspect_ratio="pad", conv_template="v1"), tmp_path / "hf", report=str)
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json"} <= names
    assert {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["text_config"]["architectures"] == ["LlamaForCausalLM"]
    images = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert (images["image_processor_type"], images["do_pad"]) == ("LlavaImageProcessor", True)
    words = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert words["chat_template"] == write_jinja("v1")
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast"
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in weights
    assert "language_model.model.layers.0.mlp.up_proj.weight" in weights
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "do_pad" in card
    assert str(tmp_path) not in card
    mode = (tmp_path / "hf" / "config.json").stat().st_mode
    assert all(path.stat().st_mode == mode for path in (tmp_path / "hf").glob("*.safetensors"))


def test_end_of_an_answer_is_known_where_it_is_a_token(full_directory, tmp_path):
    output = []
    convert(full_directory("qwen2", "qwen", conv_template="chat"), tmp_path / "hf", report=output.append)
    ends = json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "hf").tokenizer
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ends
    assert not any("stop_strings" in line for line in output)


def test_way_back_keeps_the_kind_of_tokenizer_and_drops_what_convert_added(full_directory, toy_tokenizer, tmp_path):
    from transformers import AutoTokenizer, LlamaTokenizer

    model = json.loads(toy_tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = LlamaTokenizer(vocab=model["vocab"], merges=merges, model_max_length=2048)
    source = full_directory(tokenizer=tokenizer, conv_template="v1")
    convert(source, tmp_path / "hf", report=str)
    assert_transformers_agrees(source, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "back", report=str)
    before, after = (AutoTokenizer.from_pretrained(directory) for directory in (source, tmp_path / "back"))
    assert type(after) is type(before) is LlamaTokenizer
    assert after.get_vocab() == before.get_vocab()
    assert (after.pad_token, after.chat_template) == (None, None)
    text = "USER: What colour?</s>USER: x"
    assert after(text)["input_ids"] == before(text)["input_ids"]


def test_tower_of_a_known_shape_is_named_for_llavas_own_loader():
    from transformers import CLIPVisionConfig

    from llava_lite.export.convert import name_tower
    from llava_lite.model import LlavaConfig

    shape = {"hidden_size": 1024, "num_attention_heads": 16, "patch_size": 14, "image_size": 336}
    config = LlavaConfig(vision_config=CLIPVisionConfig(**shape))
    assert name_tower(config) == []
    assert (config.mm_vision_tower, config.unfreeze_mm_vision_tower) == ("openai/clip-vit-large-patch14-336", True)
    odd = LlavaConfig(vision_config=CLIPVisionConfig(**shape | {"image_size": 280}))
    assert "needs it as mm_vision_tower" in name_tower(odd)[0]
    assert odd.mm_vision_tower is None


def test_wrong_weights_fail_the_check_and_get_no_name(full_directory, tmp_path, monkeypatch):
    from llava_lite.formats import hf_llava as layout

    right = layout.weights_to

    def swapped(state, config):
        weights = right(state, config)
        first, second = (f"language_model.model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1))
        return weights | {first: weights[second], second: weights[first]}

    monkeypatch.setattr(layout, "weights_to", swapped)
    with pytest.raises(ValueError, match=r"does not answer as its source does .*hf.unchecked"):
        convert(full_directory(), tmp_path / "hf", report=str)
    assert not (tmp_path / "hf").exists()
    assert (tmp_path / "hf.unchecked" / "config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"moe": MOE}, "for Qwen3 alone .qwen3_moe.; this model has experts .config.moe. in a decoder 'llama'"),
        ({"model_type": "qwen3", "moe": MOE | {"use_residual": True}}, "use_residual is True"),
        ({"model_type": "phi"}, "lm_head has a bias"),
        ({"tower": "dinov2", "mm_image_size": None}, "'dinov2' is none that readers"),
        ({"mm_projector_type": "mlp3x_gelu"}, "is not two linear layers"),
        ({"tower": None}, "no vision tower"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused_before_anything_is_written(full_directory, tmp_path, arguments, words):
    source = full_directory(**arguments)
    with pytest.raises(ValueError, match=f"{words}.*stays loadable here"):
        convert(source, tmp_path / "hf", report=str)
    assert {path.name for path in tmp_path.iterdir()} == {"ours"}


def test_batch_of_unequal_questions_is_padded_for_generation(full_directory, tmp_path):
    convert(full_directory(conv_template="v1"), tmp_path / "hf", report=str)
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    greedy = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    alone = []
    for conversation in QUESTIONS:
        inputs = processor.apply_chat_template(conversation, **options)
        alone.append(model.generate(**inputs, **greedy)[0, -6:].tolist())
    together = processor.apply_chat_template(QUESTIONS, processor_kwargs={"padding": True}, **options)
    assert together["attention_mask"].min() == 0
    assert model.generate(**together, **greedy)[:, -6:].tolist() == alone


def test_name_that_is_nowhere_is_named_when_there_is_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="'some/absent' is not in the cache"):
        convert("some/absent", tmp_path / "new", report=str)


def test_wrong_directories_are_refused_with_reasons(full_directory, toy_llm_dir, tmp_path):
    source = full_directory()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there already and not empty"):
        convert(source, tmp_path / "full", report=str)
    with pytest.raises(OSError, match="there is no such directory"):
        convert(tmp_path / "absent", tmp_path / "new", report=str)
    with pytest.raises(ValueError, match="a plain llama and no LLaVA model"):
        convert(toy_llm_dir("llama"), tmp_path / "new", report=str)
    with pytest.raises(ValueError, match="layout of LLaVA and of this package already"):
        convert(source, tmp_path / "new", to="llava", report=str)
    config = json.loads((source / "config.json").read_text()) | {"base_model_name_or_path": "some/base"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"holds only what was trained.*llava-lite merge"):
        convert(source, tmp_path / "new", report=str)
    # A merge would not mend this.
    prompts = {"mm_injection": "adaption_prompt", "adaption_prompt_layers": 2, "mm_projector_type": "query_vit"}
    (source / "config.json").write_text(json.dumps(config | prompts))
    with pytest.raises(ValueError, match="no prompts in its attention"):
        convert(source, tmp_path / "new", report=str)


def test_command_line_converts_and_tells(full_directory, tmp_path):
    source = full_directory(conv_template="v1")
    command = [sys.executable, "-m", "llava_lite.cli", "convert", str(source), str(tmp_path / "hf")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "largest logit difference 0; greedy tokens agree" in done.stdout
    again = subprocess.run([*command, "--to", "transformers"], capture_output=True, text=True, timeout=240)
    assert again.returncode == 1
    assert again.stderr.splitlines()[-1].startswith("llava-lite convert: ")
    assert "not empty" in again.stderr


OWN_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {% for part in m['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def foreign_directory(full_directory, tmp_path):
    """Return a function: file of the chat template, arguments of full_directory -> a directory without our record."""

    def make(place="chat_template.jinja", **kwargs):
        directory = tmp_path / "foreign"
        convert(full_directory(**kwargs), directory, report=str)
        config = json.loads((directory / "config.json").read_text())
        del config["llava_lite"]
        (directory / "config.json").write_text(json.dumps(config))
        for name in ("tokenizer_config.json", "processor_config.json"):
            fields = json.loads((directory / name).read_text())
            fields.pop("chat_template", None)
            (directory / name).write_text(json.dumps(fields))
        (directory / "chat_template.jinja").unlink()
        text = OWN_TEMPLATE if place.endswith("jinja") else json.dumps({"chat_template": OWN_TEMPLATE})
        (directory / place).write_text(text)
        return directory

    return make


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json"])
@pytest.mark.parametrize("tokenizer", ["always", "first"])
def test_directory_of_transformers_is_asked_as_its_own_chat_template_says(
    foreign_directory, toy_tokenizer, place, tokenizer
):
    tokenizer = first_space_only(toy_tokenizer) if tokenizer == "first" else toy_tokenizer
    directory = foreign_directory(place, tokenizer=tokenizer)
    model, processor = load(directory, device="cpu")
    assert processor.render([("<image>\nWho is it?", None)]).text == "[user] <image>Who is it? [assistant]"
    hf, hf_processor = (
        AutoModelForImageTextToText.from_pretrained(directory),
        AutoProcessor.from_pretrained(directory),
    )
    conversation = [
        {"role": "user", "content": [{"type": "image", "image": WIDE}, {"type": "text", "text": "Who is it?"}]}
    ]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    inputs = hf_processor.apply_chat_template(conversation, **options)
    asked, _ = prepare(processor, ["Who is it?"], [WIDE], history=[None])
    assert torch.equal(asked["input_ids"], inputs["input_ids"])
    assert torch.equal(asked["pixel_values"], inputs["pixel_values"])
    tokens = hf.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    expected = hf_processor.decode(tokens, skip_special_tokens=True).strip()
    assert reply(model, processor, "Who is it?", WIDE, max_new_tokens=8) == expected
    assert_transformers_agrees(directory, directory)


def test_image_as_base64_and_a_streamer_reach_a_foreign_model_too(foreign_directory):
    _, processor = load(foreign_directory(), device="cpu")
    image = verify.draw(40, 30)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    pixels = []
    for shown in ({"image": image}, {"base64": encoded}):
        content = [{"type": "image", **shown}, {"type": "text", "text": "What is this?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            streamer=None,
        )
        pixels.append(inputs["pixel_values"])
    assert torch.equal(*pixels)


def test_messages_reach_the_own_chat_template_as_they_are(foreign_directory):
    directory = foreign_directory()
    _, processor = load(directory, device="cpu")
    image = {"type": "image", "image": TALL}
    conversation = [
        {"role": "user", "content": [{"type": "text", "text": "First"}, image, {"type": "text", "text": "then."}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [image, image]},
    ]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    assert processor.apply_chat_template(conversation, add_generation_prompt=True) == (
        "[user] First<image>then. [assistant] Yes. [user] <image><image> [assistant]"
    )
    conversation[1]["content"] = [{"type": "text", "text": "Yes."}]
    expected = AutoProcessor.from_pretrained(directory).apply_chat_template(conversation, **options)
    found = processor.apply_chat_template(conversation, **options)
    assert all(torch.equal(found[name], expected[name]) for name in ("input_ids", "attention_mask", "pixel_values"))


def test_model_of_transformers_becomes_one_of_ours_and_again_one_of_transformers(foreign_directory, tmp_path):
    directory = foreign_directory(image_aspect_ratio="pad")
    assert convert(directory, tmp_path / "llava", report=str).logits <= 1e-5
    assert_transformers_agrees(tmp_path / "llava", directory)
    # LLaVA's own code looks there, and nowhere else.
    assert json.loads((tmp_path / "llava" / "config.json").read_text())["image_aspect_ratio"] == "pad"
    assert convert(tmp_path / "llava", tmp_path / "again", report=str).logits <= 1e-5
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == OWN_TEMPLATE


def test_way_to_llava_is_refused_where_it_reads_other_ids(foreign_directory, toy_tokenizer, tmp_path):
    directory = foreign_directory(tokenizer=first_space_only(toy_tokenizer))
    with pytest.raises(ValueError, match=r"as a text of its own, which gives other ids .*stays loadable here"):
        convert(directory, tmp_path / "llava", report=str)
    assert not list(tmp_path.glob("llava*"))


@pytest.mark.parametrize(("tower", "model_type", "moe"), [("clip", "llama", None), ("siglip", "qwen3", MOE)])
def test_images_of_any_resolution_become_llava_next(full_directory, tmp_path, tower, model_type, moe):
    pinpoints = [[32, 64], [64, 32], [64, 64], [96, 32]]
    source = full_directory(
        model_type,
        moe=moe,
        conv_template="mistral_instruct",
        tower=tower,
        image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints=pinpoints,
    )
    gap = convert(source, tmp_path / "hf", report=str)
    assert gap.logits <= 1e-5
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlavaNextForConditionalGeneration"]
    assert config["image_grid_pinpoints"] == [[height, width] for width, height in pinpoints]
    assert "image_newline" in load_file(tmp_path / "hf" / "model.safetensors")
    assert_transformers_agrees(source, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "back", report=str)
    before, after = (load_file(directory / "model.safetensors") for directory in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_directory_is_pushed_once_it_has_passed(full_directory, client, tmp_path):
    source = full_directory(conv_template="v1")
    code = f"""
        import sys
        from llava_lite.cli import main
        sys.exit(main(["convert", {str(source)!r}, {str(tmp_path / "hf")!r}, "--push-to-hub", "tester/hf"]))
        """
    assert client(code, start="").splitlines()[-1].startswith("http")
    code = """
        from transformers import AutoModelForImageTextToText, AutoProcessor
        model = AutoModelForImageTextToText.from_pretrained("tester/hf")
        print(type(model).__name__, type(AutoProcessor.from_pretrained("tester/hf")).__name__)
        """
    printed = client(code, cache="other", start="")
    assert printed.splitlines()[-1] == "LlavaForConditionalGeneration LlavaProcessor"


def test_our_classes_open_what_transformers_saved(full_directory, tmp_path):
    from llava_lite.model import LlavaMistralForCausalLM
    from llava_lite.model.builder import load_pretrained_model

    convert(full_directory("mistral", conv_template="v1"), tmp_path / "written", report=str)
    hf = AutoModelForImageTextToText.from_pretrained(tmp_path / "written")
    # transformers 5 names the tower's weights otherwise than the released checkpoints do.
    hf.save_pretrained(tmp_path / "a-llama-lora")
    AutoProcessor.from_pretrained(tmp_path / "written").save_pretrained(tmp_path / "a-llama-lora")
    ids = torch.arange(1, 30)[None]
    expected = hf(ids).logits
    model = LlavaMistralForCausalLM.from_pretrained(tmp_path / "a-llama-lora")
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    _, loaded, image_processor, _ = load_pretrained_model(tmp_path / "a-llama-lora", None, "llava-qwen", device="cpu")
    assert type(loaded) is LlavaMistralForCausalLM
    torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert image_processor.crop_size["height"] == 32
    # What a training stage starts from.
    begun = assemble(str(tmp_path / "a-llama-lora"), config_overrides={"image_aspect_ratio": "pad"})
    torch.testing.assert_close(begun(ids).logits, expected, atol=1e-5, rtol=1e-5)
    processor = LlavaLiteProcessor.from_pretrained(tmp_path / "a-llama-lora")
    assert processor.image_token_index == hf.config.image_token_index
