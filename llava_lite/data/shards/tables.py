"""Read raw records from any row of a parquet file, or of an Arrow file of `datasets`."""

from collections.abc import Iterator

from llava_lite.data.errors import DataError
from llava_lite.data.records.formats import ANSWER_KEYS, CAPTION_KEYS, CONVERSATION_KEYS
from llava_lite.data.records.keys import (
    IMAGE_KEYS,
    MEDIA_KEYS,
    NOT_READ,
    PREFERENCE_KEYS,
    SYSTEM_KEYS,
    WEIGHT_KEYS,
    named_media,
    sound_keys,
)
from llava_lite.data.shards.files import START, Place, RawRecord, Shard, open_shard

BATCH_ROWS = 16
IMAGE_COLUMNS = (*IMAGE_KEYS, "jpg", "jpeg", "png", "webp")
ID_COLUMNS = ("id", "key", "__key__")
# A row needs all columns of one of these sets; some sets are read only by a conversion.
CONTENTS = (
    *({key} for key in (*CONVERSATION_KEYS, "texts", "text_list", *PREFERENCE_KEYS)),
    {"prompt", "completion"},
    {"instruction", "output"},
    {"query", "response"},
    *({"question", key} for key in ANSWER_KEYS),
)
CAPTIONS = {*CAPTION_KEYS, "captions", "sentences"}
# Only these columns are read, and those that may hold media; embeddings, for example, are not.
READ_COLUMNS = {*IMAGE_COLUMNS, *CAPTIONS, *ID_COLUMNS, *NOT_READ, *SYSTEM_KEYS, "label", "image_info"}
# To be refused: shards have images alone.
READ_COLUMNS |= {*MEDIA_KEYS, *WEIGHT_KEYS}
READ_COLUMNS = READ_COLUMNS.union(*CONTENTS)


def read_parquet(shard: Shard, place: Place = START, part: int = 0, num_parts: int = 1) -> Iterator[RawRecord]:
    """Yield the rows from `place` on with number % num_parts == part, in the order of the file."""
    import pyarrow
    from pyarrow import parquet

    try:
        with open_shard(shard.path) as file:
            table = parquet.ParquetFile(file)
            columns = get_columns(table.schema_arrow, shard.name)
            row = 0
            for group in range(table.num_row_groups):
                num_rows = table.metadata.row_group(group).num_rows
                if row + num_rows <= place.number:
                    row += num_rows
                    continue
                for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
                    for k in range(batch.num_rows):
                        if row >= place.number and row % num_parts == part:
                            yield _row(batch, k, row, shard.name)
                        row += 1
    except (pyarrow.ArrowException, OSError) as error:
        # Arrow raises OSError for corrupt pages too; that of a disk has an errno, that of a network its own class.
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise
        raise DataError(
            f"{shard.name}: not a parquet file, or a corrupt one ({' '.join(str(error).split())})."
        ) from None


def read_arrow(shard: Shard, place: Place = START, part: int = 0, num_parts: int = 1) -> Iterator[RawRecord]:
    """Yield the rows of an Arrow file of `datasets` like read_parquet; the file is memory-mapped."""
    import pyarrow
    from datasets import Dataset

    if "://" in shard.path:
        raise DataError(f"{shard.path}: Arrow files are read from a local disk; download the directory first.")
    try:
        rows = Dataset.from_file(shard.path)
        columns = get_columns(rows.features.arrow_schema, shard.name)
        # Not decoded: an image stays the bytes of its file.
        rows = rows.select_columns(columns).with_format("arrow")
        for start in range(place.number, len(rows), BATCH_ROWS):
            batch = rows[start : start + BATCH_ROWS]
            for k in range(batch.num_rows):
                if (start + k) % num_parts == part:
                    yield _row(batch, k, start + k, shard.name)
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{shard.name}: not an Arrow file, or a corrupt one ({' '.join(str(error).split())})."
        ) from None


def get_columns(schema, name: str) -> list[str]:
    """Return the columns to read: those with a known name, and those that may hold media under any name.

    Raises DataError with the columns of the file if its rows cannot be records.
    """
    names = set(schema.names)
    has_caption = bool(CAPTIONS & names)
    media = [field.name for field in schema if _may_hold_image(field)]
    if not any(keys <= names for keys in CONTENTS) and not (has_caption and media):
        raise DataError(
            f"{name} has the columns {', '.join(schema.names) or '(none)'}; expected conversations, or one of "
            f"{', '.join(CAPTION_KEYS)} beside one of {', '.join(IMAGE_COLUMNS)}."
        )
    # Only its values show whether a text column holds names of images.
    media += [field.name for field in schema if _holds_text(field.type)]
    return [column for column in schema.names if column in READ_COLUMNS or column in media]


def _may_hold_image(field) -> bool:
    """Return whether a column may hold images: by its name, or by its type (bytes, {"bytes", "path"})."""
    import pyarrow

    # Any text value will do here: the name decides, and numbers are never images.
    name, kind = {field.name: "x"}, _inner(field.type)
    if pyarrow.types.is_struct(kind):
        return field.name in IMAGE_KEYS or any(map(_may_hold_image, kind))
    if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
        return True
    return _holds_text(kind) and bool(field.name in IMAGE_KEYS or named_media(name) or sound_keys(name))


def _inner(kind):
    """Return the element type of nested lists, and of dictionary-encoded columns."""
    while hasattr(kind, "value_type"):
        kind = kind.value_type
    return kind


def _holds_text(kind) -> bool:
    """Return whether a type is text, or lists or objects of text."""
    import pyarrow

    kind = _inner(kind)
    if pyarrow.types.is_struct(kind):
        return any(_holds_text(field.type) for field in kind)
    return any(is_kind(kind) for is_kind in (pyarrow.types.is_string, pyarrow.types.is_large_string))


def _row(batch, k: int, row: int, name: str) -> RawRecord:
    """Return row k of a batch, which is row `row` of the file."""
    after = Place(row + 1, row + 1)
    try:
        parts = {column: batch.column(column)[k].as_py() for column in batch.schema.names}
    except UnicodeDecodeError as error:
        return RawRecord(str(row), row, {}, after, DataError(f"{name}[{row}]: a text is not UTF-8 ({error.reason})."))
    return RawRecord(_row_key(parts, row), row, parts, after)


def _row_key(parts: dict, row: int) -> str:
    return str(next((parts[name] for name in ID_COLUMNS if parts.get(name) is not None), row))
