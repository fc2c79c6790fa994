"""Why a run does not run: the exact reasons, each with a sentence and the facts behind it.

Called by the API in a snapshot of the caller's org. Invariants: all is read from one snapshot; it takes
no lock, the claim's least of all; a work item that stands queued always gets a reason.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import orjson

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine.easing import at_us
from millpond.engine.needs import name_of
from millpond.engine.ordering import Basis, Estimate, all_of, any_of
from millpond.engine.registry import capability
from millpond.engine.tokens import need_of, without_need
from millpond.engine.why_queued import (
    MAX_AHEAD,
    Place,
    Reason,
    able_of,
    at_text,
    limited,
    place_of_run,
    queued,
)
from millpond.errors import NotFound
from millpond.types import Json, RunState

__all__ = ["MAX_AHEAD", "Reason", "Why", "anonymous", "explain"]

_SQL = queries("why")
_NEEDS = queries("needs")


@dataclass(frozen=True, kw_only=True, slots=True)
class Why:
    """Where a run stands and why it does not run, or since when it does.

    `estimate` is of when it starts or goes on; None for one that runs or is over.
    """

    run_id: uuid.UUID
    state: RunState
    deadline_at: datetime | None
    reasons: Sequence[Reason]
    estimate: Estimate | None = None

    @property
    def text(self) -> str:
        """The reasons as one line."""
        return " ".join(reason.text for reason in self.reasons)


async def explain(con: Connection, org_id: int, run_id: uuid.UUID) -> Why:
    """Return why a run stands where it stands; raises NotFound when the org has no such run.

    `con` is a snapshot's, so that the reasons fit each other.
    """
    run = await con.fetchrow(_SQL["run"], org_id, run_id)
    if run is None:
        raise NotFound(f"run {run_id} does not exist", param="run_id")
    state = RunState(run["outcome"] or run["state"])
    reasons = await _reasons(con, org_id, run, state)
    estimates = [one.estimate for one in reasons if one.estimate is not None]
    # What stands in line needs all that is in its way to go; of what a run waits for, one thing lets it go on.
    together = all_of if state == RunState.QUEUED and estimates else any_of
    return Why(
        run_id=run_id,
        state=state,
        deadline_at=run["deadline_at"],
        reasons=reasons,
        estimate=together(estimates),
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
        return await queued(con, org_id, place_of_run(run))
    if state == RunState.RUNNING:
        return [await _running(con, org_id, run)]
    return await _waiting(con, org_id, run["run_id"])


def _finished(run: Record, state: RunState) -> Reason:
    error = orjson.loads(run["error"]) if run["error"] else None
    why = f": {error['code']}" if error else ""
    verb = "was" if state == RunState.CANCELLED else "has"
    return Reason(
        kind="finished",
        text=f"It {verb} {state} at {at_text(run['finished_at'])}{why}.",
        facts={"finished_at": run["finished_at"], "error": error},
    )


def _blocked(blocked: Json) -> Reason:
    message = blocked.get("message", "") if isinstance(blocked, dict) else ""
    return Reason(
        kind="blocked",
        text=f"It stands still until a person resumes it: {message}".rstrip(": ") + ".",
        facts={"blocked": blocked},
        estimate=_unknown("blocked", "a person has to resume it"),
    )


async def _scheduled(con: Connection, org_id: int, run_id: uuid.UUID) -> Reason:
    timer = await con.fetchrow(_SQL["timer"], org_id, run_id)
    until = timer["due_at"] if timer else None
    return Reason(
        kind="scheduled",
        text=f"It starts at {at_text(until)}.",
        facts={"until": until},
        estimate=_timed(timer),
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
    waiting = await con.fetch(_SQL["rides"], org_id, run_id)
    # Many branches of a run may need the same keys.
    in_the_way = {
        keys: await limited(con, org_id, run["lane_id"], keys)
        for keys in {tuple(row["keys"]) for row in waiting}
    }
    rides = [
        _in_line_for_room(row, in_the_way[tuple(row["keys"])], row["since_us"]) for row in waiting
    ]
    return Reason(
        kind="running",
        text=" ".join(
            [f"It runs since {at_text(since)}{where}{doing}{asked}.", *(one.text for one in rides)]
        ),
        facts={
            "since": since,
            "attempt": run["attempt"],
            "worker": {"id": holder["worker_id"], "host": holder["host"], "pid": holder["pid"]}
            if holder
            else None,
            "steps": steps,
            "stopping": stopping,
        },
        inner=rides,
        where=where,
    )


def _in_line_for_room(row: Record, inner: Sequence[Reason], since_us: int) -> Reason:
    """Return that a step stands in line for room since then, and what is in its way."""
    name, keys = name_of(row["step_key"]), without_need(row["keys"])
    text = f"Step {name} waits for room on {', '.join(keys)}."
    return Reason(
        kind="room",
        text=" ".join([text, *(reason.text for reason in inner)]),
        facts={
            "step": row["step_key"],
            "name": name,
            "keys": keys,
            "tokens": need_of(row["keys"]),
            "since": at_us(since_us),
        },
        inner=inner,
    )


# Waiting


async def _waiting(con: Connection, org_id: int, run_id: uuid.UUID) -> list[Reason]:
    reasons = []
    timer = await con.fetchrow(_SQL["timer"], org_id, run_id)
    if timer is not None and timer["kind"] == "retry":
        reasons.append(await _flow_backoff(con, org_id, run_id, timer))
    for row in await con.fetch(_SQL["waits"], org_id, run_id):
        reason = await _wait(con, org_id, row)
        if reason is not None:
            reasons.append(reason)
    for row in await con.fetch(_NEEDS["waiting"], org_id, run_id):
        reasons.append(await _room(con, org_id, row))
    return reasons


async def _room(con: Connection, org_id: int, row: Record) -> Reason:
    """Return what a step waits for that stands in line for room on its keys, and those of its run."""
    place = Place(
        item_id=row["need_id"],
        queue=row["queue"],
        capability=capability(row["flow"], row["version"]),
        flow=row["flow"],
        lane_id=row["lane_id"],
        rank=row["rank"],
        urgency=row["urgency"],
    )
    inner = await queued(con, org_id, place)
    estimates = [one.estimate for one in inner if one.estimate is not None]
    estimate = all_of(estimates) if estimates else None
    return replace(_in_line_for_room(row, inner, row["rank"]), estimate=estimate)


async def _flow_backoff(con: Connection, org_id: int, run_id: uuid.UUID, timer: Record) -> Reason:
    until = timer["due_at"]
    row = await con.fetchrow(_SQL["last_error"], org_id, run_id)
    error = orjson.loads(row["error"]) if row and row["error"] else None
    tries = int(row["tries"]) if row and row["tries"] else None
    after = f" after {error['class']}: {error['message']}" if error else ""
    return Reason(
        kind="backoff",
        text=f"Its flow code is tried again at {at_text(until)}{after}.",
        facts={"step": None, "name": None, "until": until, "tries": tries, "error": error},
        estimate=_timed(timer),
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
            text = f"It sleeps until {at_text(row['due_at'])}"
            return replace(_told(row, "sleep", text, until=row["due_at"]), estimate=_timed(row))
        case "signal":
            limit = f", until {at_text(row['due_at'])}" if row["due_at"] else ""
            text = f"It waits for the signal {row['name']}{limit}"
            told = _told(row, "signal", text, until=row["due_at"])
            return replace(
                told, estimate=_unknown("signal", f"the signal {row['name']} may come any time")
            )
        case "child" | "join":
            state = row["child_outcome"] or row["item_state"]
            text = f"It waits for run {row['ref']} of {row['child_flow']}, which is {state}"
            facts = {"run_id": row["ref"], "flow": row["child_flow"], "state": state}
            told = _told(row, "child", text, **facts)
            return replace(
                told, estimate=_unknown("child", f"when run {row['ref']} is over is not known")
            )
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
    told = _told(
        row,
        "backoff",
        f"Step {row['name']} is tried again at {at_text(row['due_at'])}{after}",
        until=row["due_at"],
        tries=row["tries"],
        error=error,
    )
    return replace(told, estimate=_timed(row))


def _question(row: Record) -> Reason:
    is_outcome = row["state"] == "unknown"
    asked = f"say how {row['name']} ended" if is_outcome else f"decide {row['title']!r}"
    limit = f", until {at_text(row['expires_at'])}" if row["expires_at"] else ""
    told = _told(
        row,
        "outcome" if is_outcome else "input",
        f"Somebody with the role {row['role']} has to {asked}{limit}",
        request_id=row["request_id"],
        role=row["role"],
        title=row["title"],
        expires_at=row["expires_at"],
    )
    return replace(told, estimate=_unknown("human", "it waits for a person"))


async def _elsewhere(con: Connection, org_id: int, row: Record) -> Reason:
    """Return why a step that executes in another queue is not over."""
    inner: Sequence[Reason] = ()
    if row["item_state"] == RunState.QUEUED:
        inner = await queued(
            con,
            org_id,
            Place(
                item_id=row["ref"],
                queue=row["item_queue"],
                capability=able_of(row["item_capability"], row["lane_id"]),
                flow=None,
                lane_id=row["lane_id"],
                rank=row["rank"],
                urgency=row["urgency"],
            ),
        )
    elif row["item_blocked"] is not None:
        inner = [_blocked(orjson.loads(row["item_blocked"]))]
    text = f"Step {row['name']} is {row['item_state']} in queue {row['item_queue']}"
    told = _told(row, "other_queue", text, queue=row["item_queue"], state=row["item_state"])
    texts = " ".join([told.text, *(reason.text for reason in inner)])
    estimates = [one.estimate for one in inner if one.estimate is not None]
    if estimates:
        estimate = replace(all_of(estimates), is_least=True)  # then it still has to be executed
    else:
        estimate = _unknown("running", f"when step {row['name']} is over is not known")
    return Reason(kind=told.kind, text=texts, facts=told.facts, inner=inner, estimate=estimate)


# Estimates


def _timed(timer: Record | None) -> Estimate:
    """Return an estimate for what a timer starts, which then still needs a slot."""
    if timer is None or timer["due_in_s"] is None:
        return _unknown("unknown", "its time is not known")
    in_s = max(0.0, timer["due_in_s"])
    return Estimate(
        in_s=in_s, basis="timer", text=f"not before {at_text(timer['due_at'])}", is_least=True
    )


def _unknown(basis: Basis, text: str) -> Estimate:
    return Estimate(in_s=None, basis=basis, text=text)
