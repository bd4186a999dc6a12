"""A run that is started again with other data or flags: refused, or said, and never taken for the same run."""

import json
import shutil

import pytest
from PIL import Image

from llava_lite.train.train import train

RUN = "--max_steps 4 --save_strategy steps --save_steps 2 --report_to none --learning_rate 0.001"
PACKS = ["--packing", "tokens", "--packing_tokens", "200", "--per_device_train_batch_size", "1"]
STAGES = {
    "full": ["full"],
    "lora": ["lora", "--lora_r", "4"],
    "moe": ["moe", "--num_experts", "2"],
}


@pytest.fixture(scope="module")
def data(toy_data):
    """Records and images of every run here."""
    return toy_data(num_records=12)


@pytest.fixture
def go_on(stage_flags, data, tmp_path, caplog):
    """Return a function: stage, flags of the first run, of the second, its data -> the second's warnings."""

    def run(stage, first=(), more=(), other_data=None):
        name, *own = STAGES[stage]
        train([*stage_flags(name, tmp_path / "first", data=data), *own, *RUN.split(), *first])
        caplog.clear()
        second = [*stage_flags(name, tmp_path / "second", data=other_data or data), *own, *RUN.split(), *first]
        checkpoint = str(tmp_path / "first" / "checkpoint-2")
        train([*second, "--resume_from_checkpoint", checkpoint, *more])
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    return run


@pytest.fixture
def copy(data, tmp_path):
    """Return the records and the image directory of a copy of the data."""
    shutil.copy(data[0], tmp_path / "toy.json")
    return tmp_path / "toy.json", shutil.copytree(data[1], tmp_path / "images")


def rewrite(path, change):
    """Change the records of a file."""
    records = json.loads(path.read_text())
    change(records)
    path.write_text(json.dumps(records))


def reverse_words(records):
    """Give every answer the same words in another order, which are as many tokens."""
    for record in records:
        for turn in record["conversations"][1::2]:
            turn["value"] = " ".join(reversed(turn["value"].split()))


def swap_images(records):
    """Exchange the images of two records."""
    first, second = [record for record in records if "image" in record][:2]
    first["image"], second["image"] = second["image"], first["image"]


def swap_records(records):
    """Exchange two records of the same length."""
    records[0]["conversations"], records[3]["conversations"] = records[3]["conversations"], records[0]["conversations"]


@pytest.mark.parametrize("change", [reverse_words, swap_images, swap_records])
def test_other_records_are_refused(go_on, copy, change):
    rewrite(copy[0], change)
    with pytest.raises(
        ValueError, match=r"cannot be resumed exactly: .*checksum of the records' texts was \d+, is \d+"
    ):
        go_on("full", other_data=copy)


def test_a_copy_of_the_same_records_in_another_spelling_is_the_same_run(go_on, copy):
    records = json.loads(copy[0].read_text())
    copy[0].write_text("\n".join(json.dumps(record, indent=None, ensure_ascii=True) for record in records))
    assert not [line for line in go_on("full", other_data=copy) if "first" in line]


def test_other_groups_of_the_same_records_are_refused(stage_flags, copy, tmp_path):
    def run(name, types, *more):
        mixture = tmp_path / f"{name}.yaml"
        mixture.write_text(json.dumps({"META": [{"path": str(copy[0]), "type": one} for one in types]}))
        train([*stage_flags("full", tmp_path / name, data=(mixture, copy[1])), *RUN.split(), *more])

    run("first", ["a", "b"])
    with pytest.raises(ValueError, match=r"cannot be resumed exactly: checksum of the records' groups was \d+, is"):
        run("second", ["a", "a"], "--resume_from_checkpoint", str(tmp_path / "first" / "checkpoint-2"))


def test_images_of_other_sizes_are_said(go_on, copy):
    for path in copy[1].glob("*.png"):
        with Image.open(path) as image:
            size = image.size
        Image.new("RGB", size, (0, 255, 0)).save(path)
    said = [line for line in go_on("full", other_data=copy) if "image files had other sizes in bytes" in line]
    assert len(said) == 1
    assert "checkpoint-2 was saved by a run" in said[0]


@pytest.mark.parametrize(
    ("stage", "first", "more", "found"),
    [
        ("full", [], ["--optim", "adafactor"], "--optim was adamw_torch.*, is adafactor"),
        ("full", ["--optim", "sgd"], ["--optim", "adamw_torch"], "--optim was sgd, is adamw_torch"),
        ("full", [], ["--bf16", "True"], "--bf16 was False, is True"),
        ("lora", [], ["--lora_alpha", "64"], "--lora_alpha was 16, is 64"),
        ("lora", [], ["--lora_r", "8"], "--lora_r was 4, is 8"),
        ("moe", [], ["--top_k_experts", "1"], "--top_k_experts was 2, is 1"),
        ("moe", [], ["--capacity_factor", "0.5"], r"--capacity_factor was 1\.0, is 0\.5"),
        ("moe", [], ["--moe_drop_tokens", "True"], "--moe_drop_tokens was False, is True"),
        ("full", [], ["--image_resize", "fast"], "--image_resize was exact, is fast"),
        ("full", [], ["--version", "llava_v1"], "conv_template was v1, is llava_v1"),
        ("full", [], ["--image_aspect_ratio", "square"], "image_aspect_ratio was pad, is square"),
        ("full", [], ["--mm_vision_select_layer", "-1"], "mm_vision_select_layer was -2, is -1"),
        ("full", [], ["--model_max_length", "72"], r"checksum of the samples' lengths was \d+, is \d+"),
        ("full", [], ["--group_by_modality_length", "True"], "group_by_modality_length was False, is True"),
        ("full", [], ["--train_sampling_strategy", "sequential"], "--train_sampling_strategy was random, is sequ"),
        ("full", PACKS, ["--packing_tokens", "300"], "--packing_tokens was 200, is 300"),
        (
            "full",
            [],
            ["--accelerator_config", '{"even_batches": false}'],
            "--accelerator_config even_batches was True, is False",
        ),
    ],
)
def test_flags_that_make_another_step_are_refused_with_both_values(go_on, stage, first, more, found):
    with pytest.raises(ValueError, match=rf"cannot be resumed exactly: .*{found}"):
        go_on(stage, first, more)


@pytest.mark.parametrize(
    ("more", "found"),
    [
        (["--bits", "8"], "--bits was 4, is 8"),
        (["--quant_type", "fp4"], "--quant_type was nf4, is fp4"),
        (["--double_quant", "False"], "--double_quant was True, is False"),
    ],
)
def test_frozen_weights_in_other_bits_are_refused_with_both_values(go_on, more, found):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match=rf"cannot be resumed exactly: .*{found}"):
        go_on("lora", ["--bits", "4"], more)


@pytest.mark.parametrize(
    ("stage", "more", "found"),
    [
        ("full", ["--mm_projector_lr", "0.005"], "mm_projector_lr was None, is 0.005"),
        ("full", ["--adam_beta2", "0.5", "--max_grad_norm", "0.01"], "max_grad_norm was 1.0, is 0.01; adam_beta2 was"),
        ("full", ["--ignore_data_skip", "True"], "ignore_data_skip was False, is True"),
        ("lora", ["--lora_dropout", "0.5"], "lora_dropout was 0.05, is 0.5"),
        ("moe", ["--router_aux_loss_coef", "0.5"], "router_aux_loss_coef was 0.01, is 0.5"),
    ],
)
def test_flags_that_may_change_are_said_with_both_values(go_on, stage, more, found):
    said = [line for line in go_on(stage, (), more) if "is resumed with another schedule: " in line]
    assert len(said) == 1
    assert found in said[0]


def test_a_checkpoint_of_an_earlier_version_is_compared_by_what_it_has(go_on, monkeypatch):
    from llava_lite.train.llava_trainer import LLaVATrainer
    from llava_lite.train.saving import resume

    now = LLaVATrainer.step_settings, LLaVATrainer.get_schedule
    is_first = [True]

    def old_settings(trainer):
        settings = now[0](trainer)
        return {key: value for key, value in settings.items() if not (is_first[0] and resume.is_later(key))}

    def old_schedule(trainer):
        schedule = now[1](trainer)
        return {key: value for key, value in schedule.items() if not is_first[0] or "adam" not in key}

    def check(*arguments):
        is_first[0] = False
        return resume.check_same_run(*arguments)

    monkeypatch.setattr(LLaVATrainer, "step_settings", old_settings)
    monkeypatch.setattr(LLaVATrainer, "get_schedule", old_schedule)
    monkeypatch.setattr("llava_lite.train.saving.same_run.check_same_run", check)
    assert not [line for line in go_on("full", (), ["--adam_beta2", "0.5"]) if "another schedule" in line]
