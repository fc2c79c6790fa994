"""Outside issuers: whose tokens an org accepts, and which of its roles their claims give.

Called by the API in a transaction of the caller. Invariants: nobody lets an issuer give, or changes one that gives,
a role that they could not give themselves; an issuer's address never changes, since identities are known by it; every
change makes stale what its identities were given.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

import orjson

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine import features
from millpond.engine.pages import read_page
from millpond.engine.views import PageOf
from millpond.errors import Conflict, InvalidInput
from millpond.identity import audit, holdings
from millpond.identity.claims import Rule, check_claim
from millpond.identity.outside_tokens import ALGORITHMS
from millpond.identity.rights import absent, check_gives, check_role, permissions_in, take_turn
from millpond.types import Principal, new_id

_SQL = queries("issuers")
MAX_ISSUERS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What an org decides about an issuer: what may be changed."""

    name: str
    audiences: Sequence[str]
    algorithms: Sequence[str]
    rules: Sequence[Rule]
    org_claim: str | None = None
    org_values: Sequence[str] = ()
    trust_days: int = 30
    is_disabled: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Issuer:
    """An outside issuer as an org knows it."""

    issuer_id: uuid.UUID
    url: str
    terms: Terms
    created_by: str
    created_at: datetime
    disabled_at: datetime | None


def belonging(terms: Terms) -> tuple[object, ...]:
    """Return what tells whether a token is one for the org at all: no identity remembers it of its last token."""
    org_values, audiences = tuple(terms.org_values), frozenset(terms.audiences)
    return terms.org_claim, org_values, audiences, frozenset(terms.algorithms)


async def page(
    con: Connection, org_id: int, wanted: PageOf, url: str | None = None
) -> tuple[list[Issuer], bool]:
    """Return one page of issuers, newest first, and whether more follow."""
    rows, has_more = await read_page(con, _SQL["page"], org_id, wanted, "issuer_id", url)
    return [_issuer(row) for row in rows], has_more


async def get(con: Connection, org_id: int, issuer_id: uuid.UUID) -> Issuer:
    """Return one issuer; raises NotFound."""
    row = await con.fetchrow(_SQL["get"], org_id, issuer_id)
    if row is None:
        raise absent("issuer", issuer_id, param="issuer_id")
    return _issuer(row)


async def trusted_at(con: Connection, org_id: int, url: str) -> Issuer | None:
    """Return the issuer at an address whose tokens an org accepts now."""
    row = await con.fetchrow(_SQL["at_address"], org_id, url)
    return None if row is None else _issuer(row)


async def create(
    con: Connection, principal: Principal, url: str, terms: Terms, *, address: str | None = None
) -> Issuer:
    """Let an org accept an issuer's tokens; raises InvalidInput, Forbidden, Conflict for one that it knows."""
    _check(terms)
    await take_turn(con, principal)
    await _check_roles(con, principal, terms)
    if await con.fetchval(_SQL["count"], principal.org_id) >= MAX_ISSUERS:
        raise Conflict(
            f"an organization has {MAX_ISSUERS} issuers at most", code="too_many_issuers"
        )
    issuer_id = new_id()
    made = await con.fetchval(
        _SQL["add"],
        principal.org_id,
        issuer_id,
        terms.name,
        url,
        list(terms.audiences),
        list(terms.algorithms),
        terms.org_claim,
        list(terms.org_values),
        terms.trust_days,
        principal.subject,
    )
    if made is None:
        raise Conflict(f"the issuer {url} is known already", code="issuer_known", param="url")
    await holdings.check(con, principal.org_id, "outside_issuers")
    await _store_rules(con, principal.org_id, issuer_id, terms.rules)
    # Identities from before it was removed, if it was.
    await _map_again(con, principal.org_id, issuer_id, url, is_unknown=True)
    await _tell(con, principal, "created", issuer_id, {"url": url, **_told(terms)}, address)
    return await get(con, principal.org_id, issuer_id)


async def change(
    con: Connection,
    principal: Principal,
    issuer_id: uuid.UUID,
    wish: dict[str, Any],
    *,
    address: str | None = None,
) -> Issuer:
    """Change members of an issuer's terms; raises NotFound, InvalidInput, Forbidden."""
    await take_turn(con, principal)
    seen = await get(con, principal.org_id, issuer_id)
    await _check_held(con, principal, seen)
    terms = replace(seen.terms, **wish)
    _check(terms)
    await _check_roles(con, principal, terms)
    if terms == seen.terms:
        return seen
    if not terms.is_disabled:
        await features.check(con, principal.org_id, "outside_issuers")
    await con.execute(
        _SQL["change"],
        principal.org_id,
        issuer_id,
        terms.name,
        list(terms.audiences),
        list(terms.algorithms),
        terms.org_claim,
        list(terms.org_values),
        terms.trust_days,
        terms.is_disabled,
    )
    await con.execute(_SQL["clear_rules"], principal.org_id, issuer_id)
    await _store_rules(con, principal.org_id, issuer_id, terms.rules)
    # What is not remembered of anybody may have let them in wrongly: they have to come again.
    is_unknown = belonging(terms) != belonging(seen.terms)
    await _map_again(con, principal.org_id, issuer_id, seen.url, is_unknown=is_unknown)
    told = {"from": _told(seen.terms), "to": _told(terms)}
    await _tell(con, principal, "changed", issuer_id, told, address)
    return await get(con, principal.org_id, issuer_id)


async def remove(
    con: Connection, principal: Principal, issuer_id: uuid.UUID, *, address: str | None = None
) -> None:
    """Accept an issuer's tokens no more; its identities may nothing from now on. Raises NotFound, Forbidden."""
    await take_turn(con, principal)
    seen = await get(con, principal.org_id, issuer_id)
    await _check_held(con, principal, seen)
    await con.execute(_SQL["remove"], principal.org_id, issuer_id)
    await _tell(con, principal, "removed", issuer_id, {"url": seen.url}, address)


def _check(terms: Terms) -> None:
    unknown = sorted(set(terms.algorithms) - set(ALGORITHMS))
    if unknown:
        raise InvalidInput(
            f"{unknown[0]!r} is no algorithm that is accepted: {', '.join(ALGORITHMS)} are",
            param="algorithms",
        )
    for rule in terms.rules:
        check_claim(rule.claim, param="rules")
    if (terms.org_claim is None) != (not terms.org_values):
        raise InvalidInput(
            "`org_claim` and `org_values` go together: which values of which claim are of this organization",
            param="org_claim",
        )
    if terms.org_claim is not None:
        check_claim(terms.org_claim, param="org_claim")


async def _check_roles(con: Connection, principal: Principal, terms: Terms) -> None:
    for role in sorted({rule.role for rule in terms.rules}):
        await check_role(con, principal, role, param="rules")


async def _check_held(con: Connection, principal: Principal, seen: Issuer) -> None:
    """Raise Forbidden where an issuer gives what the principal could not give."""
    for role in sorted({rule.role for rule in seen.terms.rules}):
        held = await permissions_in(con, principal.org_id, role)
        check_gives(principal, role, held or frozenset(), param="issuer_id")


async def _store_rules(
    con: Connection, org_id: int, issuer_id: uuid.UUID, rules: Sequence[Rule]
) -> None:
    for nth, rule in enumerate(rules):
        values = list(rule.values)
        await con.execute(_SQL["add_rule"], org_id, issuer_id, nth, rule.claim, values, rule.role)


async def _map_again(
    con: Connection, org_id: int, issuer_id: uuid.UUID, url: str, *, is_unknown: bool
) -> None:
    """Give identities what the rules give now; with `is_unknown` nothing, until they come again."""
    await con.execute(_SQL["map_again"], org_id, issuer_id, url, is_unknown)


async def _tell(
    con: Connection,
    principal: Principal,
    what: str,
    issuer_id: uuid.UUID,
    details: dict[str, Any],
    address: str | None,
) -> None:
    await audit.record(
        con, principal, f"issuer.{what}", f"issuer:{issuer_id}", details=details, address=address
    )


def _told(terms: Terms) -> dict[str, Any]:
    return asdict(terms)


def _issuer(row: Record) -> Issuer:
    rules = [
        Rule(claim=claim, values=tuple(values), role=role)
        for claim, values, role in orjson.loads(row["rules"])
    ]
    terms = Terms(
        name=row["name"],
        audiences=row["audiences"],
        algorithms=row["algorithms"],
        rules=rules,
        org_claim=row["org_claim"],
        org_values=row["org_values"],
        trust_days=row["trust_days"],
        is_disabled=row["disabled_at"] is not None,
    )
    return Issuer(
        issuer_id=row["issuer_id"],
        url=row["url"],
        terms=terms,
        created_by=row["created_by"],
        created_at=row["created_at"],
        disabled_at=row["disabled_at"],
    )
