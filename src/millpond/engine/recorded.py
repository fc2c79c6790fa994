"""Recorded: when runs that have ended arrived, and how long workers had them, for whoever replays them.

Called by the API, in a transaction of an org or (for operators) without one. Invariant: it only reads, a bounded page
at a time, and nothing of what runs were given or gave.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import orjson

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine.tokens import Used
from millpond.types import NO_ORG, STANDARD, Urgency

_SQL = queries("recorded")
_HIGHEST_ID = uuid.UUID(int=2**128 - 1)
_LOWEST_ID = uuid.UUID(int=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """A run that has ended; `worked_s` is how long workers had it, its waits between left out.

    `org` is its org's slug, where runs of all orgs are told of; `org_id` is 0 where not. `used` is what it used of
    tokens, in all of its steps, by those of its keys that these were used of (`Used`); None where nobody knows.
    """

    run_id: uuid.UUID
    flow: str
    version: int
    queue: str
    keys: Sequence[str]
    priority: int
    ready_at: datetime
    started_at: datetime
    worked_s: float
    used: Sequence[Used] | None
    urgency: Urgency = STANDARD
    org: str | None = None
    org_id: int = NO_ORG


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Which recorded runs: made since a time, of a queue, at most so many."""

    since: datetime
    queue: str | None
    limit: int


async def list_recorded(
    con: Connection, org_id: int, wanted: Wanted, after: uuid.UUID | None
) -> tuple[list[Recorded], bool]:
    """Return one page of ended runs of an org, newest first, and whether more follow."""
    below = after or _HIGHEST_ID
    first = _first_id(wanted.since)
    rows = await con.fetch(_SQL["page"], org_id, below, first, wanted.queue, wanted.limit + 1)
    return [_recorded(row) for row in rows[: wanted.limit]], len(rows) > wanted.limit


async def list_recorded_of_all(
    con: Connection, wanted: Wanted, after: tuple[int, uuid.UUID] | None
) -> tuple[list[Recorded], bool]:
    """Return one page of ended runs of all orgs, by org and age, and whether more follow.

    Of keys only those that flows declare are told, and what was used of these: what callers add is the org's.
    """
    org_id, run_id = after or (NO_ORG, _LOWEST_ID)
    first = _first_id(wanted.since)
    rows = await con.fetch(
        _SQL["page_of_all"], first, org_id, run_id, wanted.queue, wanted.limit + 1
    )
    return [_recorded(row) for row in rows[: wanted.limit]], len(rows) > wanted.limit


def _recorded(row: Record) -> Recorded:
    told = None if row["used"] is None else orjson.loads(row["used"])
    used = told and [Used(tuple(one["keys"]), one["tokens"], one["is_lost"]) for one in told]
    return Recorded(**(dict(row) | {"used": used}))


def _first_id(since: datetime) -> uuid.UUID:
    """Return the lowest id that a run has which was made then: ids begin with the time in milliseconds."""
    return uuid.UUID(int=max(0, int(since.timestamp() * 1000)) << 80)
