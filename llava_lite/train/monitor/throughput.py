"""Turn a model and the batches it saw into tokens a second and MFU.

Flops are those of the matrix multiplications that the step needs, attention scores not counted. Recomputed activations
and padding do not count, so neither raises MFU. Letters: N images, P features of an image, S tokens of an image
inside the tower, E experts.
"""

import time
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from llava_lite.constants import IGNORE_INDEX
from llava_lite.model.matmul import TORCH
from llava_lite.model.moe.block import MoeBlock
from llava_lite.tower_config import has_class_token, num_tower_tokens
from llava_lite.train.tuning import count

# Dense half-precision peaks in flops/s from the vendors' data sheets, by a part of the device's name; first match.
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
    """Flops of a training step: of a token in the decoder, of a supervised one in the vocabulary head, of an image."""

    per_token: float
    per_supervised: float
    per_image: float

    def of_batch(self, num_tokens, num_supervised, num_images):
        """Return the flops of a batch."""
        return num_tokens * self.per_token + num_supervised * self.per_supervised + num_images * self.per_image


class FlopCounter:
    """Counts flops from pixels to logits: modules after the first trained weight need the gradient of their input."""

    def __init__(self):
        self.after_trained = False

    def cost(self, module, fraction=1.0):
        """Return the flops of the module's weights for one token, which uses this fraction of them."""
        params = [p for m in module.modules() if not isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)]
        trains = any(p.requires_grad for p in params)
        self.after_trained = self.after_trained or trains
        frozen_flops = 4 if self.after_trained else 2
        return fraction * sum(count(p) * (6 if p.requires_grad else frozen_flops) for p in params)

    def layer_cost(self, layer):
        """Return the flops of a decoder layer for one token; of the experts count those that it is routed to."""
        blocks = [m for m in layer.modules() if isinstance(m, MoeBlock)]
        unused = [1 - block.moe.top_k_experts / block.num_experts for block in blocks]
        pairs = zip(blocks, unused, strict=True)
        return self.cost(layer) - sum(self.cost(block.experts, fraction) for block, fraction in pairs)


def step_flops(model):
    """Return the Flops of a LLaVA model (or of one wrapped by PEFT) with its trained weights as they are now."""
    counter, stack, tower = FlopCounter(), model.get_model(), model.get_vision_tower()
    per_image = 0.0
    if tower is not None:
        num_patches = tower.num_patches
        num_tokens = num_patches + has_class_token(tower.config)
        convolutions = [m for m in tower.modules() if isinstance(m, nn.Conv2d)]
        per_image += num_patches * sum(counter.cost(m) for m in convolutions)
        per_image += num_tokens * sum(counter.cost(layer) for layer in tower.layers[: tower.num_read_layers])
        connector, num_features = stack.mm_projector, num_tower_tokens(model.config, tower.config)
        parts = connector.parts(num_features) if hasattr(connector, "parts") else [(connector, num_features)]
        per_image += sum(num_passing * counter.cost(part) for part, num_passing in parts)
    # A trained embedding has no matrix multiplication, but gradients must reach it.
    counter.after_trained |= any(p.requires_grad for p in stack.embed_tokens.parameters())
    per_token = sum(counter.layer_cost(layer) for layer in stack.layers)
    head = counter.cost(model.get_output_embeddings())
    if "loss" in model.plain_paths:
        return Flops(per_token + head, 0.0, per_image)
    return Flops(per_token, head, per_image)


def get_matmul(model):
    """Return the matrix multiplication that a model uses."""
    return getattr(model.get_output_embeddings(), "matmul", TORCH)


def peak_flops(device, dtype, matmul=TORCH):
    """Return the dense peak of a device in flops/s: the vendor's for half precision, else that of a large matmul.

    No vendor states a peak for a CPU core or a part of it: there, MFU is relative to a matrix multiplication. matmul:
    the one that the model uses.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        known = next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
        if known is not None:
            return known
    return measured_peak_flops(device, dtype, matmul)


def measured_peak_flops(device, dtype, matmul=TORCH, repeats=5):
    """Return the flops/s of the fastest of a few square matrix multiplications."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    best_s = float("inf")
    for _ in range(repeats):
        start_s = time.perf_counter()
        matmul.product(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * size**3 / best_s


# Numbers that count_batch returns.
NUM_COUNTS = 5


@dataclass(frozen=True)
class Work:
    """Tokens, time and flops of one device between two lines of the log."""

    tokens: int
    seconds: float
    flops: float
    peak: float
    # Tokens if the records of each micro-batch were padded to the longest of them, and the records.
    padded_tokens: int = 0
    records: int = 0

    @property
    def tokens_per_s(self):
        """Tokens a second, padding not counted."""
        return self.tokens / self.seconds

    @property
    def mfu(self):
        """Model FLOPs utilisation, 0 to 1."""
        return mfu(self.tokens_per_s, self.flops / max(self.tokens, 1), self.peak)


class Meter:
    """Counts tokens, images and time between two lines of the log; reads the device only by `read` and `state`."""

    def __init__(self, flops: Flops, peak: float):
        self.flops, self.peak = flops, peak
        self.counts = None  # [5] as of count_batch, on the batch's device
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
        """Return the seconds since the last `read`, without pauses."""
        return self.seconds_before + time.perf_counter() - self.start_s

    def read(self):
        """Return the Work since the last call, and start from zero."""
        counts, seconds = self.state()["counts"], self.seconds()
        self.counts, self.seconds_before = None, 0.0
        self.start_clock()
        return Work(counts[0], seconds, self.flops.of_batch(*counts[:3]), self.peak, *counts[3:])

    def state(self):
        """Return the counts so far, for a checkpoint."""
        return {"counts": [0] * NUM_COUNTS if self.counts is None else self.counts.tolist(), "seconds": self.seconds()}

    def load_state(self, state, device):
        """Continue from the counts of a checkpoint."""
        # Earlier versions counted the first three alone.
        counts = state["counts"] + [0] * (NUM_COUNTS - len(state["counts"]))
        self.counts = torch.tensor(counts, device=device)
        self.seconds_before = state["seconds"]
        self.start_clock()


def has_images(batch):
    """Tell whether a batch shows any image, as pixels or as features of the tower."""
    return "images" in batch or len(batch.get("image_features", ())) > 0


def count_batch(batch):
    """Return [5] tokens without padding, supervised tokens, images, padded tokens and records of a batch.

    A tensor on the batch's device. Padded tokens: as if every record were as long as the longest one.
    """
    num_supervised = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
    # A packed sequence has neither mask nor padding.
    mask = batch.get("attention_mask")
    num_tokens = num_supervised.new_tensor(batch["input_ids"].numel()) if mask is None else mask.sum()
    # [N, 3, H, W], or a list of [3, H, W] or [n, 3, H, W]; media that together are an image count as one.
    images = batch.get("images", ())
    num_images = sum(image.shape[0] if isinstance(image, torch.Tensor) and image.dim() == 4 else 1 for image in images)
    num_padded, num_records = batch["labels"].numel(), len(batch["labels"])
    if "cu_seq_lens_q" in batch:
        num_records = len(batch["cu_seq_lens_q"]) - 1
        num_padded = int(batch["max_length_q"]) * num_records
    return torch.stack([num_tokens, num_supervised, *num_tokens.new_tensor([num_images, num_padded, num_records])])
