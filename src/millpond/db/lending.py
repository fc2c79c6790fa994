"""Lending: a role's connections, lent for one transaction each and kept at hand between them.

Called by `pool` and `transaction`. Invariants: a connection whose task was cancelled inside a
transaction is discarded, since its server side may still be at work; none is kept while somebody waits
for one.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TypeAlias

import asyncpg

from millpond.db.translate import translated
from millpond.errors import Permanent, Unavailable

Connection: TypeAlias = (
    "asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"
)
Lent: TypeAlias = "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"

# A rollback is immediate; past this the connection is as good as gone.
ROLLBACK_S = 5.0
DISCARD_S = 2.0
# The driver's pool closes idle connections and worn ones, so they go back to it now and then.
_KEPT_S = 60.0
# A connection is worn after so many statements; a new one has to make all plans anew.
_WORN = 5_000_000
# What keeps a connection of its own, where there are enough: its plans are large, and it is never to be late.
_APART = frozenset(("claim", "claim_at_once"))
# It goes back to the driver's pool once in so many times.
_APART_RETURNS = 60
_DRIVER_ERRORS = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
)


async def _leave_as_it_is(_: object) -> None:
    """Spare a round trip per use: every setting made here ends with its transaction."""


async def _learn_types(con: asyncpg.Connection[asyncpg.Record]) -> None:
    """Learn of arrays while nobody waits for an answer: the driver asks for them once per connection, slowly."""
    async with con.transaction():  # in which the driver sets and unsets something for its question
        await con.prepare(
            "select $1::bigint[], $2::text[], $3::uuid[], $4::bool[], $5::float8[], $6::int[], $7::timestamptz[]"
        )


async def open_pool(
    url: str, *, name: str, min_size: int, max_size: int, command_timeout_s: float | None = None
) -> asyncpg.Pool[asyncpg.Record]:
    """Open a driver's pool; connecting is capped at 10 s, and idle connections live for 5 minutes."""
    with translated(connecting=True):
        pool = await asyncpg.create_pool(
            url,
            min_size=min_size,
            max_size=max_size,
            timeout=10,
            command_timeout=command_timeout_s,
            max_inactive_connection_lifetime=300,
            max_queries=_WORN,
            init=_learn_types,
            reset=_leave_as_it_is,
            server_settings={"application_name": name},
        )
    assert pool is not None
    return pool


class Lending:
    """The connections of one pool; those just given back are at hand without the pool's own ceremony."""

    def __init__(self, pool: asyncpg.Pool[asyncpg.Record]) -> None:
        self._pool = pool
        self._kept: list[tuple[str, Lent]] = []
        self._waiting = 0
        self._is_closed = False
        self._returns = 0
        self._returning: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Close every connection; those still busy after 5 s are cut."""
        self._is_closed = True
        if self._returning is not None:
            self._returning.cancel()
        await self._return_kept()
        try:
            async with asyncio.timeout(5):
                await self._pool.close()
        except TimeoutError:
            self._pool.terminate()

    async def ping(self) -> None:
        """Raise Unavailable when the database does not answer within 2 s."""
        with translated(connecting=True):
            async with asyncio.timeout(2):
                con = await self.lend()
                is_clean = False
                try:
                    await con.fetchval("select 1")
                    is_clean = True
                finally:
                    await self.take_back(con, is_clean=is_clean)

    def at_hand(self, name: str = "") -> Lent | None:
        """Return a connection that needs no waiting for, if there is one, and rather one that was lent for the same.

        It has the plans for it. Others get one that has other plans than a claim's, which everybody waits for.
        """
        kept = self._kept
        if not kept:
            return None
        best = -1
        for nth in range(len(kept) - 1, -1, -1):
            of = kept[nth][0]
            if of == name or (of in _APART and name in _APART):
                best = nth
                break
            if best < 0 and of not in _APART:
                best = nth
        if best < 0 and not self._can_grow():
            best = len(kept) - 1
        if best < 0 or is_broken(kept[best][1]):
            return None
        return kept.pop(best)[1]

    def _can_grow(self) -> bool:
        return self._pool.get_idle_size() > 0 or self._pool.get_size() < self._pool.get_max_size()

    async def lend(self, name: str = "") -> Lent:
        """Lend a connection; a role refused now was let in before, so that passes as an outage."""
        if (con := self.at_hand(name)) is not None:
            return con
        if any(is_broken(con) for _, con in self._kept):
            await self._return_kept()
        self._waiting += 1
        try:
            with translated(connecting=True):
                return await self._pool.acquire(timeout=10)
        except Permanent as error:
            if error.code != "database_login":
                raise
            raise Unavailable(error.message, retry_after_s=1.0) from error
        finally:
            self._waiting -= 1

    async def take_back(self, con: Lent, name: str = "", *, is_clean: bool) -> None:
        """Take a connection back, closed unless clean.

        An error here must not fail a committed transaction: the pool drops a broken connection.
        """
        if is_clean and not self._waiting and not self._is_closed:
            self._kept.append((name, con))
            if self._returning is None:
                self._returning = asyncio.create_task(self._return_later(), name="connections")
            return
        if not is_clean:
            await asyncio.shield(_discard(con))
        await self._release(con)

    async def _return_later(self) -> None:
        await asyncio.sleep(_KEPT_S)
        self._returning = None
        self._returns += 1
        if self._returns % _APART_RETURNS == 0:
            return await self._return_kept()
        apart = [one for one in self._kept if one[0] in _APART]
        others = [con for name, con in self._kept if name not in _APART]
        self._kept = apart
        for con in others:
            await self._release(con)
        if apart and self._returning is None:
            self._returning = asyncio.create_task(self._return_later(), name="connections")
        return None

    async def _return_kept(self) -> None:
        while self._kept:
            await self._release(self._kept.pop()[1])

    async def _release(self, con: Lent) -> None:
        with contextlib.suppress(*_DRIVER_ERRORS):
            await self._pool.release(con)


def is_broken(con: Lent) -> bool:
    """Whether the connection was closed while it was kept; the driver then takes it back by itself."""
    try:
        return con.is_closed()
    except asyncpg.InterfaceError:
        return True


async def _discard(con: Lent) -> None:
    """Close a connection once its cancelled statement has ended on the server.

    Cutting it at once would also cut the driver's request to cancel, and the statement would go on
    with its locks.
    """
    with contextlib.suppress(*_DRIVER_ERRORS):
        await con.close(timeout=DISCARD_S)


async def is_rolled_back(con: Connection) -> bool:
    """Roll back what is open; False when the connection is not fit for another transaction."""
    try:
        await con.execute("rollback", timeout=ROLLBACK_S)
    except _DRIVER_ERRORS:
        return False
    return True
