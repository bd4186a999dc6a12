"""The page of `check --show`: the batches that training takes, as it takes them, in one file that fetches nothing."""

import base64
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import draw_image
from PIL import Image
from toy_media import media_record, write_imagebind, write_media
from transformers import TrainerCallback

from llava_lite.commands.check import main
from llava_lite.train.dry_run import DryRun
from llava_lite.train.preview.page import to_page
from llava_lite.train.preview.read import read_batches
from llava_lite.train.preview.tokens import token_texts
from llava_lite.train.train import prepare, run

ANYRES = "--image_aspect_ratio anyres --mm_patch_merge_type spatial_unpad "
ANYRES += "--image_grid_pinpoints [[32,64],[64,32],[64,64]]"
WAYS = {
    "random": "",
    "padded": "--packing none --image_aspect_ratio pad",
    "packs": "--packing tokens --packing_tokens 200 --per_device_train_batch_size 1",
    "grouped": "--group_by_modality_length True",
    "any resolution": ANYRES,
    "random crops": "--image_aspect_ratio random_crop --data_seed 7",
    "new tokens": "--new_tokens curious <there> --mm_use_im_start_end True",
    "accumulated": "--gradient_accumulation_steps 2 --per_device_train_batch_size 2",
}


def shown(flags, count=4):
    """Return the batches of a dry run, what could not be read, and the run."""
    dry = DryRun(list(map(str, flags)))
    opened = {(path,): dry.open([path]) for path in dry.data_args.data_path}
    with dry.start(opened) as sets:
        return *read_batches(dry, *sets, count), dry


class Ids(TrainerCallback):
    """The ids of the records of each step."""

    def __init__(self, trainer):
        self.trainer, self.steps = trainer, []

    def on_step_end(self, *args, **kwargs):
        """Note them."""
        self.steps.append(list(self.trainer.ids_of_step))


@pytest.mark.parametrize("way", WAYS)
def test_the_batches_are_those_of_training(way, stage_flags, tmp_path):
    flags = stage_flags("full", tmp_path / "out", *WAYS[way].split(), "--max_steps", 2, "--logging_steps", 1)
    stage = prepare(flags)
    ids = Ids(stage.trainer)
    stage.trainer.add_callback(ids)
    trainer = run(stage)
    per_step = trainer.args.gradient_accumulation_steps
    batches, problems, _ = shown(flags, 2 * per_step)
    assert not problems
    for k, step in enumerate(ids.steps):
        mine = batches[k * per_step : (k + 1) * per_step]
        assert [record.id for batch in mine for record in batch.records] == step
        line = trainer.state.log_history[k]
        assert sum(batch.num_tokens for batch in mine) == line["tokens"]
    for batch in batches:
        assert batch.num_supervised == sum(record.num_supervised for record in batch.records)
        assert batch.num_image_tokens == sum(record.num_image_tokens for record in batch.records)
        assert batch.shape[0] * batch.shape[1] == batch.num_tokens + batch.num_padding


RECORDS = [
    ("<image>\nWhat is it, <b>please</b> & why?", "Grüße, 你好 🦙.\nA second line", 1),
    ("<image> and <image>", "two", 2),
    ("only text", "<script>alert('x')</script>", 0),
    ("<image>\nlong", "so " * 120, 1),
]


@pytest.fixture
def records(tmp_path, stage_flags):
    """Return a function: more flags -> flags of a run on four odd records in one batch, in their order."""
    images = tmp_path / "images"
    images.mkdir()
    data = []
    for k, (question, answer, count) in enumerate(RECORDS):
        names = [f"{k}_{i}.png" for i in range(count)]
        for i, name in enumerate(names):
            draw_image(10 * k + i).resize((40 + 30 * i, 30 + 60 * (k == 3))).save(images / name)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        data.append({"id": f"<i>{k}</i>", "conversations": turns} | ({"image": names} if names else {}))
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(data))
    return lambda *more: stage_flags("full", tmp_path / "out", *more, data=(path, images))


def in_order(batches):
    """Return the records by their place in the file."""
    return sorted((record for batch in batches for record in batch.records), key=lambda record: record.place)


def test_pieces_are_the_text_of_the_tokens_and_supervised_ones_the_answers(records):
    batches, _, _ = shown(records("--model_max_length", 120))
    first, two, text, long = in_order(batches)
    learned = ["".join(piece.text for piece in one.pieces if piece.kind == "supervised") for one in in_order(batches)]
    assert learned[0] == " Grüße, 你好 🦙.\nA second line</s>"
    assert learned[1:3] == [" two</s>", " <script>alert('x')</script></s>"]
    assert learned[3].startswith(" so so so")
    assert [(piece.kind, piece.count) for piece in two.pieces] == [
        ("text", two.pieces[0].count), ("image", 16), ("text", two.pieces[2].count), ("image", 16),
        ("text", two.pieces[4].count), ("supervised", two.num_supervised),
    ]  # fmt: skip
    for one in (first, two, text, long):
        assert one.num_tokens == sum(piece.count for piece in one.pieces)
    assert long.num_tokens == 120
    assert long.num_cut == sum(piece.count for piece in long.cut) > 0
    full = "".join(piece.text for piece in [*long.pieces, *long.cut])
    assert full.endswith("so so </s>")
    assert first.num_cut == 0
    assert first.file.endswith("odd.json")
    assert first.pieces[0].text.startswith("<s>")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_texts_of_tokens_make_up_the_text_whatever_the_tokenizer(kind, toy_tokenizer_for):
    tokenizer = toy_tokenizer_for(kind)
    text = "The square  is\n\nred, Grüße 你好 🦙 ¿there?"
    ids = tokenizer(text).input_ids
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in one for one in texts)


def pixels_of(url):
    """Return the pixels of a data URL."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))


@pytest.mark.parametrize("way", ["--image_aspect_ratio pad", "--image_aspect_ratio random_crop", ANYRES])
@pytest.mark.parametrize("resize", ["exact", "None"])
def test_images_are_the_pixels_that_the_tower_is_given(way, resize, records):
    more = [] if resize == "None" else ["--image_resize", resize]
    flags = records(*way.split(), *more)
    batches, _, dry = shown(flags)
    opened = {(path,): dry.open([path]) for path in dry.data_args.data_path}
    with dry.start(opened) as (dataset, _):
        dataset.begin_epoch(0)
        for record in in_order(batches):
            example = dataset[record.place]
            for shown_image, pixels in zip(record.images, example.get("images", []), strict=True):
                crops = pixels.reshape(-1, *pixels.shape[-3:])
                found = [pixels_of(url) for url in shown_image.crops]
                assert len(found) == len(crops)
                for one, crop in zip(found, crops, strict=True):
                    expected = crop.permute(1, 2, 0).numpy()
                    if expected.dtype != np.uint8:
                        processor = dataset.image_processor
                        expected = ((expected * processor.image_std + processor.image_mean) * 255).round()
                    assert np.abs(one.astype(float) - expected).max() <= 1
                assert shown_image.num_tokens == dataset.layout.num_tokens(shown_image.size)
                if "anyres" in way:
                    columns, rows = dataset.layout.grid(shown_image.size)
                    assert (shown_image.columns, len(crops)) == (columns, 1 + columns * rows)


class Elements(HTMLParser):
    """The elements of a page with their attributes."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        """Note it."""
        self.found.append((tag, dict(attrs)))


def test_the_page_escapes_records_and_fetches_nothing(records, tmp_path, capsys):
    page = tmp_path / "pages" / "show.html"
    assert main([*records("--model_max_length", 120), "--show", "1", "--page", str(page)]) == 0
    assert f"{page}: 1 batch\n" in capsys.readouterr().out
    html = page.read_text(encoding="utf-8")
    elements = Elements(html).found
    assert {tag for tag, _ in elements}.isdisjoint({"script", "link", "iframe", "object", "i"})
    assert "<script" not in html
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in html
    sources = [attributes["src"] for tag, attributes in elements if tag == "img"]
    assert len(sources) == 4
    assert all(source.startswith("data:image/") for source in sources)
    assert not any("href" in attributes for _, attributes in elements)
    assert "http" not in html.replace("http-equiv", "")
    assert any("default-src 'none'" in attributes.get("content", "") for _, attributes in elements)
    assert "prefers-color-scheme: dark" in html


def test_padding_and_what_is_cut_off_are_marked(records):
    batches, _, dry = shown(records("--packing", "none", "--model_max_length", 120), 1)
    html = to_page(dry, batches)
    record = min(batches[0].records, key=lambda one: one.num_tokens)
    assert f"{batches[0].shape[1] - record.num_tokens:,} padding" in html
    long = in_order(batches)[3]
    assert f"{long.num_cut:,} tokens cut off" in html


def test_media_are_named_with_their_shape(tmp_path, stage_flags):
    write_media(tmp_path / "images")
    both = {"audio": "bird.wav", "audio_weight": 0.5, "image": "bird.png"}
    data = [media_record("sound", audio="bird.wav"), media_record("both", **both)]
    path = tmp_path / "media.json"
    path.write_text(json.dumps(data))
    tower = write_imagebind(tmp_path / "imagebind", ["image", "audio"])
    more = ["--vision_tower", tower, "--image_aspect_ratio", "square"]
    batches, _, _ = shown(stage_flags("full", tmp_path / "out", *more, data=(path, tmp_path / "images")))
    sound, both = in_order(batches)
    assert sound.images[0].note.startswith("audio (")
    assert (len(sound.images[0].crops), len(both.images[0].crops)) == (0, 1)


@pytest.mark.parametrize(("policy", "status"), [("raise", 1), ("skip", 0)])
def test_an_image_that_cannot_be_decoded_is_found_by_reading_the_batches(policy, status, records, tmp_path, capsys):
    path = tmp_path / "images" / "0_0.png"
    data = bytearray(path.read_bytes())
    start = data.find(b"IDAT") + 6
    data[start : start + 20] = bytes(20)
    path.write_bytes(data)
    page = tmp_path / "show.html"
    report = tmp_path / "report.json"
    more = ["--bad_record", policy, "--max_bad_fraction", "0.5"]
    assert main(records(*more)) == 0
    assert main([*records(*more), "--show", "1", "--page", str(page), "--report", str(report)]) == status
    assert "broken data stream" in page.read_text()
    reason = json.loads(report.read_text())["reason"]
    assert (reason is None) if policy == "skip" else "broken data stream" in reason


def test_fewer_batches_than_asked_for_are_all_of_the_epoch(records):
    assert len(shown(records(), 50)[0]) == 1


def test_a_page_that_cannot_be_written_leaves_the_verdict_on_the_data(records, tmp_path, capsys):
    report = tmp_path / "report.json"
    for page, words in ((str(tmp_path), "is a directory; name a file, such as"), ("/dev/full", "No space left on")):
        assert main([*records(), "--show", "1", "--page", page, "--report", str(report)]) == 1
        verdict, line = capsys.readouterr().out.splitlines()[-2:]
        assert verdict.startswith("ready to train: ")
        assert line.startswith("not written: ")
        assert page in line
        assert words in line
        found = json.loads(report.read_text())
        assert (found["would_train"], found["reason"]) == (True, None)
