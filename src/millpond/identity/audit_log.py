"""Reading an audit log: by pages newest first, or whole in the order of its chain.

Called by the API. Invariant: a reader sees one log alone, that of the transaction's org or the platform's.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from millpond.db.pool import Connection
from millpond.engine.pages import read_page
from millpond.engine.views import PageOf
from millpond.identity.audit_chain import Entry, Head, entry_of, members, time_text
from millpond.identity.audit_sealer import statement

Open = Callable[[], AbstractAsyncContextManager[Connection]]
_PAGE = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditFilter:
    """Which rows to list; an empty filter means all. `action` is how the action begins."""

    subject: str | None = None
    action: str | None = None
    resource: str | None = None
    run_id: uuid.UUID | None = None
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """A row with its seal, or with none while it waits for it."""

    entry: Entry
    seal: Head | None


async def page(
    con: Connection, org_id: int, wanted: PageOf, which: AuditFilter
) -> tuple[list[Told], bool]:
    """Return one page of a log, newest first, and whether more follow."""
    rows, has_more = await read_page(
        con,
        statement("page", org_id),
        org_id,
        wanted,
        "audit_id",
        which.subject,
        which.action,
        which.resource,
        which.run_id,
        which.since,
        which.until,
    )
    return [_told(row, org_id) for row in rows], has_more


async def export(
    transaction: Open, org_id: int, *, after: int, limit: int | None
) -> AsyncIterator[dict[str, Any]]:
    """Yield rows in the order of their seals above a place, then those that wait for one.

    Rights are asked again with every thousand rows, each in a transaction of its own.
    """
    left, last = limit, after
    while left is None or left > 0:
        wanted = _PAGE if left is None else min(_PAGE, left)
        async with transaction() as con:
            # What waits is read first: a row that is sealed meanwhile is then read twice, and never missed.
            waiting = await con.fetch(statement("unsealed", org_id), org_id, wanted)
            rows = await con.fetch(statement("links", org_id), org_id, last, wanted)
        for row in rows:
            if row["has_row"]:
                yield line_of(_told(row, org_id), org_id)
        for row in _still_waiting(waiting, rows, wanted):
            yield line_of(Told(entry=entry_of(row), seal=None), org_id)
        if len(rows) < wanted:
            return
        last = rows[-1]["seq"]
        left = None if left is None else left - len(rows)


def _still_waiting(waiting: list[Any], rows: list[Any], wanted: int) -> list[Any]:
    """Return what waits for a seal beside the last seals of a log: nothing until these are read."""
    if len(rows) >= wanted:
        return []
    sealed = {row["audit_id"] for row in rows}
    return [row for row in waiting if row["audit_id"] not in sealed][: wanted - len(rows)]


def line_of(told: Told, org_id: int) -> dict[str, Any]:
    """Return what an export tells of a row: all that its seal covers, and the seal."""
    seal = told.seal
    return {
        "org": org_id,
        "seq": None if seal is None else seal.seq,
        **members(told.entry),
        "key_id": None if seal is None else seal.key_id,
        "sealed_at": None if seal is None else time_text(seal.sealed_at),
        "mac": None if seal is None else seal.mac.hex(),
    }


def _told(row: Any, org_id: int) -> Told:
    if row["seq"] is None:
        return Told(entry=entry_of(row), seal=None)
    seal = Head(
        org_id=org_id,
        seq=row["seq"],
        mac=bytes(row["mac"]),
        key_id=row["key_id"],
        sealed_at=row["sealed_at"],
    )
    return Told(entry=entry_of(row), seal=seal)
