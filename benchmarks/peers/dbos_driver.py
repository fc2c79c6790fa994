"""The driver of DBOS: durable workflows on Postgres, submitted to a queue.

Run by `benchmarks.systems` in the peers' environment. Settings: the queue is polled every 10 ms (the
default is 1 s) and gives this process 400 workflows at once; workflows and steps are async functions.
Tenants beside each other are partitions of a queue, each limited to less than the slots of all.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg
import sqlalchemy
import wire
from dbos import DBOS, DBOSClient, DBOSConfig, EnqueueOptions

QUEUE = "bench"
SHARED = "shared"
POLL_S = 0.01
SLOTS = 400

marks: queue.Queue[float] = queue.Queue()
naps: wire.Naps = {}


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


@DBOS.workflow(name="nap")
async def nap(data: str, name: str) -> None:
    """Rest, and note from when to when."""
    began = time.perf_counter()
    await asyncio.sleep(wire.NAP_S)
    naps[name] = (began, time.perf_counter())


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

    def _share(self, count: int, visits: int) -> tuple[wire.Naps, dict[str, float]]:
        """Drain what A has queued while B comes by; returns the rests, and when each of B's was sent."""

        def of(tenant: str) -> EnqueueOptions:
            return {
                "queue_name": SHARED,
                "workflow_name": "nap",
                "queue_partition_key": tenant,
            }

        def send(n: int) -> None:
            sent[f"b{n}"] = time.perf_counter()
            self._client.enqueue(of("b"), wire.PAYLOAD, f"b{n}")

        sent: dict[str, float] = {}
        naps.clear()
        for start in range(0, count, wire.BATCH):
            with self._engine.begin() as con:
                for n in range(start, min(start + wire.BATCH, count)):
                    self._client.enqueue_in_transaction(con, of("a"), wire.PAYLOAD, f"a{n}")
        with self._worker():
            wire.wait_until(lambda: len(naps) > 0)
            wire.visit(send, visits)
            wire.wait_until(lambda: len(naps) >= count + visits)
            wire.wait_until(self._is_empty)
        return dict(naps), sent

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

    def noisy(self, count: int) -> wire.Answer:
        """Drain what A has queued, with B and without."""
        with self._worker():
            DBOS.register_queue(
                SHARED,
                worker_concurrency=wire.SHARED_SLOTS,
                partition_worker_concurrency=wire.SLOTS_OF_ONE,
                polling_interval_sec=POLL_S,
            )
        self._share(max(1, count // 10), 0)
        beside, sent = self._share(count, wire.visits(count))
        alone, _ = self._share(count, 0)
        return wire.noisy(beside, alone, sent)

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
    orders = ("submit", "bulk", "drain", "steps", "idle", "noisy")
    wire.serve({name: getattr(bench, name) for name in orders}, answers)


if __name__ == "__main__":
    main()
