"""Read the files of benchmarks: JSON, lines of JSON, LLaVA's question files, and tables of Hugging Face."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from llava_lite.eval.questions import Question


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; ValueError with its path for a broken one."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error


def read_lines(path: Path, keys: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Return the objects of a file with one JSON object a line; ValueError with the line of one without `keys`."""
    found = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is no JSON object: {error}") from error
            if not isinstance(item, dict) or any(key not in item for key in keys):
                found_keys = f"the keys {', '.join(item)}" if isinstance(item, dict) else f"a {type(item).__name__}"
                raise ValueError(
                    f"{path}, line {number} holds {found_keys}; expected {', '.join(keys) or 'an object'}."
                )
            found.append(item)
    return found


def read_questions(path: Path, images: Path) -> Iterator[tuple[dict[str, Any], Question]]:
    """Yield the lines of LLaVA's question file `{question_id, image, text, category}`, each with its question.

    images: the directory of the images. Raises ValueError with the line's number for a line without id, text or image.
    """
    for item in read_lines(path, ("question_id", "text", "image")):
        if not isinstance(item["text"], str) or not isinstance(item["image"], str) or not item["image"]:
            raise ValueError(
                f"{path}: question {item['question_id']!r} has the text {item['text']!r} and the image "
                f"{item['image']!r}; expected a text and the name of an image."
            )
        shown = (str(images / item["image"]),)
        yield item, Question(item["question_id"], item["text"], shown, item.get("category", "default"))


def look_up(truths: Mapping, key, path: Path, truth_path: Path):
    """Return truths[key]; ValueError naming both files where a question of `path` has no truth in `truth_path`."""
    if key not in truths:
        raise ValueError(
            f"{path}: question {key!r} is not in {truth_path}. Both files must be of one release of the benchmark."
        )
    return truths[key]


def check_same(question: Question, texts: Iterable[Any], path: Path, truth_path: Path) -> Question:
    """Return a question of `path`; ValueError if its text lacks one of those that `truth_path` holds under its id.

    Letters and digits are compared, as files of one release differ in spaces. An id may be that of another question.
    """
    asked = _bare(question.text)
    for text in texts:
        if _bare(text) not in asked:
            raise ValueError(
                f"{path}: question {question.id!r} is {question.text!r}, and {truth_path} has {text!r} under that id. "
                "Both files must be of one release of the benchmark."
            )
    return question


def check_same_image(question: Question, name: str, path: Path, truth_path: Path) -> Question:
    """Return a question of `path`; ValueError if its image is not the one of `truth_path`, whatever its ending."""
    found = Path(question.images[0]).name
    if Path(found).stem != Path(name).stem:
        raise ValueError(
            f"{path}: question {question.id!r} is about {found}, and {truth_path} has {name} under that id. Both "
            "files must be of one release of the benchmark."
        )
    return question


def _bare(text: Any) -> str:
    return "".join(filter(str.isalnum, str(text).casefold()))


def check_asked(asked: Iterable, expected: Iterable, path: Path, truth_path: Path) -> None:
    """Raise ValueError if `path` lacks questions of `truth_path` or repeats some: the score would be another one."""
    asked = check_no_repeats(asked, path)
    missing = [key for key in expected if key not in asked]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing):,} questions of {truth_path}, such as {missing[0]!r}. Both files must be of "
            "one release of the benchmark; name a file of fewer questions with --questions."
        )


def check_no_repeats(asked: Iterable, path: Path) -> set:
    """Return the keys of the questions of a file; ValueError with the first that stands there twice."""
    seen = set()
    for key in asked:
        if key in seen:
            raise ValueError(f"{path} has the question {key!r} twice, which would count twice. Leave one out.")
        seen.add(key)
    return seen


def find_tables(directory: Path) -> list[Path]:
    """Return the parquet files of a hub repository: in its directory, or in one inside."""
    return sorted([*directory.glob("*.parquet"), *directory.glob("*/*.parquet")])


def has_tables(directory: Path) -> bool:
    """Return whether a directory holds tables of Hugging Face: parquet files, or a data set that was saved to disk."""
    return bool(find_tables(directory)) or (directory / "dataset_dict.json").is_file()


def open_table(directory: Path, split: str, config: str | None = None, columns: Iterable[str] = ()):
    """Return the rows of a split as a `datasets.Dataset` whose images are not decoded.

    directory: of a clone of a hub repository, where files are named SPLIT-00000-of-00001.parquet and may lie in a
    directory of their config; or one that `save_to_disk` wrote. columns: those that the table must have. Raises
    FileNotFoundError with the splits that are there, ValueError with the columns.
    """
    try:
        from datasets import Dataset, Image, List, load_dataset, load_from_disk
    except ImportError as error:
        raise ImportError(
            f"{directory} holds tables of Hugging Face, which datasets reads: pip install datasets."
        ) from error

    if (directory / "dataset_dict.json").is_file():
        found = load_from_disk(str(directory))
        if split not in found:
            raise FileNotFoundError(f"{directory} has no split {split!r}; it has {', '.join(found)}.")
        rows: Dataset = found[split]
    else:
        files = find_tables(directory)
        inside = [path for path in files if config is None or config in (path.parent.name, path.parent.parent.name)]
        chosen = [str(path) for path in inside if path.stem == split or path.stem.startswith(f"{split}-")]
        if not chosen:
            names = sorted({path.relative_to(directory).as_posix() for path in files})[:20]
            wanted = f"{config}/{split}" if config else split
            raise FileNotFoundError(f"{directory} has no table of {wanted}; it has {', '.join(names) or 'none'}.")
        rows = load_dataset("parquet", data_files={split: chosen}, split=split)
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"{directory}: the table of {split} has no column {', '.join(missing)}; it has "
            f"{', '.join(rows.column_names)}. It may be that of another benchmark."
        )
    for name, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            rows = rows.cast_column(name, List(Image(decode=False)))
    return rows


def plain_rows(rows) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the values of each row of a table, without its images, which are not read."""
    from datasets import Image

    images = [
        name
        for name, feature in rows.features.items()
        if isinstance(feature, Image) or isinstance(getattr(feature, "feature", None), Image)
    ]
    yield from enumerate(rows.remove_columns(images))


def stored_image(rows, index: int, column: str, number: int | None = None) -> partial:
    """Return a function that reads an image of a table when it is called: the bytes of its file.

    number: which one of a list of images; without it the middle one, which LLaVA shows of a video.
    """
    return partial(_read_image, rows, index, column, number)


def shared_images(rows, column: str, key: str) -> Callable[[int, Mapping[str, Any]], partial]:
    """Return a function: number of a row, row -> its `stored_image`, the same one for rows that `key` gives one image.

    key: a column that names the image; without it in the table, each row has an image of its own.
    """
    known: dict[Any, partial] = {}
    return lambda index, row: known.setdefault(str(row.get(key, index)), stored_image(rows, index, column))


def _read_image(rows, index, column, number):
    value = rows[index][column]
    if isinstance(value, list):
        number = len(value) // 2 if number is None else number
        value = value[number] if number < len(value) else None
    if value is None:
        raise ValueError(f"row {index} has no image in the column {column!r}.")
    return value["bytes"] if value.get("bytes") is not None else value["path"]


def write_text(path: Path, text: str) -> Path:
    """Write a text, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # JSON's own way of writing half of a pair of characters, which an answer may hold.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def write_json(path: Path, value) -> Path:
    """Write JSON, and return the path."""
    return write_text(path, json.dumps(value, ensure_ascii=False) + "\n")
