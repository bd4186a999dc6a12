"""Turn LLaVA's records into its batches, under the names and with the returns of LLaVA's `train/train.py`.

For scripts written for LLaVA; `train` itself reads, checks and batches with `llava_lite.data`. Pictures are made by
the same functions. The mask of a batch keeps a padding token that stands in the text, which LLaVA's does not.
"""

import json
from dataclasses import dataclass
from multiprocessing.context import get_spawning_popen

import torch
from torch.utils.data import Dataset

from llava_lite import conversation as conversation_lib
from llava_lite.constants import IGNORE_INDEX
from llava_lite.data.picture_files import find_picture, open_image
from llava_lite.data.records import Record, missing_images, parse_record
from llava_lite.data.scan import DataError
from llava_lite.data.sources import READERS, open_sources, sample_positions
from llava_lite.pictures import PictureError, process_images
from llava_lite.train.llava_preprocess import padded, preprocess, preprocess_multimodal

# Words that a picture counts for in `lengths`.
PICTURE_WORDS = 128


class LazySupervisedDataset(Dataset):
    """LLaVA's examples {"input_ids", "labels" [T], "image"}, one placeholder a picture.

    data_path: a file of records, or several. data_args: an object with image_folder, image_processor,
    image_aspect_ratio, is_multimodal and mm_use_im_start_end. "image" is a tensor [3, H, W], a list of them where a
    record has several; where it has none it is blank in a multimodal run. With `anyres` (data_args then has
    image_grid_pinpoints) a picture is [crops, 3, H, W], and "image_size" is its (width, height). A record with image
    placeholders and no image is refused unless data_args.placeholder_as_text is True; LLaVA takes them for text.
    The records are kept in memory, as in LLaVA; `llava_lite.data.dataset` keeps none.
    """

    def __init__(self, data_path, tokenizer, data_args):
        self.list_data_dict = _read_items(data_path)
        self.tokenizer = tokenizer
        self.data_args = data_args

    def __len__(self):
        return len(self.list_data_dict)

    def __getstate__(self):
        # A worker that is not forked starts with the package's own default and would use it in silence.
        spoken = {} if get_spawning_popen() is None else {"template": conversation_lib.default_conversation}
        return self.__dict__ | spoken

    def __setstate__(self, state):
        conversation_lib.default_conversation = state.pop("template", conversation_lib.default_conversation)
        self.__dict__.update(state)

    @property
    def lengths(self) -> list[int]:
        """Words of each record, and some for its picture."""
        return [words + PICTURE_WORDS * has_image for words, has_image in self._words()]

    @property
    def modality_lengths(self) -> list[int]:
        """Words of each record, below zero for one without pictures."""
        return [words if has_image else -words for words, has_image in self._words()]

    def _words(self):
        for i in range(len(self)):
            record = self._record(i)
            yield sum(len(text.split()) for _, text in record.turns), bool(record.images)

    def _record(self, i: int) -> Record:
        """Return record i; DataError if it is none, or has image placeholders and no image."""
        record = parse_record(self.list_data_dict[i], f"record {i}", self.data_args.image_folder)
        reason = None if getattr(self.data_args, "placeholder_as_text", False) else missing_images(record)
        if reason is not None:
            raise DataError(reason)
        if record.system is not None or record.not_supervised:
            what = "a system text" if record.system is not None else "answers that are not supervised"
            raise DataError(
                f"{record.name} has {what}, for which LLaVA's preprocess has no place; `llava-lite train` learns such "
                "records."
            )
        return record

    def __getitem__(self, i: int) -> dict:
        """Return an example; DataError naming the record where it cannot be used."""
        record = self._record(i)
        sources = [[{"from": speaker, "value": text} for speaker, text in record.turns]]
        if record.images:
            sources = preprocess_multimodal(sources, self.data_args)
        encoded = preprocess(sources, self.tokenizer, has_image=bool(record.images))
        example = {name: values[0] for name, values in encoded.items()}
        shown = [self._picture(record, image) for image in record.images]
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

    def _picture(self, record, image) -> tuple[torch.Tensor, tuple[int, int]]:
        try:
            picture = open_image(image if isinstance(image, bytes) else find_picture(record.image_folder, image)[0])
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
            "input_ids": padded(ids, self.tokenizer.pad_token_id),
            "labels": padded([instance["labels"][:end] for instance in instances], IGNORE_INDEX),
            "attention_mask": padded([torch.ones_like(row, dtype=torch.bool) for row in ids], False),
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
