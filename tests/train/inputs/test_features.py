"""A run that reads its frozen tower's features from disk is the run that computes them again at every step."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava_lite.data.collator import DataCollatorForSupervisedDataset
from llava_lite.data.feature_cache import FeatureStore, StoredImage
from llava_lite.distributed.ranks import raise_together


def losses(directory):
    lines = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if "loss" in line for name in ("loss", "grad_norm")]


@pytest.fixture
def opened(monkeypatch):
    """The files that Pillow opened."""
    paths, hf = [], Image.open
    monkeypatch.setattr(Image, "open", lambda file, *args, **more: paths.append(file) or hf(file, *args, **more))
    return paths


ANYRES = ["--image_aspect_ratio", "anyres", "--image_grid_pinpoints", "[(32, 64), (64, 32)]"]
ANYRES += ["--mm_patch_merge_type", "spatial_unpad"]


@pytest.mark.parametrize(
    ("stage", "more"),
    [("projector", []), ("full", ANYRES), ("moe", ["--image_resize", "fast"])],
)
def test_losses_and_gradients_are_those_of_a_run_without(
    run_stage, toy_data, tmp_path, tower_calls, opened, stage, more
):
    data = toy_data(tmp_path / "mixed")
    # One image a call, with and without: kernels may round an image otherwise in a larger batch.
    flags = ["--max_steps", 4, "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2, *more]
    plain = run_stage(stage, tmp_path / "plain", *flags, data=data)
    tower_calls.clear(), opened.clear()
    cached = run_stage(stage, tmp_path / "cached", *flags, "--feature_cache", tmp_path / "store", data=data)
    num_images = int(cached.train_dataset.has_image.sum())
    # A blank image to find the shape of the output, then each alone, as a micro-batch shows it, and none in the run.
    assert len(opened) == num_images == 16
    assert len(tower_calls) == 17
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)
    for (name, one), (_, other) in zip(
        plain.model.state_dict().items(), cached.model.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)


def test_stored_features_are_the_towers_bit_for_bit_and_made_once(run_stage, toy_data, tmp_path, tower_calls, opened):
    data = toy_data(tmp_path / "mixed")
    flags = ["--max_steps", 1, "--feature_cache", tmp_path / "store"]
    trainer = run_stage("full", tmp_path / "one", *flags, data=data)
    dataset, tower = trainer.train_dataset, trainer.unwrapped.get_vision_tower()
    shown = [i for i in range(len(dataset)) if dataset.has_image[i]]
    records = [dataset.annotations[i] for i in shown]
    pixels = [dataset.pixels(dataset.open(record, record.images[0])) for record in records]
    with torch.no_grad():
        expected = tower(torch.stack(pixels))
    for i, features, record in zip(shown, expected, records, strict=True):
        (stored,) = dataset[i]["image_features"]
        assert torch.equal(stored, features)
        assert dataset[i]["image_sizes"] == [Image.open(f"{data[1]}/{record.images[0]}").size]
    tower_calls.clear(), opened.clear()
    run_stage("full", tmp_path / "two", *flags, data=data)
    assert (tower_calls, opened) == ([1], [])
    # A file that changed is made again, the others are not.
    path = Path(data[1]) / records[3].images[0]
    Image.new("RGB", (41, 40), "blue").save(path)
    os.utime(path, (1, 1))
    opened.clear()
    run_stage("full", tmp_path / "three", *flags, data=data)
    assert set(opened) == {str(path)}
    # Another tower or another way of preparing has a directory of its own.
    opened.clear()
    run_stage("full", tmp_path / "four", *flags, "--image_aspect_ratio", "square", data=data)
    run_stage("full", tmp_path / "five", *flags, "--mm_vision_select_layer", "-1", data=data)
    assert len(opened) == 2 * len(shown)
    assert len(list((tmp_path / "store").iterdir())) == 3


def test_an_image_replaced_by_one_of_the_same_size_and_time_is_encoded_again(run_stage, toy_data, tmp_path, opened):
    data = toy_data(tmp_path / "mixed")
    names = sorted(path.name for path in Path(data[1]).glob("*.png"))
    path = Path(data[1]) / names[0]
    for seed in (0, 1):
        noise = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8)
        # A BMP has the same size whatever it shows; the format is that of the bytes.
        Image.fromarray(noise).save(tmp_path / f"{seed}.bmp")
    flags = ["--max_steps", 1, "--feature_cache", tmp_path / "store"]
    path.write_bytes((tmp_path / "0.bmp").read_bytes())
    known = path.stat()
    run_stage("full", tmp_path / "one", *flags, data=data)
    path.write_bytes((tmp_path / "1.bmp").read_bytes())
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (known.st_size, known.st_mtime_ns)
    opened.clear()
    trainer = run_stage("full", tmp_path / "two", *flags, data=data)
    assert str(path) in opened
    dataset, tower = trainer.train_dataset, trainer.unwrapped.get_vision_tower()
    i = next(i for i in range(len(dataset)) if dataset.annotations[i].images == (path.name,))
    record = dataset.annotations[i]
    with torch.no_grad():
        expected = tower(dataset.pixels(dataset.open(record, path.name))[None])[0]
    (stored,) = dataset[i]["image_features"]
    torch.testing.assert_close(stored, expected, rtol=1e-5, atol=1e-6)


def test_a_batch_of_text_alone_reports_that_the_tower_does_not_run(toy_model, tower_calls):
    model = toy_model().train()
    ids, labels = torch.tensor([5, 6, 7]), torch.tensor([-100, 6, 7])
    text = {"id": "a", "input_ids": ids, "labels": labels, "image_features": []}
    batch = DataCollatorForSupervisedDataset(0)([text])
    del batch["sample_ids"]
    assert len(batch["image_features"]) == 0
    model(**batch).loss.backward()
    weight = next(model.get_model().mm_projector.parameters())
    assert weight.grad is not None
    assert not weight.grad.any()
    assert tower_calls == []
    shown = {"id": "b", "input_ids": torch.tensor([-200] * 16 + [6]), "labels": torch.tensor([-100] * 16 + [6])}
    shown |= {"image_features": [StoredImage((4, 4), torch.randn(16, 32)).features], "image_sizes": [(4, 4)]}
    batch = DataCollatorForSupervisedDataset(0)([text, shown])
    assert batch["image_features"].shape == (1, 16, 32)
    assert batch["image_sizes"] == [(4, 4)]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ["--unfreeze_mm_vision_tower", "True"],
            "--feature_cache .* frozen tower, and --unfreeze_mm_vision_tower True trains it",
        ),
        (["--data_path", "{text}"], "no record has an image"),
    ],
)
def test_a_directory_for_features_that_cannot_be_kept_is_refused(stage_flags, toy_data, tmp_path, more, words):
    from llava_lite.train.train import prepare

    text, _ = toy_data(tmp_path / "text", text_only_every=1)
    more = [word.format(text=text) for word in more]
    with pytest.raises(ValueError, match=words):
        prepare(stage_flags("full", tmp_path / "run", "--feature_cache", tmp_path / "store", *more))


def test_nodes_with_and_without_features_go_the_same_way(stage_flags, tmp_path, monkeypatch, caplog):
    from llava_lite.train.inputs import features
    from llava_lite.train.train import prepare

    # Of two ranks, the other has the directory that this one has not.
    monkeypatch.setattr(features, "everyone", lambda value: [value, True] if value is False else [value])
    with caplog.at_level("INFO", logger="llava_lite.train.inputs.features"):
        prepare(stage_flags("full", tmp_path / "run", "--feature_cache", "auto"))
    assert "one epoch reads them once, and few are cached" in caplog.text


def test_whatever_goes_wrong_on_a_rank_is_raised_on_all(stage_flags, tmp_path, monkeypatch):
    from llava_lite.train import together
    from llava_lite.train.train import prepare

    raised = []
    monkeypatch.setattr(
        together, "raise_together", lambda error, *more: raised.append(error) or raise_together(error, *more)
    )

    def fail(*args):
        raise RuntimeError("out of memory")

    for name in ("find", "sweep", "view"):
        with monkeypatch.context() as patch:
            patch.setattr(FeatureStore, name, fail)
            with pytest.raises(ValueError, match=r"out of memory\. .*--feature_cache off"):
                prepare(stage_flags("full", tmp_path / "run", "--feature_cache", tmp_path / name))
        assert isinstance(raised[-1], RuntimeError)


def test_each_node_makes_all_that_it_lacks_however_many_ranks_the_others_have(stage_flags, tmp_path, monkeypatch):
    from llava_lite.train.inputs import feature_fill, features
    from llava_lite.train.train import prepare

    trainer = prepare(stage_flags("full", tmp_path / "run", "--feature_cache", "off")).trainer
    dataset, tower = trainer.train_dataset, trainer.unwrapped.get_vision_tower()
    with features.ready_tower(tower, trainer):
        store, _ = features.open_store(tmp_path / "store", tower, dataset, trainer)
        keys, starts = feature_fill.image_keys(dataset, trainer.args, trainer.leave_out)
        # Three ranks: this one alone on its node, two on another that has a directory of its own.
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
        others = {int: (0, 1), dict: ({}, {})}
        monkeypatch.setattr(feature_fill, "everyone", lambda value: [value, *others.get(type(value), ())])
        args = {"process_index": 0, "world_size": 3, "local_process_index": 0, "dataloader_num_workers": 0}
        args |= {"device": torch.device("cpu"), "per_device_train_batch_size": 4, "packing": "samples"}
        feature_fill.fill(store, keys, starts, tower, dataset, SimpleNamespace(**args), trainer.leave_out)
    assert (store.find(keys)["shard"] >= 0).all()


def test_packs_are_counted_by_tokens_to_see_whether_images_are_read_again():
    from llava_lite.train.inputs.features import _is_read_again

    args = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "world_size": 2, "num_train_epochs": 1}
    dataset = SimpleNamespace(lengths=np.full(50, 10))

    def is_read_again(max_steps):
        trainer = SimpleNamespace(
            args=SimpleNamespace(**args, packing="tokens", packing_tokens=100, max_steps=max_steps)
        )
        return _is_read_again(trainer, dataset)

    # 500 tokens, of which two ranks take 200 a step.
    assert not is_read_again(2)
    assert is_read_again(3)


def test_a_directory_of_the_home_is_found(monkeypatch, tmp_path):
    from llava_lite.train.inputs.features import check_feature_cache

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is no directory"):
        check_feature_cache("~/file/features")
    check_feature_cache("~/features")
    with pytest.raises(ValueError, match=r"--feature_cache ~nobody_here/x: .* Name a directory that can be written"):
        check_feature_cache("~nobody_here/x")


def test_auto_keeps_features_where_they_are_read_again_and_fit(stage_flags, toy_data, tmp_path, monkeypatch, caplog):
    from llava_lite.train.inputs import features
    from llava_lite.train.train import prepare

    data = toy_data(tmp_path / "mixed")

    def keeps(*more):
        caplog.clear()
        with caplog.at_level("INFO", logger="llava_lite.train.inputs.features"):
            flags = stage_flags("full", tmp_path / "run", "--feature_cache", "auto", *more, data=data)
            return prepare(flags).trainer.train_dataset.features is not None

    assert not keeps()
    assert "one epoch reads them once" in caplog.text
    assert not keeps("--num_train_epochs", 2, "--unfreeze_mm_vision_tower", "True")
    assert "the vision tower trains" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(features, "AUTO_FRACTION", 0.0)
        assert not keeps("--num_train_epochs", 2)
        assert "do not fit" in caplog.text
        patch.setattr(features.shutil, "disk_usage", lambda directory: SimpleNamespace(free=0))
        with pytest.raises(
            ValueError,
            match=rf"32,768 bytes of features do not fit into the 0 bytes that are free in {tmp_path}/store/\w+; name "
            "a directory .* --feature_cache off",
        ):
            prepare(stage_flags("full", tmp_path / "run", "--feature_cache", tmp_path / "store", data=data))
    assert keeps("--num_train_epochs", 2)
    assert "features of 16 images are 32,768 bytes; 16 of them (32,768 bytes) are not cached yet" in caplog.text
    # What an earlier run has left is read, though this one reads it once.
    assert keeps()
    assert "; 0 of them" in caplog.text
