"""Turn LLaVA's records into its batches, under the names and with the returns of LLaVA's `train/train.py`.

For scripts written for LLaVA; `train` itself reads, checks and batches with `llava_lite.data`. Images are preprocessed
by the same functions. The mask of a batch keeps a padding token that is part of the text, unlike LLaVA's.
"""

from dataclasses import dataclass
from multiprocessing.context import get_spawning_popen

import torch
from torch.utils.data import Dataset

from llava_lite import conversation as conversation_lib
from llava_lite.constants import IGNORE_INDEX
from llava_lite.data.errors import DataError
from llava_lite.data.image_files import find_image, open_record_image
from llava_lite.data.index.sources import READERS, open_sources, sample_positions
from llava_lite.data.records.media import get_mixes
from llava_lite.data.records.record import Record, missing_images, parse_record
from llava_lite.media.image import ImageError
from llava_lite.media.preprocess import process_images
from llava_lite.train.compat.preprocess import padded, preprocess, preprocess_multimodal

# Words that an image counts for in `lengths`.
IMAGE_WORDS = 128


class LazySupervisedDataset(Dataset):
    """LLaVA's examples {"input_ids", "labels" [T], "image"}, one placeholder an image.

    data_path: a file of records, or several. data_args: an object with image_folder, image_processor,
    image_aspect_ratio, is_multimodal and mm_use_im_start_end. "image" is a tensor [3, H, W], a list of them where a
    record has several; where it has none it is an empty image in a multimodal run. With `anyres` (data_args then has
    image_grid_pinpoints) an image is [crops, 3, H, W], and "image_size" is its (width, height). A record with image
    placeholders and no image raises unless data_args.placeholder_as_text is True; LLaVA reads them as text.
    The records are kept in memory, as in LLaVA; `llava_lite.data.dataset` keeps none.
    """

    def __init__(self, data_path, tokenizer, data_args):
        self.list_data_dict = _read_items(data_path)
        self.tokenizer = tokenizer
        self.data_args = data_args

    def __len__(self):
        return len(self.list_data_dict)

    def __getstate__(self):
        # A worker that is not forked would silently use the package's own default template.
        template = {} if get_spawning_popen() is None else {"template": conversation_lib.default_conversation}
        return self.__dict__ | template

    def __setstate__(self, state):
        conversation_lib.default_conversation = state.pop("template", conversation_lib.default_conversation)
        self.__dict__.update(state)

    @property
    def lengths(self) -> list[int]:
        """Words of each record, and some for its image."""
        return [words + IMAGE_WORDS * has_image for words, has_image in self._words()]

    @property
    def modality_lengths(self) -> list[int]:
        """Words of each record, below zero for one without images."""
        return [words if has_image else -words for words, has_image in self._words()]

    def _words(self):
        for i in range(len(self)):
            record = self._record(i)
            yield sum(len(text.split()) for _, text in record.turns), bool(record.images)

    def _record(self, i: int) -> Record:
        """Return record i; DataError if it is not valid, or has image placeholders and no image."""
        record = parse_record(self.list_data_dict[i], f"record {i}", self.data_args.image_folder)
        reason = None if getattr(self.data_args, "placeholder_as_text", False) else missing_images(record)
        if reason is not None:
            raise DataError(reason)
        if any(get_mixes(record.images)):
            raise DataError(
                f"{record.name} has {' and '.join(record.images[0].kinds)} as one image, which LLaVA's own data set "
                "does not read; `llava-lite train` does. Remove the record or extract its frames as images."
            )
        if record.system is not None or record.not_supervised:
            what = "a system text" if record.system is not None else "answers that are not supervised"
            raise DataError(
                f"{record.name} has {what}, which LLaVA's preprocess does not support; `llava-lite train` does."
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
        prepared = [self._image(record, image) for image in record.images]
        # A run without a tower has no processor, whatever the default of is_multimodal.
        processor = getattr(self.data_args, "image_processor", None)
        if not prepared and self.data_args.is_multimodal and processor is not None:
            prepared = [_empty_image(processor)]
        if prepared:
            images, sizes = map(list, zip(*prepared, strict=True))
            example["image"] = images[0] if len(images) == 1 else images
            if str(self.data_args.image_aspect_ratio).startswith("anyres"):
                example["image_size"] = sizes[0] if len(sizes) == 1 else sizes
        return example

    def _image(self, record, image) -> tuple[torch.Tensor, tuple[int, int]]:
        try:
            opened = open_record_image(
                image if isinstance(image, bytes) else find_image(record.image_folder, image)[0]
            )
            return process_images([opened], self.data_args.image_processor, self.data_args)[0], opened.size
        except ImageError as error:
            raise DataError(f"{record.name}: {error}") from error


def _read_items(data_path) -> list[dict]:
    """Return the JSON objects of one file or several, those of a mixture as it samples them."""
    items = []
    for k, source in enumerate(open_sources(data_path)):
        reader = READERS[source.kind]
        spans, head = reader.scan(source.path), reader.head(source.path)
        with open(source.path, "rb") as file:
            data = file.read()
        chosen = spans[sample_positions(source.sampling, len(spans), k)]
        items += [reader.load(data[start:stop], head) for start, stop in chosen.tolist()]
    return items


def _empty_image(image_processor) -> tuple[torch.Tensor, tuple[int, int]]:
    # SigLIP's processor does not crop and has no crop_size.
    size = getattr(image_processor, "crop_size", None) or image_processor.size
    return torch.zeros(3, size["height"], size["width"]), (size["width"], size["height"])


def _flat(groups) -> list:
    """Return the items of lists, and items outside of lists, as one list."""
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
            "attention_mask": padded([torch.ones_like(one, dtype=torch.bool) for one in ids], False),
        }
        if "image" in instances[0]:
            images = _flat(instance["image"] for instance in instances)
            alike = len({image.shape for image in images}) == 1
            batch["images"] = torch.stack(images) if alike else images
        if "image_size" in instances[0]:
            batch["image_sizes"] = _flat(instance["image_size"] for instance in instances)
        return batch


def make_supervised_data_module(tokenizer, data_args) -> dict:
    """Return train_dataset, eval_dataset (None) and data_collator, as keywords of a Trainer."""
    return {
        "train_dataset": LazySupervisedDataset(data_args.data_path, tokenizer, data_args),
        "eval_dataset": None,
        "data_collator": DataCollatorForSupervisedDataset(tokenizer),
    }
