"""Accepting work: an authorized, validated wish becomes a durable run, once per idempotency key.

Called by the routes that answer 202. Invariant: nothing is answered before the commit, and what a
key stands for is stored in the transaction of its run.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import orjson
from fastapi import Header

from millpond.api.auth import Caller
from millpond.api.batches import Promise, claim_keys
from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine.submit import submit
from millpond.engine.views import FlowView
from millpond.errors import Forbidden, InvalidInput
from millpond.types import Intent, Json, Principal, RunState

Make = Callable[[Connection], Awaitable[Intent]]
Follow = Callable[[Connection, Intent], Awaitable[None]]

_SQL = queries("accept")
_KEY = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,253}[\x21-\x7e])?")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """A run as it was accepted, now or by the first request with the same key."""

    run_id: uuid.UUID
    flow: str
    version: int
    queue: str
    priority: int
    labels: Mapping[str, str]
    is_delayed: bool
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


class _TakenMeanwhile(Exception):
    """A rival committed the same key first."""


async def accept(caller: Caller, intent: Intent, promise: Promise | None = None) -> Accepted:
    """Store a run and wake its queue; a repeat of a promise returns the first run instead.

    Raises InvalidInput when the key was used for something else.
    """
    is_delayed = intent.delay_s > 0
    if not await caller.ports.batches.submit(intent, promise):
        assert promise is not None
        async with caller.org() as con:
            return await _first(con, caller.principal, promise, is_delayed=is_delayed)
    if not is_delayed:
        caller.ports.hints.wake([intent.queue])
    return _accepted(intent)


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
    try:
        async with caller.org() as con:
            if promise is not None and await _find(con, caller.principal, promise) is not None:
                return await _first(con, caller.principal, promise, is_delayed=is_delayed)
            intent = await make(con)
            if promise and not await claim_keys(con, caller.org_id, [(intent, promise)]):
                raise _TakenMeanwhile
            await submit(con, [intent])
            if follow is not None:
                await follow(con, intent)
    except _TakenMeanwhile:
        assert promise is not None
        async with caller.org() as con:
            return await _first(con, caller.principal, promise, is_delayed=is_delayed)
    caller.ports.hints.wake([intent.queue])
    return _accepted(intent)


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
        "state": RunState.SCHEDULED if accepted.is_delayed else RunState.QUEUED,
        "priority": accepted.priority,
        "labels": dict(accepted.labels),
    }


def accepted_headers(accepted: Accepted) -> dict[str, str]:
    """Return the headers of a 202: where the run is, and when to look."""
    headers = {"Location": f"/v1/runs/{accepted.run_id}", "Retry-After": "1"}
    if accepted.is_repeat:
        headers["Idempotency-Replayed"] = "true"
    return headers


def _accepted(intent: Intent) -> Accepted:
    return Accepted(
        run_id=intent.run_id,
        flow=intent.flow,
        version=intent.version,
        queue=intent.queue,
        priority=intent.priority,
        labels=intent.labels,
        is_delayed=intent.delay_s > 0,
    )


async def _find(con: Connection, principal: Principal, promise: Promise) -> Record | None:
    return await con.fetchrow(_SQL["first_answer"], *_of(principal, promise))


async def _first(
    con: Connection, principal: Principal, promise: Promise, *, is_delayed: bool = False
) -> Accepted:
    row = await _find(con, principal, promise)
    if row is None or row["digest"] != promise.digest:
        raise _reused()
    return Accepted(
        run_id=row["run_id"],
        flow=row["flow"],
        version=row["version"],
        queue=row["queue"],
        priority=row["priority"],
        labels=orjson.loads(row["labels"]),
        is_delayed=is_delayed,
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


IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="Any text unique to this request. A repeat with the same key and body returns "
        "the first run; with another body it is refused (422).",
    ),
]
Traceparent = Annotated[
    str | None, Header(description="W3C trace context of the caller; the run links to it.")
]
