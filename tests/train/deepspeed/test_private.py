"""What has no public name in DeepSpeed is there in the installed version, and missed at the start of a run if not."""

import inspect
from importlib.metadata import version

import pytest

from llava_lite.train.deepspeed.private import (
    EXPERTS,
    LOADING,
    SAVING,
    TESTED,
    UNIVERSAL,
    check_private_parts,
    find_part,
)

PARTS = (*SAVING, *LOADING, *UNIVERSAL, *EXPERTS)


@pytest.mark.parametrize("part", PARTS)
def test_part_is_in_the_installed_deepspeed(part):
    found = find_part(part)
    assert found is not None, f"DeepSpeed {version('deepspeed')} has no {part}; it was tested with {TESTED}"


@pytest.mark.parametrize(
    ("part", "parameters"),
    [
        (SAVING[0], ["self", "save_path"]),
        (SAVING[1], ["self", "state_dict", "path"]),
        (LOADING[0], ["self", "path", "map_location"]),
        (UNIVERSAL[0], ["self"]),
        ("deepspeed.utils.groups:_create_expert_and_data_parallel", ["expert_parallel_size_"]),
        ("deepspeed.utils.groups:_get_expert_parallel_group", ["group_name"]),
        ("deepspeed.utils.groups:_get_expert_data_parallel_group", ["group_name"]),
    ],
)
def test_part_takes_what_it_is_given(part, parameters):
    found = list(inspect.signature(find_part(part)).parameters)
    assert found[: len(parameters)] == parameters, f"DeepSpeed {version('deepspeed')}: {part}{found}"


def test_missing_part_is_named_with_the_version_and_what_to_install():
    parts = ("deepspeed.utils.groups:_no_such_name", "deepspeed.no_such_module:name", SAVING[0])
    with pytest.raises(ImportError) as error:
        check_private_parts("--ep_size 2", parts)
    message = str(error.value)
    assert message.startswith("--ep_size 2 uses deepspeed.utils.groups:_no_such_name, deepspeed.no_such_module:name,")
    assert f"DeepSpeed {version('deepspeed')} has no such part; install deepspeed=={TESTED}." in message
    assert SAVING[0] not in message
