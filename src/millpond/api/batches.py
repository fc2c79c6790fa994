"""Batches: runs of one org that are accepted at the same time share a transaction.

Called by the accept path. Invariants: a caller is answered only after the commit that holds its run;
a run and the idempotency key that stands for it are stored together; a run that cannot be stored does
not fail its neighbours; nobody waits when nothing is under way.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from millpond.db.pool import Connection, Database
from millpond.db.queries import queries
from millpond.engine.submit import submit
from millpond.errors import Transient, Unavailable
from millpond.types import Intent

_SQL = queries("accept")
_MAX_RUNS = 64
_MAX_BYTES = 1024 * 1024
_MAX_WAITING = 2000
_MAX_WAITING_BYTES = 128 * 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Promise:
    """An idempotency key as used on one route, with the digest of what was asked."""

    key: str
    route: str
    digest: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    intent: Intent
    promise: Promise | None
    is_stored: asyncio.Future[bool]


async def claim_keys(
    con: Connection, org_id: int, wanted: Sequence[tuple[Intent, Promise]]
) -> set[uuid.UUID]:
    """Take the keys of runs; returns the ids of the runs that got theirs.

    Waits for transactions that hold one of them; all take them in one order, so that none wait for
    each other.
    """
    rows = await con.fetch(
        _SQL["claim_keys"],
        org_id,
        [intent.subject for intent, _ in wanted],
        [promise.route for _, promise in wanted],
        [promise.key for _, promise in wanted],
        [promise.digest for _, promise in wanted],
        [intent.run_id for intent, _ in wanted],
    )
    return {row["run_id"] for row in rows}


class Batches:
    """Submits what has gathered for an org whenever its previous batch is committed."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._waiting: dict[int, deque[_Entry]] = {}
        self._waiting_bytes: Counter[int] = Counter()
        self._senders: set[asyncio.Task[None]] = set()

    async def submit(self, intent: Intent, promise: Promise | None = None) -> bool:
        """Return True once the run is durable, False when its promise's key stands for another.

        Raises what its submit raises.
        """
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        entry = _Entry(intent=intent, promise=promise, is_stored=future)
        org_id = intent.org_id
        waiting = self._waiting.get(org_id)
        if waiting is None:
            self._waiting[org_id] = deque([entry])
            sender = asyncio.create_task(self._send(org_id), name="accept.batches")
            self._senders.add(sender)
            sender.add_done_callback(self._senders.discard)
        elif len(waiting) >= _MAX_WAITING or self._waiting_bytes[org_id] > _MAX_WAITING_BYTES:
            raise Unavailable("Too many runs of this org are being accepted.", retry_after_s=1.0)
        else:
            waiting.append(entry)
        self._waiting_bytes[org_id] += len(intent.input)
        return await future

    async def _send(self, org_id: int) -> None:
        waiting = self._waiting[org_id]
        try:
            while waiting:
                batch = _take(waiting)
                self._waiting_bytes[org_id] -= sum(len(entry.intent.input) for entry in batch)
                await self._store(org_id, batch)
        finally:
            del self._waiting[org_id]
            del self._waiting_bytes[org_id]
            for entry in waiting:  # only when this sender is cancelled
                entry.is_stored.cancel()

    async def _store(self, org_id: int, batch: Sequence[_Entry]) -> None:
        try:
            stored = await self._commit(org_id, batch)
        except Transient as error:
            # The outcome of the commit may be unknown: nobody is told that their run exists.
            _refuse(batch, error)
        except Exception as error:  # noqa: BLE001 - goes to the request that caused it
            if len(batch) == 1:
                _refuse(batch, error)
                return
            for entry in batch:
                await self._store(org_id, [entry])
        else:
            for entry in batch:
                if not entry.is_stored.done():  # else its request was given up
                    entry.is_stored.set_result(entry.intent.run_id in stored)

    async def _commit(self, org_id: int, batch: Sequence[_Entry]) -> set[uuid.UUID]:
        """Store the runs whose keys are free; returns their ids."""
        free = {entry.intent.run_id for entry in batch if entry.promise is None}
        async with self._db.org(org_id) as con:
            wanted = [(entry.intent, entry.promise) for entry in batch if entry.promise is not None]
            if wanted:
                free |= await claim_keys(con, org_id, wanted)
            await submit(con, [entry.intent for entry in batch if entry.intent.run_id in free])
        return free


def _take(waiting: deque[_Entry]) -> list[_Entry]:
    """Take from the front what one transaction carries: at least one run, not too many bytes."""
    batch = [waiting.popleft()]
    size_bytes = len(batch[0].intent.input)
    while waiting and len(batch) < _MAX_RUNS:
        size_bytes += len(waiting[0].intent.input)
        if size_bytes > _MAX_BYTES:
            break
        batch.append(waiting.popleft())
    return batch


def _refuse(batch: Sequence[_Entry], error: Exception) -> None:
    for entry in batch:
        if not entry.is_stored.done():
            entry.is_stored.set_exception(error)
