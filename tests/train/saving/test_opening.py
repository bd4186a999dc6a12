"""checkpoint-N opens as the model that the run held: as what it would have written, had it ended there."""

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch

from llava_lite.checkpoints.manifest import BrokenCheckpoint, list_files
from llava_lite.checkpoints.step_weights import FOR_A_RUN, holds_step
from llava_lite.export.merge import merge
from llava_lite.inference import load, reply
from llava_lite.model import LlavaLlamaForCausalLM
from llava_lite.processing.processor import LlavaLiteProcessor
from llava_lite.train.train import train

HERE = Path(__file__).parents[1]
ROOT = HERE.parents[1]
# A run that ends where it saves: its directory and its checkpoint-3 hold the same model.
SAVED = ["--max_steps", "3", "--save_strategy", "steps", "--save_steps", "3", "--report_to", "none"]
ANYRES = ["--image_aspect_ratio", "anyres", "--mm_patch_merge_type", "spatial_unpad"]
# The settings of a run that decide which weights are where.
RUNS = {
    "projector": ("projector",),
    "newline": ("projector", *ANYRES),
    "full": ("full",),
    "tower": ("full", "--unfreeze_mm_vision_tower", "True"),
    "words": ("full", "--mm_use_im_start_end", "True"),
    "lora": ("lora",),
    "lora of the tower": ("lora", "--lora_vision_tower", "True", "--lora_bias", "all"),
    "moe": ("moe",),
    "new words of the connector's stage": ("projector", "--mm_use_im_start_end", "True"),
    "new words beside lora": ("lora", "--new_tokens", "<seg>", "<loc_1>"),
    "new words beside experts": ("moe", "--new_tokens", "<seg>", "<loc_1>"),
    # Half of an expert stays the copy that it was.
    "some of the experts": ("moe", "--train_modules", "down_proj", "wg"),
}
ENGINES = {
    "ddp": [],
    "zero2": ["--deepspeed", str(ROOT / "zero2.json")],
    "zero3": ["--deepspeed", str(ROOT / "zero3.json")],
}


def assert_same_model(checkpoint, finished):
    """Compare every weight, bit for bit, and what goes with the weights."""
    (expected, its_processor), (model, processor) = load(finished, device="cpu"), load(checkpoint, device="cpu")
    weights, wanted = model.state_dict(), expected.state_dict()
    assert {name: (weight.dtype, weight.shape) for name, weight in weights.items()} == {
        name: (weight.dtype, weight.shape) for name, weight in wanted.items()
    }
    differ = [name for name, weight in weights.items() if not torch.equal(weight, wanted[name])]
    assert differ == []
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    assert processor.conv_template == its_processor.conv_template
    assert processor.tokenizer.get_vocab() == its_processor.tokenizer.get_vocab()


@pytest.mark.parametrize("bf16", ["False", "True"])
@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_is_the_model_that_the_run_held(stage_flags, tmp_path, name, bf16):
    stage, *more = RUNS[name]
    train(stage_flags(stage, tmp_path / "out", *SAVED, *more, "--bf16", bf16))
    assert_same_model(tmp_path / "out" / "checkpoint-3", tmp_path / "out")


def test_a_checkpoint_of_4_bits_is_the_model_that_the_run_held(stage_flags, tmp_path):
    pytest.importorskip("bitsandbytes")
    train(stage_flags("lora", tmp_path / "out", *SAVED, "--bits", "4"))
    assert_same_model(tmp_path / "out" / "checkpoint-3", tmp_path / "out")


@pytest.mark.parametrize("stage", ["projector", "full", "lora", "moe"])
def test_each_file_that_is_lost_is_named_when_a_checkpoint_is_opened(stage_flags, tmp_path, stage):
    train(stage_flags(stage, tmp_path / "out", *SAVED))
    names = [name for name in list_files(tmp_path / "out" / "checkpoint-3") if not FOR_A_RUN.fullmatch(name)]
    assert {"trained.safetensors", "config.json", "trainer_state.json"} <= set(names)
    for name in [*names, "manifest.json"]:
        broken = shutil.copytree(tmp_path / "out" / "checkpoint-3", tmp_path / name / "checkpoint-3")
        (broken / name).unlink()
        with pytest.raises(BrokenCheckpoint, match=rf"{re.escape(name)} is missing"):
            load(broken, device="cpu")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "tokenizer_config.json"])
def test_a_text_that_changed_is_named_before_it_is_read(stage_flags, tmp_path, name):
    train(stage_flags("full", tmp_path / "out", *SAVED))
    checkpoint = tmp_path / "out" / "checkpoint-3"
    text = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(text[: len(text) // 2])
    for reading in (load, LlavaLiteProcessor.from_pretrained, LlavaLlamaForCausalLM.from_pretrained):
        with pytest.raises(BrokenCheckpoint, match=rf"{re.escape(name)} has \d+ bytes, the manifest has {len(text)}"):
            reading(checkpoint)


def test_a_checkpoint_answers_and_says_which_step_it_is(stage_flags, tmp_path, caplog):
    train(stage_flags("full", tmp_path / "out", *SAVED))
    with caplog.at_level("INFO", "llava_lite"):
        model, processor = load(tmp_path / "out" / "checkpoint-3", device="cpu")
    assert "checkpoint-3: step 3 of 3, saved by 1 rank" in caplog.text
    assert isinstance(reply(model, processor, "What is it?", max_new_tokens=3), str)


def test_a_checkpoint_of_lora_is_merged_as_the_finished_run_is(stage_flags, tmp_path):
    train(stage_flags("lora", tmp_path / "out", *SAVED, "--bf16", "True"))
    output = []
    merge(tmp_path / "out" / "checkpoint-3", tmp_path / "of_step", report=output.append)
    merge(tmp_path / "out", tmp_path / "of_run", report=output.append)
    assert_same_model(tmp_path / "of_step", tmp_path / "of_run")
    assert output[0].endswith("checkpoint-3 holds step 3 of 3, saved by 1 rank")


def test_a_run_that_needs_a_checkpoint_as_its_base_is_warned(stage_flags, tmp_path, caplog):
    train(stage_flags("full", tmp_path / "out", *SAVED))
    for start, is_warned in (("out", False), ("out/checkpoint-3", True)):
        caplog.clear()
        train(stage_flags("lora", tmp_path / f"next-{is_warned}", "--max_steps", "1", model=tmp_path / start))
        assert ("is a checkpoint of another run" in caplog.text) == is_warned


@pytest.mark.parametrize("stage", ["full", "lora", "moe"])
def test_a_run_starts_from_a_checkpoint_as_from_the_finished_run(stage_flags, tmp_path, stage):
    train(stage_flags(stage, tmp_path / "out", *SAVED))
    losses = []
    for number, start in enumerate(("out", "out/checkpoint-3")):
        more = ["--max_steps", "2", "--logging_steps", "1", "--seed", "3"]
        trainer = train(stage_flags("full", tmp_path / f"next{number}", *more, model=tmp_path / start))
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_a_directory_of_checkpoints_names_the_newest_of_them(stage_flags, tmp_path):
    train(
        stage_flags(
            "projector", tmp_path / "out", "--max_steps", "10", "--save_strategy", "steps", "--save_steps", "1"
        )
    )
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(OSError, match=r"has no config\.json; a checkpoint of it is '.*checkpoint-10'"):
        load(tmp_path / "out", device="cpu")


@pytest.mark.parametrize("open_it", [lambda path: load(path, device="cpu"), lambda path: merge(path, path / "new")])
def test_a_checkpoint_without_a_config_says_how_to_get_its_model(stage_flags, tmp_path, open_it):
    train(stage_flags("full", tmp_path / "out", *SAVED))
    checkpoint = tmp_path / "out" / "checkpoint-3"
    # As early versions wrote it.
    (checkpoint / "config.json").unlink()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["files"]["config.json"], manifest["format"], manifest["sha256"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(OSError, match=r"holds the state of a run and no config\.json.*--resume_from_checkpoint"):
        open_it(checkpoint)


# DeepSpeed's files.


@pytest.fixture(scope="module")
def launch():
    """Return the function of test_ranks.py that runs cases on several ranks."""
    return runpy.run_path(str(HERE / "test_ranks.py"))["launch"]


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "num_ranks"), [("ddp", 2), ("zero2", 1), ("zero2", 2), ("zero3", 1), ("zero3", 2)])
def test_a_checkpoint_of_ranks_is_the_model_that_they_held(stage_flags, launch, tmp_path, engine, num_ranks):
    cases = []
    names = [(name, "True") for name in RUNS if num_ranks > 1 or name in ("full", "lora")] + [("full", "False")]
    for name, bf16 in names:
        stage, *more = RUNS[name]
        out = tmp_path / f"{name} {bf16}".replace(" ", "_")
        flags = [*stage_flags(stage, out, *SAVED, *more, "--bf16", bf16), *ENGINES[engine]]
        cases.append({"name": out.name, "argv": flags})
    found = launch(cases, tmp_path, world_size=num_ranks)
    assert [result for results in found.values() for result in results if "error" in result] == []
    for case in cases:
        checkpoint = tmp_path / case["name"] / "checkpoint-3"
        assert (checkpoint / "latest").is_file() == (engine != "ddp")
        assert_same_model(checkpoint, tmp_path / case["name"])
    merge(tmp_path / "lora_True" / "checkpoint-3", tmp_path / "of_step", report=lambda line: None)
    merge(tmp_path / "lora_True", tmp_path / "of_run", report=lambda line: None)
    assert_same_model(tmp_path / "of_step", tmp_path / "of_run")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_a_checkpoint_of_expert_parallel_ranks_is_the_model_that_they_held(stage_flags, launch, tmp_path, engine):
    flags = [*stage_flags("moe", tmp_path / "out", *SAVED, "--ep_size", "2"), *ENGINES[engine]]
    found = launch([{"name": "case", "argv": flags}], tmp_path)
    assert "error" not in found["case"][0]
    assert_same_model(tmp_path / "out" / "checkpoint-3", tmp_path / "out")


class Payload:
    """What unpickling turns into a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def write_manifest_anew(checkpoint):
    """Make the manifest that of the files which are there now, as a stranger can."""
    from llava_lite.train.saving import manifest as paper

    manifest = json.loads((checkpoint / paper.MANIFEST).read_text())
    names = paper.list_files(checkpoint)
    paper.write_manifest(checkpoint, manifest | {"files": paper.digests(checkpoint, names)})


@pytest.mark.slow
@pytest.mark.parametrize("place", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_does_not_run(stage_flags, launch, tmp_path, place):
    out = tmp_path / "out"
    flags = [*stage_flags("full", out, *SAVED), *ENGINES["zero2"]]
    launch([{"name": "case", "argv": flags}], tmp_path, world_size=1)
    checkpoint = out / "checkpoint-3"
    file = checkpoint / "global_step3" / place
    state = torch.load(file, weights_only=False)
    torch.save(state | {"more": Payload(tmp_path / "ran")}, file)
    with pytest.raises(BrokenCheckpoint, match=f"{place} has .* bytes, the manifest has"):
        load(checkpoint, device="cpu")
    write_manifest_anew(checkpoint)
    with pytest.raises(ValueError, match=rf"{place}' cannot be read.*pickle with code in it"):
        load(checkpoint, device="cpu")
    again = [*flags, "--max_steps", "4", "--resume_from_checkpoint", str(checkpoint)]
    found = launch([{"name": "again", "argv": again}], tmp_path, world_size=1)
    assert "pickle with code in it" in found["again"][0]["error"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_a_checkpoint_that_lacks_the_files_of_a_rank_is_refused(stage_flags, launch, tmp_path):
    flags = [*stage_flags("full", tmp_path / "out", *SAVED), *ENGINES["zero2"]]
    launch([{"name": "case", "argv": flags}], tmp_path)
    checkpoint = tmp_path / "out" / "checkpoint-3"
    assert holds_step(checkpoint)
    (checkpoint / "global_step3" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(BrokenCheckpoint, match=r"zero_pp_rank_1_mp_rank_00_optim_states\.pt is missing"):
        load(checkpoint, device="cpu")
    write_manifest_anew(checkpoint)
    with pytest.raises(OSError, match="cannot be put together from the files of its ranks"):
        load(checkpoint, device="cpu")
    shutil.rmtree(checkpoint / "global_step3")
    write_manifest_anew(checkpoint)
    with pytest.raises(OSError, match=r"names 'global_step3', and there is no such directory"):
        load(checkpoint, device="cpu")
