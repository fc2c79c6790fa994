"""Submit: intents become runs, inside the caller's transaction.

Called by the API, by flows that start runs, by anyone with an org transaction. Invariant: it only
inserts, so that it can join a long transaction without anybody waiting for it.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import orjson

from millpond.db.pool import Connection, Database
from millpond.db.queries import queries
from millpond.engine.duties import Duty
from millpond.engine.lanes import KEY_SEPARATOR, lane_id, offset_us
from millpond.engine.payloads import INLINE_BYTES, INPUT, Payload, check_size, keep
from millpond.engine.quotas import Ticket
from millpond.engine.registry import capability
from millpond.errors import BlockGone, InvalidInput
from millpond.types import STANDARD, Intent, Json, Standing, Urgency

_SQL = queries("submit")
_PLAIN, _ONE = _SQL["submit_plain"], _SQL["submit_one"]
_MAX_DELAY_S = 10 * 366 * 86_400.0
_NOBODY = (None,) * 4
# Numbers: to combine flags takes long for what is done at every submit.
_WAITS, _KEY, _PARENT = int(Duty.WAITS), int(Duty.KEY), int(Duty.PARENT)


class _Place(NamedTuple):
    """What follows from where a run goes: its keys in order as one text, and what its first event tells, too."""

    keys: str
    lane_id: int
    offset_us: int
    told: str


@lru_cache(maxsize=8192)
def _place(
    queue: str,
    org_id: int,
    flow: str,
    version: int,
    keys: tuple[str, ...],
    priority: int,
    urgency: Urgency,
) -> _Place:
    keys = tuple(sorted(keys))
    lane = lane_id(
        queue=queue,
        org_id=org_id,
        capability=capability(flow, version),
        keys=keys,
        priority=priority,
        urgency=urgency,
    )
    told = orjson.dumps({"flow": flow, "queue": queue}).decode()
    return _Place(KEY_SEPARATOR.join(keys), lane, offset_us(priority, urgency), told)


def check(intent: Intent, org_id: int) -> None:
    """Raise InvalidInput naming the field that keeps an intent from being submitted for `org_id`."""
    if intent.org_id != org_id:
        raise InvalidInput("every intent of one submit names the same org", param="org_id")
    check_size(intent.input, "the input", param="input")
    if not -100 <= intent.priority <= 100:
        raise InvalidInput("priority is a whole number from -100 to 100", param="priority")
    if not 0 <= intent.delay_s <= _MAX_DELAY_S:
        raise InvalidInput("delay_s is from 0 to ten years", param="delay_s")
    if intent.deadline_s is not None and not 0 < intent.deadline_s <= _MAX_DELAY_S:
        raise InvalidInput("deadline_s is above 0 and at most ten years", param="deadline_s")
    if intent.deadline_s is not None and intent.deadline_s <= intent.delay_s:
        raise InvalidInput("the deadline is before the start", param="deadline_s")
    for label in intent.labels.items():
        if any("\0" in text for text in label):
            raise InvalidInput("a label has no NUL character", param="labels")
    for key in intent.keys:
        if not key or KEY_SEPARATOR in key:
            raise InvalidInput("a key is a text without control characters", param="keys")


def deadline_of(
    flow_s: float | None, *, given_s: float | None = None, delay_s: float = 0.0
) -> float | None:
    """Return by when a run is over: as given, else the flow's own deadline, which counts from its start."""
    if given_s is not None or flow_s is None:
        return given_s
    return delay_s + flow_s


async def submit(
    con: Connection, intents: Sequence[Intent], ticket: Ticket | None = None
) -> list[uuid.UUID]:
    """Insert one run per intent and return their ids in order.

    `con` is in a transaction scoped to the intents' org; the runs exist when that commits. The
    caller hints the queues after its commit. A `ticket` pays for them; without one nothing does. Raises
    InvalidInput naming the field, and BlockGone when what should pay was taken back.
    """
    if not intents:
        return []
    _check_all(intents, ticket)
    await _insert(con, intents, ticket)
    await keep(
        con,
        [
            Payload(intent.org_id, intent.run_id, INPUT, intent.input.decode())
            for intent in intents
            if _is_big(intent)
        ],
    )
    return [intent.run_id for intent in intents]


async def submit_alone(
    db: Database,
    intents: Sequence[Intent],
    ticket: Ticket | None = None,
    callers: Iterable[tuple[str, Standing]] = (),
) -> list[uuid.UUID]:
    """Insert one run per intent in a transaction of their own, and return their ids in order; durable on return.

    One message instead of three, but where an input is big. Raises as `submit`, and as `Database.org_for` where the
    rights of one of the `callers` are no more what they were.
    """
    if not intents:
        return []
    _check_all(intents, ticket)
    callers = list(dict.fromkeys(callers)) if callers else []
    if any(_is_big(intent) for intent in intents):
        async with db.org_for(intents[0].org_id, callers) as con:
            return await submit(con, intents, ticket)
    async with db.alone() as con:
        await _insert(con, intents, ticket, callers)
    return [intent.run_id for intent in intents]


def _check_all(intents: Sequence[Intent], ticket: Ticket | None) -> None:
    for intent in intents:
        check(intent, intents[0].org_id)
    if ticket is not None and ticket.refusal is not None:
        raise ticket.refusal


def _is_big(intent: Intent) -> bool:
    return len(intent.input) > INLINE_BYTES


async def _insert(
    con: Connection,
    intents: Sequence[Intent],
    ticket: Ticket | None,
    callers: Sequence[tuple[str, Standing]] | None = None,
) -> None:
    """Insert all but big inputs; with `callers` as a transaction by itself, in which the statement enters the org.

    One run that starts at once is stored as it would be among many, by a statement with less to set up.
    """
    first = intents[0]
    is_plain = first.delay_s == 0 and first.deadline_s is None
    if is_plain and len(intents) == 1 and len(callers or ()) <= 1:
        await con.execute(*_one(first, ticket, callers))
    else:
        await _insert_many(con, intents, ticket, callers)
    if ticket is not None:
        ticket.spent = len(intents)


def _one(
    intent: Intent, ticket: Ticket | None, callers: Sequence[tuple[str, Standing]] | None
) -> tuple[Any, ...]:
    """Return the statement that stores one run, and what it is given."""
    place = _place_of(intent)
    more, backing = _more(intent), intent.backing
    plain = (
        _PLAIN,
        intent.org_id,
        intent.run_id,
        intent.flow,
        intent.version,
        intent.queue,
        intent.subject,
        intent.priority,
        place.keys,
        intent.timeout_s,
        intent.traceparent,
        _labels(intent),
        None if _is_big(intent) else intent.input.decode(),
        place.lane_id,
        place.offset_us,
        _told(intent, place),
        _duties(intent),
        None if backing is None else backing.stamp,
        None if backing is None else backing.permission,
        callers is not None,
        *(_of(*callers[0]) if callers else _NOBODY),
        None if ticket is None else ticket.blocks,
    )
    if not more and not intent.behind:
        return plain
    return (_ONE, *plain[1:], intent.behind or None, _text(more) if more else None)


async def _insert_many(
    con: Connection,
    intents: Sequence[Intent],
    ticket: Ticket | None,
    callers: Sequence[tuple[str, Standing]] | None,
) -> None:
    standings = [] if callers is None else [standing for _, standing in callers]
    places = [_place_of(intent) for intent in intents]
    status = await con.execute(
        _SQL["submit"],
        intents[0].org_id,
        [intent.run_id for intent in intents],
        [intent.flow for intent in intents],
        [intent.version for intent in intents],
        [intent.queue for intent in intents],
        [intent.subject for intent in intents],
        [intent.priority for intent in intents],
        [place.keys for place in places],
        [intent.timeout_s for intent in intents],
        [intent.traceparent for intent in intents],
        [_labels(intent) for intent in intents],
        [None if _is_big(intent) else intent.input.decode() for intent in intents],
        [place.lane_id for place in places],
        [place.offset_us for place in places],
        [intent.delay_s for intent in intents],
        [_text(more) if (more := _more_of_many(intent)) else None for intent in intents],
        None if ticket is None else ticket.blocks,
        None if callers is None else [subject for subject, _ in callers],
        [standing.stamp for standing in standings],
        [standing.session_id for standing in standings],
        [standing.grant_id for standing in standings],
        [_told(intent, place) for intent, place in zip(intents, places, strict=True)],
    )
    if ticket is not None and ticket.blocks is not None and status != f"INSERT 0 {len(intents)}":
        raise BlockGone("what should pay for the runs was taken back")


def _of(subject: str, standing: Standing) -> tuple[str, int, uuid.UUID | None, uuid.UUID | None]:
    return subject, standing.stamp, standing.session_id, standing.grant_id


def _told(intent: Intent, place: _Place) -> str:
    """Return what a run's first event tells, as JSON text."""
    origin = intent.origin
    if origin is None or origin.kind != "rerun":
        return place.told
    told = {"flow": intent.flow, "queue": intent.queue, "rerun_of": str(origin.run_id)}
    if origin.from_step is not None:
        told["rerun_from"] = origin.from_step
    return orjson.dumps(told).decode()


def _labels(intent: Intent) -> str:
    return orjson.dumps(dict(intent.labels)).decode() if intent.labels else "{}"


def _place_of(intent: Intent) -> _Place:
    return _place(
        intent.queue,
        intent.org_id,
        intent.flow,
        intent.version,
        tuple(intent.keys),
        intent.priority,
        intent.urgency,
    )


def _duties(intent: Intent) -> int:
    """Return as bits what the end of a run has to see to."""
    duties = intent.duties
    if intent.delay_s > 0 or intent.deadline_s is not None:
        duties |= _WAITS
    if intent.dedup_key is not None:
        duties |= _KEY
    if intent.parent is not None:
        duties |= _PARENT
    return duties


def _more(intent: Intent) -> dict[str, Json]:
    """Return what few runs have; nothing for most."""
    more: dict[str, Json] = {}
    if intent.dedup_key is not None:
        more["dedup_key"] = intent.dedup_key
    if intent.parent is not None:
        more["parent_id"] = intent.parent.run_id
        more["parent_key"] = intent.parent.step_key
        more["close_policy"] = intent.parent.close_policy
    if intent.origin is not None:
        if intent.origin.kind == "rerun":
            more["rerun_of"] = intent.origin.run_id
            more["rerun_from"] = intent.origin.from_step
        else:
            more["continued_from"] = intent.origin.run_id
    if intent.urgency != STANDARD:
        more["urgency"] = intent.urgency
    if intent.backing is not None and intent.backing.lent is not None:
        more["lent"], more["granted_by"] = intent.backing.lent, intent.backing.granted_by
    return more


def _more_of_many(intent: Intent) -> dict[str, Json]:
    """Return what not every one of many runs has."""
    more = _more(intent)
    if intent.deadline_s is not None:
        more["deadline_s"] = intent.deadline_s
    if intent.behind:
        more["behind"] = list(intent.behind)
    if intent.backing is not None:
        more["stamp"], more["permission"] = intent.backing.stamp, intent.backing.permission
    if duties := _duties(intent):
        more["duties"] = duties
    return more


def _text(more: dict[str, Json]) -> str:
    # The driver's ids are of a class of its own.
    return orjson.dumps(more, default=str).decode()
