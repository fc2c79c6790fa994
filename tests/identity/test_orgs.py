"""Orgs: made once per slug."""

from __future__ import annotations

import asyncio

import pytest

from millpond.db.pool import Database
from millpond.errors import InvalidInput
from millpond.identity.orgs import ensure_org


async def test_a_slug_keeps_its_org(db: Database) -> None:
    first = await ensure_org(db, "pond", "Pond")
    assert await ensure_org(db, "pond", "Another name") == first
    assert await ensure_org(db, "marsh", "Marsh") != first


async def test_making_the_same_org_at_once_gives_one(db: Database) -> None:
    ids = await asyncio.gather(*(ensure_org(db, "pond", "Pond") for _ in range(6)))
    assert len(set(ids)) == 1


@pytest.mark.parametrize("slug", ["", "Pond", "-pond", "a b", "a" * 64, "pönd", "pond\n"])
async def test_a_bad_slug_is_refused(db: Database, slug: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        await ensure_org(db, slug, "x")
    assert caught.value.param == "slug"
