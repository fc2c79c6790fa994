"""Access grants: an owner lets an operator of the platform into the org for a while.

Called by the API in a transaction of the caller. Invariants: a grant ends by itself within three days; it is
read-only unless said otherwise; both people stand in the audit log.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from datetime import datetime

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.engine.pages import read_page
from millpond.engine.views import PageOf
from millpond.errors import InvalidInput
from millpond.identity import audit
from millpond.identity.rights import absent, check_signed_in, enter_org, take_turn
from millpond.types import Principal, new_id

_SQL = queries("grants")
MAX_HOURS = 72


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """A grant; `granted_by` is the owner's subject."""

    grant_id: uuid.UUID
    operator_id: uuid.UUID
    operator_email: str
    granted_by: str
    reason: str
    is_read_only: bool
    created_at: datetime
    expires_at: datetime
    ended_at: datetime | None
    is_open: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A wish to let an operator in."""

    operator_email: str
    reason: str
    hours: int
    is_read_only: bool = True


async def page(
    con: Connection, org_id: int, wanted: PageOf, *, only_open: bool = False
) -> tuple[list[Grant], bool]:
    """Return one page of grants, newest first, and whether more follow."""
    rows, has_more = await read_page(con, _SQL["page"], org_id, wanted, "grant_id", only_open)
    return [Grant(**row) for row in rows], has_more


async def get(con: Connection, org_id: int, grant_id: uuid.UUID) -> Grant:
    """Return one grant; raises NotFound."""
    row = await con.fetchrow(_SQL["get"], org_id, grant_id)
    if row is None:
        raise absent("grant", grant_id, param="grant_id")
    return Grant(**row)


async def create(
    con: Connection, principal: Principal, draft: Draft, *, address: str | None = None
) -> Grant:
    """Let an operator in; raises InvalidInput when the address is no operator's, Forbidden."""
    check_signed_in(principal, "Letting an operator in")
    await take_turn(con, principal)
    operator_id = await con.fetchval(_SQL["operator"], draft.operator_email.strip().lower())
    if operator_id is None:
        raise InvalidInput(
            "no operator of this platform has this address",
            code="operator_unknown",
            param="operator_email",
        )
    grant_id = new_id()
    await con.execute(
        _SQL["add"],
        principal.org_id,
        grant_id,
        operator_id,
        principal.subject,
        draft.reason,
        draft.is_read_only,
        draft.hours,
    )
    await audit.record(
        con,
        principal,
        "grant.created",
        f"grant:{grant_id}",
        details={
            "operator": f"user:{operator_id}",
            "reason": draft.reason,
            "hours": draft.hours,
            "is_read_only": draft.is_read_only,
        },
        address=address,
    )
    return await get(con, principal.org_id, grant_id)


async def end(
    con: Connection, principal: Principal, grant_id: uuid.UUID, *, address: str | None = None
) -> None:
    """End a grant at once; one that is over stays so. Raises NotFound."""
    seen = await get(con, principal.org_id, grant_id)
    if await con.fetchval(_SQL["end"], principal.org_id, grant_id) is None:
        return
    details = {"operator": f"user:{seen.operator_id}"}
    await audit.record(
        con, principal, "grant.ended", f"grant:{grant_id}", details=details, address=address
    )


async def end_all_of(
    con: Connection, actor: Principal, former: uuid.UUID, *, address: str | None = None
) -> None:
    """End every grant of somebody who is no operator, told to each org's own log; the last of a transaction.

    They do not come back with the right: the transaction is then in the last of the orgs.
    """
    details = {"operator": f"user:{former}", "why": "operator.removed"}
    for row in await con.fetch(_SQL["end_all_of"], former):
        await enter_org(con, row["org_id"])
        await audit.record(
            con,
            replace(actor, org_id=row["org_id"]),
            "grant.ended",
            f"grant:{row['grant_id']}",
            details=details,
            address=address,
        )
