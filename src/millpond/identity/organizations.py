"""Organizations: the tenants, and what each decides for itself.

Called by the API: by members in their org's transaction, by operators in one without an org. Invariant: here is
nothing of what an org holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.errors import InvalidInput
from millpond.identity import audit
from millpond.identity.rights import absent
from millpond.types import Json, Principal

_SQL = queries("organizations")


@dataclass(frozen=True, kw_only=True, slots=True)
class Organization:
    """A tenant."""

    org_id: int
    slug: str
    name: str
    created_at: datetime
    suspended_at: datetime | None
    suspended_reason: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What an org decides for itself.

    `may_resolve_own`: whether somebody may answer a question of a run that they started. Without
    `email_domains`, every address may be invited.
    """

    may_resolve_own: bool = False
    invitation_days: int = 7
    email_domains: Sequence[str] = ()


async def get(con: Connection, org_id: int) -> Organization:
    """Return one org; raises NotFound."""
    row = await con.fetchrow(_SQL["get"], org_id) if 0 < org_id < 2**63 else None
    if row is None:
        raise absent("organization", org_id, param="org_id")
    return Organization(**row)


async def policy(con: Connection, org_id: int) -> Policy:
    """Return what an org decided for itself, or the defaults."""
    row = await con.fetchrow(_SQL["policy"], org_id)
    return Policy() if row is None else Policy(**row)


async def change(
    con: Connection,
    principal: Principal,
    *,
    name: str | None = None,
    policy_changes: Mapping[str, Json] | None = None,
    address: str | None = None,
) -> None:
    """Rename the principal's org, change its policy, or both; raises InvalidInput."""
    seen = await get(con, principal.org_id)
    before = await policy(con, principal.org_id)
    after = replace(before, **(policy_changes or {}))
    after = replace(after, email_domains=_domains(after.email_domains))
    details: dict[str, Json] = {}
    if name is not None and name != seen.name:
        await con.execute(_SQL["rename"], principal.org_id, name)
        details["name"] = {"from": seen.name, "to": name}
    if asdict(after) != asdict(before):
        await con.execute(
            _SQL["put_policy"],
            principal.org_id,
            after.may_resolve_own,
            after.invitation_days,
            list(after.email_domains),
        )
        details["policy"] = {"from": asdict(before), "to": asdict(after)}
    if details:
        resource = f"org:{principal.org_id}"
        await audit.record(
            con, principal, "org.changed", resource, details=details, address=address
        )


def _domains(words: Sequence[str]) -> list[str]:
    domains = sorted({word.strip().lower().removeprefix("@") for word in words})
    for domain in domains:
        parts = domain.split(".")
        if len(parts) < 2 or not all(part.replace("-", "").isalnum() for part in parts):
            raise InvalidInput(
                f"{domain!r} is no domain of email addresses", param="policy.email_domains"
            )
    return domains
