"""Work that may take long, beside the thread that answers the page: progress, cancelling, results brought back safely.

A kernel handles one message of the page at a time, so that a computation inside a callback would keep a click on
"Cancel" waiting until there is nothing left to cancel.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Iterator

from torch import nn

GRACE = 0.25  # seconds that a page waits for a result before it is told that work goes on
EVERY = 0.2  # seconds between two reports of progress


class Cancelled(Exception):
    """Raised inside a piece of work that is to stop."""


class Job:
    """One piece of work: what it tells of itself, and the means to stop it.

    ``outcome`` is its result or the exception that ended it; ``doing, done, total`` say how far it is.
    """

    def __init__(self, work: Callable[[Job], object], finish: Callable[[object], None], tell: Callable[[Job], None]):
        self.outcome: object = None
        self.doing, self.done, self.total, self.began = "", 0, 0, time.monotonic()
        self._work, self._finish, self._tell = work, finish, tell
        self._told = 0.0
        self._stop, self._ended, self._lock, self._settled = (
            threading.Event(),
            threading.Event(),
            threading.Lock(),
            False,
        )
        self._context = contextvars.copy_context()
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:  # a script or a test: nothing else goes on there, and who starts the job waits for it
            self._loop = None

    # ---- for the work itself ----
    def stage(self, doing: str) -> None:
        """Say what comes now. Raises Cancelled where the job is to stop."""
        self.doing, self.began = doing, time.monotonic()
        self.step(0, 0)

    def step(self, done: int, total: int) -> None:
        """``done`` of ``total`` parts are there. Raises Cancelled where the job is to stop."""
        self.done, self.total = done, total
        self.check()
        if time.monotonic() - self._told > EVERY:
            self._told = time.monotonic()
            self._later(lambda: None if self._ended.is_set() else self._tell(self))

    def check(self) -> None:
        """Raises Cancelled where the job is to stop."""
        if self._stop.is_set():
            raise Cancelled

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Within it, a network stops before its next layer when the job is to: a tile may take a minute."""
        own = threading.get_ident()  # the same network may be at work for someone else

        def hook(*_: object) -> None:
            if threading.get_ident() == own:
                self.check()

        handles = [module.register_forward_pre_hook(hook) for module in model.modules()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # ---- for who started it ----
    def progress(self) -> str:
        """How far it is, in words."""
        if not self.done:
            return f"{self.doing} …"
        left = (time.monotonic() - self.began) * (self.total - self.done) / self.done
        return f"{self.doing}: {self.done} of {self.total}, about {left:.0f} s left"

    def cancel(self) -> None:
        """Ask the work to stop."""
        self._stop.set()

    def wait(self) -> None:
        """Until the result is there and taken over; Ctrl-C cancels."""
        try:
            self._ended.wait()
        except KeyboardInterrupt:
            self.cancel()
            raise
        self.settle()

    def settle(self) -> None:
        """Hand the outcome over, once."""
        with self._lock:
            if self._settled:
                return
            self._settled = True
        self._finish(self.outcome)

    def run(self, before: Job | None) -> None:
        """Work, after ``before`` has ended: two at once would only take each other's cores."""
        if before is not None:
            before._ended.wait()
        try:
            self.check()
            self.outcome = self._work(self)
        except Exception as error:  # whatever it is, the page has to be told
            self.outcome = error
        self._ended.set()
        self._later(self.settle)

    def _later(self, call: Callable[[], None]) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the kernel is shutting down
                self._loop.call_soon_threadsafe(call, context=self._context)


class Worker:
    """Runs one job at a time on a thread; a new one takes the place of the one at work.

    ``tell(job)`` is called every now and then while a job is at work. Both it and ``finish`` are called by the thread
    that started the job, when it is free.
    """

    def __init__(self, tell: Callable[[Job], None]):
        self._tell, self.job = tell, None

    def start(self, work: Callable[[Job], object], finish: Callable[[object], None]) -> None:
        """Call ``work(job)`` on another thread, then ``finish`` with its result or with the exception it ended in.

        Moved by code, this returns when all is done; moved by the reader's hand, it returns at once or nearly so.
        """
        before = self.job
        if before is not None:
            before.cancel()

        def taken(outcome: object) -> None:
            if self.job is job:  # else a newer one has been started meanwhile
                self.job = None
                finish(outcome)

        self.job = job = Job(work, taken, self._tell)
        threading.Thread(target=job.run, args=(before,), daemon=True).start()
        if job._loop is None or not by_hand():
            job.wait()
        elif job._ended.wait(GRACE):
            job.settle()
        else:
            self._tell(job)

    def cancel(self) -> None:
        """Stop the job at work, if there is one; ``finish`` gets Cancelled."""
        if self.job is not None:
            self.job.cancel()

    def wait(self) -> None:
        """Until no job is at work."""
        while (job := self.job) is not None:
            job.wait()


def by_hand() -> bool:
    """Is a message of the page being handled, and not a cell run?"""
    from IPython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    parent = kernel.get_parent("shell") if hasattr(kernel, "get_parent") else {}
    return parent.get("header", {}).get("msg_type") == "comm_msg"
