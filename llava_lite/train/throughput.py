"""Turn a model and the batches it saw into tokens a second and MFU.

Flops are those of the matrix products that the step needs, attention scores not counted: recomputed activations and
padding are nobody's use, so neither raises MFU. Letters: N pictures, P features of a picture, S tokens of a picture
inside the tower, E experts.
"""

import time
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from llava_lite.constants import IGNORE_INDEX
from llava_lite.model.configuration import has_class_token
from llava_lite.model.moe import MoeBlock
from llava_lite.model.products import product
from llava_lite.train.tuning import count

# Dense half-precision peaks in flops/s from the makers' data sheets, by a part of the device's name; first match.
PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A40": 150e12,
    "RTX 4090": 165e12,
    "RTX A6000": 155e12,
    "V100": 125e12,
}


def mfu(tokens_per_s, flops_per_token, peak_flops):
    """Model FLOPs utilisation, 0 to 1 (Chowdhery et al. 2022, PaLM, appendix B; attention not counted).

    tokens_per_s: for one chip, padding not counted. peak_flops: of one chip, dense, at the run's dtype.
    A trained weight costs 6 flops a token; a frozen one after the first trained one 4 (forward, gradient to its
    input); one before it, such as the frozen tower, 2.
    """
    return tokens_per_s * flops_per_token / peak_flops


@dataclass(frozen=True)
class Flops:
    """What a training step costs: a token in the decoder, a supervised one in the vocabulary head, an image."""

    per_token: float
    per_supervised: float
    per_picture: float

    def of_batch(self, num_tokens, num_supervised, num_pictures):
        """Return the flops of a batch."""
        return num_tokens * self.per_token + num_supervised * self.per_supervised + num_pictures * self.per_picture


class FlopCounter:
    """Walks the model from pixels to logits: after the first trained weight, each needs the gradient of its input."""

    def __init__(self):
        self.after_trained = False

    def cost(self, module, share=1.0):
        """Return the flops of the module's weights for one token; `share` of them is used by a token."""
        params = [p for m in module.modules() if not isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)]
        trains = any(p.requires_grad for p in params)
        self.after_trained = self.after_trained or trains
        frozen_flops = 4 if self.after_trained else 2
        return share * sum(count(p) * (6 if p.requires_grad else frozen_flops) for p in params)

    def layer_cost(self, layer):
        """Return the flops of a decoder layer for one token; of the experts a token pays for those it visits."""
        blocks = [m for m in layer.modules() if isinstance(m, MoeBlock)]
        unused = [1 - block.moe.top_k_experts / block.num_experts for block in blocks]
        return self.cost(layer) - sum(self.cost(b.experts, share) for b, share in zip(blocks, unused, strict=True))


def step_flops(model):
    """Return the Flops of a LLaVA model (or of one wrapped by PEFT) with its present choice of what trains."""
    counter, stack, tower = FlopCounter(), model.get_model(), model.get_vision_tower()
    per_picture = 0.0
    if tower is not None:
        num_features = tower.num_patches
        num_tokens = num_features + has_class_token(tower.config)
        convolutions = [m for m in tower.modules() if isinstance(m, nn.Conv2d)]
        per_picture += num_features * sum(counter.cost(m) for m in convolutions)
        per_picture += num_tokens * sum(counter.cost(layer) for layer in tower.layers[: tower.num_read_layers])
        per_picture += num_features * counter.cost(stack.mm_projector)
    # A trained embedding costs no product, but gradients must reach it.
    counter.after_trained |= any(p.requires_grad for p in stack.embed_tokens.parameters())
    per_token = sum(counter.layer_cost(layer) for layer in stack.layers)
    head = counter.cost(model.get_output_embeddings())
    if "loss" in model.plain_paths:
        return Flops(per_token + head, 0.0, per_picture)
    return Flops(per_token, head, per_picture)


def peak_flops(device, dtype):
    """Return the dense peak of a device in flops/s: the maker's for half precision, else what a large product reaches.

    No maker states a peak for a CPU core or a share of it: there, MFU means "of the speed of a matrix product".
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        known = next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
        if known is not None:
            return known
    return measured_peak_flops(device, dtype)


def measured_peak_flops(device, dtype, repeats=5):
    """Return the flops/s of the fastest of a few square matrix products."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    best_s = float("inf")
    for _ in range(repeats):
        start_s = time.perf_counter()
        product(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * size**3 / best_s


@dataclass(frozen=True)
class Work:
    """What one device did between two lines of the log."""

    tokens: int
    seconds: float
    flops: float
    peak: float

    @property
    def tokens_per_s(self):
        """Tokens a second, padding not counted."""
        return self.tokens / self.seconds

    @property
    def mfu(self):
        """Model FLOPs utilisation, 0 to 1."""
        return mfu(self.tokens_per_s, self.flops / max(self.tokens, 1), self.peak)


class Meter:
    """Counts what the steps between two lines of the log worked on, and for how long; reads no device until asked."""

    def __init__(self, flops: Flops, peak: float):
        self.flops, self.peak = flops, peak
        self.counts = None  # [3] tokens, supervised tokens, pictures; on the batch's device
        self.seconds_before = 0.0
        self.start_clock()

    def start_clock(self):
        """Count time from now on."""
        self.start_s = time.perf_counter()

    def add(self, batch):
        """Count a batch as the collator makes it."""
        counts = count_batch(batch)
        self.counts = counts if self.counts is None else self.counts + counts

    @contextmanager
    def pause(self):
        """Leave out the time of an evaluation or a save."""
        self.seconds_before = self.seconds()
        try:
            yield
        finally:
            self.start_clock()

    def seconds(self):
        """Return the seconds since the last reading, pauses left out."""
        return self.seconds_before + time.perf_counter() - self.start_s

    def read(self):
        """Return the Work since the last reading, and start anew."""
        counts, seconds = self.state()["counts"], self.seconds()
        self.counts, self.seconds_before = None, 0.0
        self.start_clock()
        return Work(counts[0], seconds, self.flops.of_batch(*counts), self.peak)

    def state(self):
        """Return the counts so far, for a checkpoint."""
        return {"counts": [0, 0, 0] if self.counts is None else self.counts.tolist(), "seconds": self.seconds()}

    def load_state(self, state, device):
        """Go on from the counts of a checkpoint."""
        self.counts = torch.tensor(state["counts"], device=device)
        self.seconds_before = state["seconds"]
        self.start_clock()


def has_pictures(batch):
    """Tell whether a batch shows any picture, as pixels or as features of the tower."""
    return "images" in batch or len(batch.get("image_features", ())) > 0


def count_batch(batch):
    """Return [3] tokens without padding, supervised tokens, pictures of a batch; a tensor on its device."""
    num_supervised = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
    # A packed row has neither mask nor padding.
    mask = batch.get("attention_mask")
    num_tokens = num_supervised.new_tensor(batch["input_ids"].numel()) if mask is None else mask.sum()
    # [N, 3, H, W], or a list of [3, H, W] or [n, 3, H, W].
    num_pictures = sum(picture.shape[0] if picture.dim() == 4 else 1 for picture in batch.get("images", ()))
    return torch.stack([num_tokens, num_supervised, num_tokens.new_tensor(num_pictures)])
