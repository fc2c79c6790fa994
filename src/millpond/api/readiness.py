"""Readiness: whether database and schema serve this code, looked at once a second at most.

Called by `/readyz`, which anybody may ask. Invariant: however many ask at once, one look is under way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from millpond.db.pool import Database
from millpond.errors import MillpondError

SchemaCheck = Callable[[], Awaitable[None]]
_MAX_AGE_S = 1.0


class Readiness:
    """Remembers the last look for a second, also when it failed."""

    def __init__(self, db: Database, check_schema: SchemaCheck | None) -> None:
        self._db = db
        self._check_schema = check_schema
        self._looking = asyncio.Lock()
        self._looked_at = float("-inf")
        self._fault: MillpondError | None = None

    async def check(self) -> None:
        """Raise what stands in the way of serving."""
        async with self._looking:
            if time.monotonic() - self._looked_at > _MAX_AGE_S:
                self._fault = await self._look()
                self._looked_at = time.monotonic()
        if self._fault is not None:
            raise self._fault

    async def _look(self) -> MillpondError | None:
        try:
            await self._db.ping()
            if self._check_schema is not None:
                await self._check_schema()
        except MillpondError as error:
            return error
        return None
