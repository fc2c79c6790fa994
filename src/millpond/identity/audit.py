"""The audit log's way in: a row per deed, in the transaction that does it.

Called by every room that changes who may do what, or decides. Invariant: a row is inserted with the change
it tells of and never changed after; chaining rows is a sealer's work, apart from this transaction.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping

import orjson

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.types import NO_ORG, Json, Principal, new_id

_SQL = queries("audit")


async def record(
    con: Connection,
    principal: Principal,
    action: str,
    resource: str,
    *,
    details: Mapping[str, Json] | None = None,
    run_id: uuid.UUID | None = None,
    address: str | None = None,
) -> None:
    """Tell that `principal` did `action` (`noun.past_tense`, such as `member.removed`) to `resource` (`kind:id`).

    `details` hold no secret. Without an org, the row is of the platform's own log.
    """
    text = orjson.dumps(dict(details or {})).decode()
    if principal.org_id == NO_ORG:
        await con.execute(
            _SQL["add_platform"], new_id(), principal.subject, action, resource, address, text
        )
        return
    await con.execute(
        _SQL["add"],
        principal.org_id,
        new_id(),
        principal.subject,
        principal.granted_by,
        action,
        resource,
        run_id,
        address,
        text,
    )
