"""Old flags are translated, or refused with what to use instead; nothing is dropped in silence."""

import dataclasses
import logging

import pytest
import transformers

from llava_lite.train.arguments import legacy as flags
from llava_lite.train.arguments.legacy import (
    REFUSED,
    RENAMED,
    TRANSLATED,
    WITHOUT_EFFECT,
    join_flags,
    split_flags,
    translate,
    yaml_flags,
)

KNOWN = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
# Every field that TrainingArguments of transformers 4.37, which LLaVA pins, had and 5.17 to 5.23 no longer have.
DROPPED_SINCE_4_37 = """
    overwrite_output_dir evaluation_strategy per_gpu_train_batch_size per_gpu_eval_batch_size warmup_ratio
    logging_dir
    save_safetensors no_cuda use_mps_device jit_mode_eval use_ipex fp16_opt_level half_precision_backend
    tpu_num_cores tpu_metrics_debug past_index fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap adafactor
    group_by_length use_legacy_prediction_loop include_inputs_for_metrics fp16_backend push_to_hub_model_id
    push_to_hub_organization push_to_hub_token mp_parameters torchdynamo ray_scope dispatch_batches split_batches
    include_tokens_per_second
"""


@pytest.mark.parametrize("name", DROPPED_SINCE_4_37.split())
def test_every_flag_of_transformers_4_has_an_answer(name):
    assert name not in KNOWN
    assert sum(name in answers for answers in (RENAMED, TRANSLATED, WITHOUT_EFFECT, REFUSED)) == 1


def test_renames_lead_to_flags_that_exist():
    from llava_lite.train.arguments.fields import ModelArguments

    today = KNOWN | {field.name for field in dataclasses.fields(ModelArguments)}
    assert set(RENAMED.values()) <= today


def test_warmup_ratio_is_a_fraction_of_the_steps():
    assert translate(["--warmup_ratio", "0.03"], KNOWN) == ["--warmup_steps", "0.03"]


def test_warmup_ratio_of_one_is_not_one_step():
    assert float(translate(["--warmup_ratio", "1.0"], KNOWN)[1]) < 1


def test_both_spellings_of_a_flag_and_a_negative_value():
    assert split_flags(["--warmup-ratio=0.1", "--layer", "-2", "--flag"]) == [
        ("warmup_ratio", ["0.1"]),
        ("layer", ["-2"]),
        ("flag", []),
    ]
    assert join_flags([("", ["x"]), ("a", ["1", "2"])]) == ["x", "--a", "1", "2"]


def test_group_by_length_is_a_sampling_strategy():
    assert translate(["--group_by_length", "True"], KNOWN) == ["--train_sampling_strategy", "group_by_length"]
    assert translate(["--group_by_length", "False"], KNOWN) == []


def test_logging_dir_reaches_tensorboard(monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    assert translate(["--logging_dir", "/x"], KNOWN) == []
    assert flags.os.environ["TENSORBOARD_LOGGING_DIR"] == "/x"
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")


def test_a_flag_without_meaning_is_refused_with_advice():
    with pytest.raises(ValueError, match="--adafactor is not a flag any more: use --optim adafactor"):
        translate(["--adafactor", "True"], KNOWN)
    with pytest.raises(ValueError, match="always saved as safetensors"):
        translate(["--save_safetensors", "False"], KNOWN)


def test_a_flag_that_transformers_still_has_is_never_refused():
    assert translate(["--ray_scope", "last"], KNOWN | {"ray_scope"}) == ["--ray_scope", "last"]


def test_checkpointing_takes_the_name_of_the_installed_transformers():
    old, new = {"gradient_checkpointing"}, {"gradient_checkpointing", "activation_checkpointing"}
    assert translate(["--activation_checkpointing", "True"], old) == ["--gradient_checkpointing", "True"]
    assert translate(["--gradient_checkpointing", "True"], new) == ["--activation_checkpointing", "True"]
    kwargs = {"activation_checkpointing_kwargs"}
    assert translate(["--gradient_checkpointing_kwargs", "{}"], kwargs) == ["--activation_checkpointing_kwargs", "{}"]


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_an_unknown_value_of_checkpointing_is_refused_with_auto(name):
    with pytest.raises(ValueError, match=f"--{name} some: True for every layer, False for none, or auto"):
        translate([f"--{name}", "some"], {name})


def test_precision_that_the_machine_lacks_is_turned_off_with_a_warning(device_without, caplog):
    device_without("bf16", "tf32", "fp16")
    with caplog.at_level(logging.WARNING):
        assert translate(["--bf16", "True", "--tf32", "True"], KNOWN) == ["--bf16", "False", "--tf32", "False"]
    assert "--bf16 True" in caplog.text


def test_bf16_stays_on_a_cpu_that_was_asked_for(device_without):
    device_without("bf16", "tf32", "fp16")
    assert translate(["--bf16", "True", "--use_cpu", "True"], KNOWN) == ["--bf16", "True", "--use_cpu", "True"]


def test_precision_that_the_machine_has_stays(device_without):
    device_without()
    assert translate(["--bf16", "True", "--tf32"], KNOWN) == ["--bf16", "True", "--tf32"]


def test_yaml_lists_sections_and_tables(tmp_path):
    path = tmp_path / "x.yml"
    path.write_text("a: [1, 2]\nsection:\n  b: true\nfsdp_config: {k: 1}\nnothing: null\n")
    assert yaml_flags(path) == ["--a", "1", "2", "--b", "True", "--fsdp_config", '{"k": 1}']
