"""ImageBind-LLM's functions under their names: `load`, `data.load_and_transform_*`, `model.generate(inputs, prompts)`.

Programs written for imagebind_LLM import this in place of its packages `llama` and `ImageBind`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from llava_lite.imagebind_llm import data
from llava_lite.llama_adapter import Adapter, format_prompt
from llava_lite.model.builder import load_pretrained_model
from llava_lite.model.mixing import FeatureBank, mix_embeddings

__all__ = ["BindAdapter", "data", "format_prompt", "load"]

# The original's names of kinds -> ours.
KINDS = {"Image": "image", "Video": "video", "Text": "text", "Audio": "audio", "Point": "point"}


def load(
    name,
    llama_dir,
    device=None,
    download_root="ckpts",
    knn=False,
    llama_type="7B",
    phase="finetune",
    max_seq_len=512,
    **options,
):
    """Return the model.

    name: the file of a release (7B.pth) or its name in download_root; or a directory of ours. llama_dir: the directory
    that holds Meta's `llama_type`, or a LLaMA in Hugging Face's layout. knn: the file of a feature bank, which
    `llava-lite bank` makes of images or of the original's knn.index; True for download_root/knn.safetensors. options:
    of load_pretrained_model; vision_tower is ImageBind, download_root/imagebind_w3D.pth by default.
    phase is accepted and not needed.
    """
    path = next((one for one in (Path(name), Path(download_root) / f"{name}.pth") if one.exists()), None)
    if path is None:
        raise ValueError(
            f"model {str(name)!r}: there is no such file or directory, and no {name}.pth in {str(download_root)!r}."
        )
    base = Path(llama_dir) / llama_type
    given = {}
    if not path.is_dir():
        given = {"model_base": str(base if base.is_dir() else llama_dir)}
        options.setdefault("vision_tower", str(Path(download_root) / "imagebind_w3D.pth"))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, model, _, _ = load_pretrained_model(str(path), device=str(device), **given, **options)
    bank = None
    if knn:
        bank = FeatureBank.load(Path(download_root) / "knn.safetensors" if knn is True else knn)
    return BindAdapter(model, tokenizer, max_seq_len, bank)


class BindAdapter(Adapter):
    """A model whose tower is ImageBind, asked as the original's `LLaMA_adapter` is."""

    def __init__(self, model, tokenizer, max_seq_len: int = 512, bank: FeatureBank | None = None):
        super().__init__(model, tokenizer, max_seq_len)
        self.bank = bank

    def generate(
        self,
        inputs: dict,
        prompts,
        max_gen_len: int = 256,
        temperature: float = 0.1,
        top_p: float = 0.75,
        cache_size: int = 10,
        cache_t: float = 20.0,
        cache_weight: float = 0.5,
    ) -> list[str]:
        """Return the answers [B] to prompts about inputs {"Image": [tensor [B, ...], weight], "Audio": ..., ...}.

        The tensors are those of data.load_and_transform_*. cache_size, cache_t, cache_weight: of the feature bank that
        `load` was given: embeddings that are read, the temperature of their softmax, and how much they count.
        """
        return self.answer(
            prompts,
            {"image_features": self.features(inputs, cache_size, cache_t, cache_weight)},
            *(max_gen_len, temperature, top_p),
        )

    @torch.inference_mode()
    def features(self, inputs: dict, cache_size=10, cache_t=20.0, cache_weight=0.5) -> torch.Tensor:
        """Return the features [B, 1, C] that stand for an image; ValueError for a kind that is not known."""
        unknown = [kind for kind in inputs if kind not in KINDS]
        if unknown or not inputs:
            raise ValueError(f"inputs are of {', '.join(KINDS)}; got {', '.join(map(str, inputs)) or 'none'}.")
        tower = self.model.get_vision_tower()
        parts = {name: (tower.encode(KINDS[name], value), float(weight)) for name, (value, weight) in inputs.items()}
        mixing = {"top_k": cache_size, "temperature": cache_t, "weight": cache_weight}
        return mix_embeddings(parts, bank=self.bank, **mixing)[:, None]
