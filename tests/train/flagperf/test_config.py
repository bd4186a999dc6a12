"""A vendor's config is read and not run."""

import pytest

from llava_lite.train.flagperf.config import read_config

FIELDS = """\
theoryflops = 312000000000000.0
pretrain_per_device_train_batch_size = 32
pretrain_gradient_accumulation_steps = 1
finetune_per_device_train_batch_size = 16
finetune_gradient_accumulation_steps = 1
output_dir_finetune = "Output/checkpoints_finetune/llava-v1.5-7b"
mmmu_data_path = "MMMU/MMMU"
"""


@pytest.fixture
def config(tmp_path):
    """Return a function: text, file name -> path."""

    def write(text, name="config_A800x1x8.py"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_assignments_are_read(config):
    found = read_config(config(FIELDS))
    assert found.theoryflops == 312e12
    assert found.pretrain_per_device_train_batch_size == 32
    assert found.finetune_per_device_train_batch_size == 16
    assert found.mmmu_data_path == "MMMU/MMMU"


def test_code_of_the_file_is_not_run(config, tmp_path):
    code = f"import os\nopen({str(tmp_path / 'was_run')!r}, 'w')\nvendor: str = 'nvidia'\nuse = os.environ\n"
    assert read_config(config(code + FIELDS)).theoryflops == 312e12
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("flops", ["312e12", "3.12e+14", "312000000000000"])
def test_yaml_says_the_same(config, flops):
    text = FIELDS.replace(" = ", ": ").replace("312000000000000.0", flops)
    assert read_config(config(text, "config.yaml")) == read_config(config(FIELDS))


@pytest.mark.parametrize(
    ("found", "written", "says"),
    [
        ("theoryflops = 312000000000000.0", "theoryflops = peak()", "no plain value to theoryflops"),
        ("theoryflops = 312000000000000.0", "", "no plain value to theoryflops"),
        ("theoryflops = 312000000000000.0", "theoryflops = 0", "theoryflops is 0; expected a number above 0"),
        ("train_batch_size = 32", "train_batch_size = 32.5", "is 32.5; expected a whole number above 0"),
        ("train_batch_size = 32", "train_batch_size = True", "is True; expected a whole number above 0"),
        ('"MMMU/MMMU"', '""', "mmmu_data_path is ''; expected a path"),
        ("theoryflops = 3", "theoryflops == = 3", "line 1 is no Python"),
    ],
)
def test_what_is_missing_or_no_such_value_is_named(config, found, written, says):
    with pytest.raises(ValueError, match=says):
        read_config(config(FIELDS.replace(found, written)))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no config"):
        read_config(tmp_path / "config.py")


def test_yaml_that_is_no_mapping_is_named(config):
    with pytest.raises(ValueError, match="is list; expected names and values"):
        read_config(config("- theoryflops", "config.yml"))
