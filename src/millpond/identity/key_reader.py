"""The reader of API keys: a key's text becomes the principal it is now.

Called by the gate. Invariants: what a key may is worked out anew for every request, scopes ∩ its owner's rights, as
they are after it was asked; unknown, wrong, revoked and expired keys get one answer; remembering the use of a key
holds up no request.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import uuid
from collections.abc import Mapping

from millpond.db.pool import Database, Record
from millpond.db.queries import queries
from millpond.errors import MillpondError, Unauthenticated
from millpond.identity import bearers
from millpond.identity.gate import Wish
from millpond.identity.passport import not_in_org
from millpond.identity.permissions import permissions_of
from millpond.types import Principal, Standing

_SQL = queries("api_keys")
_NO_DIGEST = bytes(32)


class _Looks:
    """Looks for the keys of an org together: those asked for during one look share the next.

    Many requests at once cost a few transactions, and none is answered by a look that began before it.
    """

    def __init__(self, db: Database) -> None:
        self._db = db
        self._asked: dict[int, dict[str, asyncio.Future[Record | None]]] = {}
        self._looking: set[asyncio.Task[None]] = set()

    async def find(self, org_id: int, prefix: str) -> Record | None:
        """Return the row of a good key, None without one; raises what the look raised."""
        asked = self._asked.get(org_id)
        if asked is None:
            asked = self._asked[org_id] = {}
            task = asyncio.create_task(self._look(org_id), name="keys")
            self._looking.add(task)
            task.add_done_callback(self._looking.discard)
        found = asked.get(prefix)
        if found is None:
            found = asked[prefix] = asyncio.get_running_loop().create_future()
        return await asyncio.shield(found)

    async def _look(self, org_id: int) -> None:
        asked: dict[str, asyncio.Future[Record | None]] = {}
        try:
            while asked := self._asked[org_id]:
                self._asked[org_id] = {}
                await self._answer(org_id, asked)
        finally:
            for left in (asked, self._asked.pop(org_id)):  # only when this look is cancelled
                for future in left.values():
                    future.cancel()

    async def _answer(
        self, org_id: int, asked: Mapping[str, asyncio.Future[Record | None]]
    ) -> None:
        try:
            async with self._db.org(org_id) as con:
                rows = await con.fetch(_SQL["read"], org_id, list(asked))
        except Exception as error:  # noqa: BLE001 - goes to the requests that asked
            for future in asked.values():
                future.set_exception(error)
            return
        found = {row["prefix"]: row for row in rows}
        for prefix, future in asked.items():
            future.set_result(found.get(prefix))


class KeyReader:
    """Reads API keys; `close` waits for what it still has to remember."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._looks = _Looks(db)
        self._remembering: dict[uuid.UUID, asyncio.Task[None]] = {}

    def reads(self, text: str) -> bool:
        """Whether the text has a key's form."""
        return text.startswith(f"{bearers.KEY}_")

    async def admit(self, text: str, wish: Wish) -> Principal:
        """Return the key's principal; raises Unauthenticated, or Forbidden where the header names another org."""
        bearer = bearers.read(bearers.KEY, text)
        if bearer is None:
            raise _refused()
        row = await self._looks.find(bearer.org_id, bearer.prefix)
        known = _NO_DIGEST if row is None else row["digest"]
        if not hmac.compare_digest(known, bearer.digest) or row is None or row["version"] is None:
            raise _refused()
        if wish.org not in (None, str(bearer.org_id), row["slug"]):
            raise not_in_org()
        if row["is_use_due"]:
            self._remember(bearer.org_id, row["key_id"])
        return _principal(bearer.org_id, row)

    def expires_at(self, text: str) -> float | None:
        """Return None: what a key stands on is asked of the database, its end too."""
        return None

    async def close(self) -> None:
        """Wait until every use is remembered."""
        await asyncio.gather(*self._remembering.values())

    def _remember(self, org_id: int, key_id: uuid.UUID) -> None:
        if key_id in self._remembering:
            return
        task = asyncio.create_task(self._store_use(org_id, key_id))
        self._remembering[key_id] = task
        task.add_done_callback(lambda _: self._remembering.pop(key_id, None))

    async def _store_use(self, org_id: int, key_id: uuid.UUID) -> None:
        # A use that cannot be stored now is stored with the next request.
        with contextlib.suppress(MillpondError):
            async with self._db.org(org_id) as con:
                await con.execute(_SQL["used"], org_id, key_id)


def _principal(org_id: int, row: Record) -> Principal:
    held = permissions_of(row["role"], row["permissions"])
    return Principal(
        org_id=org_id,
        subject=f"key:{row['key_id']}",
        permissions=held & frozenset(row["scopes"]),
        roles=frozenset({row["role"]}),
        standing=Standing(stamp=row["version"]),
    )


def _refused() -> Unauthenticated:
    return Unauthenticated(
        "This API key is not good: it is unknown, revoked or expired.",
        code="key_refused",
        advice="make another with `millpond apikeys create`",
    )
