"""Write shards of toy captions and conversations: WebDataset tar files and parquet files."""

import io
import json
import random
import tarfile

from conftest import WORDS, draw_image


def image_bytes(seed):
    """Return a PNG in bytes."""
    file = io.BytesIO()
    draw_image(seed).save(file, "PNG")
    return file.getvalue()


def caption_of(number):
    """Return a caption that names its number."""
    return f"{number} " + " ".join(random.Random(number).choices(WORDS, k=4))


def tar_files(path, files):
    """Write a tar file of (name, bytes) pairs, in their order."""
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def caption_files(number):
    """Return the two files of a caption pair."""
    key = f"{number:06d}"
    return [(f"{key}.png", image_bytes(number)), (f"{key}.txt", caption_of(number).encode())]


def conversation_of(number, num_images=1):
    """Return the conversations of a record."""
    return [
        {"from": "human", "value": "<image>\n" * num_images + "What is it?"},
        {"from": "gpt", "value": f"It is {number}."},
    ]


def write_caption_tars(directory, counts):
    """Write a shard of `count` captions each, numbered through; return the pattern that names them all."""
    directory.mkdir(parents=True, exist_ok=True)
    number = 0
    for k, count in enumerate(counts):
        tar_files(
            directory / f"{k:05d}.tar", [file for n in range(number, number + count) for file in caption_files(n)]
        )
        number += count
    return str(directory / "*.tar")


def write_parquet(path, rows, **options):
    """Write rows (dicts) as a parquet file."""
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def caption_row(number):
    """Return a caption pair as `datasets` stores it."""
    return {
        "id": f"{number:06d}",
        "image": {"bytes": image_bytes(number), "path": None},
        "caption": caption_of(number),
    }


def conversation_row(number):
    """Return a conversation as a parquet row."""
    return {
        "id": f"{number:06d}",
        "image": {"bytes": image_bytes(number), "path": None},
        "conversations": conversation_of(number),
    }


def conversation_json(number):
    """Return a conversation as the json of a tar file."""
    return json.dumps({"id": f"{number:06d}", "conversations": conversation_of(number)}).encode()
