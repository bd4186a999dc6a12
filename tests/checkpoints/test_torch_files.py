"""Files that other systems wrote with torch.save: hand-made ones open, and nothing in them is run."""

import argparse
import hashlib
import json
import os

import pytest
import torch
from hub_client import run_client
from toy_originals import (
    ADAPTER_PARAMS,
    HEADS,
    PARAMS,
    VOCAB,
    accessory_state,
    adapter_full,
    adapter_release,
    imagebind_release,
    meta_state,
)

from llava_lite.checkpoints.torch_files import is_torch_checkpoint, read_torch_checkpoint
from llava_lite.formats import accessory, llama_adapter


def write_meta(directory, params=PARAMS, state=None):
    """Write a directory of Meta's layout, as of LLaMA 7B."""
    directory.mkdir()
    torch.save(meta_state(params) if state is None else state, directory / "consolidated.00.pth")
    (directory / "params.json").write_text(json.dumps(params))
    return directory


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_metas_directory_is_read(tmp_path):
    directory = write_meta(tmp_path / "7B")
    kind, params, weights = read_torch_checkpoint(directory)
    assert (kind, params) == ("meta_llama", PARAMS)
    assert same(weights, meta_state())
    assert is_torch_checkpoint(directory)
    assert not is_torch_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        (adapter_release("BIAS"), "llama_adapter"),
        (imagebind_release(), "imagebind_llm"),
        (accessory_state("llama_qformerv2"), "accessory"),
        (meta_state(), "meta_llama"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_of_each_system_is_told_by_its_keys(state, kind, tmp_path):
    file = tmp_path / "weights.pth"
    torch.save({"model": state, "config": {"w_bias": True}}, file)
    found = read_torch_checkpoint(file)
    assert found.kind == kind
    assert same(found.weights, state)
    assert is_torch_checkpoint(file)


def test_settings_of_a_run_beside_the_weights_are_read_without_running_code(tmp_path):
    file = tmp_path / "checkpoint-3.pth"
    args = argparse.Namespace(batch_size=4, lr=None, distributed=False, output_dir="./output")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict()
    torch.save({"model": adapter_full("BIAS"), "optimizer": optimizer, "epoch": 3, "scaler": {}, "args": args}, file)
    kind, params, weights = read_torch_checkpoint(file)
    assert (kind, params) == ("llama_adapter", {})
    options = {"mm_query_heads": 4, "vision_config": {"num_attention_heads": HEADS}}
    fields = llama_adapter.config_from(ADAPTER_PARAMS, weights, **options)
    assert "model.embed_tokens.weight" in llama_adapter.weights_from(weights, fields)


class Evil:
    """Runs a command when a plain pickle of it is opened."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_file_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": adapter_release("BIAS"), "args": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth' cannot be read as weights .*a pickle with code in it, .*mkdir"):
        read_torch_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "holds a list and no named tensors"),
        ({"model": {"a": 1}}, r"more than named tensors: \['a'\]"),
        ({"model": {"a": torch.ones(1)}}, r"holds \['a'\] .*is of no system that is known: meta_llama, llama_adapter"),
        ({}, "holds no weights"),
    ],
)
def test_files_of_something_else_are_refused(content, words, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=words):
        read_torch_checkpoint(tmp_path / "x.pth")


def test_a_file_that_is_cut_short_is_named(tmp_path):
    file = write_meta(tmp_path / "7B") / "consolidated.00.pth"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(
        ValueError, match=r"consolidated\.00\.pth' cannot be read as weights .*cut short after 1000 bytes"
    ):
        read_torch_checkpoint(tmp_path / "7B")


def test_sha256_in_a_name_is_checked(tmp_path):
    torch.save(adapter_release("BIAS"), tmp_path / "x.pth")
    digest = hashlib.sha256((tmp_path / "x.pth").read_bytes()).hexdigest()
    file = (tmp_path / "x.pth").rename(tmp_path / f"{digest}_BIAS-7B.pth")
    assert read_torch_checkpoint(file).kind == "llama_adapter"
    other = file.rename(tmp_path / f"{'0' * 64}_BIAS-7B.pth")
    with pytest.raises(ValueError, match="is not the file whose sha256 is in its name"):
        read_torch_checkpoint(other)


def test_a_base_and_an_adapter_are_read_as_one(tmp_path):
    directory = write_meta(tmp_path / "7B", ADAPTER_PARAMS)
    torch.save({"model": adapter_release("LORA-BIAS")}, tmp_path / "LORA-BIAS-7B.pth")
    kind, params, weights = read_torch_checkpoint(directory, tmp_path / "LORA-BIAS-7B.pth")
    assert (kind, params) == ("llama_adapter", ADAPTER_PARAMS)
    fields = llama_adapter.config_from(params, weights, mm_query_heads=4)
    ours = llama_adapter.weights_from(weights, fields)
    # Written as a release again, the file holds what was trained alone, and opens as one.
    torch.save(llama_adapter.release(ours, fields), tmp_path / "again.pth")
    assert same(read_torch_checkpoint(tmp_path / "again.pth").weights, adapter_release("LORA-BIAS"))
    assert ours["model.embed_tokens.weight"].shape == (VOCAB, 32)
    # Norms are those that were trained.
    assert torch.equal(ours["model.norm.weight"], adapter_release("LORA-BIAS")["llama.norm.weight"])
    torch.save({"model": imagebind_release()}, tmp_path / "7B.pth")
    with pytest.raises(ValueError, match="is of imagebind_llm and what it goes on is of llama_adapter"):
        read_torch_checkpoint(tmp_path / "LORA-BIAS-7B.pth", tmp_path / "7B.pth")


def write_accessory(directory, shards, suffix="model", **meta):
    directory.mkdir()
    for rank, shard in enumerate(shards):
        torch.save({"model": shard}, directory / f"consolidated.{rank:02d}-of-{len(shards):02d}.{suffix}.pth")
    (directory / "config.json").write_text(json.dumps(PARAMS | {"lora_rank": -1}))
    if meta:
        (directory / "meta.json").write_text(json.dumps(meta))
    return directory


# What two ranks hold apart, and the dimension that is cut.
CUTS = dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output"), 0) | dict.fromkeys(("wo", "w2", "tok_embeddings"), 1)


def halves(state):
    """Return the state dicts of two ranks."""
    cut = {name: CUTS[name.split(".")[-2]] for name in state if name.split(".")[-2] in CUTS}
    parts = {name: state[name].chunk(2, dimension) for name, dimension in cut.items()}
    return [{name: parts[name][rank] if name in parts else w for name, w in state.items()} for rank in (0, 1)]


def test_accessorys_shards_and_differences_are_read_on_top_of_metas_base(tmp_path):
    state = accessory_state("llama_qformerv2")
    full = write_accessory(tmp_path / "full", halves(state))
    kind, params, weights = read_torch_checkpoint(full)
    assert (kind, params["dim"]) == ("accessory", 32)
    assert same(weights, state)
    assert accessory.kind_of(weights) == "llama_qformerv2"
    base = write_meta(tmp_path / "13B")
    before = {f"llma.{name}": w for name, w in meta_state().items() if name != "rope.freqs"}
    difference = {name: w - before[name] if name in before else w for name, w in state.items()}
    added = write_accessory(tmp_path / "diff", halves(difference), "model-diff", llama_type="llama_qformerv2")
    _, _, summed = read_torch_checkpoint(base, added)
    for name, tensor in state.items():
        # A sum and a difference in float32.
        torch.testing.assert_close(summed[name], tensor, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="is a difference; give the model that it is added to before it"):
        read_torch_checkpoint(added)
    wrong = write_accessory(tmp_path / "wrong", [state], llama_type="llama_ens5")
    with pytest.raises(ValueError, match="says 'llama_ens5' and the weights are of 'llama_qformerv2'"):
        read_torch_checkpoint(wrong)


UPLOAD = """
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("tester/accessory")
api.upload_folder(repo_id="tester/accessory", folder_path=DIRECTORY, path_in_repo="finetune/13b")
api.upload_file(path_or_fileobj=b"other", path_in_repo="finetune/13b/notes.bin", repo_id="tester/accessory")
"""
READ = """
from llava_lite.checkpoints.torch_files import read_torch_checkpoint
kind, params, weights = read_torch_checkpoint("hf://tester/accessory/finetune/13b")
print(kind, params["dim"], len(weights))
try:
    read_torch_checkpoint("hf://tester/absent")
except OSError as error:
    print(type(error).__name__, error)
"""


def test_a_repository_of_the_hub_is_read_as_accessory_spells_it(hub, tmp_path):
    state = accessory_state("llama_qformerv2")
    directory = write_accessory(tmp_path / "full", halves(state))
    run_client(hub, tmp_path / "tester", f"DIRECTORY = {str(directory)!r}\n{UPLOAD}", start="")
    kind, absent = run_client(hub, tmp_path / "reader", READ, start="").splitlines()
    assert kind == f"accessory 32 {len(state)}"
    assert absent.startswith("HubError 'tester/absent' is no directory here, and the Hub shows no repository")
    fetched = {path.name for path in (tmp_path / "reader").rglob("*") if path.is_symlink()}
    assert fetched == {"consolidated.00-of-02.model.pth", "consolidated.01-of-02.model.pth", "config.json"}
    with pytest.raises(ValueError, match="names no repository; write hf://user/name"):
        read_torch_checkpoint("hf://tester")


def test_missing_and_mixed_files_are_named(tmp_path):
    directory = write_accessory(tmp_path / "full", halves(accessory_state("llama_qformerv2")))
    torch.save({}, directory / "consolidated.00.pth")
    with pytest.raises(
        ValueError, match=r"two checkpoints, consolidated\.00-of-02\.model\.pth and consolidated\.00\.pth"
    ):
        read_torch_checkpoint(directory)
    (directory / "consolidated.00.pth").unlink()
    (directory / "consolidated.00-of-02.model.pth").unlink()
    with pytest.raises(OSError, match=r"has 1 of the 2 files .* those of ranks \[0\] are missing"):
        read_torch_checkpoint(directory)
    with pytest.raises(OSError, match=r"holds no consolidated\.\*\.pth"):
        read_torch_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_torch_checkpoint(tmp_path / "nothing.pth")
