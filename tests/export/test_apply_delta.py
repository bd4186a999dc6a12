"""`llava-lite apply-delta`: a base and its published differences, in Meta's layout and in Hugging Face's."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_originals import PARAMS, VOCAB, adapter_release, meta_state

from llava_lite import cli


@pytest.fixture
def base(tmp_path):
    """LLaMA's directories: the weights in 7B, the tokenizer beside it."""
    (tmp_path / "7B").mkdir()
    torch.save({name: w.half() for name, w in meta_state().items()}, tmp_path / "7B" / "consolidated.00.pth")
    (tmp_path / "7B" / "params.json").write_text(json.dumps(PARAMS))
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    return tmp_path / "7B"


@pytest.fixture
def delta(tmp_path):
    """Differences without a table of rotary frequencies, and with params of their own."""
    (tmp_path / "delta").mkdir()
    state = {name: w.half() for name, w in meta_state(seed=5).items() if "rope" not in name}
    torch.save(state, tmp_path / "delta" / "consolidated.00.pth")
    (tmp_path / "delta" / "params.json").write_text(json.dumps(PARAMS | {"vocab_size": VOCAB}))
    return tmp_path / "delta"


def test_metas_layout_is_written_with_params_and_tokenizer(base, delta, tmp_path, capsys):
    out = tmp_path / "7B_chinese"
    assert cli.main(["apply-delta", str(base), str(delta), str(out)]) == 0
    written = torch.load(out / "consolidated.00.pth", weights_only=True)
    expected = {
        name: (w.half().double() + meta_state(seed=5)[name].half().double()).half()
        for name, w in meta_state().items()
        if "rope" not in name
    }
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert json.loads((out / "params.json").read_text())["vocab_size"] == VOCAB
    assert (out / "tokenizer.model").read_bytes() == b"pieces"
    assert not (tmp_path / "7B_chinese.unchecked").exists()
    output = capsys.readouterr().out
    assert "consolidated.00.pth, params.json, tokenizer.model" in output
    assert f"{len(expected)} weights" in output
    assert cli.main(["apply-delta", str(base), str(delta), str(out)]) == 1
    assert "is there already and not empty" in capsys.readouterr().err


def test_missing_tokenizer_is_reported(base, delta, tmp_path, capsys):
    (tmp_path / "tokenizer.model").unlink()
    assert cli.main(["apply-delta", str(base), str(delta), str(tmp_path / "out")]) == 0
    assert "no tokenizer.model was found, copy it beside them" in capsys.readouterr().out


def test_hugging_faces_layout_is_written_with_config_and_tokenizer(toy_llm_dir, tmp_path, capsys):
    base, delta, out = toy_llm_dir("llama"), tmp_path / "delta", tmp_path / "out"
    weights = load_file(base / "model.safetensors")
    delta.mkdir()
    save_file(
        {name: torch.full_like(w, 0.25) for name, w in weights.items()}, delta / "model.safetensors", {"format": "pt"}
    )
    assert cli.main(["apply-delta", str(base), str(delta), str(out)]) == 0
    written = load_file(out / "model.safetensors")
    assert all(torch.equal(written[name], (w.float() + 0.25).half()) for name, w in weights.items())
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float16
    assert AutoTokenizer.from_pretrained(out)("a").input_ids == AutoTokenizer.from_pretrained(base)("a").input_ids
    assert "model.safetensors" in capsys.readouterr().out


def test_what_does_not_go_together_is_refused_and_nothing_is_left(base, delta, tmp_path, toy_llm_dir, capsys):
    out = tmp_path / "out"
    assert cli.main(["apply-delta", str(base), str(toy_llm_dir("llama")), str(out)]) == 1
    assert "is in Meta's layout and" in capsys.readouterr().err
    torch.save({"norm.weight": torch.ones(3)}, delta / "consolidated.00.pth")
    assert cli.main(["apply-delta", str(base), str(delta), str(out)]) == 1
    assert "are in the base only" in capsys.readouterr().err
    torch.save({"model": adapter_release("BIAS")}, delta / "consolidated.00.pth")
    assert cli.main(["apply-delta", str(base), str(delta), str(out)]) == 1
    assert "is of llama_adapter and no plain LLaMA" in capsys.readouterr().err
    assert not out.exists()
    assert not (tmp_path / "out.unchecked").exists()
