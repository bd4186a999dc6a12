"""Turn a Record into token ids and labels, one placeholder a picture or one a feature."""

from dataclasses import replace

from llava_lite.chat_answers import Chat
from llava_lite.chat_format import THINK_END
from llava_lite.chat_template import Unfit, today
from llava_lite.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_lite.conversation import Conversation, SeparatorStyle, get_template, place_images
from llava_lite.data.cache import key_of
from llava_lite.data.index import TokenFacts
from llava_lite.data.records import Record
from llava_lite.data.scan import DataError
from llava_lite.mm_utils import tokenize_rendered

# Raised when the same record may give other ids or labels than before.
VERSION = 2


def expand_image_tokens(input_ids, labels, lengths):
    """Repeat each IMAGE_TOKEN_INDEX once for every feature of its picture.

    input_ids, labels: lists [T]; lengths: features of each picture, in order of appearance.
    Returns lists of ids and labels [L]; labels are IGNORE_INDEX wherever a picture stands.
    Raises ValueError if the ids name more or fewer pictures than `lengths`.
    """
    num_marks = input_ids.count(IMAGE_TOKEN_INDEX)
    if num_marks != len(lengths):
        raise ValueError(f"{num_marks} placeholders in the tokens but {len(lengths)} pictures.")
    ids, targets, start = [], [], 0
    for length in lengths:
        mark = input_ids.index(IMAGE_TOKEN_INDEX, start)
        ids += input_ids[start:mark] + [IMAGE_TOKEN_INDEX] * length
        targets += labels[start:mark] + [IGNORE_INDEX] * length
        start = mark + 1
    return ids + input_ids[start:], targets + labels[start:]


class RecordEncoder:
    """Record -> ids and labels by one template and one tokenizer; what dataset, index and check share.

    Chat templates with a date write that of the moment at which the first encoder of a run is made.
    """

    def __init__(self, tokenizer, conv_template: str | Conversation, mm_use_im_start_end: bool = False):
        template = get_template(conv_template) if isinstance(conv_template, str) else conv_template
        options = template.options._replace(moment=template.options.moment or today())
        self.tokenizer, self.template = tokenizer, replace(template, options=options)
        self.mm_use_im_start_end = mm_use_im_start_end

    def __call__(self, record: Record) -> tuple[list[int], list[int]]:
        """Return ids and labels [T], one IMAGE_TOKEN_INDEX a picture; DataError naming a record that does not fit."""
        turns = record.turns
        if record.images:
            turns = place_images(turns, self.template, self.mm_use_im_start_end)
        try:
            rendered = self.template.with_turns(turns, record.system).render(self.tokenizer)
            if record.not_supervised:
                # The answers of a record are its odd turns.
                kept = (span for i, span in enumerate(rendered.answers) if 2 * i + 1 not in record.not_supervised)
                rendered = rendered._replace(answers=tuple(kept))
            ids, labels = tokenize_rendered(rendered, self.tokenizer, has_image=bool(record.images))
        except ValueError as error:
            raise DataError(f"{record.name} does not fit the template: {error}") from error
        num_marks = ids.count(IMAGE_TOKEN_INDEX)
        if num_marks != len(record.images):
            raise DataError(
                f"{record.name} has {len(record.images)} pictures, but the template keeps {num_marks} of their marks. "
                "`plain` wants <image> in the question."
            )
        return ids, labels

    def measure(self, record: Record) -> TokenFacts:
        """Return what the index keeps of a record's tokens."""
        ids, labels = self(record)
        learned = [i for i, label in enumerate(labels) if label != IGNORE_INDEX]
        first = learned[0] if learned else len(ids)
        pictures = [i for i, token in enumerate(ids) if token == IMAGE_TOKEN_INDEX]
        supervised = [i for i in range(1, len(record.turns), 2) if i not in record.not_supervised]
        answers = [record.turns[i][1] for i in supervised]
        texts = [record.system or "", *(text for _, text in record.turns)]
        special = self.template.special_words(self.tokenizer)
        return TokenFacts(
            text_len=len(ids),
            num_learned=len(learned),
            first_learned=first,
            pictures_before=sum(i < first for i in pictures),
            last_picture=pictures[-1] if pictures else -1,
            num_special=sum(len(special.findall(text)) for text in texts),
            is_reasoned=int(bool(answers) and THINK_END in answers[-1]),
        )

    @property
    def fingerprint(self) -> str:
        """A name for all that decides ids and labels: tokenizer, template, options."""
        tokenizer, template = self.tokenizer, self.template
        parts = [tokenizer.backend_tokenizer.to_str()] if tokenizer.is_fast else [tokenizer.name_or_path]
        parts += [tokenizer.chat_template, sorted(tokenizer.special_tokens_map.items(), key=str)]
        parts += [template.sep_style.name, template.system, template.roles, template.sep, template.sep2]
        options = template.options._replace(moment=None)
        parts += [template.version, template.messages, self.mm_use_im_start_end, *options]
        return key_of(VERSION, *parts, *self._skeletons())

    def _skeletons(self) -> list[str]:
        """Return what a chat template writes around texts, today's date included; nothing for other templates."""
        if self.template.sep_style is not SeparatorStyle.CHAT:
            return []
        options, skeletons = self.template.options, []
        for thinks in (False, True):
            try:
                chat = Chat(self.tokenizer, options.moment, thinks, options.chat_end_mark)
                skeletons.append(chat.format(thinks).skeleton)
            except Unfit as reason:
                skeletons.append(str(reason))
        return skeletons
