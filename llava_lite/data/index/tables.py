"""Measure records once and keep the numbers in tables on disk: token counts, image sizes.

Only unknown records are measured. A record that cannot be measured stays unknown, so a corrected one is measured at
the next start. Letters: M records of a file, S slots of a table, C columns.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llava_lite.data.index.cache import load_array, load_undamaged, locked, save_array

CHUNK_RECORDS = 512
# Start of a worker process on a busy machine: imports, and the load of a tokenizer.
POOL_START_S = 12.0


class Measured(NamedTuple):
    """The result of a measure for some records: a row of numbers each, or the reason why there is none."""

    positions: list[int]
    rows: list[tuple[int, ...]]
    problems: list[tuple[int, ValueError]]


def _measure_chunk(file: Sequence, positions: list[int], measure: Callable) -> Measured:
    measured = Measured([], [], [])
    for position in positions:
        try:
            row = measure(file[position])
        except ValueError as error:
            measured.problems.append((position, error))
        else:
            measured.positions.append(position)
            measured.rows.append(row)
    return measured


def measure_records(
    file: Sequence,
    positions: np.ndarray,
    measure: Callable[..., tuple[int, ...]],
    purpose: str,
    num_workers: int = 0,
    num_threads: int = 0,
) -> Iterator[Measured]:
    """Yield the result of `measure` for the records at `positions` [n], in order and in chunks, with a progress bar.

    num_workers: processes, for CPU work; `measure` must pickle. They are started only if the work takes longer than
    their start. num_threads: for waiting on a disk. A ValueError of `measure` is the reason for that record.
    """
    from tqdm import tqdm

    pieces = [positions[i : i + CHUNK_RECORDS].tolist() for i in range(0, len(positions), CHUNK_RECORDS)]
    with tqdm(total=len(positions), desc=purpose, unit=" records", disable=len(pieces) < 2) as bar:
        for measured in _run(file, pieces, measure, num_workers, num_threads):
            bar.update(len(measured.positions) + len(measured.problems))
            yield measured


class _Worker:
    """The arguments of a worker process, sent once at its start: a tokenizer is too large for every chunk."""

    file: Sequence
    measure: Callable

    @classmethod
    def start(cls, file, measure):
        cls.file, cls.measure = file, staticmethod(measure)

    @classmethod
    def work(cls, piece) -> Measured:
        return _measure_chunk(cls.file, piece, cls.measure)


def _run(file, pieces, measure, num_workers, num_threads) -> Iterator[Measured]:
    alone = (_measure_chunk(file, piece, measure) for piece in pieces)
    if len(pieces) > 1 and num_workers > 0:
        start_s, left = time.monotonic(), len(pieces)
        for measured in alone:
            yield measured
            left -= 1
            rest_s = left * (time.monotonic() - start_s) / (len(pieces) - left)
            # The processes must save more time than their start takes.
            if left > 1 and rest_s * (1 - 1 / min(num_workers, left)) > POOL_START_S:
                break
        # Not forked: the parent may have threads of the tokenizer, of torch or of a device.
        if left:
            count, context = min(num_workers, left), get_context("spawn")
            pool = ProcessPoolExecutor(count, mp_context=context, initializer=_Worker.start, initargs=(file, measure))
            yield from _run_in(pool, _Worker.work, pieces[-left:], 4 * count)
    elif len(pieces) > 1 and num_threads > 0:
        pool = ThreadPoolExecutor(num_threads)
        yield from _run_in(pool, lambda piece: _measure_chunk(file, piece, measure), pieces, 4 * num_threads)
    else:
        yield from alone


def _run_in(pool: Executor, work: Callable, pieces, max_waiting: int) -> Iterator[Measured]:
    """Yield results in order; at most `max_waiting` chunks are submitted ahead."""
    waiting = deque()
    try:
        for piece in pieces:
            waiting.append(pool.submit(work, piece))
            if len(waiting) > max_waiting:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def get_slots(starts: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return the slots of the records at `positions` [n], in their order; record p has starts[p] to starts[p + 1]."""
    first, count = starts[positions], starts[positions + 1] - starts[positions]
    before = np.cumsum(count) - count
    return np.repeat(first - before, count) + np.arange(count.sum())


class Facts:
    """A table [S, C] of whole numbers of one file, -1 for unknown.

    starts: [M + 1], record p has the slots starts[p] to starts[p + 1]; by default one each.
    """

    def __init__(self, path: Path, num_columns: int, starts: np.ndarray):
        self.path = path
        self.num_columns = num_columns
        self.starts = starts

    def rows(self) -> np.ndarray:
        """Return the table [S, C], memory-mapped if it exists; DamagedArray if it is damaged."""
        return self._of_my_shape(load_array(self.path))

    def known_rows(self) -> np.ndarray:
        """Return the table [S, C] for whoever measures what is unknown, which in a damaged table is everything."""
        return self._of_my_shape(load_undamaged(self.path))

    def _of_my_shape(self, rows: np.ndarray | None) -> np.ndarray:
        shape = (int(self.starts[-1]), self.num_columns)
        return rows if rows is not None and rows.shape == shape else np.full(shape, -1, np.int32)

    def unknown(self, positions: np.ndarray) -> np.ndarray:
        """Return those of `positions` [n] whose slots are unknown."""
        positions = positions[self.starts[positions + 1] > self.starts[positions]]
        return positions[self.known_rows()[self.starts[positions], 0] < 0]

    def complete(self, file: Sequence, positions: np.ndarray, measure, purpose: str, **pool) -> dict[int, ValueError]:
        """Measure the unknown records at `positions` [n]; return the reason for each that cannot be measured.

        measure: record -> the numbers of its slots, one after another. pool: see measure_records. One process works
        while others wait; if it is stopped, the results so far are kept.
        """
        if not len(self.unknown(positions)):
            return {}
        with locked(self.path, purpose):
            return self._measure(file, self.unknown(positions), measure, purpose, **pool)

    def renew(self, file: Sequence, positions: np.ndarray, measure, purpose: str, **pool) -> dict[int, ValueError]:
        """Measure the records at `positions` [n] again; return like `complete`. One that fails keeps its numbers."""
        if not len(positions):
            return {}
        with locked(self.path, purpose):
            return self._measure(file, positions, measure, purpose, **pool)

    def _measure(self, file, positions, measure, purpose, **pool) -> dict[int, ValueError]:
        problems, rows = {}, np.array(self.known_rows())
        try:
            for measured in measure_records(file, positions, measure, purpose, **pool):
                problems.update(measured.problems)
                if measured.rows:
                    numbers = np.fromiter(chain.from_iterable(measured.rows), np.int32)
                    rows[get_slots(self.starts, np.array(measured.positions))] = numbers.reshape(-1, self.num_columns)
        finally:
            if len(problems) < len(positions):
                save_array(self.path, rows)
        return problems
