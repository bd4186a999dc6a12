"""Turn a question with images into the load of each expert: which fraction of image and text tokens it got.

What MoE-LLaVA (Lin et al. 2024, arXiv 2401.15947) shows in its figures on routing. Assignments are counted as the
router made them, before any is dropped for lack of capacity; padding is left out.

Shapes: `B` questions, `T` tokens, `S` routed tokens, `E` experts, `K` experts a token.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from llava_lite.inference import prepare

IMAGE, TEXT = "image", "text"


@dataclass(frozen=True)
class ExpertLoad:
    """The load of the experts of one layer by the tokens of one kind.

    num_tokens: tokens of this kind. first: the fraction of first assignments (the expert of the highest probability)
    that went to each expert, [E], sum 1. all_k: the fraction of all K assignments, [E], sum 1; the same for K = 1.
    Without tokens all fractions are 0.
    """

    num_tokens: int
    first: list[float]
    all_k: list[float]


@torch.no_grad()
def routes(model, processor, question, images=None, conv_template=None, history=None):
    """Return {layer: {"image": ExpertLoad, "text": ExpertLoad}} of the prompt of one question, or of a list together.

    Arguments as in `reply`; the answer is not generated. To see the routes of an answer as well, give question and
    answer as `history` and the next question.
    """
    blocks = get_expert_blocks(model)
    if isinstance(question, str):
        question, images, history = [question], [images], [history]
    images, history = images or [None] * len(question), history or [None] * len(question)
    inputs, _ = prepare(processor, question, images, conv_template, history)
    was_training = model.training
    with watching(blocks, lambda block: block.experts, lambda seen: seen[1]) as assignments:
        model.eval()(**inputs.to(model.device, dtype=model.dtype))
    model.train(was_training)
    is_image = (inputs["input_ids"] == processor.image_token_index).flatten()  # [B * T]
    is_real = inputs["attention_mask"].flatten().bool()
    found = {}
    for layer, (experts,) in assignments.items():  # [S, K]
        # With moe_count_padding padding is routed too.
        real = experts if len(experts) < len(is_real) else experts[is_real]
        on_image = is_image[is_real]
        num_experts = blocks[layer].num_experts
        found[layer] = {
            IMAGE: measure_load(real[on_image], num_experts),
            TEXT: measure_load(real[~on_image], num_experts),
        }
    return found


def measure_load(assignments, num_experts):
    """Return the ExpertLoad of tokens with these assignments [S, K], the most probable expert first."""
    counts = F.one_hot(assignments, num_experts).sum(dim=0)  # [K, E]
    first, every = counts[0], counts.sum(dim=0)
    return ExpertLoad(
        len(assignments),
        (first / max(int(first.sum()), 1)).tolist(),
        (every / max(int(every.sum()), 1)).tolist(),
    )


@torch.no_grad()
def gating_logits(model, **inputs):
    """Return {layer: logits [S, E] in float32} of the routers in one forward pass over `inputs`."""
    with watching_gates(model) as seen:
        model(**inputs)
    return {layer: logits[-1] for layer, logits in seen.items()}


@contextmanager
def watching_gates(model):
    """Yield {layer: list of logits [S, E]} that grows by one entry a forward pass as long as the block lasts."""
    with watching(get_expert_blocks(model), lambda block: block.gate, None) as seen:
        yield seen


@contextmanager
def watching(blocks, get_part, read_inputs):
    """Yield {layer: list} that grows, on the CPU, by what a part of a block gets (`read_inputs`) or else gives."""
    seen = {layer: [] for layer in blocks}

    def hook_on(layer):
        def keep(part, inputs, output):
            seen[layer].append((output if read_inputs is None else read_inputs(inputs)).detach().cpu())

        return keep

    hooks = [get_part(block).register_forward_hook(hook_on(layer)) for layer, block in blocks.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def get_expert_blocks(model):
    """Return the MoE blocks by layer; raise ValueError for a model without any."""
    blocks = model.moe_layers()
    if not blocks:
        raise ValueError(
            f"this {type(model).__name__} has no experts, so nothing is routed; open a model that was trained with "
            "--tuning moe."
        )
    return blocks


def plot_routes(found, path=None, assignments="all_k"):
    """Draw image tokens beside text tokens, one bar a layer, split by expert; save as `path` and return the figure.

    found: what `routes` returned. assignments: "all_k" for all K of a token, "first" for the most probable alone.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    layers = list(found)
    most = max(len(found[layer][TEXT].first) for layer in layers)
    for panel, kind in zip(panels, (IMAGE, TEXT), strict=True):
        heights = [getattr(found[layer][kind], assignments) for layer in layers]
        bottom = [0.0] * len(layers)
        for expert in range(most):
            height = [loads[expert] if expert < len(loads) else 0.0 for loads in heights]
            panel.bar([str(layer) for layer in layers], height, bottom=bottom, label=f"expert {expert}", width=0.8)
            bottom = [low + more for low, more in zip(bottom, height, strict=True)]
        panel.set(title=f"{kind} tokens ({found[layers[0]][kind].num_tokens})", xlabel="layer", ylim=(0, 1))
    panels[0].set_ylabel("fraction of first assignments" if assignments == "first" else "fraction of assignments")
    panels[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure
