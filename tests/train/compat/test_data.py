"""LLaVA's data names return what LLaVA's own do: images by Hugging Face's processor, a mask of real tokens."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from llava_lite.constants import IGNORE_INDEX
from llava_lite.data.errors import DataError
from llava_lite.media.preprocess import load_image_processor
from llava_lite.train import train as train_module
from llava_lite.train.compat.data import (
    DataCollatorForSupervisedDataset,
    LazySupervisedDataset,
    make_supervised_data_module,
)


def conversation_of(turns):
    return [{"from": speaker, "value": text} for speaker, text in turns]


@pytest.fixture
def data_args(tmp_path, toy_tower_dir):
    """LLaVA's data arguments over five records: two images of one size, one of another, a pair, and words alone."""
    sizes = {"wide.png": (50, 30), "tall.png": (20, 44), "grey.png": (50, 30)}
    for i, (name, size) in enumerate(sizes.items()):
        Image.linear_gradient("L").resize(size).convert("L" if i == 2 else "RGB").save(tmp_path / name)

    def record(number, question, image=None):
        turns = [("human", question), ("gpt", "It is red."), ("human", "And now?"), ("gpt", "So it stays.")]
        return {"id": number, "conversations": conversation_of(turns)} | ({"image": image} if image else {})

    records = [
        record(0, "<image>\nWhat is it?", "wide.png"),
        record(1, "What is a square?"),
        record(2, "What is it?\n<image>", "tall.png"),
        record(3, "Is <image> like <image> ?", ["wide.png", "tall.png"]),
        record(4, "<image>\nAnd this?", "grey.png"),
    ]
    (tmp_path / "train.json").write_text(json.dumps(records))
    return SimpleNamespace(
        data_path=str(tmp_path / "train.json"),
        image_folder=str(tmp_path),
        image_processor=load_image_processor(toy_tower_dir("clip")),
        image_aspect_ratio="pad",
        is_multimodal=True,
        mm_use_im_start_end=False,
    )


def test_examples_are_ids_labels_and_images_on_a_square_of_the_mean_colour(data_args, toy_tokenizer, speak):
    speak("v1")
    dataset = LazySupervisedDataset(data_args.data_path, toy_tokenizer, data_args)
    assert len(dataset) == 5
    square = Image.new("RGB", (50, 50), (122, 116, 104))
    square.paste(Image.open(f"{data_args.image_folder}/wide.png"), (0, 10))
    expected = data_args.image_processor(square, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(dataset[0]["image"], expected)
    assert set(dataset[0]) == {"input_ids", "labels", "image"}
    assert dataset[0]["input_ids"].dim() == dataset[0]["labels"].dim() == 1
    # A record of text alone has a blank image, so that a batch has one a sequence.
    assert torch.equal(dataset[1]["image"], torch.zeros(3, 32, 32))
    assert [image.shape for image in dataset[3]["image"]] == [(3, 32, 32)] * 2
    torch.testing.assert_close(dataset[3]["image"][0], expected)
    data_args.is_multimodal = False
    assert "image" not in dataset[1]
    data_args.is_multimodal = True
    del data_args.image_processor
    assert "image" not in dataset[1]


def test_lengths_are_words_and_below_zero_for_words_alone(data_args, toy_tokenizer):
    dataset = LazySupervisedDataset(data_args.data_path, toy_tokenizer, data_args)
    words = [sum(len(turn["value"].split()) for turn in item["conversations"]) for item in dataset.list_data_dict]
    assert words == [12, 12, 12, 13, 11]
    assert dataset.modality_lengths == [12, -12, 12, 13, 11]
    assert dataset.lengths == [12 + 128, 12, 12 + 128, 13 + 128, 11 + 128]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_speak_the_template_of_their_parent(data_args, toy_tokenizer, speak, context):
    speak("mistral_instruct")
    toy_tokenizer.pad_token = "<unk>"
    module = make_supervised_data_module(toy_tokenizer, data_args)
    dataset, collate = module["train_dataset"], module["data_collator"]
    loader = DataLoader(dataset, 5, num_workers=1, collate_fn=collate, multiprocessing_context=context)
    (batch,) = loader
    expected = collate([dataset[i] for i in range(5)])
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["labels"], expected["labels"])


def test_a_record_that_cannot_be_used_is_named(data_args, toy_tokenizer, speak, tmp_path):
    speak("v1")
    records = [
        {"id": "lost", "image": "lost.png", "conversations": conversation_of([("human", "<image>"), ("gpt", "A.")])}
    ]
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, records)))
    paths = [data_args.data_path, str(tmp_path / "more.jsonl")]
    dataset = LazySupervisedDataset(paths, toy_tokenizer, data_args)
    assert len(dataset) == 6
    with pytest.raises(DataError, match=r"record 'lost' .*lost\.png.*no such file"):
        dataset[5]


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"conversations": conversation_of([("human", "<image>q"), ("gpt", "a")])}, "no image in record 'r'"),
        (
            {"img": "wide.png", "conversations": conversation_of([("human", "<image>q"), ("gpt", "a")])},
            "the key 'img'",
        ),
        (
            {"video": "a.mp4", "conversations": conversation_of([("human", "<image>q"), ("gpt", "a")])},
            "has video as one image, which LLaVA's own data set does not read",
        ),
        (
            {"system": "S", "conversations": conversation_of([("human", "q"), ("gpt", "a")])},
            "has a system text, which LLaVA",
        ),
        ({"query": "q", "response": "a"}, "llava-lite data convert"),
    ],
)
def test_an_image_that_nobody_would_see_is_refused(data_args, toy_tokenizer, speak, item, words):
    speak("v1")
    dataset = LazySupervisedDataset(data_args.data_path, toy_tokenizer, data_args)
    dataset.list_data_dict = [{"id": "r", **item}]
    for ask in (lambda: dataset[0], lambda: dataset.lengths, lambda: dataset.modality_lengths):
        with pytest.raises(DataError, match=words):
            ask()


def test_a_placeholder_is_text_where_that_is_asked_for(data_args, toy_tokenizer, speak):
    speak("v1")
    data_args.placeholder_as_text = True
    dataset = LazySupervisedDataset(data_args.data_path, toy_tokenizer, data_args)
    dataset.list_data_dict = [
        {"id": "r", "conversations": conversation_of([("human", "the tag <image>"), ("gpt", "a")])}
    ]
    assert dataset.modality_lengths == [-4]
    assert "the tag <image>" in toy_tokenizer.decode(dataset[0]["input_ids"])


def test_other_spellings_are_llavas_records(data_args, toy_tokenizer, speak):
    speak("v1")
    dataset = LazySupervisedDataset(data_args.data_path, toy_tokenizer, data_args)
    turns = [("user", "<image>\nWhat is it?"), ("assistant", "It is red."), ("user", "And now?"),
             ("assistant", "So it stays.")]  # fmt: skip
    with open(f"{data_args.image_folder}/wide.png", "rb") as file:
        image = {"bytes": file.read(), "path": None}
    item = {"id": 0, "messages": [{"role": role, "content": text} for role, text in turns], "images": [image]}
    dataset.list_data_dict.append(item)
    assert dataset.lengths[-1] == dataset.lengths[0]
    for key in ("input_ids", "labels", "image"):
        assert torch.equal(dataset[5][key], dataset[0][key])


def test_a_batch_is_padded_on_the_right_and_its_mask_keeps_a_padding_token_of_the_text(toy_tokenizer):
    toy_tokenizer.pad_token, toy_tokenizer.model_max_length = "<unk>", 4
    pad = toy_tokenizer.pad_token_id
    image = torch.ones(3, 2, 2)
    sequences = [torch.tensor([1, pad, 5]), torch.tensor([1, 2, 3, 4, 5])]
    examples = [{"input_ids": row, "labels": row, "image": image * i} for i, row in enumerate(sequences)]
    batch = DataCollatorForSupervisedDataset(tokenizer=toy_tokenizer)(examples)
    assert batch["input_ids"].tolist() == [[1, pad, 5, pad], [1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[1, pad, 5, IGNORE_INDEX], [1, 2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[True, True, True, False], [True] * 4]
    assert torch.equal(batch["images"], torch.stack([image * 0, image]))
    examples[1]["image"] = torch.ones(5, 3, 2, 2)
    shapes = [one.shape for one in DataCollatorForSupervisedDataset(toy_tokenizer)(examples)["images"]]
    assert shapes == [(3, 2, 2), (5, 3, 2, 2)]


def test_the_names_are_found_where_llava_has_them():
    for name in ("LazySupervisedDataset", "DataCollatorForSupervisedDataset", "make_supervised_data_module"):
        assert getattr(train_module, name) is globals()[name]
    for name in ("preprocess", "preprocess_multimodal", "preprocess_v1", "preprocess_plain"):
        assert getattr(train_module, name).__module__ == "llava_lite.train.compat.preprocess"
    with pytest.raises(AttributeError, match="no attribute 'preprocces'; known: ModelArguments"):
        train_module.preprocces  # noqa: B018


@pytest.mark.parametrize("merge", ["flat", "anyres"])
def test_a_plain_trainer_trains_on_llavas_batches(tmp_path, data_args, toy_tokenizer, toy_model, speak, merge):
    speak("v1")
    toy_tokenizer.pad_token = "<unk>"
    keys = {}
    if merge == "anyres":
        keys = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}
        vars(data_args).update(keys)
        keys |= {"mm_patch_merge_type": "spatial_unpad"}
    model = toy_model(**keys)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    module = make_supervised_data_module(tokenizer=toy_tokenizer, data_args=data_args)
    assert module["eval_dataset"] is None
    batch = module["data_collator"]([module["train_dataset"][i] for i in range(5)])
    with torch.no_grad():
        # The loss of each conversation by itself, from logits alone.
        losses = []
        for example in (module["train_dataset"][i] for i in range(5)):
            alone = module["data_collator"]([example])
            alone.pop("attention_mask")
            labels = alone.pop("labels")[0]
            logits = model(**alone).logits[0]
            supervised = labels != IGNORE_INDEX
            # Answers stand after the images, so they count from the end.
            from_end = torch.arange(len(labels)) - len(labels)
            losses.append(F.cross_entropy(logits[from_end[supervised] - 1], labels[supervised], reduction="none"))
    args = TrainingArguments(
        str(tmp_path / "out"),
        per_device_train_batch_size=5,
        max_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        use_cpu=True,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(model=model, args=args, **module)
    trainer.train()
    first, second = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    # The log is rounded.
    assert first == pytest.approx(torch.cat(losses).mean().item(), abs=1e-3)
    assert second < first
    moved = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    assert {"lm_head.weight", "model.mm_projector.0.weight"} <= moved
    assert len(batch["images"]) == 6
