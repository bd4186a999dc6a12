"""Note SIGTERM, SIGINT and SIGHUP while a run trains, so that it saves instead of dying of them."""

import atexit
import logging
import os
import signal
import threading
import time

from llava_lite.distributed.processes import end_children

logger = logging.getLogger(__name__)

# What a scheduler, Ctrl-C and a closed terminal send.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
# As a shell reports a process that SIGINT ended: 128 + 2.
EXIT_INTERRUPTED = 130
# A launcher may pass on what the terminal has sent to its ranks already: within this time it is the same Ctrl-C.
SAME_SIGNAL_S = 0.5
# Python's word for no descriptor.
_NO_WAKEUP = -1


class SignalWatch:
    """Listens to SIGNALS in the main thread of a process.

    Those that it ignores already stay ignored: SIGHUP under nohup, SIGINT in the background of a shell.
    A second SIGINT ends the process at once, wherever it is.
    """

    def __init__(self):
        self._first, self._handlers, self._pipe, self._interrupted_s = 0, {}, None, None

    @property
    def number(self) -> int:
        """The number of the first signal that has come since `listen`, 0 if none has."""
        if not self._first and self._handlers:
            # Blocked here, and not yet taken by another thread.
            self._first = int(min(signal.sigpending() & set(self._handlers), default=0))
        return self._first

    def listen(self) -> None:
        """Note the signals from here on; nothing happens in a thread other than the main one.

        Launchers and schedulers send them to the process tree. Loader workers inherit that they are blocked, so none
        dies of one and takes the rank along before it could save; a handler set in a worker would come too late for
        one that is just starting. Threads that were there before do not block them: for those there is the handler.
        """
        if self._handlers or threading.current_thread() is not threading.main_thread():
            return
        self._first, self._interrupted_s = 0, None
        taken = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, self._handle) for number in taken}
        signal.pthread_sigmask(signal.SIG_BLOCK, taken)
        # Python would wait at exit for a worker that is left.
        atexit.unregister(end_children)
        atexit.register(end_children, os.getpid())
        self._start_watching()

    def _start_watching(self) -> None:
        """Start a thread that sees each signal even while the main one waits inside a library, as in a collective."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        other = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        if other != _NO_WAKEUP:
            # An event loop of the caller needs it: the handler alone has to do.
            signal.set_wakeup_fd(other)
            os.close(reader)
            os.close(writer)
            return
        self._pipe = writer
        threading.Thread(target=self._watch, args=(reader, tuple(self._handlers)), name="signals", daemon=True).start()

    def _watch(self, reader: int, taken: tuple) -> None:
        """Note the signals until the pipe is closed; in a thread of its own, which is there to receive them."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, taken)
        with open(reader, "rb", buffering=0) as pipe:
            while numbers := pipe.read(64):
                for number in numbers:
                    if number in taken:
                        self._note(number)

    def _handle(self, number, frame) -> None:
        if self._pipe is None:
            self._note(number)
        else:
            # The thread counts them; this one may be late.
            self._first = self._first or number

    def _note(self, number: int) -> None:
        now_s = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted_s is not None and now_s - self._interrupted_s > SAME_SIGNAL_S:
                end_at_once()
            if self._interrupted_s is None:
                self._interrupted_s = now_s
                logger.info("SIGINT: a checkpoint is written after this step. A second one ends the run without it.")
        self._first = self._first or number

    def hand_back(self, forget: bool = False) -> None:
        """Give the signals back to their former handlers; forget: drop those that have come and are not noted."""
        if not self._handlers:
            return
        taken, self._handlers = self._handlers, {}
        if self._pipe is not None:
            signal.set_wakeup_fd(_NO_WAKEUP)
            os.close(self._pipe)
            self._pipe = None
        while forget and signal.sigtimedwait(taken, 0) is not None:
            pass
        for number, handler in taken.items():
            # None: it was not set from Python, and cannot be set again from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, taken)


def end_at_once() -> None:
    """End this process with code 130 and a line that says so; nothing is saved and no handler of the exit runs."""
    # Not sys.stderr: the main thread may have been stopped inside it.
    os.write(2, b"llava-lite train: SIGINT again: the run ends at once, and nothing more is saved.\n")
    os._exit(EXIT_INTERRUPTED)
