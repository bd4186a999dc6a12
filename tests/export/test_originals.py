"""Files of the adapter systems become directories of ours, and a directory of ours becomes a release, bit for bit."""

import json

import pytest
import torch
from toy_originals import ADAPTER_PARAMS, PARAMS, VOCAB, adapter_release, imagebind_release, meta_state, write_clip
from transformers import LlamaConfig, LlamaForCausalLM

from llava_lite.export.convert import convert
from llava_lite.formats import meta_llama
from llava_lite.imagebind_config import ImageBindConfig
from llava_lite.model.builder import load_pretrained_model
from llava_lite.model.encoders.imagebind.model import ImageBindModel
from llava_lite.model.originals import open_original


@pytest.fixture
def base(tmp_path, toy_tokenizer):
    """A plain Llama in Hugging Face's layout, with a tokenizer, of the size of the toys."""
    fields = meta_llama.config_from_params(ADAPTER_PARAMS, VOCAB)
    model = LlamaForCausalLM(LlamaConfig(**{key: value for key, value in fields.items() if key != "model_type"}))
    model.load_state_dict(meta_llama.weights_from(meta_state(ADAPTER_PARAMS), 4))
    model.save_pretrained(tmp_path / "base")
    toy_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def tower(tmp_path):
    """The directory of a CLIP for the releases."""
    return str(write_clip(tmp_path / "clip"))


@pytest.fixture
def release(tmp_path):
    """Return a function: kind -> the file of a release, in the original's names."""

    def write(kind):
        path = tmp_path / f"{kind}.pth"
        torch.save({"model": adapter_release(kind)}, path)
        return path

    return write


@pytest.mark.parametrize("kind", ["BIAS", "LORA-BIAS", "CAPTION"])
def test_a_release_becomes_a_directory_and_is_written_back_bit_for_bit(base, tower, release, tmp_path, kind):
    lines = []
    convert(release(kind), tmp_path / "ours", base=str(base), vision_tower=tower, report=lines.append)
    assert "the trained weights, on" in lines[0]
    fields = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert fields["base_model_name_or_path"] == str(base)
    expected = open_original(release(kind), str(base), tower, dtype=torch.float32)
    ids, images = torch.randint(3, VOCAB, (2, 6)), torch.randn(2, 3, 12, 12)
    opened = type(expected).from_pretrained(tmp_path / "ours", dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(opened(ids, images=images).logits, expected(ids, images=images).logits, atol=1e-4)
    convert(tmp_path / "ours", tmp_path / "back.pth", to="llama-adapter", report=lines.append)
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    original = adapter_release(kind)
    assert back["model"].keys() == original.keys()
    assert all(torch.equal(back["model"][name], weight) for name, weight in original.items())
    assert back["config"]["w_lora"] == (kind == "LORA-BIAS")


def test_metas_directory_becomes_a_complete_model(tmp_path, toy_tokenizer):
    (tmp_path / "7B").mkdir()
    torch.save(meta_state(PARAMS), tmp_path / "7B" / "consolidated.00.pth")
    (tmp_path / "7B" / "params.json").write_text(json.dumps(PARAMS))
    toy_tokenizer.save_pretrained(tmp_path / "words")
    convert(tmp_path / "7B", tmp_path / "ours", tokenizer=str(tmp_path / "words"), report=lambda line: None)
    _, opened, _, _ = load_pretrained_model(str(tmp_path / "ours"), device="cpu")
    ids = torch.randint(3, VOCAB, (2, 6))
    with torch.no_grad():
        expected = open_original(tmp_path / "7B")(ids).logits
        # The tokenizer of the toys has more words.
        assert torch.allclose(opened(ids).logits[..., :VOCAB], expected, atol=1e-5)


def test_a_lora_beside_which_no_base_stands_is_refused_with_what_to_do(tmp_path, release, toy_tokenizer):
    (tmp_path / "7B").mkdir()
    torch.save(meta_state(ADAPTER_PARAMS), tmp_path / "7B" / "consolidated.00.pth")
    (tmp_path / "7B" / "params.json").write_text(json.dumps(ADAPTER_PARAMS))
    with pytest.raises(ValueError, match="Convert its base first, llava-lite convert META_DIRECTORY BASE"):
        convert(release("LORA-BIAS"), tmp_path / "ours", base=str(tmp_path / "7B"))


def test_flags_and_layouts_that_do_not_fit_are_refused(tmp_path, toy_llm_dir, release, base, tower):
    with pytest.raises(ValueError, match=r"--base .* is for files that another system wrote"):
        convert(str(toy_llm_dir()), tmp_path / "out", base="x")
    with pytest.raises(ValueError, match=r"name a new file that ends in \.pth"):
        convert(str(toy_llm_dir()), tmp_path / "out", to="llama-adapter")
    with pytest.raises(ValueError, match="a release of LLaMA-Adapter V2 holds prompts and a query_vit"):
        convert(str(toy_llm_dir()), tmp_path / "out.pth", to="llama-adapter")
    convert(release("BIAS"), tmp_path / "ours", base=str(base), vision_tower=tower, report=lambda line: None)
    fields = json.loads((tmp_path / "ours" / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(json.dumps(fields | {"mm_vision_select_feature": "patch"}))
    with pytest.raises(ValueError, match=r"LLaMA-Adapter V2 reads all of CLIP's tokens after its projection"):
        convert(tmp_path / "ours", tmp_path / "out.pth", to="llama-adapter")
    (tmp_path / "ours" / "config.json").write_text(json.dumps(fields))
    _, merged, _, _ = load_pretrained_model(str(tmp_path / "ours"), device="cpu")
    merged.config.base_model_name_or_path = None
    merged.save_pretrained(tmp_path / "complete")
    with pytest.raises(ValueError, match="no prompts in its attention, and this model has some"):
        convert(tmp_path / "complete", tmp_path / "hf", to="transformers")


def test_imagebind_llm_opens_on_its_base_with_imagebind(tmp_path, base):
    sizes = {"hidden_size": 12, "image_size": 28, "vision_width": 16, "num_hidden_layers": 1, "vision_num_heads": 2}
    encoder = ImageBindModel(ImageBindConfig(modalities=["image"], **sizes))
    encoder.save_pretrained(tmp_path / "imagebind")
    release = imagebind_release(params=ADAPTER_PARAMS, extras=("bias", "lora"))
    torch.save({"model": release}, tmp_path / "7B.pth")
    model = open_original(tmp_path / "7B.pth", str(base), str(tmp_path / "imagebind"), dtype=torch.float32)
    ids, image = torch.randint(3, VOCAB, (1, 6)), torch.randn(1, 3, 28, 28)
    assert (model.config.adaption_prompt_len, model.config.num_prompted_layers) == (1, 3)
    with torch.no_grad():
        embedding = encoder.eval()(image)
        hidden = embedding @ release["image_bind_proj.weight"].T + release["image_bind_proj.bias"]
        for i in (1, 2, 3):
            normed = (
                hidden / (hidden.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * release[f"image_bind_norm_{i}.weight"]
            )
            gate, up = (normed @ release[f"image_bind_f{j}_{i}.weight"].T for j in (1, 3))
            hidden = hidden + (torch.nn.functional.silu(gate) * up) @ release[f"image_bind_f2_{i}.weight"].T
        assert torch.allclose(model.encode_images(image)[:, 0], hidden, rtol=1e-3, atol=1e-3)
        assert model(ids, images=image).logits.shape == (1, 6, VOCAB)
