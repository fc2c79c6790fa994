"""The driver of Celery on Redis: its own worker program beside it, tasks acknowledged late.

Run by `benchmarks.systems` in the peers' environment. Settings: the prefork pool with a process per
core (the default), acknowledgement after the task instead of before it (else a killed worker loses
tasks), results ignored, and, as its guide says for short tasks, 64 messages prefetched per process;
gossip, mingle and worker events off. There is no bulk submit. Three steps are a chain. Tenants beside each
other have a queue each, of which one worker takes in turn (the default with Redis), with a pool of threads
as for tasks that wait and nothing prefetched beyond them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import redis
import wire

# The queue, and messages delivered but not acknowledged.
QUEUE, UNACKED = "celery", "unacked"
PREFORK = ("--pool", "prefork", "--concurrency", str(os.cpu_count()))
# One worker for the queues of both tenants.
SHARED = (
    *("--pool", "threads", "--concurrency", str(wire.SHARED_SLOTS)),
    *("--prefetch-multiplier", "1", "--queues", "a,b"),
)


class Bench:
    """The orders of the wire, on one Redis."""

    def __init__(self, socket: str, folder: str) -> None:
        board = Path(folder) / "board"
        board.write_bytes(bytes(64 * 64))
        os.environ["BENCH_BROKER"] = f"redis+socket://{socket}"
        os.environ["BENCH_BOARD"] = str(board)
        os.environ["BENCH_LOG"] = str(Path(folder) / "log")
        import celery_tasks

        self._tasks = celery_tasks
        self._redis = redis.Redis(unix_socket_path=socket)

    @contextmanager
    def _worker(self, pool: Sequence[str] = PREFORK) -> Iterator[None]:
        self._tasks.board.reset()
        self._tasks.log.reset()
        options = ["--loglevel", "ERROR", *pool]
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

    def _share(self, count: int, visits: int) -> tuple[wire.Naps, dict[str, float]]:
        """Drain what A has queued while B comes by; returns the rests, and when each of B's was sent."""
        nap, log = self._tasks.nap, self._tasks.log

        def send(n: int) -> None:
            sent[f"b{n}"] = time.monotonic()
            nap.apply_async((wire.PAYLOAD, f"b{n}", wire.NAP_S), queue="b")

        sent: dict[str, float] = {}
        for n in range(count):
            nap.apply_async((wire.PAYLOAD, f"a{n}", wire.NAP_S), queue="a")
        with self._worker(SHARED):
            wire.wait_until(lambda: log.count() > 0)
            wire.visit(send, visits)
            wire.wait_until(lambda: log.count() >= count + visits)
            wire.wait_until(self._is_empty)
        return log.read(), sent

    def noisy(self, count: int) -> wire.Answer:
        """Drain what A has queued, with B and without."""
        self._share(max(1, count // 10), 0)
        beside, sent = self._share(count, wire.visits(count))
        alone, _ = self._share(count, 0)
        return wire.noisy(beside, alone, sent)

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
        orders = ("submit", "drain", "steps", "idle", "noisy")
        wire.serve({name: getattr(bench, name) for name in orders}, answers)


if __name__ == "__main__":
    main()
