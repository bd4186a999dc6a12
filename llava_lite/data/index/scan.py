"""Find the byte span of each record of a JSON or JSON-lines file, without parsing it or holding it in memory.

A million records of LLaVA's JSON are gigabytes as Python objects and a few megabytes as byte offsets. The scanner
looks only at quotes, backslashes and brackets, many bytes at a time.
"""

import json
import mmap
import os
from collections.abc import Iterator

import numpy as np

from llava_lite.data.errors import DataError

CHUNK_BYTES = 1 << 23
# A smaller file is read before a progress bar could appear.
BAR_BYTES = 1 << 27
BOM = b"\xef\xbb\xbf"
WHITESPACE = b" \t\r\n"

QUOTE, BACKSLASH, NEWLINE = b'"\\\n'
_STEP = np.zeros(256, np.int8)
_STEP[list(b"{[")] = 1
_STEP[list(b"}]")] = -1
# bytes.translate with this table is several times as fast as indexing an array.
_STRUCTURAL = bytes(int(byte in b'{[]}"\\') for byte in range(256))


# A file of one bracket; that a single record is nested too deeply is found when it is parsed.
DEEPEST = 1_000_000
# No record is so short: `{"image": "1.jpg", "caption": ""}` has 33 bytes. More in a part of a file end the scan.
SHORTEST_RECORD_BYTES, FEW_RECORDS = 16, 100_000


class LineError(ValueError):
    """What is wrong with a line of a table; `placed_error` adds the file and the line."""


def parse_json(data: bytes | str):
    """Return what JSON holds; ValueError with the place for what is none, or nested deeper than Python can read."""
    try:
        return json.loads(data)
    except RecursionError:
        raise json.JSONDecodeError("lists and objects are nested too deeply", "", 0) from None


def without_bom(data: bytes) -> bytes:
    """Return the first bytes of a file without a byte order mark."""
    return data.removeprefix(BOM)


def get_line(path: str, offset: int) -> tuple[int, int]:
    """Return line and column, counted from 1, of a byte of a file."""
    num_lines, last = 0, -1
    with open(path, "rb") as file:
        position = 0
        while position < offset and (chunk := file.read(min(CHUNK_BYTES, offset - position))):
            num_lines += chunk.count(b"\n")
            newline = chunk.rfind(b"\n")
            last = position + newline if newline >= 0 else last
            position += len(chunk)
    return num_lines + 1, offset - last


def syntax_error(path: str, offset: int, reason: str) -> DataError:
    """Return the error that names file, line, column and reason."""
    line, column = get_line(path, offset)
    return DataError(f"{path}, line {line}, column {column}: {reason}")


def placed_error(path: str, start: int, data: bytes, error: ValueError) -> DataError:
    """Return json's error, or a LineError, for the bytes `data`, which begin at `start`, with file and line."""
    if isinstance(error, LineError):
        return DataError(f"{path}, line {get_line(path, start)[0]}: {error}")
    if isinstance(error, UnicodeDecodeError):
        reason = f"byte 0x{data[error.start]:02x} is not UTF-8 ({error.reason})."
        return syntax_error(path, start + error.start, reason)
    position = getattr(error, "pos", 0)
    offset = start + len(data.decode("utf-8", "surrogatepass")[:position].encode("utf-8", "surrogatepass"))
    reason = getattr(error, "msg", str(error))
    if offset >= os.path.getsize(path) - 1:
        reason += " (the file ends here: is it cut short?)"
    return syntax_error(path, offset, f"not JSON: {reason}.")


def _open_checked(path: str):
    """Return the open file, after a byte order mark; DataError for UTF-16."""
    file = open(path, "rb")  # noqa: SIM115 - the caller closes it
    head = file.read(4)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\x00" in head:
        file.close()
        raise DataError(f"{path} is not UTF-8 (it starts with {head!r}). Save it as UTF-8.")
    file.seek(len(BOM) if head.startswith(BOM) else 0)
    return file


def _chunks(file) -> Iterator[tuple[int, bytes]]:
    """Yield offset and bytes of each chunk of the file; a chunk never ends between a backslash and what it escapes."""
    from tqdm import tqdm

    offset, size = file.tell(), os.fstat(file.fileno()).st_size
    name = f"indexing {os.path.basename(file.name)}"
    with tqdm(total=size, desc=name, unit="B", unit_scale=True, disable=size < BAR_BYTES) as bar:
        while chunk := file.read(CHUNK_BYTES):
            # One byte is enough: where that is a backslash too, the run is one of pairs.
            if (len(chunk) - len(chunk.rstrip(b"\\"))) % 2:
                chunk += file.read(1)
            yield offset, chunk
            offset += len(chunk)
            bar.update(len(chunk))


def _unescaped(quotes: np.ndarray, slashes: np.ndarray) -> np.ndarray:
    """Return the quotes that stand after an even number of backslashes."""
    if not len(slashes):
        return quotes
    runs = slashes[np.diff(slashes, prepend=-2) != 1]  # where each run of backslashes begins
    before = np.searchsorted(slashes, quotes) - 1
    touches = (before >= 0) & (slashes[before] == quotes - 1)
    run_len = quotes - runs[np.searchsorted(runs, quotes) - 1]
    return quotes[~(touches & (run_len % 2 == 1))]


def _levels(file) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield offsets [n] of brackets outside strings, the brackets [n], and the depth [n] after each; chunk by chunk.

    If the file ends inside a string, a last item has a bracket 0 at the end of the file.
    """
    depth, in_string, end = 0, 0, file.tell()
    for offset, chunk in _chunks(file):
        data = np.frombuffer(chunk, np.uint8)
        places = np.flatnonzero(np.frombuffer(chunk.translate(_STRUCTURAL), bool))
        kinds = data[places]
        quotes = _unescaped(places[kinds == QUOTE], places[kinds == BACKSLASH])
        brackets = places[_STEP[kinds] != 0]
        brackets = brackets[(np.searchsorted(quotes, brackets) + in_string) % 2 == 0]
        depths = depth + np.cumsum(_STEP[data[brackets]], dtype=np.int64)
        if len(depths) and depths.max() > DEEPEST:
            reason = f"lists and objects are nested more than {DEEPEST:,} deep."
            raise syntax_error(file.name, offset + int(brackets[np.argmax(depths > DEEPEST)]), reason)
        yield offset + brackets, data[brackets], depths
        depth = int(depths[-1]) if len(depths) else depth
        in_string = (in_string + len(quotes)) % 2
        end = offset + len(chunk)
    if in_string:
        yield np.array([end]), np.array([0], np.uint8), np.array([depth])


def scan_json(path: str) -> np.ndarray:
    """Return the byte spans [N, 2] of the objects in the list that a JSON file holds.

    Only the brackets of the list are checked here; each object is checked when it is parsed. A file whose first line
    is a complete object is read as JSON lines. Raises DataError with file, line and reason if the list is malformed.
    """
    with _open_checked(path) as file:
        first = _first_byte(file)
        if first == b"{" and _first_line_is_object(file):
            return scan_lines(path)
        if first != b"[":
            found = repr(first.decode("ascii", "replace")) if first else "nothing"
            raise syntax_error(path, file.tell(), f"found {found}, expected a list of records: [{{...}}, {{...}}].")
        starts, stops, ends, last = [], [], [], (0, 0)
        for places, kinds, depths in _levels(file):
            starts.append(places[(depths == 2) & (kinds == ord("{"))])
            check_lengths(path, starts[-1])
            stops.append(places[(depths == 1) & (kinds == ord("}"))] + 1)
            ends.append(places[depths <= 0])
            last = (int(places[-1]), int(depths[-1])) if len(places) else last
    starts, stops, ends = (np.concatenate(parts) for parts in (starts, stops, ends))
    is_complete = last[1] == 0 and len(ends) == 1 and len(starts) == len(stops)
    _check_frame(path, starts, stops, ends, is_complete)
    return np.stack([starts, stops], axis=1)


def _first_byte(file) -> bytes:
    """Return the first byte that is not whitespace (b"" at the end of the file), and seek to it."""
    while chunk := file.read(CHUNK_BYTES):
        if rest := chunk.lstrip(WHITESPACE):
            file.seek(-len(rest), os.SEEK_CUR)
            return rest[:1]
    return b""


def _first_line_is_object(file) -> bool:
    start = file.tell()
    line = file.readline()
    file.seek(start)
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def check_lengths(path: str, starts: np.ndarray) -> None:
    """Raise DataError for many records that are all shorter than any record; starts: offsets [n], ascending."""
    if len(starts) > FEW_RECORDS and starts[-1] - starts[0] < SHORTEST_RECORD_BYTES * (len(starts) - 1):
        length = (starts[-1] - starts[0]) / (len(starts) - 1)
        raise syntax_error(
            path, int(starts[0]), f"{len(starts):,} records from here have {length:.0f} bytes each, and none is so "
            "short. Write the file again."
        )  # fmt: skip


def _check_frame(path: str, starts: np.ndarray, stops: np.ndarray, ends: np.ndarray, is_complete: bool) -> None:
    """Raise DataError unless the list closes once and holds only objects with single commas between them.

    ends: offsets where brackets close the list; is_complete: they do so once, at the end, after every record.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if not is_complete:
            raise _first_flaw(path, data, starts, stops, ends)
        end = int(ends[0])
        if data[end + 1 :].strip(WHITESPACE):
            raise syntax_error(path, end + 1, "text after the end of the list.")
        begin = data.find(b"[") + 1
        lefts, rights = [begin, *stops.tolist()], [*starts.tolist(), end]
        for position, (left, right) in enumerate(zip(lefts, rights, strict=True)):
            between = data[left:right].strip(WHITESPACE)
            if between != (b"," if 0 < position < len(starts) else b""):
                raise syntax_error(
                    path, left, f"found {between[:40].decode('utf-8', 'replace')!r} beside record {position}, "
                    "expected objects with one comma between two."
                )  # fmt: skip


def _first_flaw(path: str, data: mmap.mmap, starts: np.ndarray, stops: np.ndarray, ends: np.ndarray) -> DataError:
    """Return the error of the first record that is not JSON, which is why the brackets do not match."""
    for position, start in enumerate(starts.tolist()):
        stop = int(stops[position]) if position < len(stops) else len(data)
        part = data[start:stop]
        try:
            parse_json(part)
        except ValueError as error:
            return placed_error(path, start, part, error)
    if len(ends):
        return syntax_error(path, int(ends[0]), f"{chr(data[int(ends[0])])!r} closes the list of records too early.")
    return syntax_error(path, len(data), "the list of records does not close; is the file cut short?")


def scan_lines(path: str) -> np.ndarray:
    """Return the byte spans [N, 2] of the non-empty lines of a JSON-lines file."""
    starts, stops = [], []
    with _open_checked(path) as file:
        start = file.tell()
        for offset, chunk in _chunks(file):
            newlines = offset + np.flatnonzero(np.frombuffer(chunk, np.uint8) == NEWLINE)
            if len(newlines):
                starts.append(np.concatenate([[start], newlines[:-1] + 1]))
                check_lengths(path, starts[-1])
                stops.append(newlines)
                start = int(newlines[-1]) + 1
        size = os.path.getsize(path)
        if start < size:
            starts.append(np.array([start]))
            stops.append(np.array([size]))
        if not starts:
            return np.zeros((0, 2), np.int64)
        spans = np.stack([np.concatenate(starts), np.concatenate(stops)], axis=1).astype(np.int64)
        keep = np.ones(len(spans), bool)
        # A line shorter than the shortest record may be whitespace.
        for position in np.flatnonzero(spans[:, 1] - spans[:, 0] < 20):
            file.seek(int(spans[position, 0]))
            keep[position] = bool(file.read(int(spans[position, 1] - spans[position, 0])).strip(WHITESPACE))
    return spans[keep]
