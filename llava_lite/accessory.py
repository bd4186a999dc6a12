"""LLaMA2-Accessory's model under its names: MetaModel with from_pretrained, generate, stream_generate, compute_logits.

Programs written for accessory.model.meta import this in its place. B prompts, T tokens, V vocabulary.
"""

from __future__ import annotations

import torch

from llava_lite.inference import stream
from llava_lite.llama_adapter import Adapter
from llava_lite.model.builder import load_pretrained_model
from llava_lite.processing.processor import LlavaLiteProcessor


class MetaModel(Adapter):
    """A model of any kind that Accessory trains and this package opens, asked as there."""

    def __init__(self, model, tokenizer, max_seq_len: int = 4096, image_processor=None):
        super().__init__(model, tokenizer, max_seq_len)
        self.processor = LlavaLiteProcessor.from_config(model.config, tokenizer, image_processor)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_path,
        llama_type=None,
        llama_config=None,
        tokenizer_path=None,
        device=None,
        max_seq_len=4096,
        with_visual=None,
        mp_group=None,
        **options,
    ):
        """Return the model of a directory, `hf://user/name`, or several that are read on top of each other.

        The kind is told by the names of the weights; llama_type and llama_config, which state it, are accepted and not
        needed. tokenizer_path: where the directory has none. options: of load_pretrained_model (vision_tower, dtype).
        with_visual: whether images will be given; mp_group: a process group of one. Raises ValueError for a model
        that cannot see them, and for a group of several processes.
        """
        if mp_group is not None and mp_group.size() > 1:
            raise ValueError(
                f"mp_group has {mp_group.size()} processes, and a model is not divided among processes here. Leave it "
                "out and start one process: a model that is too large for a GPU is spread over several."
            )
        paths = [pretrained_path] if isinstance(pretrained_path, str) else list(map(str, pretrained_path))
        if len(paths) > 2:
            raise ValueError(f"{len(paths)} paths: give one, or a base and what was trained on it.")
        given = {"model_base": paths[0]} if len(paths) == 2 else {}
        given |= {} if tokenizer_path is None else {"tokenizer": tokenizer_path}
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer, model, image_processor, _ = load_pretrained_model(paths[-1], device=str(device), **given, **options)
        if with_visual and model.get_vision_tower() is None:
            raise ValueError(f"with_visual=True, but the model of {paths[-1]!r} has no vision tower; leave it out.")
        return cls(model, tokenizer, max_seq_len, image_processor)

    def generate(
        self, prompts, images=None, max_gen_len=512, temperature=0.0, top_p=0.95, additional_stop_symbols=()
    ) -> list[str]:
        """Return the answers [B] to prompts about images [B, 3, H, W] or None.

        An image stands right after the first token where the model was trained so, else nowhere in the text.
        additional_stop_symbols: texts at the first of which an answer ends.
        """
        inputs = {"images": images}
        answers = self.answer(prompts, inputs, max_gen_len, temperature, top_p)
        for symbol in additional_stop_symbols:
            answers = [answer.partition(symbol)[0] for answer in answers]
        return answers

    def stream_generate(self, prompt, image=None, max_gen_len=512, temperature=0.0, **options):
        """Yield {"text": what is there so far, "end_of_content": whether that is all} about an image or none."""
        text = ""
        for piece in stream(
            self.model,
            self.processor,
            prompt,
            None if image is None else [image],
            conv_template="bare",
            max_new_tokens=max_gen_len,
            temperature=temperature,
            **options,
        ):
            text += piece
            yield {"text": text, "end_of_content": False}
        yield {"text": text, "end_of_content": True}

    @torch.inference_mode()
    def compute_logits(self, examples, images=None) -> list[torch.Tensor]:
        """Return the logits [T, V] of each text or list of ids, those of an image's places left out."""
        rows, found = self.tokenize(examples), []
        for i, row in enumerate(rows):
            ids = torch.tensor([self.with_place(row, images is not None)], device=self.model.device)
            given = {} if images is None else {"images": images[i : i + 1].to(self.model.device, self.model.dtype)}
            logits = self.model(ids, **given).logits[0]
            # An image stands after the first token, and its last place predicts the second.
            found.append(logits[len(logits) - len(row) :])
        return found

    def encode(self, prompts, max_gen_len, has_images=False):
        """Return ids and mask [B, T] of prompts, with a place for an image where they have one."""
        return super().encode([self.with_place(row, has_images) for row in self.tokenize(prompts)], max_gen_len)

    def with_place(self, row: list[int], has_image: bool) -> list[int]:
        """Return ids with an image's placeholder after the first token, where the model reads images as tokens."""
        if not has_image or self.model.config.has_prompts:
            return row
        at = int(row[:1] == [self.tokenizer.bos_token_id])
        return [*row[:at], self.model.config.image_token_index, *row[at:]]
