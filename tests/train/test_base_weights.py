"""A number that is not finite in what a run starts from ends it before its first step, and is named with its flag."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_lite.train.base_weights import count_non_finite
from llava_lite.train.monitor.finite import NonFiniteError
from llava_lite.train.train import main, train

NAN, INF = float("nan"), float("inf")
EMBEDDINGS, LAST_LAYER = "model.embed_tokens.weight", "encoder.layers.1.mlp.fc2.weight"


@pytest.fixture
def hurt(tmp_path):
    """Return a function: (directory of a model, name of a weight, place, value) -> a copy with that number."""

    def make(directory, name, place, value=NAN):
        copy = tmp_path / f"hurt_{directory.name}"
        shutil.copytree(directory, copy)
        (file,) = copy.glob("*.safetensors")
        weights = load_file(file)
        (found,) = [key for key in weights if key.endswith(name)]
        weights[found][place] = value
        save_file(weights, file, {"format": "pt"})
        return copy

    return make


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("stage", "more"),
    [("moe", []), ("lora", ["--save_full", "True"]), ("lora", []), ("projector", []), ("full", [])],
    ids=["moe", "lora written in full", "lora", "projector", "full"],
)
def test_a_number_of_the_language_model_ends_the_run_before_its_first_step(
    stage, more, value, hurt, stage_flags, toy_llm_dir, tmp_path
):
    out, model = tmp_path / "out", hurt(toy_llm_dir("llama"), EMBEDDINGS, (5, 0), value)
    flags = stage_flags(stage, out, "--max_steps", 1, *more, "--model_name_or_path", model)
    with pytest.raises(NonFiniteError) as error:
        train(flags)
    num = load_file(model / "model.safetensors")[EMBEDDINGS].numel()
    assert str(error.value).startswith(
        f"not finite: {EMBEDDINGS} (1 of {num:,} numbers), from --model_name_or_path {model}. No step was taken, since"
    )
    # On a CPU without float16.
    assert "16" not in str(error.value).partition("No step")[2]
    assert not list(out.rglob("*.safetensors"))
    assert not (out / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "place"), [("post_layernorm.weight", 0), (LAST_LAYER, (0, 0)), ("pre_layrnorm.bias", 3)]
)
def test_a_number_of_the_tower_names_it_even_where_the_selected_layer_does_not_read_it(
    name, place, hurt, stage_flags, toy_tower_dir, tmp_path
):
    tower = hurt(toy_tower_dir("clip"), name, place)
    with pytest.raises(
        NonFiniteError, match=rf"not finite: model\.vision_tower\.\S+ .*, from --vision_tower {tower}\."
    ):
        train(stage_flags("full", tmp_path / "out", "--vision_tower", tower))


def test_a_number_of_the_connector_names_the_file_of_stage_one(stage_flags, tmp_path):
    path = tmp_path / "mm_projector.bin"
    state = {"0.weight": (32, 32), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    state = {f"model.mm_projector.{name}": torch.ones(shape) for name, shape in state.items()}
    state["model.mm_projector.2.bias"][:2] = INF
    torch.save(state, path)
    with pytest.raises(
        NonFiniteError, match=rf"mm_projector\.2\.bias \(2 of 32 numbers\), from --pretrain_mm_mlp_adapter {path}\."
    ):
        train(stage_flags("full", tmp_path / "out", "--pretrain_mm_mlp_adapter", path))


def test_the_terminal_shows_one_line(hurt, stage_flags, toy_llm_dir, tmp_path, capfd):
    flags = stage_flags("moe", tmp_path / "out")
    with pytest.raises(SystemExit) as end:
        main([*flags, "--model_name_or_path", str(hurt(toy_llm_dir("llama"), EMBEDDINGS, (5, 0)))])
    assert end.value.code == 1
    printed = capfd.readouterr().err
    assert f"llava-lite train: not finite: {EMBEDDINGS} (1 of " in printed
    assert "Traceback" not in printed


def test_a_number_too_large_for_the_dtype_of_the_run_is_one_that_could_not_be_written():
    model = torch.nn.Linear(4, 3)
    with torch.no_grad():
        model.weight[2, 1] = 70_000
    assert count_non_finite(model, torch.float32) == count_non_finite(model, torch.bfloat16) == {}
    assert count_non_finite(model, torch.float16) == {"weight": "1 of 12 numbers"}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_two_ranks_end_together_whichever_part_holds_the_number(
    engine, hurt, stage_flags, run_with_fault, toy_llm_dir, tmp_path
):
    # Of a ZeRO-3 weight the second rank has the last row.
    model = hurt(toy_llm_dir("llama"), EMBEDDINGS, (-1, -1))
    flags = stage_flags("moe", tmp_path / "out", "--deepspeed", f"{engine}.json", "--model_name_or_path", model)
    codes, logs = run_with_fault("none", flags, num_ranks=2)
    assert codes == [1, 1]
    assert f"llava-lite train: not finite: {EMBEDDINGS} (1 of " in logs[0]
    assert "Traceback" not in "".join(logs)
    assert not list((tmp_path / "out").rglob("*.safetensors"))
