"""Turn prompts and pictures into what a model takes: ids with a place for every feature, a mask, pixels.

B texts, T tokens of the longest, N pictures of all texts together.
"""

import math
import os
from importlib import import_module

import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.utils import PROCESSOR_NAME

from llava_lite.anyres import PictureLayout
from llava_lite.call_keywords import CallKeywords, with_settings
from llava_lite.chat_processing import ChatProcessing
from llava_lite.chat_template import takes_images
from llava_lite.companions import image_processor_of, load_tokenizer, read_json, template_of
from llava_lite.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_lite.conversation import Rendered, get_template, place_images
from llava_lite.hub import CONFIG, hub_arguments, in_words
from llava_lite.image_inputs import pictures_of_each
from llava_lite.mm_utils import load_image_processor, process_images, tokenize_rendered
from llava_lite.pictures import picture_side
from llava_lite.prompts import read_prompts
from llava_lite.rows import Row, as_tensors, cut_row, length_limit, pad_rows, padded_len
from llava_lite.share import ProcessorSharing

# What a processor saves of its own, beside its parts.
SETTINGS = ("conv_template", "image_aspect_ratio", "num_image_tokens", "image_token_index", "use_im_start_end")
SETTINGS += ("image_grid_pinpoints", "mm_patch_merge_type")
# Fields of PromptOptions that a checkpoint keeps.
PROMPT_SETTINGS = ("enable_thinking", "chat_end_mark", "special_tokens_in_text")

# What the Auto classes and pipelines hand to processor and model alike, and no processor needs.
OF_OTHERS = ("_from_auto", "_from_pipeline", "_commit_hash", "trust_remote_code", "code_revision", "config")
OF_OTHERS += ("dtype", "torch_dtype", "device_map", "attn_implementation", "low_cpu_mem_usage", "use_fast", "backend")


class LlavaLiteProcessor(ChatProcessing, ProcessorSharing, ProcessorMixin):
    """The tokenizer, the image processor and the prompt format that belong to a checkpoint.

    conv_template: key of `conv_templates`. num_image_tokens: features of one picture, or of one crop of it if
    image_aspect_ratio is `anyres`; image_grid_pinpoints and mm_patch_merge_type then say how many crops there are and
    how their features are joined. image_token_index: the id that stands for one feature, -200 or the id of `<image>`
    in the vocabulary. image_processor: None for a text-only model. enable_thinking, chat_end_mark,
    special_tokens_in_text: as in PromptOptions.
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
        chat_end_mark=None,
        special_tokens_in_text="token",
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
        self.chat_end_mark = chat_end_mark
        self.special_tokens_in_text = special_tokens_in_text
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
        """The id that fills short rows; the mask says where, so any id will do."""
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
        return ["input_ids", "attention_mask", "pixel_values", "image_sizes"]

    @property
    def picture_layout(self):
        """How a picture becomes crops and features; the model's config says the same."""
        return PictureLayout.read(
            self.num_image_tokens,
            math.isqrt(self.num_image_tokens),
            picture_side(self.image_processor),
            self.image_aspect_ratio,
            self.mm_patch_merge_type,
            self.image_grid_pinpoints,
        )

    @classmethod
    def from_config(cls, config, tokenizer, image_processor=None):
        """Build the processor that a model's config asks for, from parts that are already loaded."""
        sees = image_processor is not None and getattr(config, "has_vision_tower", False)
        return cls(
            image_processor=image_processor,
            tokenizer=tokenizer,
            conv_template=template_of(config, tokenizer),
            image_aspect_ratio=getattr(config, "image_aspect_ratio", "square"),
            num_image_tokens=config.num_image_tokens if sees else 0,
            image_token_index=getattr(config, "image_token_index", IMAGE_TOKEN_INDEX),
            use_im_start_end=getattr(config, "mm_use_im_start_end", False),
            chat_template=getattr(tokenizer, "chat_template", None),
            image_grid_pinpoints=getattr(config, "image_grid_pinpoints", None),
            mm_patch_merge_type=getattr(config, "mm_patch_merge_type", "flat"),
            **{key: getattr(config, key) for key in PROMPT_SETTINGS if hasattr(config, key)},
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load from a folder or hub id: one that `save_pretrained` wrote, or one of LLaVA's, which has no processor.

        LLaVA's folders hold config.json and the tokenizer; the image processor is then that of `mm_vision_tower`. A
        processor that was saved without its model needs no config.json. A folder without a tokenizer (projector, LoRA)
        takes that of `base_model_name_or_path`. Further keywords replace what was saved, of the processor
        (conv_template="llava_v1") or of a part of it (padding_side="right", do_center_crop=False); those of the
        hub (revision, token, ...) go to every file.
        """
        hub = hub_arguments(kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key not in (*hub, *OF_OTHERS)}
        name = str(pretrained_model_name_or_path)
        with in_words(name, **hub):
            saved = read_json(name, PROCESSOR_NAME, hub)
            is_alone = saved.keys() >= set(SETTINGS) and not read_json(name, CONFIG, hub)
        if is_alone:
            # Saved or pushed without its model: processor_config.json holds all that a config would say.
            tokenizer = load_tokenizer(name, **hub)
            image_processor = load_image_processor(name, **hub) if saved.get("image_processor") else None
            processor = cls(image_processor, tokenizer, chat_template=getattr(tokenizer, "chat_template", None))
        else:
            # Knows the config classes and formats that a folder may name; only here, since this page knows no model.
            config_of = import_module("llava_lite.model.builder").config_of
            with in_words(name, **hub):
                config = config_of(name, hub)
            tokenizer = load_tokenizer(name, config, **hub)
            processor = cls.from_config(config, tokenizer, image_processor_of(name, config, **hub))
        for key in (*SETTINGS, *PROMPT_SETTINGS):
            setattr(processor, key, kwargs.pop(key, saved.get(key, getattr(processor, key))))
        for key, value in kwargs.items():
            part = next(
                (part for part in (processor, processor.tokenizer, processor.image_processor) if hasattr(part, key)),
                None,
            )
            if part is None:
                raise TypeError(f"unknown keyword {key!r}: neither processor, tokenizer nor image processor has it.")
            setattr(part, key, value)
        get_template(processor.conv_template)
        return processor

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """Write the tokenizer and processor_config.json, which holds the image processor too."""
        if self.image_processor is not None:
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        # The parent takes every part for present.
        self.tokenizer.save_pretrained(save_directory)
        self.to_json_file(os.path.join(save_directory, PROCESSOR_NAME))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", os.path.basename(save_directory)), **kwargs)
        return [os.path.join(save_directory, PROCESSOR_NAME)]

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Return input_ids and attention_mask [B, T] and, where there are images, pixel_values [N, 3, H, W].

        Under `anyres` pixel_values are [N, n, 3, H, W], filled up with zeros to the most crops that an image has, and
        image_sizes [N, 2] are the widths and heights of the images.

        text: a prompt or a list of B, as texts or as `render` returns them. images: an image, all images in the order
        of their placeholders, or one list a text; an image is a PIL image, a path, an address, the bytes of a file, an
        array or tensor of pixels, or an undecoded one of `datasets`, turned upright as its EXIF says. Every `<image>`
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
            raise ValueError("the model sees pictures alone; videos and audio are not for it.")
        if text is None:
            raise ValueError("the processor needs a text; for pictures alone use processor.image_processor.")
        asked = CallKeywords.read(kwargs, self.image_processor)
        image_processor = with_settings(self.image_processor, asked.images)
        prompts = read_prompts(text, asked.add_special_tokens, asked.return_assistant_tokens_mask)
        groups = pictures_of_each(images, [prompt.text for prompt in prompts])
        rows = [self._row(prompt, group) for prompt, group in zip(prompts, groups, strict=True)]
        limit = length_limit(asked.max_length, self.tokenizer)
        if asked.truncation not in (False, "do_not_truncate") and limit is not None:
            rows = [cut_row(row, limit, self.image_token_index) for row in rows]
        length = padded_len(rows, asked.padding, limit, asked.pad_to_multiple_of)
        batch = pad_rows(rows, self.pad_token_id, asked.padding_side, length)
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
        if upright:
            data |= self._pixels(upright, image_processor, asked.return_tensors)
        return BatchFeature(data)

    def _row(self, prompt: Rendered, images) -> Row:
        """Return the ids of one prompt, each placeholder already as long as the features of its image."""
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
        if images and self.image_processor is None:
            raise ValueError(f"{len(images)} pictures for a model that has no vision tower.")
        lengths = iter([self.picture_layout.num_tokens(image.size) for image in images])
        row = Row([], [])
        for one, answers in zip(ids, in_answer, strict=True):
            is_image = one == IMAGE_TOKEN_INDEX
            count = next(lengths) if is_image else 1
            row.ids.extend([self.image_token_index if is_image else one] * count)
            row.in_answer.extend([answers] * count)
        return row

    def _pixels(self, images, image_processor, return_tensors):
        """Return what the model needs of the images: pixel_values, and image_sizes where they have crops."""
        prepared = process_images(images, image_processor, self)
        if return_tensors is None:
            data = {"pixel_values": [pixels.numpy() for pixels in prepared]}
            return data | ({"image_sizes": [image.size for image in images]} if self.picture_layout.is_anyres else {})
        data = {"pixel_values": prepared}
        if self.picture_layout.is_anyres:
            filled = torch.nn.utils.rnn.pad_sequence(list(prepared), batch_first=True)  # [N, n, 3, H, W]
            sizes = torch.tensor([image.size for image in images])  # [N, 2]
            data = {"pixel_values": filled, "image_sizes": sizes}
        return {name: value.numpy() if return_tensors == "np" else value for name, value in data.items()}

    def template(self, conv_template=None):
        """Return the prompt format, by default the checkpoint's own, with the choices that it was trained with."""
        options = {key: getattr(self, key) for key in PROMPT_SETTINGS}
        return get_template(conv_template or self.conv_template, **options, is_strict=False)

    def render(self, turns, conv_template=None, system=None, open_turn=True):
        """Return a conversation as the prompt that its format makes of it, a `Rendered`, marks placed as in training.

        turns: (question, answer) pairs; the last answer may be None, which leaves the turn open for the model.
        conv_template: another format than the checkpoint's own. system: replaces the format's system text. open_turn:
        False ends with the last question, without the words that ask the model for its answer.
        """
        template = self.template(conv_template)
        spoken = [turn for question, answer in turns for turn in (("human", question), ("gpt", answer))]
        if not open_turn and spoken[-1][1] is None:
            spoken.pop()
        spoken = place_images(spoken, template, self.use_im_start_end)
        return template.with_turns(spoken, system).render(self.tokenizer)

    def decode(self, token_ids, skip_special_tokens=False, **kwargs):
        """Return the text of one row of ids, or a list for many; placeholders of pictures are left out."""
        rows = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        if isinstance(rows, list) and rows and not isinstance(rows[0], int):
            return self.batch_decode(rows, skip_special_tokens=skip_special_tokens, **kwargs)
        rows = [rows] if isinstance(rows, int) else rows
        # -200 is in no vocabulary; a placeholder with an id of its own is said once by its mark, not 576 times.
        kept = [token for token in rows if token >= 0 and token != self.image_token_index]
        return self.tokenizer.decode(kept, skip_special_tokens=skip_special_tokens, **kwargs)

    def batch_decode(self, sequences, skip_special_tokens=False, **kwargs):
        """Return the text of every row of what `generate` returned, prompts included or not."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens, **kwargs) for row in sequences]

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens=True, **kwargs):
        """Return the texts of generated rows; the name that transformers' pipeline calls."""
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
