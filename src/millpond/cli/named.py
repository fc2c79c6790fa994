"""Things with an id and a name: people give either.

Called by `schedules` and `triggers`. Invariant: what reads as an id is one.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from millpond.cli.call import call
from millpond.cli.options import Bearer
from millpond.errors import NotFound
from millpond.types import Json

if TYPE_CHECKING:
    from millpond.cli.remote import Remote


async def path_of(remote: Remote, collection: str, which: str) -> str:
    """Return the path of what a collection has under an id or a name; raises NotFound."""
    try:
        return f"{collection}/{uuid.UUID(which)}"
    except ValueError:
        page = await remote.get(collection, {"name": which})
    if not page["data"]:
        raise NotFound(f"{collection} has nothing named {which}", param="which")
    return f"{collection}/{page['data'][0]['id']}"


def act(url: str, token: Bearer | None, collection: str, which: str, verb: str) -> Json:
    """POST a verb to what a collection has under an id or a name; returns the answer."""

    async def talk(remote: Remote) -> Json:
        return await remote.post(f"{await path_of(remote, collection, which)}/{verb}", {})

    return call(url, token, talk)
