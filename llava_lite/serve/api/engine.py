"""Answer requests of many threads with one model: a bounded queue, and one thread that owns the model.

An answer tells whoever asked by events: ("piece", text, entries of logprobs), ("end", text, reason, number of tokens)
and ("error", exception).
"""

import logging
import time
from collections import deque
from threading import Condition, Thread

from llava_lite.serve.api.answer import Answer
from llava_lite.serve.api.batch import Batch, why_alone

logger = logging.getLogger(__name__)


class QueueFull(Exception):
    """There is no place for so many answers; how many wait, and how many may."""

    def __init__(self, num_asked: int, num_waiting: int, max_waiting: int):
        places = f"{num_waiting} of the {max_waiting} places in the queue are taken"
        super().__init__(f"{places}; there is none for {num_asked} more. Try again later.")


class Engine:
    """A model that answers for many.

    max_batch: answers that are generated side by side. max_waiting: answers that may wait for a place among them,
    those included whose images are still being read. is_exact: as in Batch. metrics: a Metrics.
    """

    def __init__(self, model, processor, metrics, max_batch: int = 32, max_waiting: int = 128, is_exact: bool = True):
        self.model, self.processor, self.metrics = model, processor, metrics
        self.max_batch, self.max_waiting, self.is_exact = max_batch, max_waiting, is_exact
        self.why_alone = why_alone(model)
        self._batch = Batch(model, processor.pad_token_id, is_exact)
        self._waiting: deque[tuple[Answer, float]] = deque()
        self._num_reserved, self._num_running, self._is_closing = 0, 0, False
        self._changed = Condition()
        self._thread = Thread(target=self._work, name="engine", daemon=True)
        metrics.watch(self)

    @property
    def num_waiting(self) -> int:
        """Answers that have a place in the queue, or reserved one."""
        return self._num_reserved + len(self._waiting)

    @property
    def num_running(self) -> int:
        """Answers that are being generated."""
        return self._num_running

    @property
    def is_alive(self) -> bool:
        """Whether the thread of the model runs."""
        return self._thread.is_alive()

    def start(self) -> "Engine":
        """Start the thread; return the engine."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop after the running step; answers that are not finished get an error."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()

    def check_room(self, num_answers: int) -> None:
        """Raise QueueFull if there are too few places in the queue."""
        if self.num_waiting + num_answers > self.max_waiting:
            raise QueueFull(num_answers, self.num_waiting, self.max_waiting)

    def reserve(self, num_answers: int) -> None:
        """Reserve places in the queue for answers that are being prepared; QueueFull if there are too few."""
        with self._changed:
            self.check_room(num_answers)
            self._num_reserved += num_answers

    def release(self, num_answers: int) -> None:
        """Give reserved places back."""
        with self._changed:
            self._num_reserved -= num_answers

    def submit(self, answers: list[Answer]) -> None:
        """Queue answers for which places were reserved."""
        with self._changed:
            self._num_reserved -= len(answers)
            self._waiting.extend((answer, time.monotonic()) for answer in answers)
            self._changed.notify_all()

    def leave(self, answers: list[Answer]) -> None:
        """Give up answers that nobody waits for: their places are free at the next step."""
        with self._changed:
            for answer in answers:
                answer.is_left = True
            self._waiting = deque(entry for entry in self._waiting if not entry[0].is_left)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._num_running = len(self._batch.answers)
                while not (self._waiting or self._batch.answers or self._is_closing):
                    self._changed.wait()
                if self._is_closing:
                    break
            self._admit()
            if self._batch.answers:
                self._run()
        left = [*self._batch.clear(), *(answer for answer, _ in self._waiting)]
        self._fail(left, ConnectionAbortedError("the server is stopping."))

    def _admit(self) -> None:
        """Read the prompts of those who wait, while there are places in the batch."""
        while (answer := self._next()) is not None:
            try:
                if self.why_alone is None:
                    self._batch.read(answer)
                else:
                    self._batch.run_alone(answer)
            # Whatever goes wrong with one answer, the others go on.
            except Exception as error:
                self._fail([answer], error)

    def _next(self) -> Answer | None:
        with self._changed:
            self._num_running = len(self._batch.answers)
            if self._is_closing or not self._waiting or self._num_running >= self.max_batch:
                return None
            answer, since = self._waiting.popleft()
            self._num_running += 1
        self.metrics.queue_seconds.observe(time.monotonic() - since)
        return answer

    def _run(self) -> None:
        """Generate until an answer ends or another one may join; then generate doubtful answers alone."""
        try:
            self._batch.run(self._goes_on, self.metrics.batch_size.observe)
        except Exception as error:
            self._fail(self._batch.clear(), error)
        while self._batch.doubtful:
            answer = self._batch.doubtful.pop(0)
            self.metrics.answers_again.inc()
            try:
                self._batch.run_alone(answer)
            except Exception as error:
                self._fail([answer], error)

    def _goes_on(self) -> bool:
        has_place = len(self._batch.answers) < self.max_batch
        return not (self._is_closing or (self._waiting and has_place))

    def _fail(self, answers: list[Answer], error: Exception) -> None:
        if not isinstance(error, ConnectionAbortedError):
            logger.error("%d answers failed.", len(answers), exc_info=error)
        for answer in answers:
            answer.send(("error", error))
