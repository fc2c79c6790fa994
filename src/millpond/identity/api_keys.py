"""API keys: what programs send instead of signing in.

Called by the API in a transaction of the caller; `key_reader` reads them. Invariants: a key's secret is shown
once and never stored; its scopes are no more than its maker may, and it never does more than its owner may.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine.pages import read_page
from millpond.engine.views import PageOf
from millpond.errors import InvalidInput
from millpond.identity import audit, bearers, holdings
from millpond.identity.permissions import check_permissions
from millpond.identity.rights import absent, check_within, role_now, take_turn
from millpond.types import Principal, new_id

_SQL = queries("api_keys")


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKey:
    """A key without its secret; `owner` is `user:…` or `service:…`."""

    key_id: uuid.UUID
    name: str
    prefix: str
    owner: str
    scopes: list[str]
    created_by: str
    created_at: datetime
    expires_at: datetime | None
    used_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A wish for a key; `owner` None means who asks, `expires_in_days` None never."""

    name: str
    scopes: Collection[str]
    expires_in_days: int | None = None
    owner: str | None = None


async def page(
    con: Connection,
    org_id: int,
    wanted: PageOf,
    *,
    owner: str | None = None,
    only_good: bool = False,
) -> tuple[list[ApiKey], bool]:
    """Return one page of keys, newest first, and whether more follow."""
    rows, has_more = await read_page(con, _SQL["page"], org_id, wanted, "key_id", owner, only_good)
    return [_key(row) for row in rows], has_more


async def get(con: Connection, org_id: int, key_id: uuid.UUID) -> ApiKey:
    """Return one key; raises NotFound."""
    row = await con.fetchrow(_SQL["get"], org_id, key_id)
    if row is None:
        raise absent("API key", key_id, param="key_id")
    return _key(row)


async def create(
    con: Connection, principal: Principal, draft: Draft, *, address: str | None = None
) -> tuple[ApiKey, str]:
    """Make a key; returns it with its text. Raises InvalidInput, Forbidden for scopes above the maker's rights."""
    scopes = check_permissions(draft.scopes, param="scopes")
    check_within(principal, scopes, param="scopes")
    await take_turn(con, principal)
    owner = await _owner(con, principal, draft.owner)
    text, bearer = bearers.make(bearers.KEY, principal.org_id)
    key_id = new_id()
    await con.execute(
        _SQL["add"],
        principal.org_id,
        key_id,
        draft.name,
        bearer.prefix,
        bearer.digest,
        owner,
        sorted(scopes),
        principal.subject,
        draft.expires_in_days,
    )
    await holdings.check(con, principal.org_id, "api_keys")
    await audit.record(
        con,
        principal,
        "api_key.created",
        f"key:{key_id}",
        details={
            "name": draft.name,
            "prefix": bearer.prefix,
            "owner": owner,
            "scopes": sorted(scopes),
            "expires_in_days": draft.expires_in_days,
        },
        address=address,
    )
    return await get(con, principal.org_id, key_id), text


async def revoke(
    con: Connection, principal: Principal, key_id: uuid.UUID, *, address: str | None = None
) -> None:
    """End a key; one that is revoked already stays so. Raises NotFound."""
    seen = await get(con, principal.org_id, key_id)
    if await con.fetchval(_SQL["revoke"], principal.org_id, key_id) is None:
        return
    await audit.record(
        con,
        principal,
        "api_key.revoked",
        f"key:{key_id}",
        details={"name": seen.name, "prefix": seen.prefix, "owner": seen.owner},
        address=address,
    )


async def revoke_of(
    con: Connection, principal: Principal, owner: str, why: str, *, address: str | None = None
) -> None:
    """End all keys of an owner, as `user:<id>`, for good: they do not come back with their owner."""
    for row in await con.fetch(_SQL["revoke_of"], principal.org_id, owner):
        await audit.record(
            con,
            principal,
            "api_key.revoked",
            f"key:{row['key_id']}",
            details={"name": row["name"], "prefix": row["prefix"], "owner": owner, "why": why},
            address=address,
        )


async def _owner(con: Connection, principal: Principal, wanted: str | None) -> str:
    """Return whom a key acts for: who asks, a key's own owner, or a service principal that was named."""
    own = principal.subject
    if own.startswith("key:"):
        own = str(await con.fetchval(_SQL["owner_of"], principal.org_id, uuid.UUID(own[4:])))
    owner = wanted or own
    if owner != own and not owner.startswith("service:"):
        raise InvalidInput(
            "a key acts for you or for a service principal, not for another member",
            code="key_owner",
            param="owner",
        )
    kind = owner.partition(":")[0]
    if kind not in ("user", "service") or await role_now(con, principal.org_id, owner) is None:
        raise InvalidInput(
            f"{owner} is no member and no service principal that is in use",
            code="key_owner",
            param="owner",
            advice="name a service principal as `service:<id>`",
        )
    return owner


def _key(row: Record) -> ApiKey:
    return ApiKey(**row)
