"""Pages: one keyset page of a list by id, read in one statement.

Called by the rooms that list rows of their own. Invariant: rows come newest first, whichever way the
page was asked for.
"""

from __future__ import annotations

import uuid

from millpond.db.pool import Connection, Record
from millpond.engine.views import PageOf

_HIGHEST_ID = uuid.UUID(int=2**128 - 1)


async def read_page(
    con: Connection, statement: str, org_id: int, page: PageOf, key: str, *arguments: object
) -> tuple[list[Record], bool]:
    """Return the rows of one page and whether more follow in its direction.

    The statement takes $1 org, $2 ids below, $3 ids above or null, $4 how many, then `arguments`.
    """
    below = page.after or _HIGHEST_ID
    rows = await con.fetch(statement, org_id, below, page.before, page.limit + 1, *arguments)
    nearest = sorted(rows, key=lambda row: row[key], reverse=page.before is None)
    kept = nearest[: page.limit]
    return sorted(kept, key=lambda row: row[key], reverse=True), len(rows) > page.limit
