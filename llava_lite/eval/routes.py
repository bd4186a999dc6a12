"""Turn a question with pictures into a report of where the experts of each layer sent pictures and words.

What MoE-LLaVA (Lin et al. 2024, arXiv 2401.15947) shows in its figures on routing. Counted are the choices as they
were made, before any is dropped for lack of room; padding is left out.

Shapes: `B` questions, `T` tokens, `S` routed tokens, `E` experts, `K` choices a token.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from llava_lite.inference import prepare

PICTURES, WORDS = "pictures", "words"


@dataclass(frozen=True)
class Shares:
    """How the tokens of one kind were shared among the experts of one layer.

    num_tokens: how many there were. first: share of the first choices that each expert got, [E], sum 1. chosen: share
    of all K choices, [E], sum 1; with one choice a token the two are equal. Without tokens all shares are 0.
    """

    num_tokens: int
    first: list[float]
    chosen: list[float]


@torch.no_grad()
def routes(model, processor, question, images=None, conv_template=None, history=None):
    """Return {layer: {"pictures": Shares, "words": Shares}} of the prompt of one question, or of a list together.

    Arguments as in `reply`; the answer is not generated. To see the routes of an answer as well, give question and
    answer as `history` and the next question.
    """
    blocks = experts_of(model)
    if isinstance(question, str):
        question, images, history = [question], [images], [history]
    images, history = images or [None] * len(question), history or [None] * len(question)
    inputs, _ = prepare(processor, question, images, conv_template, history)
    was_training = model.training
    with watching(blocks, lambda block: block.experts, lambda seen: seen[1]) as choices:
        model.eval()(**inputs.to(model.device, dtype=model.dtype))
    model.train(was_training)
    is_picture = (inputs["input_ids"] == processor.image_token_index).flatten()  # [B * T]
    is_real = inputs["attention_mask"].flatten().bool()
    found = {}
    for layer, (experts,) in choices.items():  # [S, K]
        # With moe_count_padding every position takes a route, else the real ones alone.
        rows = experts if len(experts) < len(is_real) else experts[is_real]
        pictures = is_picture[is_real]
        num_experts = blocks[layer].num_experts
        found[layer] = {
            PICTURES: shares_of(rows[pictures], num_experts),
            WORDS: shares_of(rows[~pictures], num_experts),
        }
    return found


def shares_of(choices, num_experts):
    """Return the Shares of tokens with the given choices [S, K], the first choice first."""
    counts = F.one_hot(choices, num_experts).sum(dim=0)  # [K, E]
    first, chosen = counts[0], counts.sum(dim=0)
    return Shares(
        len(choices),
        (first / max(int(first.sum()), 1)).tolist(),
        (chosen / max(int(chosen.sum()), 1)).tolist(),
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
    blocks = experts_of(model)
    with watching(blocks, lambda block: block.gate, None) as seen:
        yield seen


@contextmanager
def watching(blocks, part_of, read_inputs):
    """Yield {layer: list} that grows, on the CPU, by what a part of a block gets (`read_inputs`) or else gives."""
    seen = {layer: [] for layer in blocks}

    def hook_on(layer):
        def keep(part, inputs, output):
            seen[layer].append((output if read_inputs is None else read_inputs(inputs)).detach().cpu())

        return keep

    hooks = [part_of(block).register_forward_hook(hook_on(layer)) for layer, block in blocks.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def experts_of(model):
    """Return the MoE blocks by layer; raise ValueError for a model without any."""
    blocks = model.moe_layers()
    if not blocks:
        raise ValueError(
            f"this {type(model).__name__} has no experts, so nothing is routed; open a model that was trained with "
            "--tuning moe."
        )
    return blocks


def plot_routes(found, path=None, choices="chosen"):
    """Draw pictures beside words, a bar a layer split among its experts; save as `path` and return the figure.

    found: what `routes` returned. choices: "chosen" for all choices of a token, "first" for the first alone.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    layers = list(found)
    most = max(len(found[layer][WORDS].first) for layer in layers)
    for panel, kind in zip(panels, (PICTURES, WORDS), strict=True):
        heights = [getattr(found[layer][kind], choices) for layer in layers]
        bottom = [0.0] * len(layers)
        for expert in range(most):
            height = [row[expert] if expert < len(row) else 0.0 for row in heights]
            panel.bar([str(layer) for layer in layers], height, bottom=bottom, label=f"expert {expert}", width=0.8)
            bottom = [low + more for low, more in zip(bottom, height, strict=True)]
        panel.set(title=f"{kind} ({found[layers[0]][kind].num_tokens} tokens)", xlabel="layer", ylim=(0, 1))
    panels[0].set_ylabel("share of first choices" if choices == "first" else "share of choices")
    panels[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure
