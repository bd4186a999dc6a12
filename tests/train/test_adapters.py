"""Two phases of an adapter run: prompts and connector, then norms and biases; files, resume, answers."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from conftest import draw_image
from safetensors.torch import load_file

from llava_lite.export.merge import merge
from llava_lite.inference import reply
from llava_lite.model.builder import load_pretrained_model
from llava_lite.processing.processor import LlavaLiteProcessor

ADAPTER = "--mm_injection adaption_prompt --adaption_prompt_len 4 --adaption_prompt_layers 3"
ADAPTER += " --mm_projector_type query_vit --mm_query_len 4 --mm_query_hidden 16 --mm_query_depth 1 --mm_query_heads 2"
ADAPTER += " --mm_vision_select_layer -1 --mm_vision_select_feature cls_patch --version alpaca --tuning prompts"
ONE = "--mm_injection adaption_prompt --adaption_prompt_len 1 --mm_projector_type gated_mlp2x"
ONE += " --mm_vision_select_feature pooled --mm_vision_select_layer -1 --version alpaca --tuning prompts"
RATE = "--learning_rate 1e-2 --logging_steps 1 --report_to none"
PADDINGS = {
    "packed": "--packing samples",
    "padded": "--packing none",
    "packs": "--packing tokens --packing_tokens 300",
}
PADDINGS["packs"] += " --per_device_train_batch_size 1"


@pytest.fixture
def phase(run_stage, stage_flags, toy_data, tmp_path):
    """Return a function: (output, flags, model) -> the trainer of a phase on records with and without images."""
    data = toy_data(tmp_path / "records", num_records=24, text_only_every=3, num_turns=1)

    def run(out, flags, model=None):
        return run_stage("full", tmp_path / out, *flags.split(), *RATE.split(), data=data, model=model)

    return run


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def has_learned(trainer):
    """Return whether the last third of the steps has a smaller loss than the first."""
    found = losses(trainer)
    third = len(found) // 3
    return sum(found[-third:]) < sum(found[:third]) - 0.03 * third


@pytest.mark.parametrize("system", [ADAPTER, ONE], ids=["ten prompts", "one prompt"])
def test_the_first_phase_trains_prompts_gates_and_connector_and_writes_them(phase, tmp_path, system):
    trainer = phase("out", f"{system} --num_train_epochs 4")
    model = trainer.unwrapped
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all("mm_projector" in name or "adaption" in name for name in trained)
    assert {name for name in trained if name.endswith("adaption_gate")} == {
        f"model.layers.{i}.self_attn.adaption_gate" for i in range(4 - model.config.num_prompted_layers, 4)
    }
    assert has_learned(trainer)
    assert load_file(tmp_path / "out" / "trained.safetensors").keys() == trained
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["mm_injection"] == "adaption_prompt"
    assert fields["base_model_name_or_path"]
    images = [draw_image(i) for i in range(2)]
    _, opened, _, _ = load_pretrained_model(str(tmp_path / "out"), None, "llava", device="cpu")
    for name in trained:
        assert torch.allclose(opened.get_parameter(name), model.get_parameter(name).to(opened.dtype), atol=1e-6), name
    processor = LlavaLiteProcessor.from_pretrained(tmp_path / "out")
    questions = ["What colour is the square?", "How many circles are there?"]
    both = reply(opened, processor, questions, [[images[0]], [images[1]]], max_new_tokens=5)
    alone = [reply(opened, processor, *pair, max_new_tokens=5) for pair in zip(questions, images, strict=True)]
    assert both == alone
    mixed = reply(opened, processor, questions, [[], [images[1]]], max_new_tokens=5)
    assert mixed == [reply(opened, processor, questions[0], max_new_tokens=5), alone[1]]


def test_padded_rows_packed_rows_and_packs_learn_the_same(phase):
    first = {name: losses(phase(name, f"{ADAPTER} --max_steps 1 --seed 3 {flags}"))[0]
             for name, flags in PADDINGS.items() if name != "packs"}  # fmt: skip
    assert first["packed"] == pytest.approx(first["padded"], abs=1e-5)
    phase("packs", f"{ADAPTER} --max_steps 2 {PADDINGS['packs']}")


def test_the_prompt_of_training_is_the_prompt_of_an_answer(phase, tmp_path):
    trainer = phase("out", f"{ADAPTER} --max_steps 1")
    data, processor = trainer.train_dataset, LlavaLiteProcessor.from_pretrained(tmp_path / "out")
    for i in range(6):
        record, example = data.annotations[i], data[i]
        question = record.turns[0][1].replace("<image>", "").strip()
        start = int((example["labels"] != -100).nonzero()[0])
        image = [data.open(record, name) for name in record.images]
        inputs = processor.encode(
            [processor.render([(question if not image else f"<image>\n{question}", None)])], [image]
        )
        assert inputs["input_ids"][0].tolist() == example["input_ids"][:start].tolist()
        assert inputs["image_rows"].tolist() == [bool(image)]
        assert len(inputs["pixel_values"]) == len(image)


@pytest.mark.parametrize("lora", ["", "--lora_enable True --lora_r 2 --lora_dropout 0"], ids=["plain", "LoRA"])
def test_the_second_phase_trains_norms_and_biases_on_the_first(phase, tmp_path, lora):
    phase("first", f"{ADAPTER} --max_steps 2")
    second = f"--version alpaca --tuning bias_norm --num_train_epochs 2 {lora}"
    trainer = phase("second", second, model=tmp_path / "first")
    model = trainer.unwrapped
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all("norm" in name or name.endswith(".bias") or ".lora_" in name for name in trained)
    assert any(name.endswith("down_proj.bias") or "down_proj.base_layer.bias" in name for name in trained)
    assert not any("k_proj" in name and name.endswith("bias") for name in trained)
    assert any(".lora_" in name for name in trained) == bool(lora)
    assert has_learned(trainer)
    _, opened, _, _ = load_pretrained_model(str(tmp_path / "second"), None, "llava", device="cpu")
    assert opened.config.decoder_bias == ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    ids = torch.tensor([[1, 20, 30, 40]])
    image = torch.randn(1, 3, opened.get_vision_tower().image_size, opened.get_vision_tower().image_size)
    with torch.no_grad():
        expected = model.eval()(ids, images=image).logits
        assert torch.allclose(opened.float()(ids, images=image).logits, expected, atol=1e-4)


def test_norms_biases_and_lora_train_on_a_base_of_four_bits(phase, tmp_path):
    pytest.importorskip("bitsandbytes")
    phase("first", f"{ADAPTER} --max_steps 2")
    second = "--version alpaca --tuning bias_norm --lora_enable True --lora_r 2 --lora_dropout 0 --bits 4"
    trainer = phase("second", f"{second} --num_train_epochs 2", tmp_path / "first")
    model = trainer.unwrapped
    assert type(model.model.layers[0].self_attn.q_proj.base_layer).__name__ == "Linear4bit"
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert "model.layers.0.self_attn.q_proj.base_layer.bias" in trained
    assert all("norm" in name or name.endswith(".bias") or ".lora_" in name for name in trained)
    assert has_learned(trainer)
    saved = load_file(tmp_path / "second" / "trained.safetensors")
    assert saved.keys() == {name.replace(".base_layer.", ".") for name in trained if ".lora_" not in name}
    with pytest.raises(ValueError, match="--bits 4 needs --lora_enable True"):
        phase("third", "--version alpaca --tuning bias_norm --bits 4", tmp_path / "first")


def test_an_interrupted_run_resumes_step_for_step(phase, tmp_path):
    flags = f"{ADAPTER} --max_steps 6 --save_strategy steps --save_steps 3"
    whole = phase("run", flags)
    again = phase("again", f"{flags} --resume_from_checkpoint {tmp_path / 'run' / 'checkpoint-3'}")
    assert losses(again)[-3:] == losses(whole)[-3:]
    for name, weight in whole.unwrapped.named_parameters():
        assert torch.equal(weight, again.unwrapped.get_parameter(name)), name


def test_both_phases_merge_into_a_model_that_answers_alike(phase, tmp_path):
    phase("first", f"{ADAPTER} --max_steps 3")
    lora = "--lora_enable True --lora_r 2 --lora_dropout 0"
    phase("second", f"--version alpaca --tuning bias_norm {lora} --max_steps 2", model=tmp_path / "first")
    merge(tmp_path / "second", tmp_path / "merged", report=lambda line: None)
    image, answers = draw_image(0), []
    for name in ("second", "merged"):
        _, model, _, _ = load_pretrained_model(str(tmp_path / name), None, "llava", device="cpu")
        answers.append(
            reply(model, LlavaLiteProcessor.from_pretrained(tmp_path / name), "What?", image, max_new_tokens=5)
        )
    assert answers[0] == answers[1]


def test_a_run_that_is_resumed_shows_texts_the_same_image(phase, tmp_path):
    flags = f"{ADAPTER} --max_steps 4 --save_strategy steps --save_steps 2"
    phase("run", flags)
    again = f"{flags} --mm_text_only blank --resume_from_checkpoint {tmp_path / 'run' / 'checkpoint-2'}"
    with pytest.raises(ValueError, match="mm_text_only was bare, is blank"):
        phase("again", again)


def test_full_tuning_with_learned_vectors_in_front_of_the_text(phase, tmp_path):
    flags = "--mm_projector_type linear_norm --mm_boundary_vectors True --mm_image_position front --version alpaca"
    trainer = phase("out", f"{flags} --num_train_epochs 2")
    assert has_learned(trainer)
    record = next(one for one in (trainer.train_dataset[i] for i in range(24)) if "images" in one)
    ids = record["input_ids"].tolist()
    num = trainer.unwrapped.config.num_image_tokens + 2
    assert ids[0] == 1
    assert ids[1 : 1 + num] == [-200] * num
    assert -200 not in ids[1 + num :]
    _, opened, _, _ = load_pretrained_model(str(tmp_path / "out"), None, "llava", device="cpu")
    processor = LlavaLiteProcessor.from_pretrained(tmp_path / "out")
    inputs = processor.encode([processor.render([("<image>\nWhat is it?", None)])], [[draw_image(0)]])
    assert inputs["input_ids"][0, 1 : 1 + num].tolist() == [-200] * num
    assert reply(opened, processor, "What is it?", draw_image(0), max_new_tokens=3) is not None
    assert "model.image_start" in {name for name, _ in opened.named_parameters()}


@pytest.mark.parametrize("precision", ["", "--bf16 True"], ids=["float32", "bfloat16"])
def test_the_second_phase_trains_the_connectors_biases_and_writes_and_resumes_them(phase, tmp_path, precision):
    connector = "--mm_projector_type linear_norm --mm_boundary_vectors True --mm_image_position front --version alpaca"
    phase("first", f"{connector} --max_steps 2")
    flags = (
        "--version alpaca --tuning bias_norm --bias_linears all --bias_connector True --lora_enable True --lora_r 2"
    )
    flags += f" --lora_dropout 0 --max_steps 6 --save_strategy steps --save_steps 3 {precision}"
    run = phase("run", flags, tmp_path / "first")
    model = run.unwrapped
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    biases = {"model.mm_projector.0.bias", "model.mm_projector.1.bias"}
    assert {name for name in trained if "mm_projector" in name or "image_" in name} == biases
    # A checkpoint holds what the optimizer updates; the final directory is in the dtype of the run.
    masters = load_file(tmp_path / "run" / "checkpoint-3" / "trained.safetensors")
    assert {name.removeprefix("base_model.model.") for name in masters} == trained
    assert {weight.dtype for weight in masters.values()} == {torch.float32}
    before = load_file(tmp_path / "first" / "model.safetensors")
    saved = load_file(tmp_path / "run" / "trained.safetensors")
    assert {name for name in saved if "mm_projector" in name} == biases
    _, opened, _, _ = load_pretrained_model(str(tmp_path / "run"), None, "llava", device="cpu")
    for name, weight in opened.named_parameters():
        if name in biases:
            assert (weight.float() - before[name].float()).abs().max() > 1e-3
            assert torch.allclose(weight.float(), model.get_parameter(name).float(), atol=1e-2)
        elif "mm_projector" in name or "image_" in name:
            assert torch.allclose(weight.float(), before[name].float(), atol=1e-2)
    again = phase("again", f"{flags} --resume_from_checkpoint {tmp_path / 'run' / 'checkpoint-3'}", tmp_path / "first")
    assert losses(again)[-3:] == losses(run)[-3:]
    assert all(torch.equal(again.unwrapped.get_parameter(name), model.get_parameter(name)) for name in trained)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_two_ranks_train_as_one(phase, stage_flags, toy_data, tmp_path, engine):
    # New weights are drawn in another order under ZeRO-3.
    phase("start", f"{ADAPTER} --max_steps 2")
    launch = runpy.run_path(str(Path(__file__).with_name("test_ranks.py")))["launch"]
    data = toy_data(tmp_path / "data", num_records=24, text_only_every=3, num_turns=1)
    results = {}
    for ranks, engine_flags in ((1, ""), (2, f"--deepspeed {engine}"), (2, f"--deepspeed {engine} --packing none")):
        flags = f"--version alpaca --tuning prompts {RATE} {engine_flags} --max_steps 4"
        flags += f" --per_device_train_batch_size {4 // ranks}"
        name = f"run{len(results)}"
        argv = stage_flags("full", tmp_path / name, *flags.split(), data=data, model=tmp_path / "start")
        results[name] = launch([{"name": name, "argv": argv}], tmp_path, world_size=ranks)[name]
    assert all("error" not in rank for ranks in results.values() for rank in ranks), results
    for name in ("run1", "run2"):
        assert results[name][0]["loss"] == pytest.approx(results["run0"][0]["loss"], abs=1e-4)
    trained = [load_file(tmp_path / name / "trained.safetensors") for name in ("run0", "run1")]
    assert trained[0].keys() == trained[1].keys()
    # Adam divides by the size of a gradient, which for the smallest is noise.
    assert all(torch.allclose(trained[0][name], trained[1][name], atol=2e-3) for name in trained[0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tuning prompts", "trains the prompts of --mm_injection adaption_prompt, and the model has none"),
        ("--tuning lora --bias_linears all", "adds biases that --tuning lora does not train"),
        ("--tuning lora --bias_connector True", "beside those of --tuning bias_norm, and --tuning is lora"),
        ("--tuning bias_norm --bias_linears wrong", "decoder_bias names wrong; the linear layers of this decoder are"),
        (f"{ADAPTER} --tuning projector", "are closed and --tuning projector leaves them so: no image would be seen"),
        (f"{ADAPTER} --tuning lora --lora_r 2", "are closed and --tuning lora leaves them so"),
        (f"{ADAPTER} --tuning bias_norm", "are closed and --tuning bias_norm leaves them so"),
        (f"{ADAPTER} --mm_query_len 5", "makes 5 vectors of an image and adaption_prompt_len 4"),
    ],
)
def test_flags_that_do_not_fit_are_refused(phase, flags, message):
    with pytest.raises((ValueError, SystemExit), match=message):
        phase("out", flags)
