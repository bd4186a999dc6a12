"""Turn a size and a stage into the same seeded weights and the same batches for every rival.

Nothing but torch is imported, since a rival may live on another transformers. Names of weights are LLaVA's.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, replace

import torch

IGNORE_INDEX = -100
IMAGE = -200
PAD, BOS = 0, 1
# Every other layer from the first gets experts in stage 3, as in MoE-LLaVA's scripts.
NUM_EXPERTS, TOP_K = 4, 2


@dataclass(frozen=True)
class Size:
    """Widths and depths of tower and decoder, samples per step, and the optimizer of transformers' --optim."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    vocab_size: int = 32000
    image_size: int = 224
    patch_size: int = 14
    vision_width: int = 256
    vision_layers: int = 6
    batch_size: int = 4
    optim: str = "adamw_torch_fused"

    @property
    def num_features(self) -> int:
        """Tokens of an image."""
        return (self.image_size // self.patch_size) ** 2

    def layer_weights(self, has_experts=False) -> int:
        """Weights of a decoder layer's matrices that multiply one token."""
        mlp = 3 * self.hidden_size * self.intermediate_size
        return 4 * self.hidden_size**2 + (TOP_K * mlp if has_experts else mlp)

    def logits_fraction(self, stage: int) -> float:
        """Weights of the vocabulary head over those of all the decoder's matrices that multiply one token, 0 to 1."""
        num_sparse = (self.num_layers + 1) // 2 if stage == 3 else 0
        layers = num_sparse * self.layer_weights(True) + (self.num_layers - num_sparse) * self.layer_weights()
        head = self.hidden_size * self.vocab_size
        return head / (head + layers)

    def text_config(self) -> dict:
        """Return the fields of a Llama config."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": 2,
        }

    def vision_config(self) -> dict:
        """Return the fields of a CLIP vision config."""
        return {
            "hidden_size": self.vision_width,
            "intermediate_size": 4 * self.vision_width,
            "num_hidden_layers": self.vision_layers,
            "num_attention_heads": max(1, self.vision_width // 64),
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "projection_dim": 64,
        }


# S: small enough for several rounds; the head is 39% of the decoder's matrices.
# V: the same vocabulary, but the head is 2% as in a 7B model. At 2% the weights are 50 * 32000 * hidden_size whatever
# the depth, hence the narrow width, the wide MLP (few layers to call), the small images, and SGD: with so few tokens
# per step, Adam's pass over the weights would be a sixth of the step; at 7B and 128 samples it is a hundredth.
SIZES = {
    "S": Size(512, 1376, 8, 8),
    "V": Size(192, 3072, 156, 3, image_size=112, batch_size=1, optim="sgd"),
    "toy": Size(64, 128, 2, 2, vocab_size=320, image_size=56, vision_width=64, vision_layers=2, batch_size=2),
}
# Captions are short; and with top-2 experts on half of the layers more weights per layer multiply a token.
OF_STAGE = {("V", 1): {"batch_size": 4}, ("V", 3): {"num_layers": 108}}


def size_of(name: str, stage: int) -> Size:
    """Return a size for a stage."""
    return replace(SIZES[name], **OF_STAGE.get((name, stage), {}))


def moe_config() -> dict:
    """Return MoE-LLaVA's nested `moe` dict."""
    return {"moe_enable": True, "moe_mode": "sparse", "num_experts": [NUM_EXPERTS], "top_k_experts": TOP_K}


def fill(parameters: dict[str, torch.Tensor]) -> None:
    """Draw every parameter from its own name, on its device: norms 1, biases 0, matrices N(0, 0.02)."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name.endswith(".bias") or "norm" in name:
                parameter.fill_(float(not name.endswith(".bias")))
                continue
            generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
            parameter.normal_(std=0.02, generator=generator)


def batches(size: Size, stage: int, count: int, seed: int = 0) -> list[list[dict]]:
    """Return `count` batches of examples: id, input_ids and labels [L], one placeholder per feature, images, sizes."""
    rng, generator = random.Random(seed + stage), torch.Generator().manual_seed(seed + stage)
    side = size.image_size
    made = []
    for index in range(count * size.batch_size):
        ids, labels = caption(size, rng) if stage == 1 else conversation(size, rng)
        made.append(
            {
                "id": f"seeded_{index}",
                "input_ids": torch.tensor(ids),
                "labels": torch.tensor(labels),
                "images": [torch.randn(3, side, side, generator=generator)],
                "image_sizes": [(side, side)],
            }
        )
    return [made[start : start + size.batch_size] for start in range(0, len(made), size.batch_size)]


def caption(size: Size, rng: random.Random) -> tuple[list[int], list[int]]:
    """Return ids and labels of stage 1: an image, then 10 to 60 supervised tokens of caption."""
    words = [rng.randrange(3, size.vocab_size - 1) for _ in range(rng.randint(10, 60))]
    return [BOS] + [IMAGE] * size.num_features + words, [IGNORE_INDEX] * (1 + size.num_features) + words


def conversation(size: Size, rng: random.Random) -> tuple[list[int], list[int]]:
    """Return ids and labels of stages 2 and 3: 35 system tokens, an image, 50 to 300 of question and answer.

    15 to 25% of all tokens are supervised, in one to three turns.
    """
    ids = [BOS] + [rng.randrange(3, size.vocab_size - 1) for _ in range(34)] + [IMAGE] * size.num_features
    labels = [IGNORE_INDEX] * len(ids)
    num_text = rng.randint(50, 300)
    num_supervised = min(round(rng.uniform(0.15, 0.25) * (len(ids) + num_text)), num_text - 12)
    num_turns = rng.randint(1, 3)
    for turn in range(num_turns):
        last = turn == num_turns - 1
        asked = (num_text - num_supervised) // num_turns + last * ((num_text - num_supervised) % num_turns)
        answered = num_supervised // num_turns + last * (num_supervised % num_turns)
        words = [rng.randrange(3, size.vocab_size - 1) for _ in range(asked + answered)]
        ids += words
        labels += [IGNORE_INDEX] * asked + words[asked:]
    return ids, labels


def count_tokens(examples: list[dict]) -> int:
    """Return the tokens of a batch, padding not counted."""
    return sum(len(example["input_ids"]) for example in examples)


def padded(examples: list[dict], image: int = IMAGE) -> dict:
    """Return input_ids, labels, attention_mask [B, L] and images [N, 3, H, W], padded as LLaVA and transformers do.

    image: the id of a feature of an image.
    """
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.where(e["input_ids"] == IMAGE, image, e["input_ids"]) for e in examples]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=PAD),
        "labels": pad_sequence([e["labels"] for e in examples], batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True, padding_value=0),
        "pixel_values": torch.stack([image for e in examples for image in e["images"]]),
    }
