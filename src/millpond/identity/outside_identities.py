"""Outside identities: whom an issuer vouches for, known by issuer and subject, with the role that the claims gave.

`admit` is called by `outside_reader` with verified claims, the rest by the API. Invariants: an address of mail decides
nothing; a token is admitted only on the role that its own claims give, and the newest token of somebody decides their
role, so that an older one gives back nothing that was taken; an identity is never removed, since runs and the audit log
name it.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine.pages import read_page
from millpond.engine.views import PageOf
from millpond.identity import audit, issuers
from millpond.identity.claims import Match, match, values_at
from millpond.identity.issuers import Issuer
from millpond.identity.permissions import permissions_of
from millpond.identity.rights import absent, check_gives, permissions_in, take_turn
from millpond.types import Json, Principal, Standing, new_id

_SQL = queries("issuers")
_RIGHTS = queries("rights")
_MAX_LABEL_CHARS = 200
# What issuers call somebody: shown, and nothing else.
_LABELS = ("name", "preferred_username", "email", "client_id", "azp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Somebody whom an issuer vouches for; without a role they may nothing."""

    identity_id: uuid.UUID
    issuer: str
    outside_subject: str
    label: str
    role: str | None
    first_seen_at: datetime
    seen_at: datetime
    disabled_at: datetime | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Admitted:
    """What became of verified claims: a principal, or why there is none (`unmapped`, `disabled`, `untrusted`,
    `superseded`).
    """

    principal: Principal | None = None
    refused: str = ""


async def admit(
    con: Connection, org_id: int, issuer: Issuer, claims: Mapping[str, Json]
) -> Admitted:
    """Return the principal of somebody whose token is good, linking them at first sight."""
    found = mapped(claims, issuer)
    row = await _find(con, org_id, issuer.url, claims["sub"])
    if row is None and found is None:
        return Admitted(refused="unmapped")
    if row is None or _is_news(row, found, _moment(claims)):
        # What decides may have changed since it was read: the turn is taken first, then all is read again.
        await con.execute(_RIGHTS["lock"], org_id)
        now = await issuers.trusted_at(con, org_id, issuer.url)
        if now is None or issuers.belonging(now.terms) != issuers.belonging(issuer.terms):
            return Admitted(refused="untrusted")
        found = mapped(claims, now)
        row = await _store(con, org_id, now, claims, found)
    elif _is_as_stored(row, found) and (row["is_sight_due"] or _moment(claims) > row["mapped_at"]):
        await con.execute(_SQL["seen"], org_id, row["identity_id"], float(claims["iat"]))
    return _judged(org_id, row, found)


def _judged(org_id: int, row: Record | None, found: Match | None) -> Admitted:
    """Say what becomes of claims that give `found`, of somebody whose newest token gave what is stored."""
    if row is None or found is None:
        return Admitted(refused="unmapped")
    if row["disabled_at"] is not None:
        return Admitted(refused="disabled")
    if row["role"] != found.role:
        return Admitted(refused="superseded")
    return Admitted(principal=_principal(org_id, row))


def mapped(claims: Mapping[str, Json], issuer: Issuer) -> Match | None:
    """Return the role that claims give in the issuer's org; None for those of another org, or of no role."""
    terms = issuer.terms
    if terms.org_claim is not None:
        held = values_at(claims, terms.org_claim)
        if not any(one in held for one in terms.org_values):
            return None
    return match(claims, terms.rules)


async def page(
    con: Connection, org_id: int, wanted: PageOf, issuer: str | None = None
) -> tuple[list[Identity], bool]:
    """Return one page of identities, newest first, and whether more follow."""
    rows, has_more = await read_page(
        con, _SQL["identity_page"], org_id, wanted, "identity_id", issuer
    )
    return [Identity(**row) for row in rows], has_more


async def get(con: Connection, org_id: int, identity_id: uuid.UUID) -> Identity:
    """Return one identity; raises NotFound."""
    row = await con.fetchrow(_SQL["get_identity"], org_id, identity_id)
    if row is None:
        raise absent("outside identity", identity_id, param="identity_id")
    return Identity(**row)


async def disable(
    con: Connection,
    principal: Principal,
    identity_id: uuid.UUID,
    is_disabled: bool,
    *,
    address: str | None = None,
) -> Identity:
    """Disable or enable an identity in the principal's org; raises NotFound, Forbidden."""
    await take_turn(con, principal)
    seen = await get(con, principal.org_id, identity_id)
    if seen.role is not None:
        held = await permissions_in(con, principal.org_id, seen.role)
        check_gives(principal, seen.role, held or frozenset(), param="identity_id")
    if (seen.disabled_at is not None) == is_disabled:
        return seen
    await con.execute(_SQL["disable"], principal.org_id, identity_id, is_disabled)
    await audit.record(
        con,
        principal,
        "identity.disabled" if is_disabled else "identity.enabled",
        f"outside:{identity_id}",
        details={"issuer": seen.issuer, "subject": seen.outside_subject},
        address=address,
    )
    return await get(con, principal.org_id, identity_id)


async def _store(
    con: Connection,
    org_id: int,
    issuer: Issuer,
    claims: Mapping[str, Json],
    found: Match | None,
) -> Record | None:
    """Link somebody, or map them anew; returns their row as it is then."""
    subject, issued_at = claims["sub"], float(claims["iat"])
    row = await _find(con, org_id, issuer.url, subject)
    if row is None and found is None:
        return None
    given = _given(found)
    if row is None:
        identity_id = new_id()
        label = _label(claims)
        await con.execute(
            _SQL["link"], org_id, identity_id, issuer.url, subject, label, *given, issued_at
        )
        await _tell(con, org_id, identity_id, "linked", issuer, claims, {"role": given[0]})
    elif _is_news(row, found, _moment(claims)):
        await con.execute(_SQL["map"], org_id, row["identity_id"], *given, issued_at)
        if row["role"] != given[0]:
            change = {"from": row["role"], "to": given[0]}
            await _tell(con, org_id, row["identity_id"], "mapped", issuer, claims, change)
    return await _find(con, org_id, issuer.url, subject)


def _is_news(row: Record, found: Match | None, issued_at: datetime) -> bool:
    """Whether claims say something else of an identity than is known, in a token that is not older."""
    return not _is_as_stored(row, found) and issued_at >= row["mapped_at"]


def _is_as_stored(row: Record, found: Match | None) -> bool:
    return _given(found) == (row["role"], row["claim"], row["claim_value"])


def _given(found: Match | None) -> tuple[str | None, str | None, str | None]:
    return (None, None, None) if found is None else (found.role, found.claim, found.value)


def _moment(claims: Mapping[str, Json]) -> datetime:
    """Return when a token was issued."""
    return datetime.fromtimestamp(float(claims["iat"]), UTC)


async def _find(con: Connection, org_id: int, url: str, subject: str) -> Record | None:
    return await con.fetchrow(_SQL["identity"], org_id, url, subject)


async def _tell(
    con: Connection,
    org_id: int,
    identity_id: uuid.UUID,
    what: str,
    issuer: Issuer,
    claims: Mapping[str, Json],
    more: Mapping[str, Json],
) -> None:
    await audit.record(
        con,
        Principal(org_id=org_id, subject=f"outside:{identity_id}"),
        f"identity.{what}",
        f"outside:{identity_id}",
        details={"issuer": issuer.url, "subject": claims["sub"], **more},
    )


def _principal(org_id: int, row: Record) -> Principal:
    return Principal(
        org_id=org_id,
        subject=f"outside:{row['identity_id']}",
        permissions=permissions_of(row["role"], row["permissions"]),
        roles=frozenset({row["role"]}),
        standing=Standing(stamp=row["version"]),
    )


def _label(claims: Mapping[str, Json]) -> str:
    for name in _LABELS:
        value = claims.get(name)
        if isinstance(value, str) and value.strip():
            return "".join(one for one in value.strip() if one.isprintable())[:_MAX_LABEL_CHARS]
    return ""
