"""Poolers: whether one stands before the database, and knows the driver's prepared statements again.

Called by `millpond doctor`. Invariant: it changes nothing in the database and leaves no transaction open.
"""

from __future__ import annotations

import uuid
from typing import Literal, TypeAlias

import asyncpg

from millpond.db.translate import translated

# `none`: a direct connection. Under a pooler the statements that the driver prepares work (`carries`) or get lost
# (`loses`); `unknown`: it has no second connection to ask with.
Pooler: TypeAlias = Literal["none", "carries", "loses", "unknown"]
_Raw: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
_LOST = (asyncpg.InvalidSQLStatementNameError, asyncpg.DuplicatePreparedStatementError)
_LIMIT_S = 5.0


async def pooler_before(url: str) -> Pooler:
    """Tell what stands before the database at `url`; raises Unavailable when nothing answers there."""
    with translated(connecting=True):
        first = await _open(url)
        try:
            if await _is_direct(first):
                return "none"
            second = await _open(url)
            try:
                return await _knows_again(first, second)
            finally:
                await second.close(timeout=_LIMIT_S)
        finally:
            await first.close(timeout=_LIMIT_S)


async def _open(url: str) -> _Raw:
    return await asyncpg.connect(
        url,
        timeout=_LIMIT_S,
        statement_cache_size=0,
        server_settings={"application_name": "millpond-doctor"},
    )


async def _is_direct(con: _Raw) -> bool:
    """Whether the process that answers is the one that let us in; a pooler gives a number of its own."""
    await con.execute("begin")  # so that one server answers whatever is asked
    answering = await con.fetchval("select pg_backend_pid()")
    await con.execute("rollback")
    return bool(answering == con.get_server_pid())


async def _knows_again(first: _Raw, second: _Raw) -> Pooler:
    """Prepare a statement, let somebody else have the connection that knows it, and ask for it again."""
    statement = await first.prepare("select 1", name=f"millpond_{uuid.uuid4().hex}")
    await (
        statement.fetchval()
    )  # only then the driver ends the exchange, and the pooler has its connection back
    await second.execute("begin")
    try:
        await statement.fetchval(timeout=_LIMIT_S)
    except _LOST:
        return "loses"
    except TimeoutError:
        return "unknown"
    finally:
        await second.execute("rollback")
    return "carries"
