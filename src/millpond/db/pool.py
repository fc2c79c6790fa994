"""Pools: the only way to a database connection, one pool for each role.

Called by every room that reads or writes. Invariants: a transaction of the application always has an
org and ends with its block; the engine's pool is never handed to step code.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from typing import TypeAlias

import asyncpg

from millpond.db.lending import Connection, Lending, open_pool
from millpond.db.transaction import Chain, Probe, Statement, Transaction
from millpond.types import NO_ORG, Principal, Standing

__all__ = ["Connection", "Database", "EngineDatabase", "Probe", "Record"]

Record = asyncpg.Record
Block: TypeAlias = AbstractAsyncContextManager[Connection, None]

SCHEMA = "millpond"
_SNAPSHOT = "begin isolation level repeatable read, read only"
_SUBJECT = re.compile(r"(user|key|service|outside):[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# The engine's statements take milliseconds; one that hangs has lost its connection.
_ENGINE_TIMEOUT_S = 30.0


class _Pool:
    """What both roles' pools share: open, close, and transactions begun by one statement."""

    def __init__(self, pool: asyncpg.Pool[Record], probe: Probe | None = None) -> None:
        self._lending = Lending(pool)
        self._probe = probe

    async def close(self) -> None:
        """Close every connection; those still busy after 5 s are cut."""
        await self._lending.close()

    async def ping(self) -> None:
        """Raise Unavailable when the database does not answer within 2 s."""
        await self._lending.ping()

    def _transaction(self, begin: str, name: str, *, is_engine: bool = False) -> Block:
        return Transaction(self._lending, self._probe, name=name, begin=begin, is_engine=is_engine)


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
        return cls(await open_pool(url, name=name, min_size=min_size, max_size=max_size), probe)

    def org(self, org_id: int) -> Block:
        """Open a transaction in which only rows of `org_id` exist; commits when the block ends."""
        return self._transaction(f"begin; set local millpond.org = '{int(org_id)}'", "org")

    def of(self, principal: Principal, *, is_snapshot: bool = False) -> Block:
        """Open a transaction in a principal's org, or without one for the platform's own.

        A snapshot reads all of it as it was at its begin, and writes nothing.
        Raises Unauthenticated when its rights are no more what they were, Forbidden when the org is suspended.
        """
        org = "" if principal.org_id == NO_ORG else int(principal.org_id)
        begin = f"{_SNAPSHOT if is_snapshot else 'begin'}; set local millpond.org = '{org}'"
        if principal.standing is not None:
            begin += f"; select {_refuse_stale(principal.subject, principal.standing)}"
        return self._transaction(begin, "org")

    def org_for(self, org_id: int, callers: Iterable[tuple[str, Standing]]) -> Block:
        """Open a transaction in an org in which several callers' wishes are done together.

        Raises as `of` when the rights of one of them are no more what they were.
        """
        calls = sorted({_refuse_stale(subject, standing) for subject, standing in callers})
        begin = f"begin; set local millpond.org = '{int(org_id)}'"
        if calls:
            begin += f"; select {', '.join(calls)}"
        return self._transaction(begin, "org")

    def alone(self) -> Block:
        """Lend a connection for one statement that is a durable transaction by itself.

        It enters its org by `enter_org`, before which it sees no tenant's rows.
        """
        return Statement(self._lending, self._probe, name="org")

    def globals(self) -> Block:
        """Open a transaction without an org: only global tables have rows in it."""
        return self._transaction("begin; set local millpond.org = ''", "globals")


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
        pool = await open_pool(
            url,
            name=name,
            min_size=min_size,
            max_size=max_size,
            command_timeout_s=_ENGINE_TIMEOUT_S,
        )
        return cls(pool, probe)

    def duty(
        self,
        name: str,
        *,
        durable: bool = True,
        limit_s: float | None = None,
        idle_s: float | None = None,
    ) -> Block:
        """Open a transaction for the engine duty `name` (a word: claim, commit, rescue …).

        `durable=False` lets the commit return before it is on disk. A statement that takes longer than
        `limit_s` is ended by the server as Transient, also where this process was stopped meanwhile. With `idle_s` the
        server ends it, and its connection, when so long nothing comes from here between two statements.
        """
        begin = _begin(name, durable=durable, limit_s=limit_s, idle_s=idle_s)
        return self._transaction(begin, name, is_engine=True)

    def chain(self, name: str, *, durable: bool, limit_s: float, idle_s: float) -> Chain:
        """Make blocks of the engine duty `name`, as `duty` does; one may begin with the commit of the one before.

        Whoever has it closes it.
        """
        begin = _begin(name, durable=durable, limit_s=limit_s, idle_s=idle_s)
        return Chain(self._lending, self._probe, name=name, begin=begin, is_engine=True)

    def statement(self, name: str) -> Block:
        """Lend a connection for one statement of duty `name`: a durable transaction of its own."""
        return Statement(self._lending, self._probe, name=name)


def _begin(name: str, *, durable: bool, limit_s: float | None, idle_s: float | None) -> str:
    if not name.isidentifier():
        raise ValueError(f"a duty is one word, not {name!r}")
    begin = f"begin; set local millpond.duty = '{name}'"
    if not durable:
        begin += "; set local synchronous_commit = off"
    if limit_s is not None:
        begin += f"; set local statement_timeout = {int(limit_s * 1000)}"
    if idle_s is not None:
        begin += f"; set local idle_in_transaction_session_timeout = {int(idle_s * 1000)}"
    return begin
