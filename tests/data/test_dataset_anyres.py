"""Records with images of any size: lengths known from headers, and batches, against the examples themselves."""

import pytest
import torch
from conftest import draw_image
from PIL import Image
from torch.utils.data import DataLoader

from llava_lite.commands.check import main
from llava_lite.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_lite.data.check.check import check_annotations
from llava_lite.data.collator import DataCollatorForSupervisedDataset
from llava_lite.data.dataset import open_dataset
from llava_lite.data.encode import RecordEncoder
from llava_lite.data.errors import DataError
from llava_lite.data.index.annotations import open_annotations
from llava_lite.media.layout import ImageLayout
from llava_lite.media.preprocess import load_image_processor
from llava_lite.mm_utils import process_images

SIZES = [(40, 40), (20, 90), (90, 20), (1, 60), (64, 33), (300, 100), (33, 33)]
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]


def get_layout(merge_type="spatial_unpad"):
    return ImageLayout.read(16, 4, 32, "anyres", merge_type, PINPOINTS)


@pytest.fixture
def mixed(tmp_path, write_json):
    """Return (json path, image directory) of 28 records with none to three images of unequal sizes."""
    for i, size in enumerate(SIZES):
        draw_image(i, 96).resize(size).save(tmp_path / f"{i}.png")
    records = []
    for i in range(28):
        count = i % 4
        turns = [
            {"from": "human", "value": "<image> and " * count + "What? " * (i % 5)},
            {"from": "gpt", "value": "So " * (i + 1)},
        ]
        # An image after the first answer.
        late = count > 1 and i % 3 == 0
        turns += [{"from": "human", "value": "<image> too? " * late}, {"from": "gpt", "value": "No. " * (i % 5)}]
        names = [f"{(i + k) % len(SIZES)}.png" for k in range(count + late)]
        records.append({"id": str(i), "conversations": turns} | ({"image": names} if names else {}))
    return write_json(records), str(tmp_path)


@pytest.fixture
def processor(toy_tower_dir):
    return load_image_processor(toy_tower_dir("clip"))


@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
def test_lengths_known_from_headers_are_those_of_the_examples(mixed, toy_tokenizer, processor, merge_type):
    layout = get_layout(merge_type)
    dataset, report = open_dataset(mixed[0], toy_tokenizer, processor, "v1", mixed[1], layout)
    examples = [dataset[i] for i in range(len(dataset))]
    assert dataset.lengths.tolist() == [len(example["input_ids"]) for example in examples]
    assert report.num_tokens == sum(len(example["input_ids"]) for example in examples)
    for example in examples:
        expected = sum(layout.num_tokens(size) for size in example.get("image_sizes", ()))
        assert int((example["input_ids"] == IMAGE_TOKEN_INDEX).sum()) == expected
        assert [len(crops) for crops in example.get("images", ())] == [
            layout.num_crops(size) for size in example.get("image_sizes", ())
        ]
    # A shard of the records has its own lengths, not those of its neighbours.
    part = report.annotations.select([9, 2, 27])
    assert part.token_lengths.tolist() == [len(examples[i]["input_ids"]) for i in (9, 2, 27)]


@pytest.mark.parametrize("max_length", [40, 90, 130, 200, 320, 420, 700])
def test_a_check_leaves_out_what_truncation_would_cut(mixed, toy_tokenizer, processor, max_length):
    layout = get_layout()
    encoder = RecordEncoder(toy_tokenizer, "v1")
    annotations = open_annotations(*mixed)
    bad = set()
    for record in annotations:
        ids, labels = encoder(record)
        lengths = iter(layout.num_tokens(SIZES[int(name.split(".")[0])]) for name in record.images)
        repeats = [next(lengths) if token == IMAGE_TOKEN_INDEX else 1 for token in ids]
        long_ids = [token for token, n in zip(ids, repeats, strict=True) for _ in range(n)]
        long_labels = [label for label, n in zip(labels, repeats, strict=True) for _ in range(n)]
        supervised = [label for label in long_labels[:max_length] if label != IGNORE_INDEX]
        if not supervised or IMAGE_TOKEN_INDEX in long_ids[max_length:]:
            bad.add(record.id)
    report = check_annotations(annotations, encoder, layout, max_length, bad_record="skip", max_bad_fraction=1.0)
    assert {entry.id for entry in report.bad} == bad
    dataset, _ = open_dataset(
        mixed[0], toy_tokenizer, processor, "v1", mixed[1], layout, max_length, bad_record="skip", max_bad_fraction=1.0
    )
    # What is left can be built, complete images included.
    assert [len(dataset[i]["input_ids"]) for i in range(len(dataset))] == dataset.lengths.tolist()


def test_the_cut_never_goes_through_an_image(mixed, toy_tokenizer, processor):
    options = {"bad_record": "skip", "max_bad_fraction": 1.0}
    dataset, _ = open_dataset(mixed[0], toy_tokenizer, processor, "v1", mixed[1], get_layout(), **options)
    full = dataset[1]["input_ids"].tolist()
    dataset.max_length = full.index(IMAGE_TOKEN_INDEX) + 20
    with pytest.raises(DataError, match=r"record '1' .* would leave 20 of the 5\d features of an image"):
        dataset[1]


def test_a_second_start_and_another_merge_look_at_no_image_again(mixed, toy_tokenizer, monkeypatch):
    encoder = RecordEncoder(toy_tokenizer, "v1")
    check_annotations(open_annotations(*mixed), encoder, get_layout("flat"), 2048)
    monkeypatch.setattr(Image, "open", None)

    class Unable(RecordEncoder):
        def measure(self, record):
            raise AssertionError("records are tokenized again")

    encoder = Unable(toy_tokenizer, "v1")
    counts = [
        check_annotations(open_annotations(*mixed), encoder, layout, 2048).num_tokens
        for layout in (get_layout("flat"), get_layout("spatial_unpad"), ImageLayout(16))
    ]
    assert counts[0] > counts[1] > counts[2]


def test_a_batch_holds_the_crops_of_process_images_and_the_sizes(mixed, toy_tokenizer, processor):
    from types import SimpleNamespace

    from llava_lite.media.image import open_image

    dataset, _ = open_dataset(mixed[0], toy_tokenizer, processor, "v1", mixed[1], get_layout())
    collate = DataCollatorForSupervisedDataset(toy_tokenizer.unk_token_id)
    batch = collate([dataset[i] for i in (0, 1, 3)])
    names = [f"{k}.png" for k in (1, 3, 4, 5, 6)]
    config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=PINPOINTS)
    expected = process_images([open_image(f"{mixed[1]}/{name}") for name in names], processor, config)
    assert batch["image_sizes"] == [SIZES[int(name.split(".")[0])] for name in names]
    assert all(torch.equal(crops, other) for crops, other in zip(batch["images"], expected, strict=True))
    assert "images" not in collate([dataset[0], dataset[4]])
    spread = next(iter(DataLoader(dataset, batch_size=4, collate_fn=collate, num_workers=1)))
    assert [len(crops) for crops in spread["images"]] == [
        dataset.layout.num_crops(size) for size in spread["image_sizes"]
    ]


def test_the_command_line_counts_crops(mixed, toy_tokenizer, tmp_path, capsys):
    toy_tokenizer.save_pretrained(tmp_path / "tokenizer")
    flags = ["--data_path", mixed[0], "--image_folder", mixed[1]]
    flags += ["--model_name_or_path", str(tmp_path / "tokenizer"), "--num_image_tokens", "16"]
    anyres = ["--image_aspect_ratio", "anyres", "--image_size", "32", "--mm_patch_merge_type", "spatial_unpad"]
    encoder = RecordEncoder(toy_tokenizer, "v1")
    for more, layout in (([], ImageLayout(16)), (anyres, get_layout())):
        assert main([*flags, *more]) == 0
        report = check_annotations(open_annotations(*mixed), encoder, layout, 2048)
        assert f"{report.num_tokens:,} tokens" in capsys.readouterr().out
