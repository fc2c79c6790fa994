"""Starting: what was decided about events becomes runs, with what groups and triggers keep of it.

Called by `inbound` in the transaction of the decision. Invariants: an event tells of every run that it
started; a trigger whose flow cannot take an event says why, counts it as dropped, and others go on.
"""

from __future__ import annotations

import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import orjson

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine import features, quotas, targets
from millpond.engine.gathering import Fire, Group
from millpond.engine.quotas import USED_UP, Ticket
from millpond.engine.submit import deadline_of, submit
from millpond.engine.targets import Target
from millpond.engine.triggers import LABEL
from millpond.engine.waits import Readied
from millpond.types import Intent, Json, new_id

_SQL = queries("inbound")
FEATURE = "triggers"
EVENT_LABEL = "millpond.event"
GroupKey = tuple[uuid.UUID, str]
_Trigger = tuple[int, uuid.UUID]
# What events (org, event id) are told of the runs that they started.
_Runs = dict[tuple[int, str], list[Json]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """One run to start: the trigger's row and the events that the run gets."""

    row: Record
    fire: Fire


@dataclass
class Outcome:
    """What a transaction has decided on so far."""

    starts: list[Start] = field(default_factory=list)
    kept: list[tuple[int, GroupKey, Group]] = field(default_factory=list)
    ended: list[tuple[int, GroupKey]] = field(default_factory=list)
    dropped: dict[_Trigger, int] = field(default_factory=lambda: defaultdict(int))
    errors: dict[_Trigger, str | None] = field(default_factory=dict)

    def drop(self, row: Record, events: int) -> None:
        """Count events of a trigger that get no run."""
        if events:
            self.errors.setdefault(_of(row), row["last_error"])
            self.dropped[_of(row)] += events

    def refuse(self, row: Record, error: str) -> None:
        """Count an event that a trigger cannot take, and say why."""
        self.errors[_of(row)] = error
        self.dropped[_of(row)] += 1


async def carry_out(
    con: Connection, outcome: Outcome, at_once: Iterable[str] = (), ticket: Ticket | None = None
) -> list[Readied]:
    """Write what was decided; returns the new runs. `at_once` are the events just received.

    A `ticket` pays for the runs of the one org that they are of; without one they are paid for here. Triggers and
    events are locked after what pays, in which order those lock who give back quotas.
    """
    known = {_of(start.row): start.row["last_error"] for start in outcome.starts}
    await _store_groups(con, outcome)
    intents, runs = await _make(con, outcome, frozenset(at_once), ticket)
    by_org: dict[int, list[Intent]] = defaultdict(list)
    for intent in intents:
        by_org[intent.org_id].append(intent)
    for of_org in by_org.values():
        await submit(con, of_org, ticket)
    await _note(con, outcome, known)
    await _add_runs(con, runs)
    return [Readied(org_id=one.org_id, run_id=one.run_id, queue=one.queue) for one in intents]


async def _make(
    con: Connection, outcome: Outcome, fresh: frozenset[str], ticket: Ticket | None
) -> tuple[list[Intent], _Runs]:
    """Make intents of the starts that their flows take, and what to tell events of them."""
    rows = [start.row for start in outcome.starts]
    found = await targets.find(con, [(row["flow"], row["version"]) for row in rows])
    documents = [_document(start) for start in outcome.starts]
    without = await features.without(con, {row["org_id"] for row in rows}, FEATURE)
    misfits = [
        features.off(FEATURE)
        if row["org_id"] in without
        else _misfit(row["flow"], found.get((row["flow"], row["version"])), document)
        for row, document in zip(rows, documents, strict=True)
    ]
    fitting = Counter(
        row["org_id"] for row, misfit in zip(rows, misfits, strict=True) if misfit is None
    )
    paid = await _paid(con, fitting, ticket)
    senders = await _senders(con, outcome.starts)
    intents: list[Intent] = []
    runs: _Runs = defaultdict(list)
    for start, document, misfit in zip(outcome.starts, documents, misfits, strict=True):
        row, error = start.row, misfit
        target = found.get((row["flow"], row["version"]))
        if error is None:
            paid[row["org_id"]] -= 1
            error = USED_UP if paid[row["org_id"]] < 0 else None
        if target is None or error is not None:
            outcome.drop(row, len(start.fire))
        else:
            intent = _intent(start, target, document, senders)
            intents.append(intent)
            told = {"run_id": str(intent.run_id), "trigger": row["name"]}
            for held in start.fire:
                event_id = held.document["id"]
                at_once = {"at_once": event_id in fresh}
                runs[row["org_id"], event_id].append({**told, **at_once})
        outcome.errors[_of(row)] = error
    return intents, runs


async def _paid(con: Connection, wanted: Mapping[int, int], ticket: Ticket | None) -> Counter[int]:
    """Spend of orgs' quotas for so many runs of each; returns how many of them that pays for."""
    paid: Counter[int] = Counter()
    for org_id in sorted(wanted):
        if ticket is None:
            paid[org_id] = await quotas.take_now(con, org_id, wanted[org_id])
        else:
            paid[org_id] = ticket.allowed(wanted[org_id])
    return paid


async def _store_groups(con: Connection, outcome: Outcome) -> None:
    if outcome.ended:
        await con.execute(_SQL["end_groups"], *group_columns(outcome.ended))
    if outcome.kept:
        groups = [group for _, _, group in outcome.kept]
        await con.execute(
            _SQL["keep_groups"],
            *group_columns([(org_id, key) for org_id, key, _ in outcome.kept]),
            [orjson.dumps([held.document for held in one.events]).decode() for one in groups],
            [one.dropped for one in groups],
            [one.first_at for one in groups],
            [one.due_at for one in groups],
        )


async def _note(con: Connection, outcome: Outcome, known: Mapping[_Trigger, str | None]) -> None:
    """Tell triggers what was dropped and how starting went, where that is news."""
    news = {key for key, error in outcome.errors.items() if key in known and error != known[key]}
    keys = sorted(news | outcome.dropped.keys())
    if keys:
        await con.execute(
            _SQL["note"],
            [org_id for org_id, _ in keys],
            [trigger_id for _, trigger_id in keys],
            [outcome.dropped.get(key, 0) for key in keys],
            [outcome.errors[key] for key in keys],
        )


async def _add_runs(con: Connection, runs: _Runs) -> None:
    if runs:
        keys = sorted(runs)
        await con.execute(
            _SQL["add_runs"],
            [org_id for org_id, _ in keys],
            [event_id for _, event_id in keys],
            [orjson.dumps(runs[key]).decode() for key in keys],
        )


def group_columns(
    keys: Sequence[tuple[int, GroupKey]],
) -> tuple[list[int], list[uuid.UUID], list[str]]:
    """Return the keys of groups as arrays for a statement."""
    return (
        [org_id for org_id, _ in keys],
        [trigger_id for _, (trigger_id, _) in keys],
        [group_key for _, (_, group_key) in keys],
    )


async def _senders(con: Connection, starts: Sequence[Start]) -> dict[tuple[int, str], str]:
    """Return who sent the events of runs that are to start."""
    events = {(one.row["org_id"], held.document["id"]) for one in starts for held in one.fire}
    if not events:
        return {}
    rows = await con.fetch(_SQL["senders"], [one for one, _ in events], [one for _, one in events])
    return {(row["org_id"], row["event_id"]): row["sent_by"] for row in rows}


def _intent(
    start: Start, target: Target, document: Json, senders: Mapping[tuple[int, str], str]
) -> Intent:
    row = start.row
    sent_by = {senders.get((row["org_id"], held.document["id"])) for held in start.fire}
    labels = {**orjson.loads(row["labels"]), LABEL: row["name"]}
    if len(start.fire) == 1:
        labels[EVENT_LABEL] = start.fire[0].document["id"]
    return Intent(
        org_id=row["org_id"],
        run_id=new_id(),
        flow=target.flow,
        version=target.version,
        queue=row["queue"] or target.queue,
        input=orjson.dumps(document),
        subject=f"service:trigger:{row['name']}",
        behind=sorted({row["created_by"], *row["changed_by"], *filter(None, sent_by)}),
        priority=row["priority"],
        keys=target.keys,
        urgency=target.urgency,
        timeout_s=target.timeout_s,
        deadline_s=deadline_of(target.deadline_s),
        labels=labels,
    )


def _misfit(flow: str, target: Target | None, document: Json) -> str | None:
    if target is None:
        return f"flow_not_found: no worker has published the flow {flow}"
    return target.misfit(document)


def _document(start: Start) -> Json:
    events = [held.document for held in start.fire]
    return {"events": events} if start.row["mode"] == "batch" else {"event": events[-1]}


def _of(row: Record) -> _Trigger:
    return row["org_id"], row["trigger_id"]
