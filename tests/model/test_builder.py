"""load_pretrained_model: every kind of directory, from any name, on any device that there is."""

import importlib.util
import json
import logging
import shutil
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig

from llava_lite.inference import reply
from llava_lite.mm_utils import process_images, tokenizer_image_token
from llava_lite.model import LlavaLlamaConfig, LlavaLlamaForCausalLM, LlavaQwen2ForCausalLM
from llava_lite.model.builder import load_pretrained_model, placement
from llava_lite.model.quantization import one_request
from llava_lite.processing.processor import LlavaLiteProcessor

MOE = {
    "moe_enable": True,
    "moe_mode": "sparse",
    "num_experts": [4],
    "top_k_experts": 2,
    "router_aux_loss_coef": 0.01,
}
IMAGE = Image.new("RGB", (40, 30), (200, 80, 10))


def logits(model, tokenizer, image_processor):
    ids = tokenizer_image_token("USER: <image>\nHello! ASSISTANT:", tokenizer, return_tensors="pt")[None]
    with torch.no_grad():
        return model(ids, images=process_images([IMAGE], image_processor, model.config)).logits


def projector_directory(model, path, base, tokenizer=None):
    """Write what LLaVA's stage 1 leaves: config.json and mm_projector.bin."""
    path.mkdir()
    state = {k: v.clone() for k, v in model.state_dict().items() if "mm_projector" in k}
    torch.save(state, path / "mm_projector.bin")
    config = model.config.to_dict() | {"base_model_name_or_path": base, "vision_config": None}
    (path / "config.json").write_text(json.dumps(config | {"architectures": [type(model).__name__]}))
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize(("model_type", "moe"), [("llama", None), ("qwen2", None), ("llama", MOE)])
@pytest.mark.parametrize("name", ["a-directory-of-any-name", "vicuna-mpt-lora-moe-qwen"])
def test_full_checkpoint_opens_under_any_name(toy_model, toy_tokenizer, tmp_path, model_type, moe, name):
    model = toy_model(model_type, moe=moe)
    model.save_pretrained(tmp_path / name)
    toy_tokenizer.save_pretrained(tmp_path / name)
    tokenizer, loaded, image_processor, context_len = load_pretrained_model(
        str(tmp_path / name), None, "llava-mistral-lora", device="cpu"
    )
    assert type(loaded) is type(model)
    assert not loaded.training
    assert context_len == 2048
    assert torch.equal(logits(loaded, tokenizer, image_processor), logits(model, toy_tokenizer, image_processor))


def test_arguments_of_evaluators_are_accepted(toy_model, toy_tokenizer, tmp_path):
    toy_model(tokenizer_model_max_length=777).save_pretrained(tmp_path)
    toy_tokenizer.save_pretrained(tmp_path)
    _, model, _, context_len = load_pretrained_model(
        model_path=tmp_path,
        model_base=None,
        model_name="llava-v1.5-7b",
        device="cpu",
        device_map="cpu",
        multimodal=True,
        attn_implementation="eager",
        customized_config=None,
        torch_dtype="bfloat16",
        overwrite_config={"image_aspect_ratio": "pad"},
    )
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert model.config.image_aspect_ratio == "pad"
    assert context_len == 777
    with pytest.raises(ValueError, match="unknown dtype 'half-ish'"):
        load_pretrained_model(tmp_path, device="cpu", dtype="half-ish")


def test_customized_config_replaces_the_checkpoints(toy_model, toy_tokenizer, tmp_path):
    model = toy_model()
    model.save_pretrained(tmp_path / "model")
    toy_tokenizer.save_pretrained(tmp_path / "model")
    model.config.image_aspect_ratio = "pad"
    model.config.save_pretrained(tmp_path / "config")
    for form in (str(tmp_path / "config"), model.config, {"image_aspect_ratio": "pad"}):
        _, loaded, _, _ = load_pretrained_model(tmp_path / "model", device="cpu", customized_config=form)
        assert loaded.config.image_aspect_ratio == "pad"


def test_projector_is_loaded_on_the_base_that_is_given(toy_model, toy_tokenizer, toy_llm_dir, tmp_path):
    model = toy_model()
    directory = projector_directory(model, tmp_path / "stage1", base=None)
    tokenizer, loaded, image_processor, _ = load_pretrained_model(directory, str(toy_llm_dir("llama")), device="cpu")
    assert type(loaded) is LlavaLlamaForCausalLM
    assert torch.equal(logits(loaded, tokenizer, image_processor), logits(model, toy_tokenizer, image_processor))


def test_partial_directory_names_its_base(toy_model, toy_tokenizer, toy_llm_dir, tmp_path):
    model = toy_model("qwen2", conv_template="plain")
    directory = projector_directory(model, tmp_path / "stage1", str(toy_llm_dir("qwen2")), toy_tokenizer)
    tokenizer, loaded, image_processor, _ = load_pretrained_model(directory, device="cpu")
    assert type(loaded) is LlavaQwen2ForCausalLM
    assert loaded.config.conv_template == "plain"
    assert torch.equal(logits(loaded, tokenizer, image_processor), logits(model, toy_tokenizer, image_processor))
    # Another base may be named, as after a move.
    shutil.copytree(toy_llm_dir("qwen2"), tmp_path / "moved")
    _, moved, _, _ = load_pretrained_model(directory, str(tmp_path / "moved"), device="cpu")
    assert torch.equal(logits(moved, tokenizer, image_processor), logits(model, toy_tokenizer, image_processor))
    with pytest.raises(OSError, match="nowhere"):
        load_pretrained_model(directory, str(tmp_path / "nowhere"), device="cpu")


def test_base_may_itself_be_only_what_was_trained(toy_model, toy_tokenizer, toy_llm_dir, tmp_path):
    first = projector_directory(toy_model(), tmp_path / "first", str(toy_llm_dir("llama")), toy_tokenizer)
    model = toy_model(conv_template="v1")
    with torch.no_grad():
        model.model.mm_projector[0].weight.mul_(2)
    second = projector_directory(model, tmp_path / "second", str(first))
    tokenizer, loaded, image_processor, _ = load_pretrained_model(second, device="cpu")
    assert loaded.config.conv_template == "v1"
    assert loaded.config.base_model_name_or_path is None
    assert torch.equal(logits(loaded, tokenizer, image_processor), logits(model, toy_tokenizer, image_processor))


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the extra 'peft'")
def test_lora_directory_is_merged_into_its_base(toy_model, toy_tokenizer, toy_llm_dir, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = toy_model()
    lora = LoraConfig(r=4, target_modules=r"model\.layers\.\d+\.self_attn\.q_proj", init_lora_weights=False)
    tuned = get_peft_model(toy_model(), lora)
    directory = tmp_path / "tuned"
    tuned.save_pretrained(directory)
    config = model.config.to_dict() | {"base_model_name_or_path": str(toy_llm_dir("llama")), "vision_config": None}
    (directory / "config.json").write_text(json.dumps(config))
    state = {k: v.clone() for k, v in model.state_dict().items() if "mm_projector" in k}
    save_file(state, directory / "trained.safetensors")
    toy_tokenizer.save_pretrained(directory)
    tokenizer, loaded, image_processor, _ = load_pretrained_model(directory, device="cpu")
    expected = logits(tuned.eval().merge_and_unload(), toy_tokenizer, image_processor)
    found = logits(loaded, tokenizer, image_processor)
    # The same matmul summed in another order.
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, logits(model, tokenizer, image_processor), atol=1e-3)


def test_plain_llm_opens_without_an_image_processor(toy_llm_dir):
    tokenizer, model, image_processor, context_len = load_pretrained_model(toy_llm_dir("phi"), device="cpu")
    assert image_processor is None
    assert context_len == 2048
    assert reply(model, LlavaLiteProcessor.from_config(model.config, tokenizer), "Hello!", max_new_tokens=4)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the extra 'peft'")
def test_lora_on_a_plain_llm_is_merged(toy_llm_dir, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(toy_llm_dir("llama"), dtype=torch.float32)
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    tuned.save_pretrained(tmp_path)
    tokenizer, model, image_processor, _ = load_pretrained_model(tmp_path, str(toy_llm_dir("llama")), device="cpu")
    ids = tokenizer("Hello!", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, tuned(ids).logits, atol=1e-5)
    assert image_processor is None


def test_half_precision_checkpoint_is_read_as_float32_on_the_cpu(toy_model, toy_tokenizer, tmp_path):
    toy_model().half().save_pretrained(tmp_path)
    toy_tokenizer.save_pretrained(tmp_path)
    assert load_pretrained_model(tmp_path, device="cpu")[1].dtype == torch.float32
    assert load_pretrained_model(tmp_path, device="cpu", dtype=torch.float16)[1].dtype == torch.float16


def test_loading_and_answering_need_no_accelerate(toy_model, toy_tokenizer, tmp_path):
    """In a process where the optional libraries cannot be imported."""
    import subprocess
    import sys

    toy_model(moe=MOE).save_pretrained(tmp_path)
    toy_tokenizer.save_pretrained(tmp_path)
    code = f"""
import importlib.abc, importlib.util, sys
absent = ("accelerate", "deepspeed", "peft", "datasets", "bitsandbytes", "torchvision", "matplotlib", "sklearn")
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
found = importlib.util.find_spec
def find_spec(name, package=None):
    return None if name.split(".")[0] in absent else found(name, package)
importlib.util.find_spec = find_spec
import importlib.metadata as metadata
distributions = metadata.packages_distributions
metadata.packages_distributions = lambda: {{k: v for k, v in distributions().items() if k not in absent}}
from PIL import Image
from llava_lite.inference import load, reply
model, processor = load({str(tmp_path)!r}, device="cpu")
print(len(reply(model, processor, "Hello!", Image.new("RGB", (9, 9)), max_new_tokens=3)) >= 0)
print(sorted(set(absent) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-2:] == ["True", "[]"]


@pytest.mark.parametrize(
    ("device", "device_map", "num_gpus", "expected"),
    [
        ("cuda", "auto", 0, ("cpu", None)),
        ("cpu", "auto", 2, ("cpu", None)),
        ("cuda", "auto", 1, ("cuda", None)),
        ("cuda", "auto", 2, ("cuda", "auto")),
        ("cuda:1", "auto", 2, ("cuda:1", None)),
        ("cpu", "cpu", 2, ("cpu", None)),
        ("cuda", {"": "cpu"}, 2, ("cpu", None)),
        ("cuda", {"": 1}, 2, ("cuda:1", None)),
        ("cuda", "cuda:1", 2, ("cuda:1", None)),
        ("cuda", {"model": 0, "lm_head": 1}, 2, ("cuda", {"model": 0, "lm_head": 1})),
    ],
)
def test_model_goes_to_its_device_itself_unless_it_must_be_spread(
    monkeypatch, caplog, device, device_map, num_gpus, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    with caplog.at_level(logging.WARNING):
        found, found_map = placement(device, device_map)
    assert (found, found_map) == (torch.device(expected[0]), expected[1])
    assert ("no CUDA device" in caplog.text) == (num_gpus == 0)
    quantised = placement(device, device_map, quantised=True)[1]
    assert quantised == (expected[1] or {"": torch.device(expected[0])})


def test_missing_bitsandbytes_says_what_to_install(monkeypatch, toy_llm_dir):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"load_4bit=True needs bitsandbytes.*llava-lite\[quant\]"):
        load_pretrained_model(toy_llm_dir("llama"), device="cpu", load_4bit=True)
    with pytest.raises(ValueError, match="exclude each other"):
        one_request(True, True, None)
    assert one_request(False, False, None) is None


def wide_model(toy_tower_dir, moe=None):
    """Return a model 64 wide: on a CPU, 4 bits come in blocks of 64."""
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 4, "vocab_size": 462, "pad_token_id": 0, "initializer_range": 0.1}
    vision = AutoConfig.from_pretrained(toy_tower_dir("clip"))
    torch.manual_seed(4)
    tower = {"mm_vision_tower": str(toy_tower_dir("clip")), "vision_config": vision}
    config = LlavaLlamaConfig(**text, **tower, mm_projector_type="mlp2x_gelu", moe=moe)
    return LlavaLlamaForCausalLM(config).eval()


def wide_logits(model, device="cpu"):
    ids = torch.tensor([[1, 50, 60, -200, 70, 80]], device=device)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        return model(ids, images=pixels).logits.float().cpu()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra 'quant'")
@pytest.mark.parametrize("moe", [None, {**MOE, "use_residual": True}], ids=["dense", "moe"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_model_computes_with_the_weights_that_it_holds(bits, moe, toy_tower_dir, toy_tokenizer, tmp_path):
    """Against the same model with every 4 or 8 bit matrix written out again in full precision."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    wide_model(toy_tower_dir, moe).save_pretrained(tmp_path)
    toy_tokenizer.save_pretrained(tmp_path)
    _, plain, _, _ = load_pretrained_model(tmp_path, device="cpu")
    _, model, _, _ = load_pretrained_model(tmp_path, device="cpu", **{f"load_{bits}bit": True})
    quantised = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__ == "Linear4bit":
            quantised[f"{name}.weight"] = dequantize_4bit(weight.data, weight.quant_state).float()
        elif type(module).__name__ == "Linear8bitLt":
            quantised[f"{name}.weight"] = int8_vectorwise_dequant(weight.data, weight.SCB).float()
    linear = {f"model.layers.{i}.self_attn.{k}_proj.weight" for i in (0, 1) for k in "qkvo"}
    linear |= {
        f"model.layers.{i}.mlp.{k}_proj.weight" for i in ((1,) if moe else (0, 1)) for k in ("gate", "up", "down")
    }
    linear |= {f"model.layers.0.mlp.mlp.{k}_proj.weight" for k in ("gate", "up", "down") if moe}
    assert quantised.keys() == linear
    for name, weight in plain.named_parameters():
        if name in quantised:
            assert 0 < (weight - quantised[name]).abs().max() < 0.1
            weight.data = quantised[name]
    # 8 bits round what goes into a layer too, to 1 in 127; 4 bits multiply in half precision.
    error = (wide_logits(model) - wide_logits(plain)).abs().max()
    assert error < {8: 0.05, 4: 0.01}[bits] * wide_logits(plain).abs().max()
    assert model.generate(torch.tensor([[1, 50]]), images=None, max_new_tokens=2, do_sample=False).shape == (1, 2)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, {"": 0}, None])
def test_a_model_opens_under_every_device_map_that_clients_give(device_map, toy_model, toy_tokenizer, tmp_path):
    model = toy_model()
    model.save_pretrained(tmp_path)
    toy_tokenizer.save_pretrained(tmp_path)
    tokenizer, loaded, image_processor, _ = load_pretrained_model(tmp_path, device_map=device_map)
    home = "cuda:0" if torch.cuda.is_available() and device_map not in ("cpu", {"": "cpu"}) else "cpu"
    assert loaded.device == torch.device(home)
    if home == "cpu":
        assert torch.equal(logits(loaded, tokenizer, image_processor), logits(model, toy_tokenizer, image_processor))


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="a map of several places needs accelerate")
@pytest.mark.parametrize("layout", ["ours", "foreign"])
def test_a_model_is_spread_as_a_map_says(layout, toy_model, toy_tokenizer, toy_tower_dir, tmp_path):
    """One half stays on the disk until it is needed: the only second place that every machine has."""
    model = toy_model()
    model.save_pretrained(tmp_path / "model")
    toy_tokenizer.save_pretrained(tmp_path / "model")
    if layout == "foreign":
        path = tmp_path / "model" / "config.json"
        fields = json.loads(path.read_text()) | {"model_type": "moe_llava_llama", "image_projector_type": "mlp2x_gelu"}
        path.write_text(json.dumps(fields))
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "model.vision_tower"), "cpu")
    places |= {"model.mm_projector": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(4)}
    tokenizer, loaded, image_processor, _ = load_pretrained_model(
        tmp_path / "model", device="cpu", device_map=places, offload_folder=str(tmp_path / "disk")
    )
    assert loaded.hf_device_map == places
    assert torch.equal(logits(loaded, tokenizer, image_processor), logits(model, toy_tokenizer, image_processor))


def test_directory_that_is_no_checkpoint_says_so(tmp_path):
    with pytest.raises(OSError, match="there is no such directory"):
        load_pretrained_model(tmp_path / "absent", device="cpu")
    (tmp_path / "run" / "checkpoint-7").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-7" / "config.json").write_text("{}")
    with pytest.raises(OSError, match=r"no config\.json; a checkpoint of it is .*checkpoint-7"):
        load_pretrained_model(tmp_path / "run", device="cpu")


def test_a_tokenizer_that_cannot_be_read_is_reported_before_the_weights_are_read(toy_model, tmp_path, monkeypatch):
    # There are no weights here: an attempt to open them first would fail with another message.
    toy_model().config.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "tokenizer.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match="pip install sentencepiece"):
        load_pretrained_model(str(tmp_path), device="cpu")


def test_a_llava_on_an_unknown_decoder_is_reported_with_the_known_ones(toy_model, tmp_path):
    toy_model().config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"model_type": "llava_mpt"}))
    with pytest.raises(ValueError, match=r"decoder that is not known here \(model_type 'llava_mpt'\); known: llama"):
        load_pretrained_model(str(tmp_path), device="cpu")


def test_start_and_end_tokens_are_added_where_the_config_trains_with_them(toy_model, toy_tokenizer, tmp_path):
    model = toy_model(mm_use_im_start_end=True, mm_use_im_patch_token=True)
    rows = model.get_input_embeddings().weight.shape[0]
    model.save_pretrained(tmp_path)
    toy_tokenizer.save_pretrained(tmp_path)
    tokenizer, loaded, _, _ = load_pretrained_model(tmp_path, device="cpu")
    assert tokenizer.convert_tokens_to_ids(["<im_patch>", "<im_start>", "<im_end>"]) == [rows, rows + 1, rows + 2]
    assert loaded.get_input_embeddings().weight.shape[0] == rows + 3
    processor = LlavaLiteProcessor.from_config(loaded.config, tokenizer)
    assert "<im_start><image><im_end>" in processor.render([("<image>\nHello!", None)]).text
