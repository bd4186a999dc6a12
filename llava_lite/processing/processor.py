"""Turn prompts and images into what a model takes: ids with a place for every feature, a mask, pixels.

B texts, T tokens of the longest, N images of all texts together.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from llava_lite.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_lite.conversation import Rendered, get_template
from llava_lite.conversation.chat_template import takes_images
from llava_lite.conversation.images import (
    drop_placeholders,
    group_images,
    open_groups,
    place_images,
    with_placeholders,
    without_placeholder,
)
from llava_lite.conversation.prompts import read_prompts
from llava_lite.conversation.tokenize import tokenize_rendered
from llava_lite.hub.push import ProcessorSharing
from llava_lite.media.layout import ImageLayout
from llava_lite.media.preprocess import image_side, process_images
from llava_lite.processing.call_keywords import CallKeywords, with_settings
from llava_lite.processing.chat import ChatProcessing
from llava_lite.processing.files import PROMPT_SETTINGS, ProcessorFiles
from llava_lite.processing.padding import Sequence, as_tensors, cut_sequence, length_limit, pad_sequences, padded_len


class LlavaLiteProcessor(ChatProcessing, ProcessorFiles, ProcessorSharing, ProcessorMixin):
    """The tokenizer, the image processor and the prompt format that belong to a checkpoint.

    conv_template: key of `conv_templates`. num_image_tokens: features of one image, or of one crop of it if
    image_aspect_ratio is `anyres`; image_grid_pinpoints and mm_patch_merge_type then determine the number of crops and
    how their features are joined. image_token_index: the id that stands for one feature, -200 or the id of `<image>`
    in the vocabulary. image_processor: None for a text-only model. enable_thinking, chat_end_token,
    special_tokens_in_text: as in PromptOptions. mm_injection, mm_image_position, mm_boundary_vectors, image_channels:
    as in the model's config.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        conv_template="v1",
        image_aspect_ratio="square",
        num_image_tokens=0,
        image_token_index=IMAGE_TOKEN_INDEX,
        use_im_start_end=False,
        chat_template=None,
        image_grid_pinpoints=None,
        mm_patch_merge_type="flat",
        enable_thinking=False,
        chat_end_token=None,
        special_tokens_in_text="token",
        mm_injection="tokens",
        mm_image_position="placeholder",
        mm_boundary_vectors=False,
        image_channels="rgb",
    ):
        get_template(conv_template)
        self.conv_template = conv_template
        self.image_aspect_ratio = image_aspect_ratio
        self.num_image_tokens = num_image_tokens
        self.image_token_index = image_token_index
        self.use_im_start_end = use_im_start_end
        self.image_grid_pinpoints = image_grid_pinpoints
        self.mm_patch_merge_type = mm_patch_merge_type
        self.enable_thinking = enable_thinking
        self.chat_end_token = chat_end_token
        self.special_tokens_in_text = special_tokens_in_text
        self.mm_injection = mm_injection
        self.mm_image_position = mm_image_position
        self.mm_boundary_vectors = mm_boundary_vectors
        self.image_channels = image_channels
        self.image_token = DEFAULT_IMAGE_TOKEN
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def check_argument_for_proper_class(self, argument_name, argument):
        """Let a text-only model go without an image processor; check the rest as the parent does."""
        if argument_name == "image_processor" and argument is None:
            return None
        return super().check_argument_for_proper_class(argument_name, argument)

    @property
    def image_token_id(self):
        """The placeholder under the name that transformers looks for."""
        return self.image_token_index

    @property
    def pad_token_id(self):
        """The padding id; the attention mask tells padding from text, so any id will do."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.unk_token_id, self.tokenizer.eos_token_id, 0)
        return next(token_id for token_id in ids if token_id is not None)

    @property
    def asks_as_transformers(self):
        """Whether this is a model of transformers' LLaVA, whose own chat template and `<image>` token are used."""
        template = getattr(self.tokenizer, "chat_template", None)
        if self.conv_template != "chat" or self.image_token_index < 0 or template is None:
            return False
        known = self.tokenizer.get_added_vocab().get(DEFAULT_IMAGE_TOKEN)
        return known == self.image_token_index and takes_images(self.tokenizer.get_chat_template())

    @property
    def model_input_names(self):
        """The names under which `__call__` returns its tensors."""
        names = ["input_ids", "attention_mask", "pixel_values", "image_sizes"]
        return [*names, "image_rows"] if self.gives_image_rows else names

    @property
    def gives_image_rows(self):
        """Whether `__call__` tells which texts have an image: with mm_injection adaption_prompt no id does."""
        return not self.has_places and self.image_processor is not None

    @property
    def has_places(self):
        """Whether images stand in the text; not with mm_injection adaption_prompt."""
        return self.mm_injection == "tokens"

    @property
    def ignores_placeholders(self):
        """Whether it does not matter where in a text the placeholder of its one image stands."""
        return not self.has_places or self.mm_image_position == "front"

    @property
    def image_layout(self):
        """How an image becomes crops and features, as in the model's config."""
        layout = ImageLayout.read(
            self.num_image_tokens,
            math.isqrt(self.num_image_tokens),
            image_side(self.image_processor),
            self.image_aspect_ratio,
            self.mm_patch_merge_type,
            self.image_grid_pinpoints,
        )
        return replace(layout, in_text=self.has_places, num_boundary=2 * self.mm_boundary_vectors)

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Return input_ids and attention_mask [B, T] and, where there are images, pixel_values [N, 3, H, W].

        With mm_injection adaption_prompt there are always pixel_values, and image_rows [B], a mask of the texts that
        have an image: so the inputs of several calls can be put one after another, as transformers' pipelines do.
        Under `anyres` pixel_values are [N, n, 3, H, W], filled up with zeros to the most crops that an image has, and
        image_sizes [N, 2] are the widths and heights of the images.

        text: a prompt or a list of B, as texts or as `render` returns them. images: an image, all images in the order
        of their placeholders, or one list a text; an image is a PIL image, a path, an address, the bytes of a file, an
        array or tensor of pixels, or an undecoded one of `datasets`, turned upright by its EXIF. Every `<image>`
        becomes as many placeholders as its image has features.

        kwargs: padding (True: to the longest; "max_length"; False), padding_side ("left", which `generate` needs),
        truncation (cuts ends off at max_length), max_length, pad_to_multiple_of, return_tensors ("pt", "np", or None
        for lists), add_special_tokens, return_attention_mask, return_token_type_ids, return_mm_token_type_ids (1 at
        images), return_assistant_tokens_mask (1 at the answers of what `render` returns); settings of the image
        processor (do_normalize, ...); or text_kwargs and images_kwargs with these.
        Raises ValueError if a text has more or fewer placeholders than images, or if an image would be cut;
        UnknownKeyword for any other name.
        """
        if videos is not None or audio is not None:
            raise ValueError("the model sees images alone; videos and audio are not for it.")
        if text is None:
            raise ValueError("the processor needs a text; for images alone use processor.image_processor.")
        asked = CallKeywords.read(kwargs, self.image_processor)
        prompts = read_prompts(text, asked.add_special_tokens, asked.return_assistant_tokens_mask)
        return self._encode(prompts, group_images(images, [prompt.text for prompt in prompts]), asked)

    def encode(self, prompts, groups):
        """Return the inputs of rendered prompts with one list of images each, for callers that have them so."""
        asked, prompts = CallKeywords(), read_prompts(prompts, None)
        return self._encode(prompts, open_groups(groups, [prompt.text for prompt in prompts]), asked)

    def _encode(self, prompts, groups, asked):
        """Return the inputs of prompts and their upright images; asked: CallKeywords."""
        image_processor = with_settings(self.image_processor, asked.images)
        sequences = [self._tokenize(prompt, group) for prompt, group in zip(prompts, groups, strict=True)]
        limit = length_limit(asked.max_length, self.tokenizer)
        if asked.truncation not in (False, "do_not_truncate") and limit is not None:
            sequences = [cut_sequence(sequence, limit, self.image_token_index) for sequence in sequences]
        length = padded_len(sequences, asked.padding, limit, asked.pad_to_multiple_of)
        batch = pad_sequences(sequences, self.pad_token_id, asked.padding_side, length)
        is_image = [[int(one == self.image_token_index) for one in ids] for ids in batch["input_ids"]]
        chosen = {
            "attention_mask": (asked.return_attention_mask, batch.pop("attention_mask")),
            "token_type_ids": (asked.return_token_type_ids, [[0] * len(ids) for ids in is_image]),
            "mm_token_type_ids": (asked.return_mm_token_type_ids, is_image),
            "assistant_masks": (asked.return_assistant_tokens_mask, batch.pop("assistant_masks")),
        }
        batch |= {name: values for name, (is_asked, values) in chosen.items() if is_asked}
        data = as_tensors(batch, asked.return_tensors)
        upright = [image for group in groups for image in group]
        if upright or self.gives_image_rows:
            data |= self._pixels(upright, image_processor, asked.return_tensors)
        if self.gives_image_rows:
            has_image = np.array([bool(group) for group in groups])
            kinds = {"pt": torch.from_numpy, "np": np.asarray, None: np.ndarray.tolist}
            data["image_rows"] = kinds[asked.return_tensors](has_image)
        return BatchFeature(data)

    def _tokenize(self, prompt: Rendered, images) -> Sequence:
        """Return the ids of one prompt, each placeholder already as long as the features of its image."""
        if self.ignores_placeholders and images:
            prompt = without_placeholder(prompt)
        if self.asks_as_transformers and not prompt.literals:
            bos = self.tokenizer.bos_token
            with_bos = prompt.add_special_tokens and not (bos is not None and prompt.text.startswith(bos))
            encoded = self.tokenizer(
                prompt.text, add_special_tokens=with_bos, return_offsets_mapping=bool(prompt.answers)
            )
            ids = [IMAGE_TOKEN_INDEX if one == self.image_token_index else one for one in encoded["input_ids"]]
            spans = encoded["offset_mapping"] if prompt.answers else [(0, 0)] * len(ids)
            in_answer = [any(start < e and end > s for s, e in prompt.answers) for start, end in spans]
        else:
            # A plain language model was not trained here: earlier answers are tokenised with the text around them.
            cuts_prompts = prompt.cuts_prompts and self.image_processor is not None
            prompt = prompt._replace(cuts_prompts=cuts_prompts)
            ids, labels = tokenize_rendered(prompt, self.tokenizer, bool(images))
            in_answer = [label != IGNORE_INDEX for label in labels]
        if self.ignores_placeholders and images and self.has_places:
            at = int(ids[:1] == [self.tokenizer.bos_token_id])
            ids, in_answer = [*ids[:at], IMAGE_TOKEN_INDEX, *ids[at:]], [*in_answer[:at], False, *in_answer[at:]]
        if images and self.image_processor is None:
            raise ValueError(f"{len(images)} images for a model that has no vision tower.")
        lengths = iter([self.image_layout.num_tokens(image.size) for image in images])
        sequence = Sequence([], [])
        for one, answers in zip(ids, in_answer, strict=True):
            is_image = one == IMAGE_TOKEN_INDEX
            count = next(lengths) if is_image else 1
            sequence.ids.extend([self.image_token_index if is_image else one] * count)
            sequence.in_answer.extend([answers] * count)
        return sequence

    def _pixels(self, images, image_processor, return_tensors):
        """Return what the model needs of the images: pixel_values, and image_sizes where they have crops."""
        side = image_side(image_processor) if not images else None
        prepared = torch.zeros(0, 3, side, side) if not images else process_images(images, image_processor, self)
        if return_tensors is None:
            data = {"pixel_values": [pixels.numpy() for pixels in prepared]}
            return data | ({"image_sizes": [image.size for image in images]} if self.image_layout.is_anyres else {})
        data = {"pixel_values": prepared}
        if self.image_layout.is_anyres:
            filled = torch.nn.utils.rnn.pad_sequence(list(prepared), batch_first=True)  # [N, n, 3, H, W]
            sizes = torch.tensor([image.size for image in images])  # [N, 2]
            data = {"pixel_values": filled, "image_sizes": sizes}
        return {name: value.numpy() if return_tensors == "np" else value for name, value in data.items()}

    def template(self, conv_template=None):
        """Return the prompt format, by default the checkpoint's own, with the options of its training."""
        options = {key: getattr(self, key) for key in PROMPT_SETTINGS}
        return get_template(conv_template or self.conv_template, **options, is_strict=False)

    def render(self, turns, conv_template=None, system=None, open_turn=True):
        """Return a conversation as a prompt, a `Rendered`, image placeholders placed as in training.

        turns: (question, answer) pairs; the last answer may be None, which leaves the turn open for the model.
        conv_template: another format than the checkpoint's own. system: replaces the format's system text. open_turn:
        False ends with the last question, without the text that starts an answer.
        """
        template = self.template(conv_template)
        spoken = [turn for question, answer in turns for turn in (("human", question), ("gpt", answer))]
        if not open_turn and spoken[-1][1] is None:
            spoken.pop()
        if self.ignores_placeholders:
            num_images = sum(text.count(DEFAULT_IMAGE_TOKEN) for _, text in spoken if text)
            rendered = template.with_turns(drop_placeholders(spoken), system).render(self.tokenizer)
            return with_placeholders(rendered, num_images)
        spoken = place_images(spoken, template, self.use_im_start_end)
        return template.with_turns(spoken, system).render(self.tokenizer)

    def decode(self, token_ids, skip_special_tokens=False, **kwargs):
        """Return the text of one sequence of ids, or a list for many; placeholders of images are left out."""
        sequences = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        if isinstance(sequences, list) and sequences and not isinstance(sequences[0], int):
            return self.batch_decode(sequences, skip_special_tokens=skip_special_tokens, **kwargs)
        sequences = [sequences] if isinstance(sequences, int) else sequences
        # -200 is in no vocabulary; a placeholder with an id of its own would be written once a feature.
        kept = [token for token in sequences if token >= 0 and token != self.image_token_index]
        return self.tokenizer.decode(kept, skip_special_tokens=skip_special_tokens, **kwargs)

    def batch_decode(self, sequences, skip_special_tokens=False, **kwargs):
        """Return the text of every sequence of what `generate` returned, prompts included or not."""
        return [self.decode(sequence, skip_special_tokens=skip_special_tokens, **kwargs) for sequence in sequences]

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens=True, **kwargs):
        """Return the texts of generated sequences; the name that transformers' pipeline calls."""
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
