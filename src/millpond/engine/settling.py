"""Settling: what happens to steps of other workers' runs, gathered and committed together.

Called by `step_tries`, one Settler per session of a worker. Invariants: whoever waits is told after the
commit; a write whose lease is gone raises LeaseLost and stores nothing; one guilty write never fails its
neighbours; after a commit of unknown outcome the batch is sent again, which finds the lease gone if the
first was stored.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from millpond.db.pool import EngineDatabase
from millpond.engine.hints import Hints
from millpond.engine.remote import RemoteWrite, settle
from millpond.errors import LeaseLost, Transient

_log = structlog.get_logger("millpond.settling")
_MAX_BATCH = 64
_MAX_BYTES = 4 * 1024 * 1024
_RETRY_S = 30.0


@dataclass(frozen=True, slots=True)
class _Pending:
    write: RemoteWrite
    is_stored: asyncio.Future[None]


class Settler:
    """Gathers what happens to steps of other workers' runs, and commits it together."""

    def __init__(self, database: EngineDatabase, hints: Hints) -> None:
        self._database = database
        self._hints = hints
        self._waiting: deque[_Pending] = deque()
        self._sender: asyncio.Task[None] | None = None
        self._is_closed = False

    def record(self, write: RemoteWrite) -> asyncio.Future[None]:
        """Store what happened; the future ends when it is durable, or with LeaseLost."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._is_closed:
            _end(future, LeaseLost("this worker has stopped"))
            return future
        self._waiting.append(_Pending(write, future))
        if self._sender is None:
            self._sender = asyncio.create_task(self._send_all(), name="settle")
        return future

    async def close(self) -> None:
        """Stop committing; whoever still waits gets LeaseLost, since nothing more is written."""
        self._is_closed = True
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.gather(self._sender, return_exceptions=True)

    async def _send_all(self) -> None:
        batch: list[_Pending] = []
        try:
            while self._waiting:
                batch = _take(self._waiting)
                await self._commit(batch)
        finally:
            self._sender = None
            for one in [*batch, *self._waiting]:  # only when this worker stops
                _end(one.is_stored, LeaseLost("this worker has stopped"))

    async def _commit(self, batch: Sequence[_Pending]) -> None:
        """Commit a batch, again after a lost connection, one by one after a refusal."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + _RETRY_S
        while True:
            try:
                await self._write(batch)
            except Transient as error:
                if loop.time() < give_up:
                    await asyncio.sleep(0.2)
                    continue
                _log.error("settle.given_up", writes=len(batch), error=error.code)
                _end_all(batch, LeaseLost("the database stayed out of reach"))
            except Exception as error:  # noqa: BLE001 - whatever it is, it ends in the guilty write
                if len(batch) == 1:
                    _log.error("settle.refused", error=type(error).__name__)
                    _end_all(batch, error)
                    return
                for one in batch:
                    await self._commit([one])
            return

    async def _write(self, batch: Sequence[_Pending]) -> None:
        async with self._database.duty("step_settle") as con:
            stored, readied = await settle(con, [one.write for one in batch])
        self._hints.wake({one.queue for one in readied})
        self._hints.changed({one.write.lease.run_id for one in batch})
        for nth, one in enumerate(batch):
            _end(one.is_stored, None if nth in stored else LeaseLost("the lease is gone"))


def _take(waiting: deque[_Pending]) -> list[_Pending]:
    """Take from the front what one transaction carries: at least one write, not too many bytes."""
    batch: list[_Pending] = []
    size = 0
    while waiting and len(batch) < _MAX_BATCH:
        size += len(waiting[0].write.output or "")
        if batch and size > _MAX_BYTES:
            break
        batch.append(waiting.popleft())
    return batch


def _end_all(batch: Sequence[_Pending], error: Exception) -> None:
    for one in batch:
        _end(one.is_stored, error)


def _end(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
        future.exception()  # read here, so that a write nobody waits for is not reported as forgotten
