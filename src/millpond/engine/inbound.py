"""Inbound: events arrive and meet the triggers that listen for them, at once or in time.

`receive` is called by the API in an org transaction, `lapse` by maintenance in every worker. Invariants:
an event is received once under its id; what it does is in the transaction that stores it; groups are
decided on under their row locks, taken in one order, then triggers, then earlier events.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import orjson
import structlog

from millpond.db.pool import Connection, EngineDatabase, Record
from millpond.db.queries import queries
from millpond.engine import gathering, targets
from millpond.engine.gathering import Group, Held, Rule
from millpond.engine.quotas import QuotaBusy, Ticket
from millpond.engine.starting import GroupKey, Outcome, Start, carry_out, group_columns
from millpond.engine.waits import Readied
from millpond.errors import Conflict, InvalidInput, MillpondError, Transient
from millpond.types import Json

_SQL = queries("inbound")
MAX_DATA_BYTES = 192 * 1024
_BATCH = 100
_log = structlog.get_logger("millpond.inbound")


@dataclass(frozen=True, kw_only=True, slots=True)
class Incoming:
    """An event as its sender gives it."""

    event_id: str
    name: str
    data: Json


@dataclass(frozen=True, kw_only=True, slots=True)
class Received:
    """A stored event; `data` is JSON text, `runs` what it started, each with whether at once."""

    event_id: str
    name: str
    data: str
    sent_by: str
    received_at: datetime
    runs: Sequence[Mapping[str, Json]]
    is_repeat: bool = False


async def receive(
    con: Connection,
    org_id: int,
    events: Sequence[Incoming],
    sent_by: str,
    ticket: Ticket | None = None,
) -> tuple[list[Received], list[Readied]]:
    """Store events and start what they start at once; returns them in order, and the new runs.

    A `ticket` pays for the runs; TooFew is raised where it does not and a larger one can be had. An event whose id
    is known is answered as the first time. Raises Conflict when the id was used for
    something else, InvalidInput for data over 192 KiB.
    """
    texts = {event.event_id: _data_text(event) for event in events}
    names = {event.event_id: event.name for event in events}
    rows = await con.fetch(
        _SQL["receive"], org_id, list(texts), list(names.values()), list(texts.values()), sent_by
    )
    fresh = {row["event_id"] for row in rows}
    stored = await _stored(con, org_id, list(texts))
    for event in events:
        _refuse_other(event, stored[event.event_id])
    readied: list[Readied] = []
    if fresh:
        new = [stored[one] for one in texts if one in fresh]
        outcome = await _meet(con, org_id, new)
        readied = await carry_out(con, outcome, at_once=fresh, ticket=ticket)
        stored = await _stored(con, org_id, list(texts))
    seen: set[str] = set()
    answers = []
    for event in events:
        is_repeat = event.event_id not in fresh or event.event_id in seen
        seen.add(event.event_id)
        answers.append(_received(stored[event.event_id], is_repeat=is_repeat))
    return answers, readied


async def page(
    con: Connection,
    org_id: int,
    *,
    limit: int,
    after: str | None = None,
    before: str | None = None,
    name: str | None = None,
) -> tuple[list[Received], bool]:
    """Return one page of received events, newest first, and whether more follow."""
    rows = await con.fetch(_SQL["page"], org_id, after, before, limit + 1, name)
    found = [_received(row) for row in rows[:limit]]
    return found if before is None else found[::-1], len(rows) > limit


async def lapse(database: EngineDatabase) -> list[Readied]:
    """Start what groups have waited for; returns the new runs. A group that fails is dropped alone."""
    try:
        async with database.duty("trigger") as con:
            return await _lapse(con, _BATCH)
    except (InvalidInput, QuotaBusy):
        return await _lapse_each(database)


async def _lapse_each(database: EngineDatabase) -> list[Readied]:
    async with database.statement("due_groups") as con:
        due = await con.fetch(_SQL["due_groups"], _BATCH)
    readied: list[Readied] = []
    for row in due:
        key = (row["trigger_id"], row["group_key"])
        try:
            async with database.duty("trigger_alone") as con:
                readied += await _lapse(con, 1, key)
        except QuotaBusy:
            continue  # it stays due
        except Transient:
            raise
        except MillpondError as error:
            _log.warning("trigger.group_dropped", trigger_id=str(key[0]), error=error.code)
            note = f"{error.code}: {error.message}"
            async with database.duty("trigger_dropped") as con:
                await con.execute(_SQL["end_groups"], [row["org_id"]], [key[0]], [key[1]])
                await con.execute(_SQL["note"], [row["org_id"]], [key[0]], [row["events"]], [note])
    return readied


async def _lapse(con: Connection, limit: int, only: GroupKey | None = None) -> list[Readied]:
    trigger_id, group_key = only or (None, None)
    rows = await con.fetch(_SQL["lapsed"], limit, group_key, trigger_id)
    outcome, parked = Outcome(), []
    for row in rows:
        key = (row["trigger_id"], row["group_key"])
        if row["is_paused"]:
            parked.append((row["org_id"], key))
            continue
        outcome.ended.append((row["org_id"], key))
        if row["name"] is None:  # its trigger was deleted while the event arrived
            continue
        outcome.drop(row, row["dropped"])
        decision = gathering.lapse(_group(row), row["now"])
        outcome.starts += [Start(row=row, fire=fire) for fire in decision.fires]
    if parked:
        await con.execute(_SQL["park_groups"], *group_columns(parked))
    return await carry_out(con, outcome) if outcome.ended else []


async def _meet(con: Connection, org_id: int, events: Sequence[Record]) -> Outcome:
    """Decide what new events, in order, do with the triggers that listen for them."""
    listening = await con.fetch(
        _SQL["listening"], org_id, sorted({event["name"] for event in events})
    )
    outcome = Outcome()
    matches = [
        (trigger, held)
        for held in map(_held, events)
        for trigger in listening
        if trigger["event"] == held.document["name"] and _lets_pass(trigger, held, outcome)
    ]
    gathered = []
    for trigger, held in matches:
        if trigger["mode"] == "each":
            outcome.starts.append(Start(row=trigger, fire=(held,)))
        else:
            gathered.append((trigger, _group_key(trigger["group_by"], held), held))
    if gathered:
        await _gather(con, org_id, gathered, outcome)
    return outcome


async def _gather(
    con: Connection, org_id: int, gathered: Sequence[tuple[Record, str, Held]], outcome: Outcome
) -> None:
    keys = sorted({(trigger["trigger_id"], key) for trigger, key, _ in gathered})
    rows = await con.fetch(
        _SQL["lock_groups"], org_id, [key[0] for key in keys], [key[1] for key in keys]
    )
    # Asked for after the locks: whoever held them before has counted from an earlier time.
    now = await con.fetchval(_SQL["now"])
    groups: dict[GroupKey, Group | None] = {
        (row["trigger_id"], row["group_key"]): None if row["is_new"] else _group(row)
        for row in rows
    }
    for trigger, group_key, held in gathered:
        key = (trigger["trigger_id"], group_key)
        decision = gathering.take(_rule(trigger), groups[key], held, now)
        groups[key] = decision.group
        outcome.starts += [Start(row=trigger, fire=fire) for fire in decision.fires]
    for key, group in groups.items():
        if group is None:
            outcome.ended.append((org_id, key))
        else:
            outcome.kept.append((org_id, key, group))


def _rule(trigger: Record) -> Rule:
    names = ("mode", "period_s", "max_wait_s", "max_count")
    return Rule(**{name: trigger[name] for name in names})


def _group(row: Record) -> Group:
    return Group(
        events=tuple(_sized(document) for document in orjson.loads(row["events"])),
        first_at=row["first_at"],
        due_at=row["due_at"],
        dropped=row["dropped"],
    )


def _held(event: Record) -> Held:
    at = event["received_at"].astimezone(UTC).isoformat().replace("+00:00", "Z")
    data = orjson.loads(event["data"])
    return _sized({"id": event["event_id"], "name": event["name"], "data": data, "received_at": at})


def _sized(document: Json) -> Held:
    return Held(document=document, size_bytes=len(orjson.dumps(document)) + 1)


def _lets_pass(trigger: Record, held: Held, outcome: Outcome) -> bool:
    """Whether an event gets past a trigger's filter; one stored before filters were bounded refuses all."""
    try:
        return trigger["filter"] is None or targets.satisfies(
            trigger["filter"], held.document["data"]
        )
    except InvalidInput as error:
        outcome.refuse(trigger, f"{error.code}: {error.message}")
        return False


def _group_key(path: str | None, held: Held) -> str:
    """Return the value at a path of the data as JSON; what is not there is null."""
    value = held.document["data"] if path is not None else None
    for name in path.split(".") if path is not None else ():
        value = value.get(name) if isinstance(value, dict) else None
    text = orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()
    return text if len(text) <= 200 else f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _data_text(event: Incoming) -> str:
    text = orjson.dumps(event.data)
    if len(text) > MAX_DATA_BYTES:
        raise InvalidInput(
            f"the data of an event has at most {MAX_DATA_BYTES} bytes",
            param="data",
            code="too_large",
            advice="store large data elsewhere and pass a reference",
        )
    return text.decode()


def _refuse_other(event: Incoming, stored: Record) -> None:
    """Raise Conflict when an id was used before for another event."""
    if stored["name"] != event.name or orjson.loads(stored["data"]) != event.data:
        raise Conflict(
            f"the event id {event.event_id} was used for another event",
            code="event_id_reused",
            param="id",
            advice="use a new id for a new event",
        )


async def _stored(con: Connection, org_id: int, ids: Sequence[str]) -> dict[str, Record]:
    rows = await con.fetch(_SQL["received"], org_id, ids)
    return {row["event_id"]: row for row in rows}


def _received(row: Record, *, is_repeat: bool = False) -> Received:
    return Received(
        event_id=row["event_id"],
        name=row["name"],
        data=row["data"],
        sent_by=row["sent_by"],
        received_at=row["received_at"],
        runs=orjson.loads(row["runs"]),
        is_repeat=is_repeat,
    )
