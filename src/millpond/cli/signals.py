"""How a process is asked to stop: signals, and the end of the process that started it.

Called by `up`, `api`, `worker` and `demo`. Invariants: the first SIGINT, SIGTERM or SIGHUP asks for
an orderly end, the second ends at once; a child whose `millpond up` is gone never stays behind.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stop_event(*, on_second: Callable[[], None] | None = None) -> Iterator[asyncio.Event]:
    """Yield an event that the first signal sets; the second calls `on_second` and ends the process."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def handle(number: int) -> None:
        if not stop.is_set():
            stop.set()
            return
        if on_second is not None:
            on_second()
        os._exit(128 + number)

    for number in _SIGNALS:
        loop.add_signal_handler(number, handle, number)
    try:
        yield stop
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


@contextmanager
def on_continue(go_on: Callable[[], None]) -> Iterator[None]:
    """Call `go_on` first of all whenever this process goes on after it was stopped (SIGSTOP, SIGTSTP).

    By a handler of Python's own and not of the loop's, which would call it after all that was ready then.
    """
    number = getattr(signal, "SIGCONT", None)
    if number is None:
        yield
        return
    before = signal.signal(number, lambda *_: go_on())
    try:
        yield
    finally:
        signal.signal(number, before)


def end_with_parent(parent_fd: int | None, *, grace_s: float) -> None:
    """Watch a pipe that the parent holds open; when it closes, stop as by SIGTERM.

    A thread watches, so that a busy event loop does not matter; after `grace_s` the process ends
    whatever it is doing.
    """
    if parent_fd is None:
        return
    os.set_inheritable(parent_fd, False)  # noqa: FBT003 - positional only

    def watch(descriptor: int) -> None:
        while os.read(descriptor, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s)
        os._exit(1)

    threading.Thread(target=watch, args=(parent_fd,), name="parent", daemon=True).start()
