"""The driver of Celery on Redis: its own worker program beside it, tasks acknowledged late.

Run by `benchmarks.systems` in the peers' environment. Settings: the prefork pool with a process per
core (the default), acknowledgement after the task instead of before it (else a killed worker loses
tasks), results ignored, and, as its guide says for short tasks, 64 messages prefetched per process;
gossip, mingle and worker events off. There is no bulk submit. Three steps are a chain.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis
import wire

# The queue, and messages delivered but not acknowledged.
QUEUE, UNACKED = "celery", "unacked"


class Bench:
    """The orders of the wire, on one Redis."""

    def __init__(self, socket: str, folder: str) -> None:
        board = Path(folder) / "board"
        board.write_bytes(bytes(64 * 64))
        os.environ["BENCH_BROKER"] = f"redis+socket://{socket}"
        os.environ["BENCH_BOARD"] = str(board)
        import celery_tasks

        self._tasks = celery_tasks
        self._redis = redis.Redis(unix_socket_path=socket)

    @contextmanager
    def _worker(self) -> Iterator[None]:
        self._tasks.board.reset()
        options = ["--loglevel", "ERROR", "--pool", "prefork", "--concurrency", str(os.cpu_count())]
        options += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        process = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "celery_tasks", "worker", *options],
            cwd=Path(__file__).parent,
            stdin=subprocess.DEVNULL,
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _send(self) -> None:
        self._tasks.noop.apply_async((wire.PAYLOAD,))

    def _chain(self) -> None:
        from celery import chain

        chain(*[self._tasks.step.si(wire.PAYLOAD) for _ in range(3)]).apply_async()

    def _is_empty(self) -> bool:
        return not self._redis.llen(QUEUE) and not self._redis.hlen(UNACKED)

    def _clear(self) -> None:
        self._redis.delete(QUEUE)

    def _drain(self, starts: int) -> wire.Answer:
        with self._worker():
            wire.wait_until(lambda: self._tasks.board.read()[0] >= starts)
            wire.wait_until(self._is_empty)
            ended = time.monotonic()
            began = self._tasks.board.read()[1]
        return {"took_s": ended - began}

    def submit(self, count: int) -> wire.Answer:
        """Send one at a time."""
        wire.timed([self._send], 2)
        (took,) = wire.timed([self._send], count)
        self._clear()
        return {"took_s": took}

    def drain(self, count: int) -> wire.Answer:
        """Drain no-op tasks."""
        for _ in range(count):
            self._send()
        return self._drain(count)

    def steps(self, count: int) -> wire.Answer:
        """Drain chains of three tasks."""
        for _ in range(count):
            self._chain()
        return self._drain(3 * count)

    def idle(self, count: int) -> wire.Answer:
        """Send while the worker is idle."""
        took, board = [], self._tasks.board
        with self._worker():
            self._send()
            wire.wait_until(lambda: board.read()[0] >= 1)
            time.sleep(wire.SETTLED_S)
            for n in range(count):
                began = time.monotonic()
                self._send()
                wire.wait_until(lambda n=n: board.read()[0] >= n + 2, pause_s=0.0002)  # type: ignore[misc]
                took.append(board.read()[2] - began)
                time.sleep(wire.PAUSE_S)
            wire.wait_until(self._is_empty)
        return {"took_s": took}


def main() -> None:
    """Set up, then answer orders."""
    answers = wire.take_stdout()
    with tempfile.TemporaryDirectory(prefix="millpond-bench-") as folder:
        bench = Bench(wire.read_setup()["redis"], folder)
        orders = ("submit", "drain", "steps", "idle")
        wire.serve({name: getattr(bench, name) for name in orders}, answers)


if __name__ == "__main__":
    main()
