"""Orgs: the tenants, by id and slug.

Called by the CLI when it makes the first org and by whoever mints tokens. Invariant: a slug stands
for one org for ever; making it twice, also at the same time, gives the same id.
"""

from __future__ import annotations

import re

from millpond.db.pool import Database
from millpond.db.queries import queries
from millpond.errors import InvalidInput

_SQL = queries("identity")
_SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


async def ensure_org(db: Database, slug: str, name: str) -> int:
    """Return the id of the org with `slug`, making it with `name` when it is missing."""
    check_slug(slug)
    async with db.globals() as con:
        await con.execute(_SQL["add_org"], slug, name)
        org_id: int = await con.fetchval(_SQL["org_id"], slug)
    return org_id


def check_slug(slug: str) -> None:
    """Raise InvalidInput for what cannot be an org's slug; a number would read as an id."""
    if not _SLUG.fullmatch(slug) or slug.isdecimal():
        raise InvalidInput(
            f"{slug!r} is not a slug: use 1 to 63 lower-case letters, digits and dashes, not digits alone",
            param="slug",
        )
