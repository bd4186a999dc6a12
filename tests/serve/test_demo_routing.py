"""The chart of routes says what was counted."""

import re

from llava_lite.eval.expert_routes import ExpertLoad
from llava_lite.serve.demo_routing import routing_html

FOUND = {
    0: {"image": ExpertLoad(16, [1.0, 0.0], [0.75, 0.25]), "text": ExpertLoad(34, [0.5, 0.5], [0.5, 0.5])},
    2: {"image": ExpertLoad(16, [0.0, 1.0], [0.0, 1.0]), "text": ExpertLoad(34, [0.97, 0.03], [0.95, 0.05])},
}


def test_each_segment_is_as_wide_as_its_fraction_and_titled_with_it():
    html = routing_html(FOUND)
    found = re.findall(
        r'width:([\d.]+)%;background:#\w+" title="layer (\d), (\w+) tokens, expert (\d): ([\d.]+)%', html
    )
    assert [(layer, kind, expert, float(width)) for width, layer, kind, expert, _ in found] == [
        ("0", "image", "0", 75.0),
        ("0", "image", "1", 25.0),
        ("0", "text", "0", 50.0),
        ("0", "text", "1", 50.0),
        ("2", "image", "1", 100.0),
        ("2", "text", "0", 95.0),
        ("2", "text", "1", 5.0),
    ]
    assert all(float(width) == float(said) for width, *_, said in found)
    assert "16 image tokens and 34 text tokens" in html
    assert "expert 0: 75.0% of assignments, 100.0% of first ones" in html


def test_a_narrow_segment_has_no_label_and_a_question_without_images_no_bar_for_them():
    assert ">5%<" not in routing_html(FOUND)
    without = {0: {"image": ExpertLoad(0, [0.0, 0.0], [0.0, 0.0]), "text": FOUND[0]["text"]}}
    assert "image" not in routing_html(without)


def test_layers_may_have_different_numbers_of_experts():
    found = {
        0: FOUND[0],
        1: {"image": ExpertLoad(0, [], []), "text": ExpertLoad(3, [0.0] * 8 + [1.0], [0.0] * 8 + [1.0])},
    }
    html = routing_html(found)
    assert html.count("</i>expert ") == 9
    assert "expert 8: 100.0% of assignments" in html
