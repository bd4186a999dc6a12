"""Flags of the verbs that compare numbers have the tolerance that those programs state."""

import pytest

from llava_lite.commands import convert, merge
from llava_lite.export.verified_directory import TOLERANCE


@pytest.mark.parametrize("verb", [convert, merge])
def test_tolerance_is_that_of_the_check(verb):
    assert verb.build_parser().parse_args(["source", "target"]).tolerance == TOLERANCE
