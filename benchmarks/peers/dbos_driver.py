"""The driver of DBOS: durable workflows on Postgres, submitted to a queue.

Run by `benchmarks.systems` in the peers' environment. Settings: the queue is polled every 10 ms (the
default is 1 s) and gives this process 200 workflows at once; workflows and steps are async functions.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg
import sqlalchemy
import wire
from dbos import DBOS, DBOSClient, DBOSConfig

QUEUE = "bench"
POLL_S = 0.01
SLOTS = 200

marks: queue.Queue[float] = queue.Queue()


@dataclass
class Seen:
    """How many workflows began, and when the first did."""

    starts: int = 0
    began: float = 0.0

    def note(self) -> None:
        """Count a start; all workflows run in one event loop."""
        if not self.starts:
            self.began = time.perf_counter()
        self.starts += 1


seen = Seen()


@DBOS.workflow(name="noop")
async def noop(data: str) -> None:
    """Do nothing but be counted."""
    seen.note()


@DBOS.step()
async def one() -> int:
    """Be a step."""
    return 1


@DBOS.workflow(name="three")
async def three(data: str) -> int:
    """Take three durable steps, one after the other."""
    seen.note()
    return await one() + await one() + await one()


@DBOS.workflow(name="mark")
async def mark(data: str) -> None:
    """Tell when the first line ran."""
    marks.put(time.perf_counter())


class Bench:
    """The orders of the wire, on one system database."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._config: DBOSConfig = {
            "name": "bench",
            "system_database_url": url,
            "log_level": "ERROR",
            "run_migrations": True,
        }
        self._con = psycopg.connect(url, autocommit=True)
        self._con.execute(
            "create table public.bare (id bigint generated always as identity primary key, data text)"
        )
        with self._worker():
            DBOS.register_queue(QUEUE, worker_concurrency=SLOTS, polling_interval_sec=POLL_S)
        self._client = DBOSClient(system_database_url=url, application_name="bench")
        self._engine = sqlalchemy.create_engine(
            sqlalchemy.make_url(url).set(drivername="postgresql+psycopg")
        )

    @contextmanager
    def _worker(self) -> Iterator[None]:
        DBOS(config=self._config)
        DBOS.launch()
        try:
            yield
        finally:
            DBOS.destroy()

    def _enqueue(self, name: str) -> None:
        self._client.enqueue({"queue_name": QUEUE, "workflow_name": name}, wire.PAYLOAD)

    def _fill(self, name: str, count: int) -> None:
        for size in wire.batches(count):
            with self._engine.begin() as con:
                for _ in range(size):
                    self._client.enqueue_in_transaction(
                        con, {"queue_name": QUEUE, "workflow_name": name}, wire.PAYLOAD
                    )

    def _is_empty(self) -> bool:
        row = self._con.execute(
            "select exists (select from dbos.workflow_status where status in ('ENQUEUED', 'PENDING'))"
        ).fetchone()
        return row is not None and not row[0]

    def _clear(self) -> None:
        with self._worker():
            wire.wait_until(self._is_empty)

    def _drain(self, name: str, count: int) -> wire.Answer:
        self._fill(name, count)
        seen.starts = 0
        with self._worker():
            wire.wait_until(lambda: seen.starts >= count)
            wire.wait_until(self._is_empty)
            took_s = time.perf_counter() - seen.began
        return {"took_s": took_s}

    def submit(self, count: int) -> wire.Answer:
        """Enqueue one at a time, beside the yardsticks of a commit."""
        insert = "insert into public.bare (data) values (%s)"

        def transaction() -> None:
            with self._con.transaction():
                self._con.execute(insert, (wire.PAYLOAD,))

        calls: list[Callable[[], object]] = [
            lambda: self._enqueue("noop"),
            lambda: self._con.execute(insert, (wire.PAYLOAD,)),
            transaction,
        ]
        wire.timed(calls, 2)
        took, commits, transactions = wire.timed(calls, count)
        self._clear()
        return {"took_s": took, "commits_s": commits, "transactions_s": transactions}

    def bulk(self, count: int) -> wire.Answer:
        """Enqueue 1,000 in each transaction."""
        began = time.perf_counter()
        self._fill("noop", count)
        took_s = time.perf_counter() - began
        self._clear()
        return {"took_s": took_s}

    def drain(self, count: int) -> wire.Answer:
        """Drain no-op workflows."""
        return self._drain("noop", count)

    def steps(self, count: int) -> wire.Answer:
        """Drain workflows of three steps."""
        return self._drain("three", count)

    def idle(self, count: int) -> wire.Answer:
        """Enqueue while the worker is idle."""
        took = []
        with self._worker():
            time.sleep(wire.SETTLED_S)
            for _ in range(count):
                began = time.perf_counter()
                self._enqueue("mark")
                took.append(marks.get() - began)
                time.sleep(wire.PAUSE_S)
            wire.wait_until(self._is_empty)
        return {"took_s": took}


def main() -> None:
    """Set up, then answer orders."""
    answers = wire.take_stdout()
    bench = Bench(wire.read_setup()["postgres"])
    orders = ("submit", "bulk", "drain", "steps", "idle")
    wire.serve({name: getattr(bench, name) for name in orders}, answers)


if __name__ == "__main__":
    main()
