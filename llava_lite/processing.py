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
from llava_lite.chat_answers import own_template
from llava_lite.chat_template import takes_images
from llava_lite.companions import image_processor_of, load_tokenizer, read_json, template_of
from llava_lite.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava_lite.conversation import Rendered, get_template, place_images
from llava_lite.hub import hub_arguments, in_words
from llava_lite.messages import in_parts, pictures_of_each, read_messages
from llava_lite.mm_utils import process_images, tokenize_rendered
from llava_lite.pictures import picture_side
from llava_lite.rows import cut_row, pad_rows, padded_len
from llava_lite.share import ProcessorSharing

# What a processor saves of its own, beside its parts.
SETTINGS = ("conv_template", "image_aspect_ratio", "num_image_tokens", "image_token_index", "use_im_start_end")
SETTINGS += ("image_grid_pinpoints", "mm_patch_merge_type")
# Fields of PromptOptions that a checkpoint keeps.
PROMPT_SETTINGS = ("enable_thinking", "chat_end_mark", "special_tokens_in_text")

# What the Auto classes and pipelines hand to processor and model alike, and no processor needs.
OF_OTHERS = ("_from_auto", "_from_pipeline", "_commit_hash", "trust_remote_code", "code_revision", "config")
OF_OTHERS += ("dtype", "torch_dtype", "device_map", "attn_implementation", "low_cpu_mem_usage", "use_fast", "backend")


class LlavaLiteProcessor(ProcessorSharing, ProcessorMixin):
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
        folder without a tokenizer (projector, LoRA) takes that of `base_model_name_or_path`. Further keywords
        replace what was saved, of the processor (conv_template="llava_v1") or of a part of it (padding_side="right",
        do_center_crop=False); those of the hub (revision, token, ...) go to every file.
        """
        hub = hub_arguments(kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key not in (*hub, *OF_OTHERS)}
        name = str(pretrained_model_name_or_path)
        # Knows the config classes and formats that a folder may name; only here, since this page knows no model.
        config_of = import_module("llava_lite.model.builder").config_of
        with in_words(name, **hub):
            config = config_of(name, hub)
        tokenizer = load_tokenizer(name, config, **hub)
        processor = cls.from_config(config, tokenizer, image_processor_of(name, config, **hub))
        saved = read_json(name, PROCESSOR_NAME, hub)
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

    def __call__(
        self,
        images=None,
        text=None,
        padding_side="left",
        return_tensors="pt",
        add_special_tokens=True,
        padding=True,
        truncation=False,
        max_length=None,
        pad_to_multiple_of=None,
        videos=None,
        audio=None,
    ):
        """Return input_ids and attention_mask [B, T] and, where there are pictures, pixel_values [N, 3, H, W].

        Under `anyres` pixel_values are [N, n, 3, H, W], filled up with zeros to the most crops that a picture has, and
        image_sizes [N, 2] are the widths and heights of the pictures.

        text: a prompt or a list of B, as texts or as `render` returns them, which decides on special tokens. images: a
        picture, all pictures in the order of their marks, or one list a text;
        a picture is a PIL image, a path or the bytes of a file, turned upright as its EXIF says. Every `<image>`
        becomes as many placeholders as its picture has features. Rows are padded on the left, which `generate` needs,
        to the longest or (padding="max_length") to max_length; truncation cuts ends off at max_length.
        Raises ValueError if a text has more or fewer marks than pictures, or if a picture would be cut.
        """
        if videos is not None or audio is not None:
            raise ValueError("the model sees pictures alone; videos and audio are not for it.")
        if text is None:
            raise ValueError("the processor needs a text; for pictures alone use processor.image_processor.")
        if return_tensors not in ("pt", None):
            raise ValueError(f"the processor returns torch tensors: return_tensors='pt', not {return_tensors!r}.")
        texts = [text] if isinstance(text, (str, Rendered)) else list(text)
        prompts = [one if isinstance(one, Rendered) else Rendered(one, (), add_special_tokens) for one in texts]
        pictures = pictures_of_each(images, [prompt.text for prompt in prompts])
        rows = [self._token_ids(prompt, group) for prompt, group in zip(prompts, pictures, strict=True)]
        if truncation and max_length is not None:
            rows = [cut_row(row, max_length, self.image_token_index) for row in rows]
        length = padded_len(rows, padding, max_length, pad_to_multiple_of)
        batch = pad_rows(rows, self.pad_token_id, padding_side, length)
        upright = [picture for group in pictures for picture in group]
        if upright:
            batch |= self._pixels(upright)
        return BatchFeature(batch)

    def _token_ids(self, prompt, pictures):
        """Return the ids of one Rendered, each mark already as long as the features of its picture."""
        if self.asks_as_transformers and not prompt.literals:
            bos = self.tokenizer.bos_token
            is_there = bos is not None and prompt.text.startswith(bos)
            with_bos = prompt.add_special_tokens and not is_there
            ids = self.tokenizer(prompt.text, add_special_tokens=with_bos)["input_ids"]
            ids = [IMAGE_TOKEN_INDEX if one == self.image_token_index else one for one in ids]
        else:
            ids, _ = tokenize_rendered(prompt, self.tokenizer, bool(pictures))
        if pictures and self.image_processor is None:
            raise ValueError(f"{len(pictures)} pictures for a model that has no vision tower.")
        lengths = iter([self.picture_layout.num_tokens(picture.size) for picture in pictures])
        places = ([self.image_token_index] * next(lengths) if one == IMAGE_TOKEN_INDEX else (one,) for one in ids)
        return [token for place in places for token in place]

    def _pixels(self, pictures):
        """Return what the model needs of the pictures: pixel_values, and image_sizes where they have crops."""
        prepared = process_images(pictures, self.image_processor, self)
        if not self.picture_layout.is_anyres:
            return {"pixel_values": prepared}
        sizes = torch.tensor([picture.size for picture in pictures])  # [N, 2]
        pixels = torch.nn.utils.rnn.pad_sequence(list(prepared), batch_first=True)  # [N, n, 3, H, W]
        return {"pixel_values": pixels, "image_sizes": sizes}

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

    def apply_chat_template(
        self,
        conversation,
        chat_template=None,
        add_generation_prompt=False,
        continue_final_message=False,
        tokenize=False,
        return_dict=False,
        return_tensors="pt",
        processor_kwargs=None,
        **kwargs,
    ):
        """Return messages as a prompt in the checkpoint's own format, or as the inputs of a model.

        conversation: a list of messages or a list of such lists; a message is {"role": "user", "content": ...} with a
        text or parts {"type": "text", "text": ...} and {"type": "image", "image" | "path" | "url": picture}; without
        `tokenize` {"type": "image"} will do, and the pictures go to the processor with the prompt.
        An explicit Jinja `chat_template` is rendered by transformers instead.
        """
        # The pipeline hands it over with the rest; the parent would give it to `__call__`.
        kwargs.pop("streamer", None)
        if chat_template is None and self.asks_as_transformers:
            chat_template = own_template(self.tokenizer, self.enable_thinking, self.chat_end_mark)
            conversation = in_parts(conversation)
        if chat_template is not None:
            return super().apply_chat_template(
                conversation,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=tokenize,
                return_dict=return_dict,
                return_tensors=return_tensors,
                processor_kwargs=processor_kwargs,
                **kwargs,
            )
        many = not isinstance(conversation[0], dict)
        talks = [read_messages(messages, tokenize) for messages in (conversation if many else [conversation])]
        prompts = [
            self._prompt(turns, system, continue_final_message, add_generation_prompt) for turns, system, _ in talks
        ]
        texts = [prompt.text for prompt in prompts]
        if not tokenize:
            return texts if many else texts[0]
        processor_kwargs = dict(processor_kwargs or {})
        with_bos = processor_kwargs.pop("add_special_tokens", prompts[0].add_special_tokens)
        prompts = [prompt._replace(add_special_tokens=with_bos) for prompt in prompts]
        inputs = self(images=[pictures for *_, pictures in talks], text=prompts, **processor_kwargs)
        return inputs if return_dict else inputs["input_ids"]

    def _prompt(self, turns, system, continue_final, open_turn):
        """Render turns; `continue_final` cuts the end mark off the last answer, so that the model goes on with it."""
        rendered = self.render(turns, system=system, open_turn=open_turn)
        answer = turns[-1][1]
        if answer is None or not continue_final:
            return rendered
        if not rendered.answers:
            raise ValueError(
                "the chat template writes the last answer in a way of its own, so it cannot be gone on with "
                "(continue_final_message)."
            )
        start, end = rendered.answers[-1]
        # Some templates take the blanks around an answer away.
        answer = answer if answer in rendered.text[start:end] else answer.strip()
        said = rendered.text.index(answer, start, end) + len(answer)
        return rendered._replace(text=rendered.text[:said], answers=rendered.answers[:-1])

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
