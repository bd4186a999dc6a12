"""A run uploads its finished directory: the files that open the model, and checkpoints only if they are asked for."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hub_client import environment, serving

from llava_lite.model import LlavaLlamaForCausalLM
from llava_lite.train.arguments.parse import parse_args
from llava_lite.train.publish.push import UploadError, check_can_push, push_command, upload

RUN = """
import json
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import get_session
from llava_lite import push_directory
from llava_lite.train.train import train
api = HfApi()
"""


def test_lora_on_a_private_base_is_pushed_and_opened_elsewhere(
    client, stage_flags, toy_llm_dir, toy_tower_dir, toy_data, tmp_path
):
    data = toy_data(tmp_path / "data", num_records=8)
    part = stage_flags("projector", tmp_path / "part", "--max_steps", 1, "--version", "v1", data=data)
    flags = stage_flags("lora", tmp_path / "digits", data=data)
    flags[flags.index("--model_name_or_path") + 1] = "tester/llm"
    flags[flags.index("--vision_tower") + 1] = "tester/tower"
    flags += ["--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1"]
    flags += ["--push_to_hub", "True", "--hub_private_repo", "True"]
    printed = client(
        f"""
        {RUN.strip().replace(chr(10), chr(10) + " " * 8)}
        for name, directory in (("llm", {str(toy_llm_dir("llama"))!r}), ("tower", {str(toy_tower_dir("clip"))!r})):
            api.create_repo(f"tester/{{name}}", private=True)
            api.upload_folder(repo_id=f"tester/{{name}}", folder_path=directory)
        train({flags!r})
        card = ModelCard.load("tester/digits")
        # What ModelCard.validate() asks; with huggingface_hub 1.33 it would ask the real Hub, whatever HF_ENDPOINT is.
        body = dict(repoType="model", content=str(card))
        get_session().post(f"{{api.endpoint}}/api/validate-yaml", json=body).raise_for_status()
        train({part!r})
        push_directory({str(tmp_path / "part")!r}, "tester/part", base="tester/llm", tower="tester/tower")
        print(json.dumps([api.list_repo_files("tester/digits"), card.data.to_dict(), card.text]))
        """
    )
    files, metadata, text = json.loads(printed.splitlines()[-1])
    assert {"config.json", "adapter_model.safetensors", "trained.safetensors", "loss.png", "README.md"} <= set(files)
    assert not [name for name in files if "/" in name or "optimizer" in name or "state" in name or "args" in name]
    assert metadata["base_model"] == "tester/llm"
    assert metadata["base_model_relation"] == "adapter"
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("llava-lite", "image-text-to-text")
    assert "![loss](loss.png)" in text
    assert 'load("tester/digits")' in text
    client(
        f"""
        from llava_lite import load_pretrained_model
        own = dict(token="tester", cache_dir={str(tmp_path / "own")!r}, device="cpu")
        model, processor = load("tester/digits", **own)
        _, again, image_processor, _ = load_pretrained_model("tester/digits", local_files_only=True, **own)
        home = load({str(tmp_path / "digits")!r}, **own)[0].state_dict()
        for opened in (model, again):
            assert all(torch.equal(weight, home[name]) for name, weight in opened.state_dict().items())
        part, home = (load(at, **own)[0] for at in ("tester/part", {str(tmp_path / "part")!r}))
        assert torch.equal(part.model.mm_projector[2].weight, home.model.mm_projector[2].weight)
        assert part.config.mm_vision_tower == "tester/tower"
        assert image_processor.crop_size == processor.image_processor.crop_size
        """,
        token=None,
        cache="stranger",
    )


def test_state_to_resume_from_goes_up_where_it_is_asked_for(client, stage_flags, toy_data, tmp_path):
    data = toy_data(tmp_path / "data", num_records=8)
    flags = stage_flags("moe", tmp_path / "experts", "--max_steps", 2, "--save_strategy", "steps", data=data)
    flags += ["--save_steps", "1", "--push_to_hub", "True", "--hub_model_id", "tester/experts"]
    flags += ["--hub_strategy", "checkpoint", "--hub_always_push", "True"]
    printed = client(
        f"""
        {RUN.strip().replace(chr(10), chr(10) + " " * 8)}
        train({flags!r})
        model = AutoModelForCausalLM.from_pretrained("tester/experts")
        print(json.dumps([api.list_repo_files("tester/experts"), sorted(model.moe_layers())]))
        """
    )
    files, layers = json.loads(printed.splitlines()[-1])
    assert layers == [0, 2]
    assert {"model.safetensors", "expert_load.png", "last-checkpoint/optimizer.pt"} <= set(files)
    assert not [name for name in files if "/" not in name and ("optimizer" in name or "state" in name)]


def test_a_hub_that_is_gone_at_the_end_costs_nothing_of_the_run(stage_flags, tmp_path):
    out = tmp_path / "out"
    flags = stage_flags("full", out, "--max_steps", 60, "--push_to_hub", True, "--hub_model_id", "tester/late")
    flags += ["--hub_revision", "exp", "--hub_private_repo", "True"]
    command = [sys.executable, "-m", "llava_lite.train.train", *flags]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with serving() as address:
        run = subprocess.Popen(command, env=environment(address, tmp_path / "home", PYTHONUNBUFFERED="1"), **streams)
        # The repository is made before the first step.
        printed = [next(run.stdout)]
        while "'loss'" not in printed[-1]:
            printed += [next(run.stdout)]
    printed = "".join([*printed, run.stdout.read()])
    assert run.wait(timeout=300) == 1
    last = printed.splitlines()[-1]
    assert f"the run is complete in {out}, and its upload failed: the Hub at {address} cannot be reached" in last
    push = f"llava-lite push {out} tester/late --revision exp --private"
    assert last.endswith(f"Upload it later: {push}")
    assert "Traceback" not in printed
    assert json.loads((out / "run.json").read_text())["end"]["state"] == "finished"
    assert LlavaLlamaForCausalLM.from_pretrained(out).num_parameters() > 0
    again = subprocess.run(command, **streams, env=environment(address, tmp_path / "home"), timeout=300)
    assert again.returncode == 0
    assert f"to upload it:      {push}" in again.stdout


def test_the_command_that_uploads_later_has_quotes_where_it_needs_them():
    args = SimpleNamespace(output_dir="/tmp/my run", hub_model_id="me/run", hub_revision=None, hub_private_repo=None)
    assert push_command(args) == "llava-lite push '/tmp/my run' me/run"


def test_an_upload_that_fails_for_another_reason_says_the_same(run_stage, tmp_path):
    trainer = run_stage("full", tmp_path, "--max_steps", 1)

    def push_to_hub():
        raise RuntimeError("Data processing error: CAS service error\nsecond line")

    trainer.push_to_hub = push_to_hub
    with pytest.raises(
        UploadError, match=r"complete in .*: Data processing error: CAS service error\. Upload it later"
    ):
        upload(trainer)


def test_part_that_nobody_else_could_open_is_refused_before_anything_is_loaded(stage_flags, tmp_path):
    flags = stage_flags("projector", tmp_path / "out", "--push_to_hub", True, "--hub_model_id", "tester/part")
    model_args, _, training_args = parse_args(flags)
    with pytest.raises(ValueError, match=r"its base .* is a directory of this machine.*--save_full True"):
        check_can_push(model_args, training_args)
    model_args, _, training_args = parse_args([*flags, "--save_full", "True"])
    check_can_push(model_args, training_args)
