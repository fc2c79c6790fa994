"""The tasks of the Celery driver, imported by its worker: what they did is told through shared memory.

Settings come from the environment that the driver gives its worker.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path

from celery import Celery

# Per pool process: tasks begun, when the first one began, when the latest mark was reached.
SLOT = struct.Struct("qdd")
SLOTS = 64
# A line of the log of rests: the run's name, from when, to when; written at once, so that lines never mix.
LINE = "{:<10} {:20.6f} {:20.6f}\n"
LINE_BYTES = len(LINE.format("", 0.0, 0.0))

app = Celery("bench", broker=os.environ["BENCH_BROKER"])
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=64,
    broker_connection_retry_on_startup=True,
    worker_hijack_root_logger=False,
)


class Log:
    """A file that the threads of the worker add to and the driver reads."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)

    def note(self, name: str, began: float) -> None:
        """Add a rest that ends now."""
        os.write(self._file, LINE.format(name, began, time.monotonic()).encode())

    def count(self) -> int:
        """Return how many there are."""
        return os.fstat(self._file).st_size // LINE_BYTES

    def read(self) -> dict[str, tuple[float, float]]:
        """Return them by name."""
        text = os.pread(self._file, os.fstat(self._file).st_size, 0).decode()
        rows = [line.split() for line in text.splitlines()]
        return {name: (float(began), float(ended)) for name, began, ended in rows}

    def reset(self) -> None:
        """Forget everything."""
        os.ftruncate(self._file, 0)


class Board:
    """Shared memory between the driver and the worker's pool processes."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._map: mmap.mmap | None = None
        self._slot = -1

    def _open(self) -> mmap.mmap:
        if self._map is None:
            with self._path.open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), SLOT.size * SLOTS)
        return self._map

    def reset(self) -> None:
        """Forget everything."""
        memory = self._open()
        memory[:] = bytes(len(memory))

    def note(self) -> None:
        """Count one start of this process."""
        if self._slot < 0:
            # Pool processes are numbered from 1; one lane each, so nothing is locked.
            from billiard import current_process

            self._slot = getattr(current_process(), "index", os.getpid()) % SLOTS
        memory, at = self._open(), self._slot * SLOT.size
        count, first, _ = SLOT.unpack_from(memory, at)
        now = time.monotonic()
        SLOT.pack_into(memory, at, count + 1, first or now, now)

    def read(self) -> tuple[int, float, float]:
        """Return all starts, when the first began and when the latest did."""
        rows = [SLOT.unpack_from(self._open(), n * SLOT.size) for n in range(SLOTS)]
        firsts = [first for count, first, _ in rows if count]
        return (
            sum(count for count, _, _ in rows),
            min(firsts, default=0.0),
            max((latest for _, _, latest in rows), default=0.0),
        )


board = Board(os.environ["BENCH_BOARD"])
log = Log(os.environ["BENCH_LOG"])


@app.task(name="bench.noop")
def noop(data: str) -> None:
    """Do nothing but be counted."""
    board.note()


@app.task(name="bench.step")
def step(data: str) -> None:
    """Be one link of a chain."""
    board.note()


@app.task(name="bench.nap")
def nap(data: str, name: str, rest_s: float) -> None:
    """Rest, and note from when to when."""
    began = time.monotonic()
    time.sleep(rest_s)
    log.note(name, began)
