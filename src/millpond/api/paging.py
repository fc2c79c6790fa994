"""Keyset paging: `limit`, `after` and `before` of a list, as one dependency.

Called by every route that lists. Invariant: a list is newest first; `after` goes on to older entries,
`before` back to newer ones, and never both.
"""

from __future__ import annotations

import uuid
from typing import Annotated, Any, TypedDict

from fastapi import Depends, Query

from millpond.engine.views import PageOf
from millpond.errors import InvalidInput


class Page(TypedDict):
    """One page of a list."""

    data: Any
    has_more: bool
    first_id: Any
    last_id: Any


async def _paged(
    limit: Annotated[int, Query(ge=1, le=200, description="How many entries at most.")] = 50,
    after: Annotated[
        uuid.UUID | None, Query(description="Go on after this id: `last_id` of a page.")
    ] = None,
    before: Annotated[
        uuid.UUID | None, Query(description="Go back before this id: `first_id` of a page.")
    ] = None,
) -> PageOf:
    if after is not None and before is not None:
        raise InvalidInput("give `after` or `before`, not both", param="before")
    return PageOf(limit=limit, after=after, before=before)


Paged = Annotated[PageOf, Depends(_paged)]
