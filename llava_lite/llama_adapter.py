"""LLaMA-Adapter V2's functions under their names: `llama.load`, `format_prompt`, `model.generate(imgs, prompts)`.

Programs written for llama_adapter_v2_multimodal7b import this in place of its package `llama`. B prompts.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch

from llava_lite.conversation import alpaca_prompt
from llava_lite.media.preprocess import process_images
from llava_lite.model.builder import load_pretrained_model

logger = logging.getLogger(__name__)

# The names of the releases, which are files of GitHub; nothing is downloaded here.
RELEASES = "https://github.com/OpenGVLab/LLaMA-Adapter/releases"
_MODELS = ("BIAS-7B", "LORA-BIAS-7B", "CAPTION-7B", "LORA-BIAS-7B-v21")
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|npu)(:\d+)?")


def available_models() -> list[str]:
    """Return the names of the releases."""
    return list(_MODELS)


def format_prompt(instruction: str, input: str | None = None) -> str:
    """Return the prompt of an instruction, with an input where there is one that is not blank."""
    return alpaca_prompt(instruction, input)


def load(
    name,
    llama_dir,
    llama_type="7B",
    device=None,
    download_root="ckpts",
    max_seq_len=512,
    phase="finetune",
    **options,
):
    """Return (model, preprocess): `model.generate(imgs, prompts)`, and a PIL image to a tensor [3, H, W] for it.

    name: a release, found as NAME.pth or DIGEST_NAME.pth in download_root; its file; a directory of ours. llama_dir:
    the directory that holds Meta's `llama_type`, such as 7B, or a LLaMA in Hugging Face's layout. options: of
    load_pretrained_model, such as vision_tower and dtype. max_seq_len limits prompt and answer together; phase is
    accepted and not needed. A device in place of llama_type, as the original's demos have it, is taken for one.
    """
    if isinstance(llama_type, torch.device) or _DEVICE.fullmatch(str(llama_type)):
        logger.warning("load: %r in place of llama_type is a device; llama_type is 7B.", str(llama_type))
        llama_type, device = "7B", llama_type
    path, base = find_release(name, download_root), Path(llama_dir) / llama_type
    base = str(base) if base.is_dir() else str(llama_dir)
    given = {} if path.is_dir() else {"model_base": base}
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, model, image_processor, _ = load_pretrained_model(str(path), device=str(device), **given, **options)
    adapter = Adapter(model, tokenizer, max_seq_len)
    return adapter, lambda image: process_images([image], image_processor, model.config)[0]


def find_release(name, download_root) -> Path:
    """Return the file or directory of a model; ValueError with the known names if there is none."""
    path = Path(name)
    if path.exists():
        return path
    found = sorted(Path(download_root).glob(f"*{name}.pth"))
    exact = [file for file in found if file.stem == name or file.stem.endswith(f"_{name}")]
    if exact:
        return exact[0]
    where = f"its file is not in {str(download_root)!r}; download it from {RELEASES}" if name in _MODELS else "unknown"
    raise ValueError(f"model {str(name)!r}: {where}. Known: {', '.join(_MODELS)}, or the path of a file or directory.")


class Adapter:
    """A model with prompts in its attention, asked as the original's `LLaMA_adapter` is."""

    def __init__(self, model, tokenizer, max_seq_len: int = 512):
        self.model, self.tokenizer, self.max_seq_len = model, tokenizer, max_seq_len

    def eval(self) -> Adapter:
        """Return the model, which is in evaluation mode already."""
        return self

    def to(self, device) -> Adapter:
        """Move the model to a device."""
        self.model.to(device)
        return self

    def generate(self, imgs, prompts, max_gen_len: int = 256, temperature: float = 0.1, top_p: float = 0.75):
        """Return the answers [B] to prompts about images [B, 3, H, W] (None for text alone).

        prompts: texts, as format_prompt writes them, or lists of token ids. temperature: 0 for the most probable
        token; else sampling among the most probable tokens whose probabilities add up to top_p.
        """
        return self.answer(prompts, {"images": imgs}, max_gen_len, temperature, top_p)

    @torch.inference_mode()
    def answer(self, prompts, inputs: dict, max_gen_len: int, temperature: float, top_p: float) -> list[str]:
        """Return the answers to prompts; inputs: images, or features in place of them, as `generate` takes them."""
        ids, mask = self.encode(prompts, max_gen_len, inputs.get("images") is not None)
        device = self.model.device
        inputs = {name: v if v is None else v.to(device, self.model.dtype) for name, v in inputs.items()}
        inputs.setdefault("images", None)
        sampling = {"temperature": temperature, "top_p": top_p} if temperature > 0 else {}
        tokens = self.model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_gen_len,
            do_sample=temperature > 0,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.eos_token_id,
            **inputs,
            **sampling,
        )
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens]

    def tokenize(self, prompts) -> list[list[int]]:
        """Return the ids of prompts, which are texts or ids already."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        return [self.tokenizer(one)["input_ids"] if isinstance(one, str) else list(one) for one in prompts]

    def encode(self, prompts, max_gen_len: int, has_images: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask [B, T] of prompts, padded on the left; ValueError where an answer would not fit."""
        rows = self.tokenize(prompts)
        longest = max(map(len, rows))
        if longest + max_gen_len > self.max_seq_len:
            raise ValueError(
                f"a prompt of {longest} tokens and an answer of {max_gen_len} are more than max_seq_len "
                f"{self.max_seq_len}; shorten one, or load with a larger max_seq_len."
            )
        pad = self.tokenizer.eos_token_id
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return ids, mask
