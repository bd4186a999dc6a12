"""Mix the embeddings of several media into one, and pull it towards those of images that a bank holds.

ImageBind-LLM (Han et al. 2023, arXiv 2309.03905) learns from images alone, and its visual cache closes the gap to
other kinds: at inference an embedding is replaced in part by a mean of the image embeddings nearest to it.
Its index is faiss's; here it is a matrix product and top-k, which are exact.

B samples, N embeddings in the bank, K of them that are read, C width of an embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

logger = logging.getLogger(__name__)

# Added to the sum of the weights, as in the original.
WEIGHT_EPS = 1e-6
# Embeddings of a bank that are multiplied at once; bounds the memory of a copy in float32.
BLOCK_LEN = 2**16
FEATURES = "features"


class FeatureBank:
    """Embeddings of images, [N, C], of length 1 and in half precision.

    features: [N, C]; halves are taken as they are, others are normalised. Raises ValueError for another shape, no
    embedding, or one that is not finite.
    """

    def __init__(self, features: torch.Tensor):
        if features.ndim != 2 or not features.numel():
            raise ValueError(f"a bank holds embeddings [N, C], at least one; got shape {tuple(features.shape)}.")
        wrong = int((~torch.isfinite(features).all(dim=1)).sum())
        if wrong:
            raise ValueError(f"{wrong} of the {len(features)} embeddings of a bank are NaN or infinite.")
        is_ready = features.dtype == torch.float16
        self.features = features if is_ready else F.normalize(features.float(), dim=-1).half()

    def __len__(self) -> int:
        return len(self.features)

    @property
    def width(self) -> int:
        """Return the width C of an embedding."""
        return self.features.shape[1]

    @classmethod
    def from_images(cls, encode, batches: Iterable[torch.Tensor]) -> FeatureBank:
        """Return the bank of images.

        encode: images [B, 3, H, W] to embeddings [B, C], such as an ImageBindModel. batches: of images.
        """
        with torch.no_grad():
            found = [encode(images).float().cpu() for images in batches]
        if not found:
            raise ValueError("a bank needs at least one image.")
        return cls(torch.cat(found))

    @classmethod
    def load(cls, path: str | Path) -> FeatureBank:
        """Return the bank of a file that `save` wrote; ValueError with the names of its tensors for another file."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no feature bank at {str(path)!r}; `llava-lite bank` makes one.")
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                features = file.get_tensor(FEATURES) if FEATURES in names else None
        # What the reader raises is no ValueError.
        except Exception as error:
            raise ValueError(f"{str(path)!r} is no feature bank ({type(error).__name__}: {error}).") from error
        if features is None:
            raise ValueError(f"{str(path)!r} is no feature bank: it holds {names[:5]}, not {FEATURES!r} [N, C].")
        return cls(features)

    def save(self, path: str | Path) -> None:
        """Write the bank as safetensors."""
        save_file({FEATURES: self.features.cpu().contiguous()}, path, {"format": "pt"})

    def to(self, device) -> FeatureBank:
        """Move the embeddings to a device, and return the bank."""
        self.features = self.features.to(device)
        return self

    def nearest(self, queries: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the largest inner products with queries [B, C], [B, K], and their embeddings [B, K, C], in float32.

        The products are of half precision on a GPU, and of float32 on a CPU, which multiplies halves slowly.
        """
        stored = self.features.to(queries.device)
        dtype = stored.dtype if stored.is_cuda else torch.float32
        blocks = stored.split(BLOCK_LEN)
        best = torch.cat([queries.to(dtype) @ block.to(dtype).T for block in blocks], dim=-1).topk(top_k, dim=-1)
        return best.values.float(), stored[best.indices].float()


def mix_embeddings(
    parts: Mapping[str, tuple[torch.Tensor, float]],
    bank: FeatureBank | None = None,
    top_k: int = 10,
    temperature: float = 20.0,
    weight: float = 0.5,
) -> torch.Tensor:
    """Return one embedding [B, C] of several kinds, float32.

    f = sum of w_m / (sum of w + 1e-6) * e_m / |e_m|. With a bank, f becomes (1 - weight) f + weight r, of length 1,
    where r is the mean of the `top_k` stored embeddings nearest to f by softmax(temperature * inner product), of
    length 1 too. Without a bank f is not normalised again: in training it is one image, of length 1.

    parts: {kind: (embeddings [B, C], weight at least 0)}. A part of one embedding goes with every sample. A bank with
    fewer embeddings than `top_k` is read as a whole, and this is logged. Raises ValueError for no parts, weights that
    are negative or all zero, and widths or numbers of samples that differ.
    """
    check_parts(parts)
    total = sum(part_weight for _, part_weight in parts.values()) + WEIGHT_EPS
    normed = {kind: F.normalize(embeddings.float(), dim=-1) for kind, (embeddings, _) in parts.items()}
    mixed = sum(parts[kind][1] / total * embedding for kind, embedding in normed.items())  # [B, C]
    return mixed if bank is None else retrieve(mixed, bank, top_k, temperature, weight)


def retrieve(embeddings, bank: FeatureBank, top_k: int, temperature: float, weight: float) -> torch.Tensor:
    """Return embeddings [B, C] mixed with those of a bank that are nearest; see mix_embeddings."""
    if bank.width != embeddings.shape[-1]:
        raise ValueError(
            f"the feature bank holds embeddings of width {bank.width}, the encoder gives {embeddings.shape[-1]}. "
            "Make the bank with the model's own encoder: llava-lite bank."
        )
    if top_k < 1 or not 0 <= weight <= 1:
        raise ValueError(f"top_k is at least 1 and the bank's weight from 0 to 1; got {top_k} and {weight}.")
    if top_k > len(bank):
        logger.warning("the feature bank holds %d embeddings, fewer than top_k %d; all are read.", len(bank), top_k)
    scores, stored = bank.nearest(embeddings, min(top_k, len(bank)))
    shares = (temperature * scores).softmax(dim=-1)  # [B, K]
    mean = F.normalize(torch.einsum("bk,bkc->bc", shares, stored), dim=-1)
    return F.normalize((1 - weight) * embeddings + weight * mean, dim=-1)


def check_parts(parts: Mapping[str, tuple[torch.Tensor, float]]) -> None:
    """Raise ValueError unless the parts can be mixed."""
    if not parts:
        raise ValueError("no media to mix; give at least one kind with its embeddings and weight.")
    weights = {kind: float(weight) for kind, (_, weight) in parts.items()}
    if not all(0 <= weight < float("inf") for weight in weights.values()) or not any(weights.values()):
        raise ValueError(f"weights of media are 0 or more and not all 0; got {weights}.")
    shapes = {kind: tuple(embeddings.shape) for kind, (embeddings, _) in parts.items()}
    flat = [kind for kind, shape in shapes.items() if len(shape) != 2]
    if flat or len({shape[1] for shape in shapes.values()}) > 1 or len({n for n, _ in shapes.values()} - {1}) > 1:
        raise ValueError(f"embeddings of media are [B, C] with equal B (or 1) and equal C; got {shapes}.")
