"""Turn a record into token ids and labels, with one placeholder for each image or for each feature."""

from dataclasses import replace
from typing import Literal, NamedTuple

from llava_lite.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_lite.conversation import Conversation, SeparatorStyle, get_template
from llava_lite.conversation.chat_answers import Chat
from llava_lite.conversation.chat_format import THINK_END
from llava_lite.conversation.chat_template import Unfit, today
from llava_lite.conversation.images import drop_placeholders, place_images
from llava_lite.conversation.layout import put_images_first
from llava_lite.conversation.templates import CAPTION_QUESTIONS
from llava_lite.conversation.tokenize import get_bos, tokenize_rendered
from llava_lite.data.errors import DataError
from llava_lite.data.index.annotations import TokenFacts
from llava_lite.data.index.cache import get_key
from llava_lite.data.records.record import Record

# Increased when the same record may give other ids or labels than before.
VERSION = 2


# Where the features of images go, and where an image stands in the text.
INJECTIONS = ("tokens", "adaption_prompt")
IMAGE_POSITIONS = ("placeholder", "front")


class ImageSetting(NamedTuple):
    """Where images stand in the ids of a record; the defaults are LLaVA's."""

    injection: str = "tokens"
    image_position: str = "placeholder"


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ValueError with the known values of an argument for any other."""
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}.")


def get_used_turns(record: Record, template: Conversation):
    """Return the turns of a record that a template uses: the first pair, if it is one of a single question."""
    return record.turns[:2] if template.is_single_turn else record.turns


def ask_for_caption(turns, template: Conversation):
    """Return the turns of a record with images; a first question without words is that of the template for captions.

    It is written as LLaMA-Adapter V2 asks for captions in its first stage; LLaVA's templates have none.
    """
    (speaker, text), *rest = turns
    words = CAPTION_QUESTIONS.get(template.system)
    if words is None or not template.is_single_turn or text.replace(DEFAULT_IMAGE_TOKEN, "").strip():
        return turns
    return ((speaker, put_images_first(words, text.count(DEFAULT_IMAGE_TOKEN))), *rest)


def expand_image_tokens(input_ids, labels, lengths):
    """Return ids and labels with each IMAGE_TOKEN_INDEX repeated for every feature of its image.

    input_ids, labels: lists [T]; lengths: features of each image, in order of appearance.
    Returns lists of ids and labels [L]; the labels of features are IGNORE_INDEX. Raises ValueError if the ids have
    more or fewer placeholders than `lengths`.
    """
    num_placeholders = input_ids.count(IMAGE_TOKEN_INDEX)
    if num_placeholders != len(lengths):
        raise ValueError(f"{num_placeholders} placeholders in the tokens but {len(lengths)} images.")
    ids, targets, start = [], [], 0
    for length in lengths:
        at = input_ids.index(IMAGE_TOKEN_INDEX, start)
        ids += input_ids[start:at] + [IMAGE_TOKEN_INDEX] * length
        targets += labels[start:at] + [IGNORE_INDEX] * length
        start = at + 1
    return ids + input_ids[start:], targets + labels[start:]


class RecordEncoder:
    """Record -> ids and labels by one template and one tokenizer; data set, index and check share it.

    Chat templates write the date on which the first encoder of the process was made. A record may name a template of
    its own. Of several questions and answers a template of one question uses the first.

    injection: `tokens`, an image has its place in the text; `adaption_prompt`, it has none, since its features are
    added inside attention, and a record has one image at most. image_position: of the place in the text,
    `placeholder`, where the question has it, or `front`, right after BOS (LLaMA2-Accessory), with one image a record.
    """

    def __init__(
        self,
        tokenizer,
        conv_template: str | Conversation,
        mm_use_im_start_end: bool = False,
        injection: Literal["tokens", "adaption_prompt"] = "tokens",
        image_position: Literal["placeholder", "front"] = "placeholder",
    ):
        check_choice("injection", injection, INJECTIONS)
        check_choice("image_position", image_position, IMAGE_POSITIONS)
        template = get_template(conv_template) if isinstance(conv_template, str) else conv_template
        options = template.options._replace(moment=template.options.moment or today())
        self.tokenizer, self.template = tokenizer, replace(template, options=options)
        self.mm_use_im_start_end = mm_use_im_start_end
        self.injection, self.image_position = injection, image_position
        self._templates = {None: self.template}

    @property
    def image_setting(self) -> ImageSetting:
        """Where images stand in the ids."""
        return ImageSetting(self.injection, self.image_position)

    def template_of(self, record: Record) -> Conversation:
        """Return the template of a record: its own, with the options of the run, or that of the run."""
        if record.template not in self._templates:
            own = get_template(record.template)
            self._templates[record.template] = replace(own, options=self.template.options)
        return self._templates[record.template]

    def __call__(self, record: Record) -> tuple[list[int], list[int]]:
        """Return ids and labels [T], one IMAGE_TOKEN_INDEX an image that has a place; DataError if it does not fit."""
        template = self.template_of(record)
        turns = get_used_turns(record, template)
        if record.images:
            turns = self._place(ask_for_caption(turns, template), template, record)
        try:
            rendered = template.with_turns(turns, record.system).render(self.tokenizer)
            if record.not_supervised:
                # Answer i of a record is its turn 2 i + 1.
                kept = (span for i, span in enumerate(rendered.answers) if 2 * i + 1 not in record.not_supervised)
                rendered = rendered._replace(answers=tuple(kept))
            ids, labels = tokenize_rendered(rendered, self.tokenizer, has_image=bool(record.images))
            if record.images and self.injection == "tokens" and self.image_position == "front":
                ids, labels = self._in_front(ids, labels)
        except ValueError as error:
            raise DataError(f"{record.name} does not fit the template: {error}") from error
        num_placeholders = ids.count(IMAGE_TOKEN_INDEX)
        if num_placeholders != (len(record.images) if self.injection == "tokens" else 0):
            raise DataError(
                f"{record.name} has {len(record.images)} images, but the template keeps {num_placeholders} "
                "placeholders. `plain` needs <image> in the question."
            )
        return ids, labels

    def _place(self, turns, template: Conversation, record: Record):
        """Return the turns of a record with images, each placeholder where the run wants it, or none."""
        if self.image_setting == ImageSetting():
            return place_images(turns, template, self.mm_use_im_start_end)
        if len(record.images) > 1:
            flag = "mm_image_position front" if self.injection == "tokens" else f"mm_injection {self.injection}"
            raise DataError(
                f"{record.name} has {len(record.images)} images; --{flag} is for one image a record. Leave such "
                "records out, or train with --mm_injection tokens --mm_image_position placeholder."
            )
        return drop_placeholders(turns)

    def _in_front(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        """Return ids and labels with the place of an image right after BOS."""
        bos = get_bos(self.tokenizer) or [self.tokenizer.bos_token_id]
        at = int(ids[:1] == bos)
        return [*ids[:at], IMAGE_TOKEN_INDEX, *ids[at:]], [*labels[:at], IGNORE_INDEX, *labels[at:]]

    def measure(self, record: Record) -> TokenFacts:
        """Return the facts about a record's tokens that the index stores."""
        ids, labels = self(record)
        labelled = [i for i, label in enumerate(labels) if label != IGNORE_INDEX]
        first = labelled[0] if labelled else len(ids)
        images = [i for i, token in enumerate(ids) if token == IMAGE_TOKEN_INDEX]
        template = self.template_of(record)
        turns = get_used_turns(record, template)
        supervised = [i for i in range(1, len(turns), 2) if i not in record.not_supervised]
        answers = [turns[i][1] for i in supervised]
        texts = [record.system or "", *(text for _, text in turns)]
        special = template.special_words(self.tokenizer)
        return TokenFacts(
            text_len=len(ids),
            num_supervised=len(labelled),
            first_supervised=first,
            images_before=sum(i < first for i in images),
            last_image=images[-1] if images else -1,
            num_special=sum(len(special.findall(text)) for text in texts),
            is_reasoned=int(bool(answers) and THINK_END in answers[-1]),
        )

    @property
    def fingerprint(self) -> str:
        """A key for everything that decides ids and labels of records without a template of their own."""
        tokenizer, template = self.tokenizer, self.template
        parts = [tokenizer.backend_tokenizer.to_str()] if tokenizer.is_fast else [tokenizer.name_or_path]
        parts += [tokenizer.chat_template, sorted(tokenizer.special_tokens_map.items(), key=str)]
        parts += [template.sep_style.name, template.system, template.roles, template.sep, template.sep2]
        options = template.options._replace(moment=None)
        parts += [template.version, template.messages, self.mm_use_im_start_end, *options]
        if self.image_setting != ImageSetting():
            parts += self.image_setting
        return get_key(VERSION, *parts, *self._skeletons())

    def _skeletons(self) -> list[str]:
        """Return the fixed texts of a chat template, with today's date; [] for other templates."""
        if self.template.sep_style is not SeparatorStyle.CHAT:
            return []
        options, skeletons = self.template.options, []
        for thinks in (False, True):
            try:
                chat = Chat(self.tokenizer, options.moment, thinks, options.chat_end_token)
                skeletons.append(chat.format(thinks).skeleton)
            except Unfit as reason:
                skeletons.append(str(reason))
        return skeletons
