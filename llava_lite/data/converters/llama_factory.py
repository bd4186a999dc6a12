"""Turn a data set of LLaMA-Factory's dataset_info.json into objects with the keys and roles of parse_record."""

import os
from collections.abc import Iterator

from llava_lite.data.converters.base import Options
from llava_lite.data.errors import DataError
from llava_lite.data.index.scan import parse_json, scan_json, scan_lines

# The default columns and tags of an entry.
ALPACA_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
OPENAI_TAGS = TAGS | {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
ROLES = {"user_tag": "human", "assistant_tag": "gpt", "system_tag": "system", "observation_tag": "observation"}
ROLES["function_tag"] = "function_call"


def read_llama_factory(data: dict, path: str, options: Options) -> Iterator[tuple[str, int, dict]]:
    """Yield (file, position, object) of the data set --dataset, or of the only one."""
    name = options.dataset or (next(iter(data)) if len(data) == 1 else None)
    if name not in data:
        advice = "name one with --dataset" if name is None else f"--dataset {name} is not one of them"
        raise DataError(f"{path} has {len(data)} data sets; {advice}: {', '.join(data)}.")
    entry = data[name]
    if entry.get("ranking") or entry.get("kto_tag"):
        raise DataError(f"{path}: {name!r} is preference data (ranking), which supervised training cannot use.")
    if not entry.get("file_name"):
        raise DataError(
            f"{path}: {name!r} names no file_name but a repository of the Hub; download it and convert its files."
        )
    for key in ("num_samples", "subset", "split"):
        if entry.get(key):
            options.remarks.append(f"{key} {entry[key]!r} of {name!r} is not applied")
    file = os.path.join(os.path.dirname(path), entry["file_name"])
    if not os.path.isfile(file) or not file.endswith((".json", ".jsonl")):
        raise DataError(f"{path}: the file of {name!r}, {file}, is not an existing JSON or JSONL file.")
    spans = (scan_lines if file.endswith(".jsonl") else scan_json)(file)
    with open(file, "rb") as stream:
        for position, (start, stop) in enumerate(spans.tolist()):
            stream.seek(start)
            try:
                yield file, position, renamed(parse_json(stream.read(stop - start)), entry)
            except ValueError as error:
                yield file, position, {"_reason": f"{file}[{position}]: {error}"}


def renamed(item: dict, entry: dict) -> dict:
    """Return the object with the keys and roles of parse_record, by the columns and tags of its entry."""
    columns, formatting = entry.get("columns") or {}, entry.get("formatting", "alpaca")
    found = {own: item.get(columns.get(own, own)) for own in ("images", "videos", "audios", "system", "tools")}
    found["id"] = item.get("id")
    if formatting == "alpaca":
        for own, standard in ALPACA_COLUMNS.items():
            found[standard] = item.get(columns.get(own, standard))
    elif formatting in ("sharegpt", "openai"):
        tags = (OPENAI_TAGS if formatting == "openai" else TAGS) | (entry.get("tags") or {})
        turns = item.get(columns.get("messages", "messages" if formatting == "openai" else "conversations"))
        found["conversations"] = [_turn(turn, tags) for turn in turns] if isinstance(turns, list) else turns
    else:
        raise DataError(f"the formatting {formatting!r} is unknown; known: alpaca, sharegpt, openai.")
    return {key: value for key, value in found.items() if value is not None}


def _turn(turn, tags: dict) -> dict:
    if not isinstance(turn, dict):
        return turn
    role, content = tags["role_tag"], tags["content_tag"]
    own = next((ROLES[tag] for tag in ROLES if turn.get(role) == tags[tag]), turn.get(role))
    rest = {key: value for key, value in turn.items() if key not in (role, content)}
    return {"from": own, "value": turn.get(content)} | rest
