"""Accepting work: an authorized, validated wish becomes a durable run, once per idempotency key.

Called by the routes that answer 202. Invariant: nothing is answered before the commit, and what a
key stands for is stored in the transaction of its run.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import Header

from millpond.api.auth import Caller
from millpond.api.batches import KeyHeld, Promise, claim_keys
from millpond.api.models import StartRun
from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine import dedup
from millpond.engine.dedup import Holder, OnDuplicate, Settled
from millpond.engine.keying import check_keys
from millpond.engine.quotas import Ticket
from millpond.engine.submit import deadline_of, submit
from millpond.engine.views import FlowView
from millpond.errors import Forbidden, InvalidInput, OverQuota
from millpond.types import Intent, Json, Principal, RunState, Urgency, lesser

R = TypeVar("R")
Make = Callable[[Connection], Awaitable[Intent]]
Follow = Callable[[Connection, Intent], Awaitable[None]]

_SQL = queries("accept")
_KEY = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,253}[\x21-\x7e])?")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """A run as it was accepted, now or by the first request with the same key.

    Not `is_new`: the live run that a wish with the same deduplication key joined.
    """

    run_id: uuid.UUID
    flow: str
    version: int
    queue: str
    priority: int
    labels: Mapping[str, str]
    state: str
    is_new: bool = True
    is_repeat: bool = False


def promised(key: str | None, route: str, digest: Callable[[], bytes]) -> Promise | None:
    """Return the promise of a request with this Idempotency-Key, None without one."""
    if key is None:
        return None
    if not _KEY.fullmatch(key):
        raise InvalidInput(
            "An Idempotency-Key has 1 to 255 visible ASCII characters.",
            code="malformed_header",
            param="Idempotency-Key",
        )
    return Promise(key=key, route=route, digest=digest())


def wellformed(traceparent: str | None) -> str | None:
    """Return the trace context, or None when it is malformed: the standard asks to go on without."""
    return traceparent if traceparent and _TRACEPARENT.fullmatch(traceparent) else None


def intent_of(
    caller: Caller, wish: StartRun, flow: FlowView, traceparent: str | None = None
) -> Intent:
    """Return the intent of a validated wish; the flow's own deadline counts from its start."""
    return Intent(
        org_id=caller.org_id,
        flow=flow.name,
        version=flow.version,
        queue=wish.queue or flow.queue,
        input=orjson.dumps(wish.input),
        subject=caller.principal.subject,
        priority=wish.priority,
        delay_s=wish.delay_s,
        keys=check_keys(wish.keys, declared=flow.keys, tokens=wish.tokens),
        timeout_s=flow.timeout_s,
        traceparent=wellformed(traceparent),
        labels=wish.labels,
        deadline_s=deadline_of(flow.deadline_s, given_s=wish.deadline_s, delay_s=wish.delay_s),
        dedup_key=wish.dedup_key,
        backing=caller.principal.backing("runs:start", flow.permission),
        urgency=_urgency(wish, flow),
    )


def _urgency(wish: StartRun, flow: FlowView) -> Urgency:
    """Return the class of a run: the flow's, or a lesser one as asked for; raises InvalidInput for a higher one."""
    if wish.urgency is None:
        return flow.urgency
    if lesser(wish.urgency, flow.urgency) != wish.urgency:
        raise InvalidInput(
            f"{flow.name} is not {wish.urgency}: a run may be called less urgent than its flow, not more.",
            code="urgency_above_flow",
            param="urgency",
            advice="leave it out, or declare it on the flow",
        )
    return wish.urgency


class _TakenMeanwhile(Exception):
    """A rival committed the same key first."""


async def accept(
    caller: Caller,
    intent: Intent,
    promise: Promise | None = None,
    on_duplicate: OnDuplicate = "reject",
) -> Accepted:
    """Store a run and wake its queue; a repeat of a promise returns the first run instead.

    Raises InvalidInput when the key was used for something else, and Conflict when the intent's
    deduplication key belongs to a live run and `on_duplicate` says so.
    """
    is_delayed = intent.delay_s > 0
    try:
        is_stored = await caller.ports.batches.submit(intent, promise, caller.principal.standing)
    except KeyHeld:
        return await _settle(caller, intent, promise, on_duplicate)
    except OverQuota:
        if promise is None and intent.dedup_key is None:
            raise
        # A repeat costs nothing, nor does joining a live run.
        return await _settle(caller, intent, promise, on_duplicate)
    if not is_stored:
        assert promise is not None
        async with caller.org() as con:
            return await _first(con, caller.principal, promise, is_delayed=is_delayed)
    if not is_delayed:
        caller.ports.hints.wake([intent.queue])
    return _accepted(intent)


async def _settle(
    caller: Caller, intent: Intent, promise: Promise | None, on_duplicate: OnDuplicate
) -> Accepted:
    """Return the first run of a promise; join, replace or be refused for a live run with the same deduplication key."""
    is_delayed = intent.delay_s > 0

    async def work(ticket: Ticket) -> Accepted | Settled:
        async with caller.org() as con:
            wanted = [] if promise is None else [(intent, promise)]
            if promise is not None and not await claim_keys(con, caller.org_id, wanted):
                return await _first(con, caller.principal, promise, is_delayed=is_delayed)
            settled = Settled()
            if intent.dedup_key is not None:
                settled = await dedup.settle(con, intent, on_duplicate)
            if settled.joined is not None:
                return await _join(con, caller.principal, settled.joined, promise)
            await submit(con, [intent], ticket)
            return settled

    settled = await paid(caller, 1, work)
    if isinstance(settled, Accepted):
        return settled
    hint_replaced(caller, [settled.replaced])
    if not is_delayed:
        caller.ports.hints.wake([intent.queue])
    return _accepted(intent)


async def paid(caller: Caller, amount: int, work: Callable[[Ticket], Awaitable[R]]) -> R:
    """Do `work`, a transaction that submits at most `amount` runs, paid by the org's quotas.

    Where they are used up it is done all the same and raises OverQuota as it submits: what needs no new run, such as a
    repeat, costs nothing.
    """
    try:
        return await caller.ports.reserver.spending(caller.org_id, amount, work)
    except OverQuota as error:
        return await work(Ticket(0, refusal=error))


async def _join(
    con: Connection, principal: Principal, live: Holder, promise: Promise | None
) -> Accepted:
    if promise is not None:
        answer = orjson.dumps({"state": live.state}).decode()
        await note_answer(con, principal, promise, live.run_id, answer)
    return Accepted(
        run_id=live.run_id,
        flow=live.flow,
        version=live.version,
        queue=live.queue,
        priority=live.priority,
        labels=orjson.loads(live.labels),
        state=live.state,
        is_new=False,
    )


async def note_answer(
    con: Connection, principal: Principal, promise: Promise, run_id: uuid.UUID, answer: str
) -> None:
    """Store what is answered under a key claimed in this transaction, as JSON text."""
    await con.execute(_SQL["note_answer"], *_of(principal, promise), run_id, answer)


async def find_answer(con: Connection, principal: Principal, promise: Promise) -> Json | None:
    """Return what was answered under a key, if it stands for something.

    Raises InvalidInput when that was another request.
    """
    row = await _find(con, principal, promise)
    if row is None:
        return None
    if row["digest"] != promise.digest:
        raise _reused()
    return orjson.loads(row["answer"])


def hint_replaced(caller: Caller, replaced: Iterable[uuid.UUID | None]) -> None:
    """Tell workers and streams of runs that lost their key to a new one."""
    if run_ids := [run_id for run_id in replaced if run_id is not None]:
        caller.ports.hints.cancelled(run_ids)
        caller.ports.hints.changed(run_ids)


async def accept_with(
    caller: Caller,
    make: Make,
    promise: Promise | None = None,
    *,
    follow: Follow | None = None,
    is_delayed: bool = False,
) -> Accepted:
    """Store what `make` stores together with the run that it returns, in one transaction.

    `follow` may add to the submitted run. A repeat of a promise stores nothing and returns the first
    run; `is_delayed` tells whether that one was.
    """

    async def work(ticket: Ticket) -> Accepted | Intent:
        async with caller.org() as con:
            if promise is not None and await _find(con, caller.principal, promise) is not None:
                return await _first(con, caller.principal, promise, is_delayed=is_delayed)
            intent = await make(con)
            if promise and not await claim_keys(con, caller.org_id, [(intent, promise)]):
                raise _TakenMeanwhile
            await submit(con, [intent], ticket)
            if follow is not None:
                await follow(con, intent)
        return intent

    try:
        made = await paid(caller, 1, work)
    except _TakenMeanwhile:
        assert promise is not None
        async with caller.org() as con:
            return await _first(con, caller.principal, promise, is_delayed=is_delayed)
    if isinstance(made, Accepted):
        return made
    caller.ports.hints.wake([made.queue])
    return _accepted(made)


async def is_repeat(con: Connection, principal: Principal, promise: Promise) -> bool:
    """Whether this was asked before under the same key; raises InvalidInput if something else was."""
    row = await _find(con, principal, promise)
    if row is not None and row["digest"] != promise.digest:
        raise _reused()
    return row is not None


async def keep_promise(
    con: Connection, principal: Principal, promise: Promise, run_id: uuid.UUID
) -> bool:
    """Take a key for something that is done to a run; False when a rival took it first."""
    rows = await con.fetch(
        _SQL["claim_keys"],
        principal.org_id,
        [principal.subject],
        [promise.route],
        [promise.key],
        [promise.digest],
        [run_id],
    )
    return bool(rows)


async def recall(caller: Caller, promise: Promise, *, is_delayed: bool) -> Accepted | None:
    """Return the run that a key stands for, if any, when the wish would not be accepted now."""
    async with caller.org() as con:
        if await _find(con, caller.principal, promise) is None:
            return None
        return await _first(con, caller.principal, promise, is_delayed=is_delayed)


def may_start(principal: Principal, flow: FlowView) -> bool:
    """Whether the principal holds the permission that a flow asks for; internal flows ask in vain."""
    return flow.permission is not None and principal.may(flow.permission)


def permit_start(principal: Principal, flow: FlowView) -> None:
    """Raise Forbidden unless the principal may start `flow`."""
    if flow.permission is None:
        raise Forbidden(
            f"{flow.name} is internal: only other flows start it.",
            code="flow_internal",
            param="flow",
            advice="declare `permission=` on the flow to let callers start it",
        )
    if not principal.may(flow.permission):
        raise Forbidden(
            f"Starting {flow.name} needs the permission {flow.permission}.",
            code="permission_missing",
            param="flow",
        )


def digest_of(document: Json) -> bytes:
    """Return SHA-256 of a JSON document, whatever the order of its keys."""
    return hashlib.sha256(orjson.dumps(document, option=orjson.OPT_SORT_KEYS)).digest()


def accepted_json(accepted: Accepted) -> dict[str, Any]:
    """Return an accepted run as JSON: the same for the first request and for every repeat."""
    return {
        "id": accepted.run_id,
        "object": "run",
        "flow": accepted.flow,
        "version": accepted.version,
        "queue": accepted.queue,
        "state": accepted.state,
        "priority": accepted.priority,
        "labels": dict(accepted.labels),
        "is_new": accepted.is_new,
    }


def accepted_headers(accepted: Accepted) -> dict[str, str]:
    """Return the headers of a 202: where the run is, and when to look."""
    headers = {"Location": f"/v1/runs/{accepted.run_id}", "Retry-After": "1"}
    if accepted.is_repeat:
        headers["Idempotency-Replayed"] = "true"
    if not accepted.is_new:
        headers["Run-Joined"] = "true"
    return headers


def _accepted(intent: Intent) -> Accepted:
    return Accepted(
        run_id=intent.run_id,
        flow=intent.flow,
        version=intent.version,
        queue=intent.queue,
        priority=intent.priority,
        labels=intent.labels,
        state=_first_state(is_delayed=intent.delay_s > 0),
    )


def _first_state(*, is_delayed: bool) -> str:
    return RunState.SCHEDULED if is_delayed else RunState.QUEUED


async def _find(con: Connection, principal: Principal, promise: Promise) -> Record | None:
    return await con.fetchrow(_SQL["first_answer"], *_of(principal, promise))


async def _first(
    con: Connection, principal: Principal, promise: Promise, *, is_delayed: bool = False
) -> Accepted:
    row = await _find(con, principal, promise)
    if row is None or row["flow"] is None or row["digest"] != promise.digest:
        raise _reused()
    joined = orjson.loads(row["answer"]) if row["answer"] else None
    return Accepted(
        run_id=row["run_id"],
        flow=row["flow"],
        version=row["version"],
        queue=row["queue"],
        priority=row["priority"],
        labels=orjson.loads(row["labels"]),
        state=joined["state"] if joined else _first_state(is_delayed=is_delayed),
        is_new=joined is None,
        is_repeat=True,
    )


def _reused() -> InvalidInput:
    return InvalidInput(
        "This Idempotency-Key was used for another request.",
        code="idempotency_key_reused",
        param="Idempotency-Key",
        advice="use a new key for a new request",
    )


def _of(principal: Principal, promise: Promise) -> tuple[int, str, str, str]:
    return principal.org_id, principal.subject, promise.route, promise.key


_KEY_TEXT = (
    "Any text unique to this request. A repeat with the same key and body returns "
    "the first run; with another body it is refused (422)."
)
_TRACE_TEXT = "W3C trace context of the caller; the run links to it."
IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", description=_KEY_TEXT)]
Traceparent = Annotated[str | None, Header(description=_TRACE_TEXT)]


def _described(name: str, title: str, text: str) -> dict[str, Any]:
    schema = {
        "anyOf": [{"type": "string"}, {"type": "null"}],
        "description": text,
        "title": title,
    }
    return {"name": name, "in": "header", "required": False, "description": text, "schema": schema}


# The same two as a route documents them that reads them by itself, since declaring them costs each request.
ACCEPT_PARAMETERS = (
    _described("Idempotency-Key", "Idempotency-Key", _KEY_TEXT),
    _described("traceparent", "Traceparent", _TRACE_TEXT),
)
