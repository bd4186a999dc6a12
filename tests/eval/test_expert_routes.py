"""Where the experts send images and words, against assignments that a hand-made router forces."""

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from llava_lite.eval.expert_routes import (
    IMAGE,
    TEXT,
    gating_logits,
    measure_load,
    plot_routes,
    routes,
    watching_gates,
)
from llava_lite.inference import prepare
from llava_lite.media.preprocess import load_image_processor
from llava_lite.processing.processor import LlavaLiteProcessor

MOE = {"moe_enable": True, "moe_mode": "sparse", "num_experts": [4], "top_k_experts": 2, "router_aux_loss_coef": 0.01}
QUESTION = "What colour is the square?"


@pytest.fixture
def ask(toy_model, toy_tokenizer, toy_tower_dir):
    """Return a function: keys of the moe dict -> (model with experts in layers 0 and 2, processor)."""

    def make(**overrides):
        model = toy_model(moe=MOE | overrides, conv_template="v1")
        tower = load_image_processor(toy_tower_dir("clip"))
        return model, LlavaLiteProcessor.from_config(model.config, toy_tokenizer, tower)

    return make


@pytest.fixture
def image():
    return Image.new("RGB", (40, 30), (200, 80, 10))


def inputs_of(model, processor, question, image):
    inputs, _ = prepare(processor, [question], [image], None, [None])
    return inputs.to(model.device, dtype=model.dtype)


def test_load_counts_first_and_all_assignments():
    load = measure_load(torch.tensor([[0, 1], [0, 2], [3, 0], [0, 1]]), 4)
    assert load.num_tokens == 4
    assert load.first == [0.75, 0, 0, 0.25]
    assert load.all_k == [0.5, 0.25, 0.125, 0.125]
    assert measure_load(torch.empty(0, 2, dtype=torch.long), 2).first == [0, 0]


@pytest.mark.parametrize("count_padding", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_load_is_that_of_the_routers_own_logits(ask, image, top_k, count_padding):
    model, processor = ask(top_k_experts=top_k, moe_count_padding=count_padding)
    found = routes(model, processor, QUESTION, image)
    assert list(found) == [0, 2]
    inputs = inputs_of(model, processor, QUESTION, image)
    is_image = inputs["input_ids"][0] == processor.image_token_index
    hidden = []
    hook = model.moe_layers()[2].register_forward_pre_hook(lambda block, args: hidden.append(args[0][0]))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    logits = F.linear(hidden[0], model.moe_layers()[2].gate.weight)
    for kind, rows in ((IMAGE, logits[is_image]), (TEXT, logits[~is_image])):
        best = rows.topk(top_k).indices
        assert found[2][kind].num_tokens == len(rows) > 0
        first = [float((best[:, 0] == expert).sum()) / len(rows) for expert in range(4)]
        chosen = [float((best == expert).sum()) / best.numel() for expert in range(4)]
        assert found[2][kind].first == pytest.approx(first)
        assert found[2][kind].all_k == pytest.approx(chosen)
    assert found[2][IMAGE].num_tokens == processor.num_image_tokens


def test_prompts_of_unequal_length_count_no_padding(ask, image):
    model, processor = ask()
    questions, images = [QUESTION, "Hello! " * 9], [image, None]
    together = routes(model, processor, questions, images)
    apart = [routes(model, processor, *one) for one in zip(questions, images, strict=True)]
    for layer, kinds in together.items():
        for kind, load in kinds.items():
            counts = [found[layer][kind].num_tokens for found in apart]
            mean = [
                sum(found[layer][kind].all_k[e] * n for found, n in zip(apart, counts, strict=True)) / sum(counts)
                for e in range(4)
            ]
            assert load.num_tokens == sum(counts)
            assert load.all_k == pytest.approx(mean)
    assert apart[1][0][IMAGE].num_tokens == 0


def test_gating_logits_are_those_of_the_gate(ask, image):
    model, processor = ask()
    inputs = inputs_of(model, processor, QUESTION, image)
    logits = gating_logits(model, **inputs)
    with watching_gates(model) as seen, torch.no_grad():
        model(**inputs)
        model(**inputs)
    assert [len(rows) for rows in seen.values()] == [2, 2]
    for layer in (0, 2):
        assert logits[layer].shape == (inputs["input_ids"].shape[1], 4)
        assert torch.equal(logits[layer], seen[layer][0])
    assert not any(block.gate._forward_hooks for block in model.moe_layers().values())


def test_plot_shows_each_fraction_at_its_height(ask, image, tmp_path):
    pytest.importorskip("matplotlib", reason="plots come with the extra train")
    model, processor = ask()
    found = routes(model, processor, QUESTION, image)
    figure = plot_routes(found, tmp_path / "routes.png", assignments="first")
    for panel, kind in zip(figure.axes, (IMAGE, TEXT), strict=True):
        heights = [bar.get_height() for bar in panel.patches]
        # One group of bars an expert, one bar a layer.
        assert heights == pytest.approx([found[layer][kind].first[expert] for expert in range(4) for layer in (0, 2)])
    with Image.open(tmp_path / "routes.png") as drawn:
        assert drawn.size == (1080, 432)


def test_dense_model_is_refused(toy_model, toy_tokenizer):
    with pytest.raises(ValueError, match="LlavaLlamaForCausalLM has no experts"):
        routes(toy_model(), None, QUESTION)
