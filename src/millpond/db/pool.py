"""Pools and transactions: the only way to a database connection.

Called by every room that reads or writes. Invariants: a transaction of the application always has an
org and ends with its block; the engine's pool is never handed to step code; a connection whose task
was cancelled inside a transaction is discarded, since its server side may still be at work. A probe,
where one is passed, hears of every commit just before it is sent and just after it was acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import TypeAlias

import asyncpg

from millpond.db.translate import translated
from millpond.errors import Permanent, Unavailable
from millpond.types import NO_ORG, Principal, Standing

Connection: TypeAlias = (
    "asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"
)
_Pooled: TypeAlias = "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"
Record = asyncpg.Record
# Called with `before:NAME` and `after:NAME` of each commit; crash tests end the process in it.
Probe: TypeAlias = Callable[[str], Awaitable[None]]

SCHEMA = "millpond"
_SNAPSHOT = "begin isolation level repeatable read, read only"
_SUBJECT = re.compile(r"(user|key|service|outside):[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# A rollback is immediate; past this the connection is as good as gone.
ROLLBACK_S = 5.0
DISCARD_S = 2.0
# The engine's statements take milliseconds; one that hangs has lost its connection.
_ENGINE_TIMEOUT_S = 30.0


_DRIVER_ERRORS = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
)


async def _leave_as_it_is(_: object) -> None:
    """Spare a round trip per use: every setting made here ends with its transaction."""


async def _open_pool(
    url: str, *, name: str, min_size: int, max_size: int, command_timeout_s: float | None = None
) -> asyncpg.Pool[Record]:
    """Open a pool; connecting is capped at 10 s, and idle connections are kept for 5 minutes."""
    with translated(connecting=True):
        pool = await asyncpg.create_pool(
            url,
            min_size=min_size,
            max_size=max_size,
            timeout=10,
            command_timeout=command_timeout_s,
            max_inactive_connection_lifetime=300,
            reset=_leave_as_it_is,
            server_settings={"application_name": name},
        )
    assert pool is not None
    return pool


class _Pool:
    """What both roles' pools share: open, close, and transactions begun by one statement."""

    def __init__(self, pool: asyncpg.Pool[Record], probe: Probe | None = None) -> None:
        self._pool = pool
        self._probe = probe

    async def close(self) -> None:
        """Close every connection; those still busy after 5 s are cut."""
        try:
            await asyncio.wait_for(self._pool.close(), 5)
        except TimeoutError:
            self._pool.terminate()

    async def ping(self) -> None:
        """Raise Unavailable when the database does not answer within 2 s."""
        with translated(connecting=True):
            async with asyncio.timeout(2), self._pool.acquire() as con:
                await con.fetchval("select 1")

    async def _acquire(self) -> _Pooled:
        """Take a connection; a role refused now was let in before, so that passes as an outage."""
        try:
            with translated(connecting=True):
                return await self._pool.acquire(timeout=10)
        except Permanent as error:
            if error.code != "database_login":
                raise
            raise Unavailable(error.message, retry_after_s=1.0) from error

    @asynccontextmanager
    async def _transaction(
        self, begin: str, name: str, *, is_engine: bool = False
    ) -> AsyncIterator[Connection]:
        con = await self._acquire()
        is_clean = False
        try:
            with translated(connecting=True):
                await con.execute(begin)
            # The engine's blocks do nothing but talk to the database: a timeout in one is its.
            with translated(connecting=is_engine):
                yield con
            if self._probe is not None:
                await self._probe(f"before:{name}")
            with translated(connecting=True):
                _refuse_rolled_back(await con.execute("commit"))
            is_clean = True
            if self._probe is not None:
                await self._probe(f"after:{name}")
        except Exception:
            is_clean = await _is_rolled_back(con)
            raise
        finally:
            await self._give_back(con, is_clean=is_clean)

    async def _give_back(self, con: _Pooled, *, is_clean: bool) -> None:
        """Return a connection to the pool, closed unless clean.

        An error here must not fail a committed transaction: the pool drops a broken connection.
        """
        if not is_clean:
            await asyncio.shield(_discard(con))
        with contextlib.suppress(*_DRIVER_ERRORS):
            await self._pool.release(con)


async def _discard(con: _Pooled) -> None:
    """Close a connection once its cancelled statement has ended on the server.

    Cutting it at once would also cut the driver's request to cancel, and the statement would go on
    with its locks.
    """
    with contextlib.suppress(*_DRIVER_ERRORS):
        await con.close(timeout=DISCARD_S)


async def _is_rolled_back(con: Connection) -> bool:
    """Roll back what is open; False when the connection is not fit for another transaction."""
    try:
        await con.execute("rollback", timeout=ROLLBACK_S)
    except _DRIVER_ERRORS:
        return False
    return True


def _refuse_rolled_back(status: str) -> None:
    """Raise when Postgres answered a commit by rolling back: a statement's error was swallowed."""
    if status != "COMMIT":
        raise Permanent(
            "The transaction was rolled back, because a statement in it had failed.",
            code="transaction_aborted",
        )


def _refuse_stale(subject: str, standing: Standing) -> str:
    """Return the call that raises when rights are stale; its words go into the opening message itself."""
    if not _SUBJECT.fullmatch(subject):
        raise ValueError("a principal with a standing is `kind:uuid`")
    words = [f"'{subject}'", str(int(standing.stamp))]
    for one in (standing.session_id, standing.grant_id):
        words.append("null" if one is None else f"'{uuid.UUID(int=one.int)}'")
    return f"refuse_stale({', '.join(words)})"


class Database(_Pool):
    """The application role's pool: API and step code."""

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        name: str = "millpond-app",
        min_size: int = 1,
        max_size: int = 8,
        probe: Probe | None = None,
    ) -> Database:
        """Open the pool as `millpond_app`; raises Unavailable when Postgres cannot be reached."""
        return cls(await _open_pool(url, name=name, min_size=min_size, max_size=max_size), probe)

    @asynccontextmanager
    async def org(self, org_id: int) -> AsyncIterator[Connection]:
        """Open a transaction in which only rows of `org_id` exist; commits when the block ends."""
        begin = f"begin; set local millpond.org = '{int(org_id)}'"
        async with self._transaction(begin, "org") as con:
            yield con

    @asynccontextmanager
    async def of(
        self, principal: Principal, *, is_snapshot: bool = False
    ) -> AsyncIterator[Connection]:
        """Open a transaction in a principal's org, or without one for the platform's own.

        A snapshot reads all of it as it was at its begin, and writes nothing.
        Raises Unauthenticated when its rights are no more what they were, Forbidden when the org is suspended.
        """
        org = "" if principal.org_id == NO_ORG else int(principal.org_id)
        begin = f"{_SNAPSHOT if is_snapshot else 'begin'}; set local millpond.org = '{org}'"
        if principal.standing is not None:
            begin += f"; select {_refuse_stale(principal.subject, principal.standing)}"
        async with self._transaction(begin, "org") as con:
            yield con

    @asynccontextmanager
    async def org_for(
        self, org_id: int, callers: Iterable[tuple[str, Standing]]
    ) -> AsyncIterator[Connection]:
        """Open a transaction in an org in which several callers' wishes are done together.

        Raises as `of` when the rights of one of them are no more what they were.
        """
        calls = sorted({_refuse_stale(subject, standing) for subject, standing in callers})
        begin = f"begin; set local millpond.org = '{int(org_id)}'"
        if calls:
            begin += f"; select {', '.join(calls)}"
        async with self._transaction(begin, "org") as con:
            yield con

    @asynccontextmanager
    async def globals(self) -> AsyncIterator[Connection]:
        """Open a transaction without an org: only global tables have rows in it."""
        async with self._transaction("begin; set local millpond.org = ''", "globals") as con:
            yield con


class EngineDatabase(_Pool):
    """The engine role's pool: claim, commit, rescue, retention. Never passed to step code."""

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        name: str = "millpond-engine",
        min_size: int = 2,
        max_size: int = 6,
        probe: Probe | None = None,
    ) -> EngineDatabase:
        """Open the pool as `millpond_engine`; raises Unavailable when Postgres cannot be reached."""
        pool = await _open_pool(
            url,
            name=name,
            min_size=min_size,
            max_size=max_size,
            command_timeout_s=_ENGINE_TIMEOUT_S,
        )
        return cls(pool, probe)

    @asynccontextmanager
    async def duty(
        self, name: str, *, durable: bool = True, limit_s: float | None = None
    ) -> AsyncIterator[Connection]:
        """Open a transaction for the engine duty `name` (a word: claim, commit, rescue …).

        `durable=False` lets the commit return before it is on disk. A statement that takes longer than
        `limit_s` is ended by the server as Transient, also where this process was stopped meanwhile.
        """
        if not name.isidentifier():
            raise ValueError(f"a duty is one word, not {name!r}")
        begin = f"begin; set local millpond.duty = '{name}'"
        if not durable:
            begin += "; set local synchronous_commit = off"
        if limit_s is not None:
            begin += f"; set local statement_timeout = {int(limit_s * 1000)}"
        async with self._transaction(begin, name, is_engine=True) as con:
            yield con

    @asynccontextmanager
    async def statement(self, name: str) -> AsyncIterator[Connection]:
        """Lend a connection for one statement of duty `name`: a durable transaction of its own."""
        con = await self._acquire()
        is_clean = False
        try:
            if self._probe is not None:
                await self._probe(f"before:{name}")
            with translated(connecting=True):
                yield con
            is_clean = True
            if self._probe is not None:
                await self._probe(f"after:{name}")
        except Exception:
            is_clean = await _is_rolled_back(con)
            raise
        finally:
            await self._give_back(con, is_clean=is_clean)
