"""The sealer: chains rows of audit logs after their commit, in an order that is given when they are sealed.

Run by every API process; `cli` composes it. Invariants: one process at a time seals a log; a row is sealed once and
its mark goes in the same transaction; a head is published only after the seals that it tells of are committed; no
log waits for all that another has.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import structlog

from millpond.db.pool import Connection, Database
from millpond.db.queries import queries
from millpond.errors import MillpondError
from millpond.identity.audit_chain import PURPOSE, START, Head, Keys, entry_of, mac_of
from millpond.identity.audit_heads import Heads
from millpond.types import NO_ORG

R = TypeVar("R")
_SQL = queries("audit_chain")
_log = structlog.get_logger("millpond.audit")
_POLL_S = 0.25
_AT_MOST = 500
_AT_ONCE = 8
# How long the end of the process waits for what its last requests told of.
_DRAIN_S = 2.0
_ORGS = 200


def statement(name: str, org_id: int) -> str:
    """Return a statement for an org's log, or its twin for the platform's."""
    return _SQL[f"{name}_platform" if org_id == NO_ORG else name]


def opened(db: Database, org_id: int) -> AbstractAsyncContextManager[Connection]:
    """Open a transaction in which a log can be read and sealed."""
    return db.globals() if org_id == NO_ORG else db.org(org_id)


class _Line:
    """Logs that have rows to be sealed, each once, in the order in which they came or come again."""

    def __init__(self) -> None:
        self._due: asyncio.Queue[int] = asyncio.Queue()
        self._known: set[int] = set()

    def add(self, logs: Iterable[int]) -> None:
        """Let logs stand in line that do not, and that nobody is at."""
        for org_id in logs:
            if org_id not in self._known:
                self._known.add(org_id)
                self._due.put_nowait(org_id)

    async def next(self) -> int:
        """Wait for the log whose turn it is; it is in hand until `done`."""
        return await self._due.get()

    def done(self, org_id: int, *, has_more: bool) -> None:
        """Let a log go that was in hand, to the end of the line where it has more."""
        self._known.discard(org_id)
        if has_more:
            self.add([org_id])


class Sealer:
    """Seals what waits and publishes how far each chain is; several processes share the work."""

    def __init__(self, db: Database, keys: Keys, heads: Heads, *, poll_s: float = _POLL_S) -> None:
        self._db = db
        self._keys = keys
        self._heads = heads
        self._poll_s = poll_s
        self._halted: str | None = None
        self._has_failed = False
        # Logs of which a part may be sealed whose head is not published.
        self._in_hand: set[int] = set()

    async def run(self, stop: asyncio.Event) -> None:
        """Seal until `stop` is set, then once more.

        Logs take turns, a part of each at a time: one with a backlog, or thousands of others, keep none waiting for
        more than a turn. Who has rows is asked all the while.
        """
        line = _Line()
        tasks = [asyncio.create_task(self._work(line), name="audit.seal") for _ in range(_AT_ONCE)]
        tasks.append(asyncio.create_task(self._publish_before(), name="audit.publish"))
        try:
            while not stop.is_set():
                await self._guarded(self._look(line))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._poll_s):
                        await stop.wait()
                if not self._has_failed:
                    self._halted = None
                self._has_failed = False
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(_DRAIN_S):
                for org_id in list(self._in_hand):
                    await self._publish_log(org_id)
                await self.seal_all()
        except (MillpondError, OSError) as error:  # a timeout is one of these
            _log.warning("audit.left_unsealed", reason=getattr(error, "code", type(error).__name__))

    async def _look(self, line: _Line) -> None:
        line.add(await self._waiting())

    async def _work(self, line: _Line) -> None:
        """Seal a part of the log whose turn it is, for ever."""
        while True:
            org_id = await line.next()
            sealed = await self._guarded(self._seal_part(org_id))
            line.done(org_id, has_more=sealed == _AT_MOST)

    async def _publish_before(self) -> None:
        """Publish, once, what was sealed before this process began, while it seals already."""
        while await self._guarded(self.publish_all()) is None:
            await asyncio.sleep(self._poll_s)

    async def _guarded(self, work: Coroutine[Any, Any, R]) -> R | None:
        """Await a part of the work; returns None after an error, which the log tells once until there is none."""
        try:
            return await work
        except MillpondError as error:
            if error.code != self._halted:
                _log.warning("audit.halted", code=error.code)
            self._halted, self._has_failed = error.code, True
        except Exception:  # noqa: BLE001 - a top-level loop; the log tells
            _log.exception("audit.halted", code="unexpected")
        return None

    async def seal_all(self) -> int:
        """Seal every row that waits now in a log that nobody else is at; returns how many."""
        places = asyncio.Semaphore(_AT_ONCE)

        async def seal(org_id: int) -> int:
            async with places:
                return await self.seal_log(org_id)

        sealed = await asyncio.gather(*map(seal, await self._waiting()), return_exceptions=True)
        for one in sealed:
            if isinstance(one, BaseException):
                raise one
        return sum(one for one in sealed if isinstance(one, int))

    async def seal_log(self, org_id: int) -> int:
        """Seal what waits in one log and publish its head; returns how many rows."""
        total = 0
        while True:
            count = await self._seal_part(org_id)
            total += count
            if count < _AT_MOST:
                return total

    async def _waiting(self) -> list[int]:
        """Return the logs that have rows to be sealed; asked all the time, so it is one message."""
        async with self._db.alone() as con:
            return [row["org_id"] for row in await con.fetch(_SQL["logs_to_seal"])]

    async def _seal_part(self, org_id: int) -> int:
        """Seal a part of what waits in one log, in one transaction, and publish its head; returns how many rows."""
        self._in_hand.add(org_id)
        count, head = await self._seal_some(org_id)
        if count:
            assert head is not None
            await self._publish(head)
        self._in_hand.discard(org_id)
        return count

    async def publish_all(self) -> int:
        """Publish what a process that was killed had sealed and not published; returns of how many logs it looked."""
        await self._publish_log(NO_ORG)
        logs = 1
        async for org_id, _ in orgs(self._db):
            await self._publish_log(org_id)
            logs += 1
        return logs

    async def _publish_log(self, org_id: int) -> None:
        # Heads are published after their commit: what was published before this look is in the database.
        seen = await asyncio.to_thread(self._heads.last, org_id)
        async with opened(self._db, org_id) as con:
            head = await head_of(con, org_id)
        if head is not None:
            await self._publish(head)
        if seen is not None and (head is None or head.seq < seen.seq):
            _log.error("audit.behind_published", org_id=org_id, published_seq=seen.seq)

    async def _seal_some(self, org_id: int) -> tuple[int, Head | None]:
        async with opened(self._db, org_id) as con:
            if not await con.fetchval(_SQL["lock"], org_id):
                return 0, None
            # A statement sees what is committed when it begins: the chain as whoever had the lock left it.
            rows = await con.fetch(statement("unsealed", org_id), org_id, _AT_MOST)
            if not rows:
                return 0, None
            return len(rows), await self._seal(con, org_id, rows)

    async def _seal(self, con: Connection, org_id: int, rows: list[Any]) -> Head:
        key_id, sealed_at = self._keys.key_id, rows[0]["now"]
        key = self._keys.derive(PURPOSE, key_id)
        seq, mac = rows[0]["last_seq"] or 0, rows[0]["last_mac"] or START
        places, macs = [], []
        for row in rows:
            seq += 1
            mac = mac_of(
                key,
                mac,
                entry_of(row),
                org_id=org_id,
                seq=seq,
                key_id=key_id,
                sealed_at=sealed_at,
            )
            places.append(seq)
            macs.append(mac)
        ids = [row["audit_id"] for row in rows]
        await con.execute(statement("seal", org_id), org_id, places, ids, macs, key_id, sealed_at)
        return Head(org_id=org_id, seq=seq, mac=mac, key_id=key_id, sealed_at=sealed_at)

    async def _publish(self, head: Head) -> None:
        await asyncio.to_thread(self._heads.publish, head)


async def orgs(db: Database) -> AsyncIterator[tuple[int, str]]:
    """Yield id and slug of every org."""
    last = NO_ORG
    while True:
        async with db.globals() as con:
            rows = await con.fetch(_SQL["all_orgs"], last, _ORGS)
        for row in rows:
            yield row["org_id"], row["slug"]
        if len(rows) < _ORGS:
            return
        last = rows[-1]["org_id"]


async def head_of(con: Connection, org_id: int) -> Head | None:
    """Return how far a log is sealed."""
    row = await con.fetchrow(statement("head", org_id), org_id)
    return None if row is None else Head(org_id=org_id, **row)


@contextlib.asynccontextmanager
async def sealing(sealer: Sealer) -> AsyncIterator[None]:
    """Let a sealer work until the block ends, and a last time then."""
    stop = asyncio.Event()
    working = asyncio.create_task(sealer.run(stop), name="audit.sealer")
    try:
        yield
    finally:
        stop.set()
        # A database that is away must not hold the end of the process.
        _, late = await asyncio.wait({working}, timeout=_DRAIN_S + 1)
        if late:
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await working
