"""Features: what an org's plan has switched off.

Called by whoever makes or uses such a thing, in the transaction that does. Invariants: a feature that nobody switched
off is on; what stood before it was switched off is kept, and can be read and removed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.errors import OverQuota

_SQL = queries("features")
# Every feature, with what it allows.
FEATURES: Mapping[str, str] = {
    "knowledge": "Taking documents in and searching them.",
    "schedules": "Making, changing, resuming and starting schedules, and their runs at their times.",
    "triggers": "Making, changing and resuming triggers, and their runs of events.",
    "secrets": "Storing and replacing secrets.",
    "custom_roles": "Making and changing roles of the organization's own.",
    "outside_issuers": "Registering and changing outside issuers, and their tokens.",
}


async def without(con: Connection, orgs: Collection[int], feature: str) -> set[int]:
    """Return those of some orgs that a feature is switched off for."""
    if not orgs:
        return set()
    rows = await con.fetch(_SQL["without"], sorted(orgs), feature)
    return {row["org_id"] for row in rows}


async def check(con: Connection, org_id: int, feature: str) -> None:
    """Raise OverQuota where an org's plan has no such feature."""
    if await without(con, [org_id], feature):
        raise OverQuota(
            f"The organization's plan has no {feature}.",
            code="feature_off",
            param=feature,
            advice="ask the operator of the platform for another plan",
            details={"feature": feature},
        )


def off(feature: str) -> str:
    """Return what is noted on a schedule or trigger that starts nothing for want of a feature."""
    return f"feature_off: the organization's plan has no {feature}"
