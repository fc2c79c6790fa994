"""Exports of an audit log: whole, also while a sealer is at work."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from millpond.db.pool import Database
from millpond.identity import audit, audit_log
from millpond.identity.audit_heads import Heads
from millpond.identity.audit_sealer import Sealer, opened
from millpond.identity.seal import KEY_BYTES, Seal
from millpond.types import Principal


class Between:
    """A connection after whose first read a sealer seals what waits."""

    def __init__(self, con: Any, sealer: Sealer) -> None:
        self._con = con
        self._sealer = sealer
        self._is_first = True

    async def fetch(self, *asked: Any) -> list[Any]:
        rows: list[Any] = await self._con.fetch(*asked)
        if self._is_first:
            self._is_first = False
            assert await self._sealer.seal_all() == 1
        return rows


async def tell(db: Database, org_id: int, resource: str) -> None:
    principal = Principal(org_id=org_id, subject="user:ann")
    async with db.of(principal) as con:
        await audit.record(con, principal, "thing.done", resource)


async def test_a_row_that_is_sealed_during_an_export_is_exported_once(
    db: Database, org: int, tmp_path: Path
) -> None:
    sealer = Sealer(db, Seal(bytes(KEY_BYTES)), Heads(tmp_path))
    await tell(db, org, "thing:1")
    assert await sealer.seal_all() == 1
    await tell(db, org, "thing:2")

    @contextlib.asynccontextmanager
    async def transaction() -> AsyncIterator[Any]:
        async with opened(db, org) as con:
            yield Between(con, sealer)

    lines = [line async for line in audit_log.export(transaction, org, after=0, limit=None)]
    assert [(line["resource"], line["seq"]) for line in lines] == [("thing:1", 1), ("thing:2", 2)]
