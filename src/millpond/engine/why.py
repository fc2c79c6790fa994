"""Why a run does not run: the exact reasons, each with a sentence and the facts behind it.

Called by the API in a snapshot of the caller's org. Invariants: all is read from one snapshot; it takes
no lock, the claim's least of all; a work item that stands queued always gets a reason.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import orjson

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine.brakes import Brake
from millpond.engine.ceilings import Full, full_for
from millpond.engine.easing import at_us
from millpond.engine.lanes import ALONE
from millpond.engine.pauses import Pause, list_pauses
from millpond.engine.registry import capability
from millpond.errors import NotFound
from millpond.types import NO_ORG, Json, RunState

_SQL = queries("why")
MAX_AHEAD = 1000
_MAX_WORKERS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Reason:
    """One reason; `inner` has those of what it waits for, where that is a work item.

    `where` is the part of the text that names a worker's host and process.
    """

    kind: str
    text: str
    facts: Mapping[str, Json] = field(default_factory=dict)
    inner: Sequence[Reason] = ()
    where: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Why:
    """Where a run stands and why it does not run, or since when it does."""

    run_id: uuid.UUID
    state: RunState
    deadline_at: datetime | None
    reasons: Sequence[Reason]

    @property
    def text(self) -> str:
        """The reasons as one line."""
        return " ".join(reason.text for reason in self.reasons)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a work item stands queued; `flow` is None for a step in another queue."""

    item_id: uuid.UUID
    queue: str
    capability: str
    flow: str | None
    lane_id: int
    rank: int


async def explain(con: Connection, org_id: int, run_id: uuid.UUID) -> Why:
    """Return why a run stands where it stands; raises NotFound when the org has no such run.

    `con` is a snapshot's, so that the reasons fit each other.
    """
    run = await con.fetchrow(_SQL["run"], org_id, run_id)
    if run is None:
        raise NotFound(f"run {run_id} does not exist", param="run_id")
    state = RunState(run["outcome"] or run["state"])
    return Why(
        run_id=run_id,
        state=state,
        deadline_at=run["deadline_at"],
        reasons=await _reasons(con, org_id, run, state),
    )


def anonymous(why: Why) -> Why:
    """Return the same without hosts and processes of workers, for who may not see workers."""
    return replace(why, reasons=[_anonymous(reason) for reason in why.reasons])


def _anonymous(reason: Reason) -> Reason:
    facts = dict(reason.facts)
    if facts.get("worker"):
        facts["worker"] = _nameless(facts["worker"])
    if "workers" in facts:
        facts["workers"] = [_nameless(worker) for worker in facts["workers"]]
    text = reason.text.replace(reason.where, "", 1) if reason.where else reason.text
    inner = [_anonymous(one) for one in reason.inner]
    return replace(reason, text=text, facts=facts, inner=inner, where="")


def _nameless(worker: Mapping[str, Json]) -> Json:
    return {name: value for name, value in worker.items() if name not in ("host", "pid")}


async def _reasons(con: Connection, org_id: int, run: Record, state: RunState) -> list[Reason]:
    if state.is_final:
        return [_finished(run, state)]
    if run["blocked"] is not None:
        return [_blocked(orjson.loads(run["blocked"]))]
    if state == RunState.SCHEDULED:
        return [await _scheduled(con, org_id, run["run_id"])]
    if state == RunState.QUEUED:
        return await _queued(con, org_id, _place_of_run(run))
    if state == RunState.RUNNING:
        return [await _running(con, org_id, run)]
    return await _waiting(con, org_id, run["run_id"])


def _finished(run: Record, state: RunState) -> Reason:
    error = orjson.loads(run["error"]) if run["error"] else None
    why = f": {error['code']}" if error else ""
    verb = "was" if state == RunState.CANCELLED else "has"
    return Reason(
        kind="finished",
        text=f"It {verb} {state} at {_at(run['finished_at'])}{why}.",
        facts={"finished_at": run["finished_at"], "error": error},
    )


def _blocked(blocked: Json) -> Reason:
    message = blocked.get("message", "") if isinstance(blocked, dict) else ""
    return Reason(
        kind="blocked",
        text=f"It stands still until a person resumes it: {message}".rstrip(": ") + ".",
        facts={"blocked": blocked},
    )


async def _scheduled(con: Connection, org_id: int, run_id: uuid.UUID) -> Reason:
    timer = await con.fetchrow(_SQL["timer"], org_id, run_id)
    until = timer["due_at"] if timer else None
    return Reason(kind="scheduled", text=f"It starts at {_at(until)}.", facts={"until": until})


# Queued


def _place_of_run(run: Record) -> _Place:
    return _Place(
        item_id=run["run_id"],
        queue=run["queue"],
        capability=_able(capability(run["flow"], run["version"]), run["lane_id"]),
        flow=run["flow"],
        lane_id=run["lane_id"],
        rank=run["rank"],
    )


def _able(able: str, lane_id: int) -> str:
    return able + ALONE if lane_id & 2 else able


async def _queued(con: Connection, org_id: int, place: _Place) -> list[Reason]:
    """Return what holds a queued work item: pauses, absent workers and full limits, else its place in line."""
    pauses = await list_pauses(con, org_id)
    held = [_paused(one) for one in pauses if one.holds(queue=place.queue, flow=place.flow)]
    workers = await con.fetch(_SQL["workers"], place.queue, place.capability)
    able = [
        row for row in workers if row["is_able"] and row["serves_queue"] and not row["draining"]
    ]
    if not able:
        held.append(_no_worker(place, workers))
    full = [_limited(one) for one in await full_for(con, org_id, place.lane_id)]
    if held:
        return [*held, *full]
    return [*full, await _in_line(con, org_id, place, able)]


def _paused(pause: Pause) -> Reason:
    scope = pause.scope
    what = (
        f"Queue {scope.queue}"
        if scope.queue
        else f"Flow {scope.flow}"
        if scope.flow
        else "All work"
    )
    by = "an operator, for everyone" if scope.is_for_everyone else pause.paused_by
    why = f" ({pause.reason})" if pause.reason else ""
    return Reason(
        kind="paused",
        text=f"{what} is paused by {by} since {_at(pause.paused_at)}{why}.",
        facts={
            "scope": scope.kind,
            "queue": scope.queue or None,
            "flow": scope.flow or None,
            "paused_by": pause.shown_by,
            "reason": pause.reason,
            "paused_at": pause.paused_at,
        },
    )


def _limited(full: Full) -> Reason:
    """Tell of a limit without room: how much of it is in use, or from when on there is some."""
    rule = full.rule
    of = "everybody's" if full.is_shared else "the organization's"
    if rule.brake is not None:
        return _braked(full, rule.brake)
    if rule.kind == "rate":
        until = f" until {_at(full.until)}" if full.until else ""
        text = f"No more starts on {rule.key}{until}: {rule.maximum} in {rule.period_s:g} s are allowed"
    else:
        known = "" if full.in_use is None else f"{full.in_use} of "
        text = f"{rule.key} has no room: {known}{rule.maximum} places are in use by {of} work"
    return Reason(
        kind="limit",
        text=f"{text}.",
        facts={
            "key": rule.key,
            "limit": rule.kind,
            "set_by": "platform" if rule.owner == NO_ORG else "org",
            "is_shared": full.is_shared,
            "in_use": full.in_use,
            "maximum": rule.maximum,
            "period_s": rule.period_s,
            "until": full.until,
            "is_exact": full.is_exact,
            "holders": list(full.holders),
        },
    )


def _braked(full: Full, brake: Brake) -> Reason:
    """Tell of a key that cools down or recovers, or whose breaker is open."""
    opened_at = at_us(brake.opened_us) if brake.opened_us else None
    if opened_at is not None:
        next_up = (
            f"next probe at {_at(full.until)}" if full.until else "one run at a time probes it"
        )
        text = f"The breaker of {brake.key} is open since {_at(opened_at)}, {next_up}"
    elif full.until is not None:
        text = f"{brake.key} is cooling down until {_at(full.until)}"
    else:
        text = f"{brake.key} recovers from a cooldown: {full.rule.maximum} at once may go by now"
    return Reason(
        kind="cooldown" if opened_at is None else "breaker",
        text=f"{text} ({brake.reason}).",
        facts={
            "key": brake.key,
            "is_of_platform": brake.owner == NO_ORG,
            "until": full.until,
            "opened_at": opened_at,
            "in_use": full.in_use,
            "maximum": full.rule.maximum,
            "hits": brake.hits,
            "step": brake.step,
            "reason": brake.reason,
            "holders": list(full.holders),
        },
    )


def _no_worker(place: _Place, workers: Sequence[Record]) -> Reason:
    """Name what is missing: workers at all, of this queue, or with this code."""
    serving = [row for row in workers if row["serves_queue"] and not row["draining"]]
    if not workers:
        text = "No worker is live."
    elif not serving:
        text = f"No live worker serves queue {place.queue}."
    else:
        text = f"No live worker of queue {place.queue} has {place.capability}."
    return Reason(
        kind="no_worker",
        text=text,
        facts={
            "queue": place.queue,
            "capability": place.capability,
            "workers": [
                {
                    "id": row["worker_id"],
                    "host": row["host"],
                    "pid": row["pid"],
                    "serves_queue": row["serves_queue"],
                    "is_able": row["is_able"],
                    "is_draining": row["draining"],
                }
                for row in workers[:_MAX_WORKERS]
            ],
        },
    )


async def _in_line(con: Connection, org_id: int, place: _Place, able: Sequence[Record]) -> Reason:
    ahead = await con.fetchval(
        _SQL["ahead"], org_id, place.lane_id, place.rank, place.item_id, MAX_AHEAD + 1
    )
    is_exact = ahead <= MAX_AHEAD
    slots, in_use = sum(row["slots"] for row in able), sum(row["in_use"] for row in able)
    shown = f"{ahead}" if is_exact else f"more than {MAX_AHEAD}"
    use = f"{in_use} of {slots} slots are in use" if slots else "only idle slots of others help it"
    return Reason(
        kind="in_line",
        text=f"It stands in line in queue {place.queue} with {shown} before it in its lane; {use}.",
        facts={
            "queue": place.queue,
            "ahead": min(ahead, MAX_AHEAD),
            "is_exact": is_exact,
            "slots": slots,
            "in_use": in_use,
        },
    )


# Running


async def _running(con: Connection, org_id: int, run: Record) -> Reason:
    run_id = run["run_id"]
    holder = await con.fetchrow(_SQL["holder"], org_id, run_id)
    steps = [
        {"step": row["step_key"], "name": row["name"], "since": row["at"]}
        for row in await con.fetch(_SQL["under_way"], org_id, run_id)
    ]
    stopping = None
    if run["cancel_requested"]:
        stopping = "deadline" if run["overdue"] else "cancel"
    where = f" on {holder['host']} (process {holder['pid']})" if holder and holder["host"] else ""
    since = holder["claimed_at"] if holder else None
    doing = f", in {', '.join(step['name'] for step in steps)}" if steps else ""
    asked = f"; it was asked to stop ({stopping})" if stopping else ""
    return Reason(
        kind="running",
        text=f"It runs since {_at(since)}{where}{doing}{asked}.",
        facts={
            "since": since,
            "attempt": run["attempt"],
            "worker": {"id": holder["worker_id"], "host": holder["host"], "pid": holder["pid"]}
            if holder
            else None,
            "steps": steps,
            "stopping": stopping,
        },
        where=where,
    )


# Waiting


async def _waiting(con: Connection, org_id: int, run_id: uuid.UUID) -> list[Reason]:
    reasons = []
    timer = await con.fetchrow(_SQL["timer"], org_id, run_id)
    if timer is not None and timer["kind"] == "retry":
        reasons.append(await _flow_backoff(con, org_id, run_id, timer["due_at"]))
    for row in await con.fetch(_SQL["waits"], org_id, run_id):
        reason = await _wait(con, org_id, row)
        if reason is not None:
            reasons.append(reason)
    return reasons


async def _flow_backoff(con: Connection, org_id: int, run_id: uuid.UUID, until: datetime) -> Reason:
    row = await con.fetchrow(_SQL["last_error"], org_id, run_id)
    error = orjson.loads(row["error"]) if row and row["error"] else None
    tries = int(row["tries"]) if row and row["tries"] else None
    after = f" after {error['class']}: {error['message']}" if error else ""
    return Reason(
        kind="backoff",
        text=f"Its flow code is tried again at {_at(until)}{after}.",
        facts={"step": None, "name": None, "until": until, "tries": tries, "error": error},
    )


async def _wait(con: Connection, org_id: int, row: Record) -> Reason | None:
    """Return what one waiting step waits for; None for one that its next claim tries again."""
    if row["request_id"] is not None:
        return _question(row)
    if row["item_kind"] == "step":
        return await _elsewhere(con, org_id, row)
    if row["state"] == "retrying":
        return _backoff(row) if row["due_at"] is not None else None
    match row["kind"]:
        case "sleep":
            return _told(row, "sleep", f"It sleeps until {_at(row['due_at'])}", until=row["due_at"])
        case "signal":
            limit = f", until {_at(row['due_at'])}" if row["due_at"] else ""
            text = f"It waits for the signal {row['name']}{limit}"
            return _told(row, "signal", text, until=row["due_at"])
        case "child" | "join":
            state = row["child_outcome"] or row["item_state"]
            text = f"It waits for run {row['ref']} of {row['child_flow']}, which is {state}"
            facts = {"run_id": row["ref"], "flow": row["child_flow"], "state": state}
            return _told(row, "child", text, **facts)
    return _told(row, "step", f"It waits for {row['name']}", until=row["due_at"])


def _told(row: Record, kind: str, text: str, **facts: Json) -> Reason:
    return Reason(
        kind=kind,
        text=f"{text}.",
        facts={"step": row["step_key"], "name": row["name"], **facts},
    )


def _backoff(row: Record) -> Reason:
    error = orjson.loads(row["error"]) if row["error"] else None
    after = f" after {error['class']}: {error['message']}" if error else ""
    return _told(
        row,
        "backoff",
        f"Step {row['name']} is tried again at {_at(row['due_at'])}{after}",
        until=row["due_at"],
        tries=row["tries"],
        error=error,
    )


def _question(row: Record) -> Reason:
    is_outcome = row["state"] == "unknown"
    asked = f"say how {row['name']} ended" if is_outcome else f"decide {row['title']!r}"
    limit = f", until {_at(row['expires_at'])}" if row["expires_at"] else ""
    return _told(
        row,
        "outcome" if is_outcome else "input",
        f"Somebody with the role {row['role']} has to {asked}{limit}",
        request_id=row["request_id"],
        role=row["role"],
        title=row["title"],
        expires_at=row["expires_at"],
    )


async def _elsewhere(con: Connection, org_id: int, row: Record) -> Reason:
    """Return why a step that executes in another queue is not over."""
    inner: Sequence[Reason] = ()
    if row["item_state"] == RunState.QUEUED:
        inner = await _queued(
            con,
            org_id,
            _Place(
                item_id=row["ref"],
                queue=row["item_queue"],
                capability=_able(row["item_capability"], row["lane_id"]),
                flow=None,
                lane_id=row["lane_id"],
                rank=row["rank"],
            ),
        )
    elif row["item_blocked"] is not None:
        inner = [_blocked(orjson.loads(row["item_blocked"]))]
    text = f"Step {row['name']} is {row['item_state']} in queue {row['item_queue']}"
    told = _told(row, "other_queue", text, queue=row["item_queue"], state=row["item_state"])
    texts = " ".join([told.text, *(reason.text for reason in inner)])
    return Reason(kind=told.kind, text=texts, facts=told.facts, inner=inner)


def _at(at: datetime | None) -> str:
    return "an unknown time" if at is None else f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
