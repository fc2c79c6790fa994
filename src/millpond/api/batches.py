"""Batches: runs of one org that are accepted at the same time share a transaction.

Called by the accept path for requests without an Idempotency-Key. Invariants: a caller is answered
only after the commit that holds its run; a run that cannot be stored does not fail its neighbours;
nobody waits when nothing is under way.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from millpond.db.pool import Database
from millpond.engine.submit import submit
from millpond.errors import Transient
from millpond.types import Intent

_MAX_RUNS = 64
_MAX_BYTES = 1024 * 1024
_Entry = tuple[Intent, "asyncio.Future[None]"]


class Batches:
    """Submits what has gathered for an org whenever its previous batch is committed."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._waiting: dict[int, deque[_Entry]] = {}
        self._senders: set[asyncio.Task[None]] = set()

    async def submit(self, intent: Intent) -> None:
        """Return once the run is durable; raises what its submit raises."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.get(intent.org_id)
        if waiting is None:
            self._waiting[intent.org_id] = deque([(intent, done)])
            sender = asyncio.create_task(self._send(intent.org_id), name="accept.batches")
            self._senders.add(sender)
            sender.add_done_callback(self._senders.discard)
        else:
            waiting.append((intent, done))
        await done

    async def _send(self, org_id: int) -> None:
        waiting = self._waiting[org_id]
        try:
            while waiting:
                await self._store(org_id, _take(waiting))
        finally:
            del self._waiting[org_id]
            for _, done in waiting:  # only when this sender is cancelled
                done.cancel()

    async def _store(self, org_id: int, batch: Sequence[_Entry]) -> None:
        try:
            async with self._db.org(org_id) as con:
                await submit(con, [intent for intent, _ in batch])
        except Transient as error:
            # The outcome of the commit may be unknown: nobody is told that their run exists.
            _settle(batch, error)
        except Exception as error:  # noqa: BLE001 - goes to the request that caused it
            if len(batch) == 1:
                _settle(batch, error)
                return
            for entry in batch:
                await self._store(org_id, [entry])
        else:
            _settle(batch, None)


def _take(waiting: deque[_Entry]) -> list[_Entry]:
    """Take from the front what one transaction carries: at least one run, not too many bytes."""
    batch = [waiting.popleft()]
    size_bytes = len(batch[0][0].input)
    while waiting and len(batch) < _MAX_RUNS:
        size_bytes += len(waiting[0][0].input)
        if size_bytes > _MAX_BYTES:
            break
        batch.append(waiting.popleft())
    return batch


def _settle(batch: Sequence[_Entry], error: Exception | None) -> None:
    for _, done in batch:
        if done.done():  # its request was given up
            continue
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)
