"""Holdings: what an org has until it deletes it, against what its plan allows.

Called by whoever adds such a thing, in the transaction that adds it. Invariant: of several at once each sees what the
others have added, so that together they do not pass the maximum.
"""

from __future__ import annotations

from collections.abc import Mapping

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.engine import features
from millpond.engine.quotas import Limits, Used, limits_of, over

_SQL = queries("holdings")
# What can be limited, with its sentence for whoever sets the limit.
HOLDINGS: Mapping[str, str] = {
    "knowledge_bases": "Knowledge bases at a time.",
    "documents": "Documents in all knowledge bases at a time.",
    "storage_bytes": "Bytes of the newest versions of documents at a time.",
    "members": "Members and open invitations at a time.",
    "api_keys": "API keys at a time that are neither revoked nor expired.",
    "service_principals": "Service principals at a time that are not disabled.",
    "custom_roles": "Roles of the organization's own at a time.",
    "outside_issuers": "Outside issuers at a time.",
    "schedules": "Schedules at a time, paused ones too.",
    "triggers": "Triggers at a time, paused ones too.",
    "secrets": "Secrets at a time.",
}
KNOWLEDGE = ("knowledge_bases", "documents", "storage_bytes")
_FEATURES: Mapping[str, str] = {
    **dict.fromkeys(KNOWLEDGE, "knowledge"),
    **{name: name for name in features.FEATURES if name in HOLDINGS},
}


async def check(con: Connection, org_id: int, *names: str) -> None:
    """Raise OverQuota where an org has more of some things now than its plan allows; locks until the commit.

    Also where its plan has switched off what they are of.
    """
    for feature in sorted({_FEATURES[name] for name in names if name in _FEATURES}):
        await features.check(con, org_id, feature)
    limits = {name: most for name, most in (await limits_of(con, org_id)).items() if name in names}
    if not limits:
        return
    await con.execute(_SQL["lock"], org_id)
    for one in await read(con, org_id, limits):
        if one.used > one.maximum:
            raise over(one.quota, one.used, one.maximum, None)


async def read(con: Connection, org_id: int, limits: Limits) -> list[Used]:
    """Return what an org has of each thing that its plan limits."""
    names = [name for name in HOLDINGS if name in limits]
    if not names:
        return []
    row = await con.fetchrow(_SQL["held"], org_id, names)
    assert row is not None
    return [Used(quota=name, used=row[name], maximum=int(limits[name])) for name in names]
