"""`llava-lite push` uploads a whole model or nothing."""

from pathlib import Path

import pytest

from llava_lite.commands.push import main
from llava_lite.train.saving.final_files import write_list


@pytest.fixture
def model(toy_model, tmp_path):
    """The directory of a model of several files of weights, as `save_pretrained` writes it."""
    toy_model().save_pretrained(tmp_path, max_shard_size="50KB")
    return tmp_path


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [Path.unlink, cut])
def test_a_model_that_lost_a_part_of_its_weights_is_not_uploaded(model, damage):
    damage(next(model.glob("model-00002-of-*")))
    with pytest.raises(ValueError, match=r"model-00002-of-.*Nothing is uploaded.*remove final_files\.json"):
        main([str(model), "tester/model"])


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_finished_run_that_lost_another_file_is_not_uploaded(model, name):
    write_list(model)
    (model / name).unlink()
    with pytest.raises(ValueError, match=f"^{name} of the finished run in .* is missing. Nothing is uploaded"):
        main([str(model), "tester/model"])
