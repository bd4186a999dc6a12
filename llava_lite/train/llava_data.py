"""Turn LLaVA's records into its batches, under the names and with the returns of LLaVA's `train/train.py`.

For scripts written for LLaVA; `train` itself reads, checks and batches with `llava_lite.data`. Prompts, labels and
pictures are made by the same functions. Which template is used says `llava_lite.conversation.default_conversation`
when a function is called. Right where LLaVA is not: labels come from the places of the answers, so no sample is masked
because two ways of counting its tokens differ, and the mask of a batch keeps a padding token that stands in the text.
"""

import json
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from llava_lite import conversation as conversation_lib
from llava_lite.constants import IGNORE_INDEX
from llava_lite.conversation import Rendered, SeparatorStyle, place_images
from llava_lite.data.picture_files import find_picture
from llava_lite.data.records import READERS, ROLES, open_sources, parse_record, sample_positions
from llava_lite.data.scan import DataError
from llava_lite.mm_utils import tokenize_rendered
from llava_lite.pictures import PictureError, open_picture, process_images

__all__ = [
    "DataCollatorForSupervisedDataset",
    "LazySupervisedDataset",
    "make_supervised_data_module",
    "preprocess",
    "preprocess_llama_2",
    "preprocess_mpt",
    "preprocess_multimodal",
    "preprocess_plain",
    "preprocess_v0",
    "preprocess_v1",
]

# Words that a picture counts for in `lengths`.
PICTURE_WORDS = 128


def preprocess_multimodal(sources, data_args):
    """Put the pictures of each turn where the model is to read them, in place, and return `sources`.

    sources: talks, each a list of {"from", "value"}. Nothing happens unless data_args.is_multimodal. One picture of a
    turn goes in front; several stay where they stand (LLaVA keeps one mark of them).
    """
    if not data_args.is_multimodal:
        return sources
    for source in sources:
        turns = [(turn["from"], turn["value"]) for turn in source]
        placed = place_images(turns, conversation_lib.default_conversation, data_args.mm_use_im_start_end)
        for turn, (_, text) in zip(source, placed, strict=True):
            turn["value"] = text
    return sources


def preprocess(sources, tokenizer, has_image=False) -> dict:
    """Return {"input_ids", "labels"} of talks by the default template.

    sources: talks, each a list of {"from", "value"}. has_image: `<image>` is a picture; else it is text, and a talk is
    cut at tokenizer.model_max_length. Both values are tensors [N, T], padded on the right, or lists of tensors for the
    templates of `plain` and of `###`, as in LLaVA.
    """
    style = conversation_lib.default_conversation.sep_style
    if style is SeparatorStyle.PLAIN:
        return preprocess_plain(sources, tokenizer)
    if style is SeparatorStyle.SINGLE:
        return preprocess_v0(sources, tokenizer, has_image)
    return _stacked(_encode(sources, tokenizer, has_image), tokenizer)


def preprocess_v1(sources, tokenizer, has_image=False) -> dict:
    """Return ids and labels [N, T] by a template of USER and ASSISTANT; answers and their end marks are learned."""
    _expect(SeparatorStyle.TWO)
    return preprocess(sources, tokenizer, has_image)


def preprocess_llama_2(sources, tokenizer, has_image=False) -> dict:
    """Return ids and labels [N, T] by a template of [INST]; answers and their end marks are learned."""
    _expect(SeparatorStyle.LLAMA_2)
    return preprocess(sources, tokenizer, has_image)


def preprocess_mpt(sources, tokenizer, has_image=False) -> dict:
    """Return ids and labels [N, T] by a template of <|im_start|>; answers and their end marks are learned.

    Nearly all that LLaVA's own masks here is masked by a wrong count; MoE-LLaVA's rule is this one.
    """
    _expect(SeparatorStyle.MPT)
    return preprocess(sources, tokenizer, has_image)


def preprocess_plain(sources, tokenizer) -> dict:
    """Return lists of ids and labels [T] of captions: of a question its pictures are kept, the caption is learned."""
    _expect(SeparatorStyle.PLAIN)
    return _listed(_encode(sources, tokenizer, has_image=True))


def preprocess_v0(sources, tokenizer, has_image=False) -> dict:
    """Return lists of ids and labels [T] of talks as LLaVA's first version was trained, `### Human: ...` a line.

    Learned are the lines of the assistant and the `###` that ends each. LLaVA's mask drifts by one token a turn.
    The prompts of these templates are written otherwise, with no blank behind `###`.
    """
    _expect(SeparatorStyle.SINGLE)
    return _listed(_encode(sources, tokenizer, has_image, _as_lines))


def _expect(style) -> None:
    found = conversation_lib.default_conversation.sep_style
    if found is not style:
        raise ValueError(
            f"the default conversation has the style {found.name}, expected {style.name}; call preprocess(), which "
            "goes by the template, or set llava_lite.conversation.default_conversation."
        )


def _by_template(source, tokenizer) -> Rendered:
    turns = [(turn["from"], turn["value"]) for turn in source]
    return conversation_lib.default_conversation.with_turns(turns).render(tokenizer)


def _as_lines(source, tokenizer) -> Rendered:
    """Return the lines of a talk, each as `### Role: text`, with the spans that are learned."""
    template = conversation_lib.default_conversation
    roles = dict(zip(ROLES, template.roles, strict=True))
    text, learned = f"{template.system}\n\n", []
    for turn in source:
        line = f"### {roles[turn['from']]}: {turn['value']}\n"
        # The mark of a human line ends the answer before it.
        learned.append((len(text), len(text) + (len("###") if turn["from"] == ROLES[0] else len(line))))
        text += line
    return Rendered(text + "### ", (*learned, (len(text), len(text) + len("### "))))


def _encode(sources, tokenizer, has_image, render=_by_template):
    """Return (ids, labels) of each talk; what has no pictures is cut at the tokenizer's maximum."""
    examples = []
    for source in sources:
        ids, labels = map(torch.tensor, tokenize_rendered(render(source, tokenizer), tokenizer, has_image))
        end = None if has_image else tokenizer.model_max_length
        examples.append((ids[:end], labels[:end]))
    return examples


def _listed(examples) -> dict:
    return {"input_ids": [ids for ids, _ in examples], "labels": [labels for _, labels in examples]}


def _stacked(examples, tokenizer) -> dict:
    ids, labels = zip(*examples, strict=True)
    return {"input_ids": _padded(ids, tokenizer.pad_token_id), "labels": _padded(labels, IGNORE_INDEX)}


def _padded(rows, value) -> torch.Tensor:
    if len({len(row) for row in rows}) > 1 and value is None:
        raise ValueError("rows of different lengths need a padding token; set tokenizer.pad_token.")
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value or 0)


class LazySupervisedDataset(Dataset):
    """LLaVA's examples {"input_ids", "labels" [T], "image"}, one placeholder a picture.

    data_path: a file of records, or several. data_args: an object with image_folder, image_processor,
    image_aspect_ratio, is_multimodal and mm_use_im_start_end. "image" is a tensor [3, H, W], a list of them where a
    record has several; where it has none it is blank in a multimodal run. With `anyres` (data_args then has
    image_grid_pinpoints) a picture is [crops, 3, H, W], and "image_size" is its (width, height).
    The records are kept in memory, as in LLaVA; `llava_lite.data.dataset` keeps none.
    """

    def __init__(self, data_path, tokenizer, data_args):
        self.list_data_dict = _read_items(data_path)
        self.tokenizer = tokenizer
        self.data_args = data_args

    def __len__(self):
        return len(self.list_data_dict)

    @property
    def lengths(self) -> list[int]:
        """Words of each record, and some for its picture."""
        return [abs(words) + PICTURE_WORDS * ("image" in item) for words, item in self._words()]

    @property
    def modality_lengths(self) -> list[int]:
        """Words of each record, below zero for one without pictures."""
        return [words if "image" in item else -words for words, item in self._words()]

    def _words(self):
        for item in self.list_data_dict:
            yield sum(len(turn["value"].split()) for turn in item["conversations"]), item

    def __getitem__(self, i: int) -> dict:
        """Return an example; DataError naming the record where it cannot be used."""
        record = parse_record(self.list_data_dict[i], f"record {i}", self.data_args.image_folder)
        sources = [[{"from": speaker, "value": text} for speaker, text in record.turns]]
        if record.images:
            sources = preprocess_multimodal(sources, self.data_args)
        encoded = preprocess(sources, self.tokenizer, has_image=bool(record.images))
        example = {name: values[0] for name, values in encoded.items()}
        shown = [self._picture(record, name) for name in record.images]
        # A run without a tower has no processor, whatever is_multimodal says by default.
        processor = getattr(self.data_args, "image_processor", None)
        if not shown and self.data_args.is_multimodal and processor is not None:
            shown = [_blank_picture(processor)]
        if shown:
            pictures, sizes = map(list, zip(*shown, strict=True))
            example["image"] = pictures[0] if len(pictures) == 1 else pictures
            if str(self.data_args.image_aspect_ratio).startswith("anyres"):
                example["image_size"] = sizes[0] if len(sizes) == 1 else sizes
        return example

    def _picture(self, record, name) -> tuple[torch.Tensor, tuple[int, int]]:
        try:
            path, _ = find_picture(record.image_folder, name)
            picture = open_picture(path)
            return process_images([picture], self.data_args.image_processor, self.data_args)[0], picture.size
        except PictureError as error:
            raise DataError(f"{record.name}: {error}") from error


def _read_items(data_path) -> list[dict]:
    """Return the JSON objects of one file or several, those of a mixture as it samples them."""
    items = []
    for k, source in enumerate(open_sources(data_path)):
        spans = READERS[source.kind].scan(source.path)
        with open(source.path, "rb") as file:
            data = file.read()
        chosen = spans[sample_positions(source.sampling, len(spans), k)]
        items += [json.loads(data[start:stop]) for start, stop in chosen.tolist()]
    return items


def _blank_picture(image_processor) -> tuple[torch.Tensor, tuple[int, int]]:
    # SigLIP's processor cuts nothing and names no crop.
    size = getattr(image_processor, "crop_size", None) or image_processor.size
    return torch.zeros(3, size["height"], size["width"]), (size["width"], size["height"])


def _flat(groups) -> list:
    """Return what stands in a list, or alone, one after another."""
    return [one for group in groups for one in (group if isinstance(group, list) else [group])]


@dataclass
class DataCollatorForSupervisedDataset:
    """Examples -> input_ids, labels, attention_mask [B, T], padded on the right, and images, one or more an example.

    images: a tensor [B, 3, H, W], or a list where their shapes differ; image_sizes, where the examples have sizes.
    """

    tokenizer: object

    def __call__(self, instances) -> dict:
        """Return the batch, cut at tokenizer.model_max_length."""
        end = self.tokenizer.model_max_length
        ids = [instance["input_ids"][:end] for instance in instances]
        batch = {
            "input_ids": _padded(ids, self.tokenizer.pad_token_id),
            "labels": _padded([instance["labels"][:end] for instance in instances], IGNORE_INDEX),
            "attention_mask": _padded([torch.ones_like(row, dtype=torch.bool) for row in ids], False),
        }
        if "image" in instances[0]:
            images = _flat(instance["image"] for instance in instances)
            alike = len({picture.shape for picture in images}) == 1
            batch["images"] = torch.stack(images) if alike else images
        if "image_size" in instances[0]:
            batch["image_sizes"] = _flat(instance["image_size"] for instance in instances)
        return batch


def make_supervised_data_module(tokenizer, data_args) -> dict:
    """Return train_dataset, eval_dataset (None) and data_collator, as a Trainer takes them."""
    return {
        "train_dataset": LazySupervisedDataset(data_args.data_path, tokenizer, data_args),
        "eval_dataset": None,
        "data_collator": DataCollatorForSupervisedDataset(tokenizer),
    }
