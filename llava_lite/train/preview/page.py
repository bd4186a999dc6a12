"""Write the first batches of a run as one self-contained HTML page: no script, and nothing is fetched."""

import os
from datetime import datetime

from llava_lite import __version__
from llava_lite.data.check.report import number
from llava_lite.output_file import write_output
from llava_lite.train.monitor.report.html import Html, details, document, facts, image, join, section, tag
from llava_lite.train.monitor.report.style import CSS
from llava_lite.train.preview.pixels import ShownImage
from llava_lite.train.preview.read import ShownBatch, ShownRecord
from llava_lite.train.preview.style import BATCH_CSS
from llava_lite.train.preview.tokens import Piece

# Smaller images are enlarged without smoothing.
EXACT_BELOW_PX = 128
LINE_BREAK = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n"


def write_page(path: str | os.PathLike, run, batches: list[ShownBatch]) -> None:
    """Write the page of the batches of a DryRun; see write_output."""
    write_output(path, to_page(run, batches), "batches.html")


def to_page(run, batches: list[ShownBatch]) -> str:
    """Return the page."""
    made = f"Made by llava-lite {__version__} on {datetime.now():%Y-%m-%d %H:%M}: llava-lite check --show."
    parts = [
        tag("h1", "First batches"),
        tag("p", ", ".join(map(os.path.basename, run.data_args.data_path)), class_="sub"),
        tag("dl", *(_figure(*one) for one in _figures(batches)), class_="figures"),
        section("How to read it", *_legend(), _settings(run)),
        *(section(f"Batch {k}", *_batch(batch)) for k, batch in enumerate(batches, 1)),
        tag("footer", made),
    ]
    return document("First batches of a training run", tag("main", *parts), CSS + BATCH_CSS)


def _figure(name: str, value: str, more: str = "") -> Html:
    return tag("div", tag("dt", name), tag("dd", value, tag("small", more) if more else None))


def _figures(batches: list[ShownBatch]) -> list[tuple[str, ...]]:
    tokens, padding = sum(batch.num_tokens for batch in batches), sum(batch.num_padding for batch in batches)
    supervised, of_images = (sum(batch[k] for batch in batches) for k in (5, 4))
    return [
        ("batches", f"{len(batches):,}"),
        ("records", f"{sum(len(batch.records) for batch in batches):,}"),
        ("tokens", f"{tokens:,}", "without padding"),
        ("supervised", f"{supervised:,}", _percent(supervised, tokens)),
        ("image tokens", f"{of_images:,}", _percent(of_images, tokens)),
        ("padding", f"{padding:,}", f"{padding / max(1, tokens + padding):.1%} of what is computed"),
    ]


def _percent(part: int, total: int) -> str:
    return f"{part / max(1, total):.1%} of the tokens"


def _legend() -> list[Html]:
    marks = [
        ("supervised", "a token of which the loss is taken"),
        ("text", "a token that is read only"),
        ("image", "the tokens of an image"),
        ("cut", "cut off by --model_max_length"),
    ]
    samples = [tag("li", tag("span", name, class_=f"piece {name}"), " ", words) for name, words in marks]
    order = (
        "These are the batches that one process trains on first, in this order. Where the order is random, rank r of "
        "n (from 0) takes the batches r + 1, r + 1 + n, ... of this list. Images are as the tower gets them, after "
        "crop, padding and resize."
    )
    return [tag("ul", *samples, class_="marks"), tag("p", order, class_="note")]


def _settings(run) -> Html:
    args, layout = run.training_args, run.layout
    images = None
    if layout is not None:
        images = f"{layout.aspect_ratio}, {'up to ' if layout.is_anyres else ''}{layout.most_tokens:,} tokens an image"
    return facts(
        [
            ("model", run.model_args.model_name_or_path),
            ("template", run.model_args.version),
            ("images", images),
            ("longest sequence", f"{args.model_max_length:,} tokens"),
            ("batch", "1 pack" if args.packing == "tokens" else number(args.per_device_train_batch_size, "record")),
            ("packing", f"tokens, {args.packing_tokens:,} a pack" if args.packing == "tokens" else args.packing),
            ("seed", str(args.seed if args.data_seed is None else args.data_seed)),
        ]
    )


def _batch(batch: ShownBatch) -> list[Html]:
    rows, columns = batch.shape
    counts = [
        f"{rows} x {columns:,} ids",
        f"{batch.num_tokens:,} tokens",
        f"{batch.num_supervised:,} supervised",
        f"{batch.num_image_tokens:,} image tokens",
        f"{batch.num_padding:,} padding",
    ]
    width = columns if rows > 1 else None
    return [tag("p", " · ".join(counts), class_="note"), *(_record(record, width) for record in batch.records)]


def _record(record: ShownRecord, width: int | None) -> Html:
    """Return a record. width: tokens of its padded row, None where there is no padding."""
    counts = [f"{record.num_tokens:,} tokens", f"{record.num_supervised:,} supervised"]
    counts += [f"{record.num_image_tokens:,} image tokens"] if record.num_image_tokens else []
    counts += [f"{record.num_cut:,} cut off"] if record.num_cut else []
    where = f"{os.path.basename(record.file)}[{record.place}]"
    padding = width - record.num_tokens if width is not None else 0
    body = [_piece(piece) for piece in record.pieces]
    body += [tag("span", _block(f"{record.num_cut:,} tokens cut off"), class_="piece cut")] if record.num_cut else []
    body += [tag("span", _block(f"{padding:,} padding"), class_="piece padding")] if padding else []
    return tag(
        "article",
        tag("h3", record.id, tag("span", where, title=record.file, class_="where")),
        tag("p", " · ".join(counts), class_="note"),
        tag("p", record.problem, class_="problem") if record.problem else None,
        tag("div", *(_image(one) for one in record.images), class_="images") if record.images else None,
        tag("div", *body, class_="tokens"),
        details("what is cut off", tag("div", *map(_cut, record.cut), class_="tokens")) if record.num_cut else None,
        class_="record",
    )


def _block(words: str) -> Html:
    return tag("b", words)


def _piece(piece: Piece, kind: str | None = None) -> Html:
    if piece.kind == "image":
        return tag("span", _block(f"image, {piece.count:,} tokens"), class_="piece image")
    shown = piece.text.replace("\n", LINE_BREAK)
    return tag("span", shown, class_=f"piece {kind or piece.kind}", title=f"{piece.count:,} tokens")


def _cut(piece: Piece) -> Html:
    return _piece(piece, "cut")


def _image(shown: ShownImage) -> Html:
    width, height = shown.size
    first, *tiles = shown.crops or [None]
    named = f"{width} x {height} pixels"
    words = [named, f"{shown.num_tokens:,} tokens"]
    if shown.crops:
        words.append(f"{len(shown.crops)} crops" if tiles else "1 crop")
        words[-1] += f" of {shown.pixels[0]} x {shown.pixels[1]}"
    words += [shown.note] if shown.note else []
    return tag(
        "figure",
        tag(
            "div",
            image(first, f"image of {named}") if first else None,
            tag("div", *(image(tile, "tile") for tile in tiles), class_="tiles", style=f"--columns: {shown.columns}")
            if tiles
            else None,
            class_="crops exact" if max(shown.pixels) < EXACT_BELOW_PX else "crops",
        ),
        tag("figcaption", join(*words, by=" · ")),
        class_="shown",
    )
