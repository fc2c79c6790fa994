"""Batches: runs of one org that are accepted at the same time share a transaction.

Called by the accept path. Invariants: a caller is answered only after the commit that holds its run;
a run and the idempotency key that stands for it are stored together; a run that cannot be stored, or that a
quota does not pay for, does not fail its neighbours; nobody waits when nothing is under way.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from millpond.db.pool import Connection, Database
from millpond.db.queries import queries
from millpond.engine import dedup
from millpond.engine.quotas import Ticket
from millpond.engine.reserving import Reserver
from millpond.engine.submit import submit, submit_alone
from millpond.errors import BlockGone, MillpondError, Transient, Unavailable
from millpond.types import Intent, Standing

_SQL = queries("accept")
_MAX_RUNS = 64
_MAX_BYTES = 1024 * 1024
_MAX_WAITING = 2000
_MAX_WAITING_BYTES = 128 * 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Promise:
    """An idempotency key as used on one route, with the digest of what was asked.

    `subject` is who asked, where that is not whose run it is.
    """

    key: str
    route: str
    digest: bytes
    subject: str | None = None


# Runs of one org, those with a deduplication key apart: they may wait for a rival with the same one.
_Line = tuple[int, bool]


class KeyHeld(MillpondError):
    """The deduplication key of a run belongs to a live run; nothing of the new one is stored."""

    code = "key_held"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    intent: Intent
    promise: Promise | None
    standing: Standing | None
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
        [promise.subject or intent.subject for intent, promise in wanted],
        [promise.route for _, promise in wanted],
        [promise.key for _, promise in wanted],
        [promise.digest for _, promise in wanted],
        [intent.run_id for intent, _ in wanted],
    )
    return {row["run_id"] for row in rows}


async def release_keys(
    con: Connection, org_id: int, wanted: Sequence[tuple[Intent, Promise]]
) -> None:
    """Give back idempotency keys that were claimed in this transaction."""
    await con.execute(
        _SQL["release_keys"],
        org_id,
        [intent.subject for intent, _ in wanted],
        [promise.route for _, promise in wanted],
        [promise.key for _, promise in wanted],
    )


class Batches:
    """Submits what has gathered for an org whenever its previous batch is committed."""

    def __init__(self, db: Database, reserver: Reserver) -> None:
        self._db = db
        self._reserver = reserver
        self._waiting: dict[_Line, deque[_Entry]] = {}
        self._waiting_bytes: Counter[int] = Counter()
        self._senders: set[asyncio.Task[None]] = set()

    async def submit(
        self, intent: Intent, promise: Promise | None = None, standing: Standing | None = None
    ) -> bool:
        """Return True once the run is durable, False when its promise's key stands for another.

        `standing` is what the rights of the intent's subject stand on: refused where they have changed.
        Raises KeyHeld when its deduplication key belongs to a live run, and what its submit raises.
        """
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        entry = _Entry(intent=intent, promise=promise, standing=standing, is_stored=future)
        org_id = intent.org_id
        line = org_id, intent.dedup_key is not None
        waiting = self._waiting.get(line)
        if waiting is None:
            self._waiting[line] = deque([entry])
            sender = asyncio.create_task(self._send(line), name="accept.batches")
            self._senders.add(sender)
            sender.add_done_callback(self._senders.discard)
        elif len(waiting) >= _MAX_WAITING or self._waiting_bytes[org_id] > _MAX_WAITING_BYTES:
            raise Unavailable("Too many runs of this org are being accepted.", retry_after_s=1.0)
        else:
            waiting.append(entry)
        self._waiting_bytes[org_id] += len(intent.input)
        return await future

    async def _send(self, line: _Line) -> None:
        waiting = self._waiting[line]
        try:
            while waiting:
                batch = _take(waiting)
                self._waiting_bytes[line[0]] -= sum(len(entry.intent.input) for entry in batch)
                await self._store(line[0], batch)
        finally:
            self._waiting_bytes[line[0]] -= sum(len(entry.intent.input) for entry in waiting)
            del self._waiting[line]
            for entry in waiting:  # only when this sender is cancelled
                entry.is_stored.cancel()

    async def _store(self, org_id: int, batch: Sequence[_Entry]) -> None:
        """Store what the org's quotas pay for; the others are refused."""
        while batch:
            try:
                ticket = await self._reserver.take(org_id, len(batch))
            except Exception as error:  # noqa: BLE001 - goes to the requests that caused it
                _refuse(batch, error)
                return
            await self._store_paid(org_id, batch[: ticket.amount], ticket)
            batch = batch[ticket.amount :]

    async def _store_paid(self, org_id: int, batch: Sequence[_Entry], ticket: Ticket) -> None:
        try:
            stored, held = await self._commit(org_id, batch, ticket)
        except BlockGone:
            self._reserver.drop(org_id, ticket)
            await self._store(org_id, batch)
        except Transient as error:
            # The outcome of the commit may be unknown: nobody is told that their run exists.
            self._reserver.settle(org_id, ticket, error)
            _refuse(batch, error)
        except Exception as error:  # noqa: BLE001 - goes to the request that caused it
            self._reserver.settle(org_id, ticket, error)
            if len(batch) == 1:
                _refuse(batch, error)
                return
            for entry in batch:
                await self._store(org_id, [entry])
        else:
            self._reserver.settle(org_id, ticket)
            for entry in batch:
                if entry.is_stored.done():  # its request was given up
                    continue
                if entry.intent.run_id in held:
                    entry.is_stored.set_exception(KeyHeld("the key belongs to a live run"))
                else:
                    entry.is_stored.set_result(entry.intent.run_id in stored)

    async def _commit(
        self, org_id: int, batch: Sequence[_Entry], ticket: Ticket
    ) -> tuple[set[uuid.UUID], set[uuid.UUID]]:
        """Store the runs whose keys are free; returns their ids, and those without a live key."""
        free = {entry.intent.run_id for entry in batch if entry.promise is None}
        callers = [(one.intent.subject, one.standing) for one in batch if one.standing is not None]
        if not any(one.promise or one.intent.dedup_key is not None for one in batch):
            await submit_alone(self._db, [one.intent for one in batch], ticket, callers)
            return free, set()
        async with self._db.org_for(org_id, callers) as con:
            wanted = [(entry.intent, entry.promise) for entry in batch if entry.promise is not None]
            if wanted:
                free |= await claim_keys(con, org_id, wanted)
            held = await _take_live(con, org_id, [e for e in batch if e.intent.run_id in free])
            free -= held
            intents = [entry.intent for entry in batch if entry.intent.run_id in free]
            await submit(con, intents, ticket)
        return free, held


async def _take_live(con: Connection, org_id: int, batch: Sequence[_Entry]) -> set[uuid.UUID]:
    """Take the deduplication keys of runs; returns the runs that did not get theirs.

    What they claimed is given back: they are settled one by one, each in a transaction of its own.
    """
    keyed = [entry for entry in batch if entry.intent.dedup_key is not None]
    got = await dedup.take(con, org_id, [entry.intent for entry in keyed])
    left = [entry for entry in keyed if entry.intent.run_id not in got]
    promised = [(entry.intent, entry.promise) for entry in left if entry.promise is not None]
    if promised:
        await release_keys(con, org_id, promised)
    return {entry.intent.run_id for entry in left}


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
