"""The audit log: read, export, verify; and the platform's own for operators.

Called by clients. Invariant: nothing here writes.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Response
from fastapi.responses import StreamingResponse

from millpond.api.auth import Caller, requires
from millpond.api.documented import failures
from millpond.api.models import Listing
from millpond.api.models_audit import AuditEntry, AuditVerification
from millpond.api.paging import Paged
from millpond.api.reply import encode, listing, reply
from millpond.api.routes.platform import Reader as PlatformReader
from millpond.api.shapes_audit import csv_line, entry_json, report_json
from millpond.api.texts import Word, moment
from millpond.engine.views import PageOf
from millpond.identity import audit_log
from millpond.identity.audit_log import AuditFilter

router = APIRouter(prefix="/v1", tags=["audit"])

Reader = Annotated[Caller, requires("audit:read")]
Seq = Annotated[int, Query(ge=0, le=2**53, description="Go on after this place of the chain.")]
_NDJSON, _CSV = "application/x-ndjson", "text/csv"
_AT_ONCE = 20_000


async def _filtered(
    subject: Annotated[Word | None, Query(description="Only what they did: `user:…`.")] = None,
    action: Annotated[
        Word | None, Query(description="Only actions that begin so, such as `member.`.")
    ] = None,
    resource: Annotated[Word | None, Query(description="Only to this: `kind:id`.")] = None,
    run_id: Annotated[uuid.UUID | None, Query(description="Only in or to this run.")] = None,
    since: Annotated[datetime | None, Query(description="Only from this time on.")] = None,
    until: Annotated[datetime | None, Query(description="Only before this time.")] = None,
) -> AuditFilter:
    return AuditFilter(
        subject=subject,
        action=action,
        resource=resource,
        run_id=run_id,
        since=moment(since, "since"),
        until=moment(until, "until"),
    )


Filtered = Annotated[AuditFilter, Depends(_filtered)]


@router.get(
    "/audit",
    operation_id="list_audit",
    responses={200: {"model": Listing[AuditEntry]}, **failures(401, 403, 422, 503)},
)
async def list_audit(caller: Reader, page: Paged, which: Filtered) -> Response:
    """List what was done in the organization, newest first."""
    return await _list(caller, page, which)


@router.get(
    "/platform/audit",
    operation_id="list_platform_audit",
    responses={200: {"model": Listing[AuditEntry]}, **failures(401, 403, 422, 503)},
)
async def list_platform_audit(caller: PlatformReader, page: Paged, which: Filtered) -> Response:
    """List what was done on the platform itself, newest first."""
    return await _list(caller, page, which)


@router.get(
    "/audit/verification",
    operation_id="verify_audit",
    responses={200: {"model": AuditVerification}, **failures(401, 403, 422, 503)},
)
async def verify_audit(
    caller: Reader,
    after: Seq = 0,
    limit: Annotated[
        int, Query(ge=1, le=_AT_ONCE, description="How many seals at most.")
    ] = _AT_ONCE,
) -> Response:
    """Compute seals of the log again, from a place on, and hold them against what was published.

    A place that is given is taken as verified. `millpond audit verify` looks at all of it, and at rows that were
    never sealed.
    """
    report = await caller.ports.auditor.verify(
        caller.org, caller.org_id, after=after, limit=limit, is_thorough=False
    )
    return reply(report_json(report))


@router.get(
    "/audit/export",
    operation_id="export_audit",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "A line per row, in the order of the seals; rows that wait for one come last.",
            "content": {name: {"schema": {"type": "string"}} for name in (_NDJSON, _CSV)},
        },
        **failures(401, 403, 422, 503),
    },
)
async def export_audit(
    caller: Reader,
    format: Annotated[
        Literal["ndjson", "csv"], Query(description="How rows are written.")
    ] = "ndjson",
    after: Seq = 0,
    limit: Annotated[int | None, Query(ge=1, description="How many rows at most.")] = None,
) -> Response:
    """Stream the log with its seals, such that whoever has the key can verify it elsewhere."""
    lines = audit_log.export(caller.org, caller.org_id, after=after, limit=limit)
    # Errors before the first row are answered as such; later ones cut the stream.
    first = await anext(lines, None)
    media_type = _CSV if format == "csv" else _NDJSON
    headers = {
        "Content-Type": media_type,
        "Content-Disposition": f'attachment; filename="audit.{format}"',
        "Cache-Control": "no-store",
    }
    return StreamingResponse(_written(first, lines, is_csv=format == "csv"), headers=headers)


async def _written(
    first: dict[str, Any] | None, lines: AsyncIterator[dict[str, Any]], *, is_csv: bool
) -> AsyncIterator[bytes]:
    if is_csv:
        yield csv_line(None)
    if first is None:
        return
    write = csv_line if is_csv else _ndjson_line
    yield write(first)
    async for line in lines:
        yield write(line)


def _ndjson_line(line: dict[str, Any]) -> bytes:
    return encode(line) + b"\n"


async def _list(caller: Caller, page: PageOf, which: AuditFilter) -> Response:
    async with caller.org() as con:
        found, has_more = await audit_log.page(con, caller.principal.org_id, page, which)
    return reply(listing([entry_json(one) for one in found], has_more=has_more))
