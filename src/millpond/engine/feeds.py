"""Feeds: the events of all runs of an org as one sequence that never skips a late commit.

Called by the API. Events stand in the order of the transactions that stored them. Invariants: only what is below the
oldest running transaction is read, so that nothing can still appear before a place that was given out. Of one run a
claim that was under way as the run came may be told of before it; the events' numbers are the order there.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import NamedTuple

import orjson

from millpond.db.pool import Connection, Database, Record
from millpond.db.queries import queries
from millpond.engine.events import Event, Feed
from millpond.errors import InvalidInput

_SQL = queries("feeds")
# So many events are looked through in one statement where not all are wanted.
_SCAN = 2000
_BUSY_S = 0.1
_IDLE_S = 1.0
# While others' runs change and none of what is wanted, it is read again this seldom.
_PACE_S = 0.5
_PLACE = re.compile(r"(\d{1,20})-([0-9a-f]{32})-(\d{1,10})")


class Place(NamedTuple):
    """Where an event stands among those of all runs: transaction, run, number."""

    xid: int
    run_id: uuid.UUID
    event_no: int

    def __str__(self) -> str:
        return f"{self.xid}-{self.run_id.hex}-{self.event_no}"

    @classmethod
    def read(cls, text: str, *, param: str) -> Place:
        """Read a place as it was given out; raises InvalidInput."""
        found = _PLACE.fullmatch(text)
        if found is None or int(found[1]) >= 2**63 or int(found[3]) >= 2**31:
            raise InvalidInput("this is no place of an event", code="malformed_cursor", param=param)
        return cls(int(found[1]), uuid.UUID(found[2]), int(found[3]))


FIRST = Place(0, uuid.UUID(int=0), 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class OrgEvent:
    """An event with its run's flow and its place among those of all runs."""

    place: Place
    flow: str
    event: Event


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Which events are wanted: of these kinds, of one flow; None is all."""

    kinds: frozenset[str] | None = None
    flow: str | None = None


ALL = Wanted()


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedPage:
    """Events in their order; `reached` is where the next page begins, `has_more` whether it may have some."""

    events: list[OrgEvent]
    reached: Place
    has_more: bool


async def now(con: Connection) -> Place:
    """Return the place after which stands what is not yet read by anybody."""
    xid: str = await con.fetchval(_SQL["horizon"])
    return Place(int(xid), uuid.UUID(int=0), 0)


async def page(
    con: Connection, org_id: int, after: Place, *, wanted: Wanted = ALL, limit: int
) -> FeedPage:
    """Return up to `limit` wanted events after a place; looks through a bounded number of others."""
    kinds = None if wanted.kinds is None else sorted(wanted.kinds)
    most = limit + 1 if wanted == ALL else max(_SCAN, limit + 1)
    rows = await con.fetch(
        _SQL["page"],
        org_id,
        str(after.xid),
        after.run_id,
        after.event_no,
        most,
        kinds,
        wanted.flow,
    )
    found: list[OrgEvent] = []
    reached = after
    for row in rows:
        if row["is_wanted"]:
            if len(found) == limit:
                return FeedPage(events=found, reached=reached, has_more=True)
            found.append(_event(row))
        reached = _place(row)
    return FeedPage(events=found, reached=reached, has_more=len(rows) == most)


async def tail(
    db: Database, feed: Feed, org_id: int, after: Place, *, wanted: Wanted = ALL
) -> AsyncIterator[OrgEvent]:
    """Yield wanted events after a place, then live ones, for ever."""
    wait_s = pace_s = _BUSY_S
    with feed.subscribe_all() as woken:
        while True:
            woken.clear()
            began = time.monotonic()
            async with db.org(org_id) as con:
                read = await page(con, org_id, after, wanted=wanted, limit=500)
            after = read.reached
            for event in read.events:
                yield event
            if read.has_more:
                continue
            wait_s = _BUSY_S if read.events else min(_IDLE_S, wait_s * 1.5)
            pace_s = _BUSY_S if read.events else min(_PACE_S, pace_s * 1.5)
            try:
                async with asyncio.timeout(wait_s):
                    await woken.wait()
            except TimeoutError:
                continue
            # Somebody's run changed, which in a busy house is always so.
            await asyncio.sleep(max(0.0, pace_s - (time.monotonic() - began)))


def _place(row: Record) -> Place:
    return Place(int(row["xid"]), row["run_id"], row["event_no"])


def _event(row: Record) -> OrgEvent:
    event = Event(
        run_id=row["run_id"],
        event_no=row["event_no"],
        kind=row["kind"],
        step_key=row["step_key"],
        data=orjson.loads(row["data"]),
        at=row["at"],
    )
    return OrgEvent(place=_place(row), flow=row["flow"], event=event)
