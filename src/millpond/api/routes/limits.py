"""Limits: ceilings on keys, of an org for itself and of the platform for everybody.

Called by clients. Invariant: an org never sees what the platform limits for another org by name.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from millpond.api.auth import Caller, permit, requires
from millpond.api.bodies import described, read_json
from millpond.api.documented import failures
from millpond.api.models import Listing
from millpond.api.models_limits import LimitKind, LimitOut, PutLimit, RecordedRun
from millpond.api.reply import listing, reply
from millpond.api.routes.platform import Reader as PlatformReader
from millpond.api.routes.platform import Writer as PlatformWriter
from millpond.api.texts import LongWord, Word, moment
from millpond.engine import ceilings, easing, recorded
from millpond.engine.ceilings import Limit, Source
from millpond.engine.easing import Braked
from millpond.engine.recorded import Recorded, Wanted
from millpond.engine.rules import Rule
from millpond.engine.tokens import need_of, without_need
from millpond.types import NO_ORG

router = APIRouter(prefix="/v1", tags=["limits"])

Reader = Annotated[Caller, requires("limits:read")]
Writer = Annotated[Caller, requires("limits:write")]
Key = Annotated[LongWord, Query(description="The key of the limit.")]
Kind = Annotated[LimitKind, Query(description="The kind of the limit.")]
_WRITES = (400, 401, 403, 404, 409, 413, 415, 422, 503)
# A place in the list of all orgs: an org and a run.
_PLACE = r"^[0-9]{1,18}-[0-9a-f]{32}$"
# What an org is told of who set a limit of the platform.
_HIDDEN: dict[Source, str] = {"api": "operator", "settings": "settings", "code": "code"}
_GONE: dict[int | str, dict[str, Any]] = {204: {"description": "It is gone."}}


@router.get(
    "/limits",
    operation_id="list_limits",
    responses={200: {"model": Listing[LimitOut]}, **failures(401, 403, 503)},
)
async def list_limits(caller: Reader) -> Response:
    """List what limits the org's work: its own limits, and the platform's that hold for it."""
    async with caller.org() as con:
        found = await ceilings.list_limits(con, caller.org_id)
        braked = await easing.list_brakes(con)
    shown = [limit_json(one, braked, is_operator=False) for one in found]
    return reply(listing(shown, has_more=False))


@router.put(
    "/limits",
    operation_id="put_limit",
    openapi_extra=described(PutLimit),
    responses={200: {"model": LimitOut}, **failures(*_WRITES)},
)
async def put_limit(request: Request, caller: Writer) -> Response:
    """Set a limit on the org's own work; it holds from the next claim on."""
    return await _put(caller, await read_json(request, PutLimit))


@router.delete(
    "/limits",
    operation_id="delete_limit",
    status_code=204,
    responses={**_GONE, **failures(401, 403, 404, 422, 503)},
)
async def delete_limit(caller: Writer, key: Key, kind: Kind = "concurrency") -> Response:
    """Remove a limit on the org's own work."""
    return await _delete(caller, key, kind)


async def _wanted(
    since: Annotated[
        datetime | None, Query(description="Made at or after. Unset: 24 hours ago.")
    ] = None,
    queue: Annotated[Word | None, Query(description="Only this queue.")] = None,
    limit: Annotated[int, Query(ge=1, le=2000, description="How many entries at most.")] = 200,
) -> Wanted:
    begin = moment(since, "since") or datetime.now(UTC) - timedelta(days=1)
    return Wanted(since=begin, queue=queue, limit=limit)


WantedRuns = Annotated[Wanted, Depends(_wanted)]


@router.get(
    "/limits/recorded-runs",
    operation_id="list_recorded_runs",
    responses={200: {"model": Listing[RecordedRun]}, **failures(401, 403, 422, 503)},
)
async def list_recorded_runs(
    caller: Reader,
    wanted: WantedRuns,
    after: Annotated[
        uuid.UUID | None, Query(description="Go on after this id: `last_id` of a page.")
    ] = None,
) -> Response:
    """List the org's runs that have ended as a replay needs them, newest first: when they came, how long they took.

    Needs `runs:read` too.
    """
    permit(caller.principal, "runs:read")
    async with caller.org() as con:
        found, has_more = await recorded.list_recorded(con, caller.org_id, wanted, after)
    return reply(listing([_recorded_json(one) for one in found], has_more=has_more))


@router.get(
    "/platform/limits",
    operation_id="list_platform_limits",
    responses={200: {"model": Listing[LimitOut]}, **failures(401, 403, 503)},
)
async def list_platform_limits(caller: PlatformReader) -> Response:
    """List what the platform limits, for all orgs together or for each."""
    async with caller.org() as con:
        found = await ceilings.list_platform_limits(con)
        braked = await easing.list_brakes(con)
    shown = [limit_json(one, braked, is_operator=True) for one in found]
    return reply(listing(shown, has_more=False))


@router.put(
    "/platform/limits",
    operation_id="put_platform_limit",
    openapi_extra=described(PutLimit),
    responses={200: {"model": LimitOut}, **failures(*_WRITES)},
)
async def put_platform_limit(request: Request, caller: PlatformWriter) -> Response:
    """Set a limit for everybody: on a key over all orgs, or with `org:*` or `org:slug` on each or one."""
    return await _put(caller, await read_json(request, PutLimit))


@router.delete(
    "/platform/limits",
    operation_id="delete_platform_limit",
    status_code=204,
    responses={**_GONE, **failures(401, 403, 404, 422, 503)},
)
async def delete_platform_limit(
    caller: PlatformWriter, key: Key, kind: Kind = "concurrency"
) -> Response:
    """Remove a limit of the platform: what settings or code declare below it holds then.

    One that is declared itself comes back with the next process that starts and declares it.
    """
    return await _delete(caller, key, kind)


@router.get(
    "/platform/limits/recorded-runs",
    operation_id="list_platform_recorded_runs",
    responses={200: {"model": Listing[RecordedRun]}, **failures(401, 403, 422, 503)},
)
async def list_platform_recorded_runs(
    caller: PlatformReader,
    wanted: WantedRuns,
    after: Annotated[
        str | None,
        Query(pattern=_PLACE, description="Go on after this id: `last_id` of a page."),
    ] = None,
) -> Response:
    """List all orgs' runs that have ended as a replay needs them, by org, oldest first, without what they were about.

    Of keys only those that flows declare are told, and what was used of these.
    """
    async with caller.org() as con:
        found, has_more = await recorded.list_recorded_of_all(con, wanted, _place(after))
    return reply(listing([_recorded_json(one) for one in found], has_more=has_more))


def _place(after: str | None) -> tuple[int, uuid.UUID] | None:
    if after is None:
        return None
    org_id, _, run_id = after.partition("-")
    return int(org_id), uuid.UUID(run_id)


async def _put(caller: Caller, wish: PutLimit) -> Response:
    rule = Rule(owner=caller.org_id, **wish.model_dump())
    async with caller.org() as con:
        made = await ceilings.set_limit(con, caller.org_id, rule, caller.principal.subject)
        now = made.rule
        details = {"maximum": now.maximum, "period_s": now.period_s, "burst": now.burst}
        await caller.tell(con, "limit.set", f"limit:{now.kind} {now.key}", details=details)
        braked = await easing.list_brakes(con)
    caller.ports.hints.wake(["*"])
    return reply(limit_json(made, braked, is_operator=caller.org_id == NO_ORG))


async def _delete(caller: Caller, key: str, kind: LimitKind) -> Response:
    async with caller.org() as con:
        key = await ceilings.remove_limit(con, caller.org_id, key, kind)
        await caller.tell(con, "limit.removed", f"limit:{kind} {key}")
    caller.ports.hints.wake(["*"])
    return Response(status_code=204)


def _recorded_json(run: Recorded) -> dict[str, Any]:
    return {
        "id": run.run_id if run.org is None else f"{run.org_id}-{run.run_id.hex}",
        "object": "recorded_run",
        "org": run.org,
        "flow": run.flow,
        "version": run.version,
        "queue": run.queue,
        "keys": without_need(run.keys),
        "tokens": need_of(run.keys),
        "used": None if run.used is None else [one._asdict() for one in run.used],
        "priority": run.priority,
        "urgency": run.urgency,
        "ready_at": run.ready_at,
        "started_at": run.started_at,
        "worked_s": run.worked_s,
    }


def limit_json(limit: Limit, braked: Iterable[Braked], *, is_operator: bool) -> dict[str, Any]:
    """Return a limit; who set one of the platform's, and what it stands above, is shown to operators only."""
    rule = limit.rule
    is_hidden = limit.is_of_platform and not is_operator
    return {
        "id": f"{rule.kind} {rule.key}",
        "object": "limit",
        "key": rule.key,
        "kind": rule.kind,
        "maximum": rule.maximum,
        "period_s": rule.period_s,
        "burst": rule.burst,
        "is_of_platform": limit.is_of_platform,
        "set_by": _HIDDEN[limit.source] if is_hidden else limit.set_by,
        "set_at": limit.set_at,
        "source": limit.source,
        "overrides": [
            {
                "source": one.source,
                "set_by": one.set_by,
                "maximum": one.rule.maximum,
                "period_s": one.rule.period_s,
                "burst": one.rule.burst,
            }
            for one in limit.overrides
        ],
        "factor": round(easing.part_of(rule, braked), 4),
    }
