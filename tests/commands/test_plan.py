"""The flags of `llava-lite plan`: their defaults are those that a plan computes with."""

import pytest

from llava_lite.commands.plan import build_parser
from llava_lite.train.estimate.scale import Cluster


def test_defaults_are_those_of_the_cluster():
    options = build_parser().parse_args([])
    assert (options.mfu, options.peak_tflops * 1e12) == (Cluster.mfu, Cluster.peak_flops)
    within, outside = Cluster.node_bandwidth / 1e9, Cluster.network_bandwidth / 1e9
    words = f"default: {within:.0f} in a node of {Cluster.devices_a_node}, {outside:.0f} out of it"
    assert words in " ".join(build_parser().format_help().split())


@pytest.mark.parametrize("words", [["--num_devices", "0"], ["--mfu", "1.5"], ["--num-records", "-3"]])
def test_numbers_that_a_plan_divides_by_are_above_zero(words, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_known_args(words)
    assert "give more than 0" in capsys.readouterr().err
