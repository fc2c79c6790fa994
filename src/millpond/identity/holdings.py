"""Holdings: what an org has until it deletes it, against what its plan allows.

Called by whoever adds such a thing, in the transaction that adds it. Invariant: of several at once each sees what the
others have added, so that together they do not pass the maximum.
"""

from __future__ import annotations

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.engine.quotas import Limits, Used, limits_of, over

_SQL = queries("holdings")
HOLDINGS = ("knowledge_bases", "documents", "storage_bytes")


async def check(con: Connection, org_id: int) -> None:
    """Raise OverQuota where an org has more of something now than its plan allows; locks until the commit."""
    limits = await limits_of(con, org_id)
    if not limits.keys() & set(HOLDINGS):
        return
    await con.execute(_SQL["lock"], org_id)
    for one in await read(con, org_id, limits):
        if one.used > one.maximum:
            raise over(one.quota, one.used, one.maximum, None)


async def read(con: Connection, org_id: int, limits: Limits) -> list[Used]:
    """Return what an org has of each thing that its plan limits."""
    if not limits.keys() & set(HOLDINGS):
        return []
    row = await con.fetchrow(_SQL["held"], org_id)
    assert row is not None
    return [
        Used(quota=quota, used=row[quota], maximum=int(limits[quota]))
        for quota in HOLDINGS
        if quota in limits
    ]
