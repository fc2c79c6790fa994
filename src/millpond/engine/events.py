"""Events: stored facts of a run, appended under its live row's lock, read from any number, tailed live.

Called by everything that changes a run outside the group commit, and by the API's streams.
Invariant: numbers of a run have no gaps and become visible in order, so a reader resumes by number.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime

import orjson

from millpond.db.pool import Connection, Database
from millpond.db.queries import queries
from millpond.engine.duties import NO_DUTY, Duty
from millpond.engine.growing import Delta, Reader
from millpond.engine.hints import CHANGED, Listener, tail_of
from millpond.errors import NotFound
from millpond.types import Json

_SQL = queries("events")
FINAL_EVENTS = frozenset({"run.succeeded", "run.failed", "run.cancelled"})
_ENDS_OF_TRIES = frozenset({"step.succeeded", "step.retrying", "step.failed", "step.unknown"})
_ANY = "any"
_BUSY_S = 0.1
_IDLE_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One stored fact of a run; `data` is JSON, `step_key` set for facts about a step."""

    run_id: uuid.UUID
    event_no: int
    kind: str
    step_key: str | None
    data: Json
    at: datetime

    @property
    def is_final(self) -> bool:
        """Whether no event can follow."""
        return self.kind in FINAL_EVENTS


@dataclass(frozen=True, slots=True)
class Fact:
    """An event before it has a number."""

    kind: str
    step_key: str | None = None
    data: Mapping[str, Json] | None = None

    def encoded(self) -> str:
        """Return the data as JSON text."""
        return orjson.dumps(self.data or {}).decode()


async def append(
    con: Connection,
    org_id: int,
    run_id: uuid.UUID,
    facts: Sequence[Fact],
    *,
    duties: Duty = NO_DUTY,
) -> None:
    """Store `facts` as the run's next events and add `duties`; locks its live row.

    Does nothing once the live row is gone.
    """
    await con.execute(
        _SQL["append"],
        org_id,
        run_id,
        [fact.kind for fact in facts],
        [fact.step_key for fact in facts],
        [fact.encoded() for fact in facts],
        int(duties),
    )


async def page(
    con: Connection, org_id: int, run_id: uuid.UUID, *, after: int = 0, limit: int = 500
) -> list[Event]:
    """Return up to `limit` events numbered above `after`, in order."""
    rows = await con.fetch(_SQL["page"], org_id, run_id, after, limit)
    return [
        Event(
            run_id=row["run_id"],
            event_no=row["event_no"],
            kind=row["kind"],
            step_key=row["step_key"],
            data=orjson.loads(row["data"]),
            at=row["at"],
        )
        for row in rows
    ]


class Feed:
    """Wakes tails when their run may have new events; one listening connection a process."""

    def __init__(self, url: str) -> None:
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._listener = Listener(url, {CHANGED: self._hear})

    @classmethod
    async def connect(cls, url: str) -> Feed:
        """Start listening at a direct database address."""
        feed = cls(url)
        await feed._listener.start()
        return feed

    async def close(self) -> None:
        """Stop listening; tails go on by polling."""
        await self._listener.close()

    def subscribe(self, run_id: uuid.UUID) -> AbstractContextManager[asyncio.Event]:
        """Give an event that is set whenever the run may have changed."""
        return self._subscribe(tail_of(run_id))

    def subscribe_all(self) -> AbstractContextManager[asyncio.Event]:
        """Give an event that is set whenever any run may have changed."""
        return self._subscribe(_ANY)

    @contextmanager
    def _subscribe(self, tail: str) -> Iterator[asyncio.Event]:
        woken = asyncio.Event()
        self._waiting.setdefault(tail, set()).add(woken)
        try:
            yield woken
        finally:
            waiting = self._waiting[tail]
            waiting.discard(woken)
            if not waiting:
                del self._waiting[tail]

    def _hear(self, payload: str) -> None:
        tails = list(self._waiting) if payload == "*" else [*payload.split(","), _ANY]
        for tail in tails:
            for woken in self._waiting.get(tail, ()):
                woken.set()


async def tail(
    db: Database, feed: Feed, org_id: int, run_id: uuid.UUID, *, after: int = 0
) -> AsyncIterator[Event]:
    """Yield the run's events after a number, then live ones, until its final event.

    Raises NotFound when the org has no such run. A run whose final event is at or before `after`
    ends the stream at once.
    """
    async for told in _follow(db, feed, org_id, run_id, after, None):
        if isinstance(told, Event):
            yield told


def tail_with_text(
    db: Database, feed: Feed, org_id: int, run_id: uuid.UUID, reader: Reader, *, after: int = 0
) -> AsyncIterator[Event | Delta]:
    """As `tail`, with the text of steps under way between the events, as far as `reader` has not had it."""
    return _follow(db, feed, org_id, run_id, after, reader)


async def _follow(
    db: Database, feed: Feed, org_id: int, run_id: uuid.UUID, after: int, reader: Reader | None
) -> AsyncIterator[Event | Delta]:
    async with db.org(org_id) as con:
        last = await con.fetchrow(_SQL["last"], org_id, run_id)
    if last is None:
        raise NotFound(f"run {run_id} does not exist", param="run_id")
    if last["kind"] in FINAL_EVENTS and last["event_no"] <= after:
        return
    wait_s = _BUSY_S
    with feed.subscribe(run_id) as woken:
        while True:
            woken.clear()
            async with db.org(org_id) as con:
                events = await page(con, org_id, run_id, after=after)
                # Read second: what a try wrote was stored before the event of its end.
                text = [] if reader is None else await reader.read(con, org_id, run_id)
            for told in _woven(events, text):
                yield told
                if isinstance(told, Event):
                    after = told.event_no
                    if told.is_final:
                        return
            wait_s = _BUSY_S if events or text else min(_IDLE_S, wait_s * 1.5)
            try:
                async with asyncio.timeout(wait_s):
                    await woken.wait()
            except TimeoutError:
                continue


def _woven(events: Sequence[Event], text: Sequence[Delta]) -> Iterator[Event | Delta]:
    """Put text before the event that ends its try, and what is of none of these after all events."""
    left = list(text)
    for event in events:
        if event.kind in _ENDS_OF_TRIES and isinstance(event.data, dict) and left:
            tries = event.data.get("tries")
            of_try = [
                one
                for one in left
                if one.step_key == event.step_key and isinstance(tries, int) and one.tries <= tries
            ]
            yield from of_try
            left = [one for one in left if one not in of_try]
        elif event.is_final:
            yield from left
            left = []
        yield event
    yield from left
