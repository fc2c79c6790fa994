"""Stored secrets open in their own place alone, with a key that the host has, and in no other way."""

from __future__ import annotations

import uuid

import asyncpg
import pytest

from millpond.db.pool import Database, EngineDatabase
from millpond.errors import Conflict, NotFound, Permanent, Transient
from millpond.identity import secret_store
from millpond.identity.ring import KeyRing
from millpond.identity.seal import KEY_BYTES, Seal
from millpond.identity.vault import Vault
from millpond.types import Principal

VALUE = "sk_live_0123456789"
RING = KeyRing(Seal(bytes(KEY_BYTES)))


def ann(org_id: int) -> Principal:
    return Principal(org_id=org_id, subject="user:ann")


MOVED = """
insert into secret (org_id, secret_id, name, sealed, seal_key_id, created_by, changed_by)
select $1, secret_id, name, sealed, seal_key_id, created_by, changed_by from secret where name = 'stripe'
"""


async def put(db: Database, org_id: int, name: str = "stripe", value: str = VALUE) -> uuid.UUID:
    async with db.globals() as con:
        await RING.current(con)  # as every process does at its start
    async with db.org(org_id) as con:
        made, _ = await secret_store.put(con, RING, ann(org_id), name, value)
    return made.secret_id


@pytest.fixture
async def owner(admin_url: str) -> asyncpg.Connection:
    con = await asyncpg.connect(admin_url, server_settings={"search_path": "millpond"})
    yield con
    await con.close()


async def test_a_value_comes_back_whole_and_stands_nowhere_in_its_row(
    db: Database, org: int, owner: asyncpg.Connection
) -> None:
    value = 'Zürich "\\ \n\x00 ' + "x" * 65_000
    await put(db, org, value=value)
    opened = await Vault(db, RING).open(org, "stripe")
    assert opened.value == value
    assert value not in repr(opened)
    row = await owner.fetchrow("select * from secret")
    assert value.encode()[:12] not in row["sealed"]


async def test_a_replaced_value_has_a_new_version_and_the_same_id(db: Database, org: int) -> None:
    first = await put(db, org)
    second = await put(db, org, value="another value")
    assert first == second
    opened = await Vault(db, RING).open(org, "stripe")
    assert (opened.value, opened.version) == ("another value", 2)


async def test_the_same_value_is_sealed_differently_each_time(
    db: Database, org: int, owner: asyncpg.Connection
) -> None:
    await put(db, org, "one")
    await put(db, org, "two")
    one, two = await owner.fetch("select sealed from secret")
    assert one["sealed"] != two["sealed"]


async def test_a_taken_name_is_a_conflict_and_an_absent_one_is_not_found(
    db: Database, org: int
) -> None:
    await put(db, org)
    async with db.org(org) as con:
        with pytest.raises(Conflict) as caught:
            await secret_store.create(con, RING, ann(org), "stripe", VALUE)
        assert caught.value.code == "name_taken"
        with pytest.raises(NotFound):
            await secret_store.remove(con, ann(org), "other")
        await secret_store.remove(con, ann(org), "stripe")
    with pytest.raises(NotFound):
        await Vault(db, RING).open(org, "stripe")


@pytest.mark.parametrize(
    "change",
    [
        "update secret set sealed = set_byte(sealed, length(sealed) - 1, get_byte(sealed, length(sealed) - 1) # 1)",
        "update secret set sealed = set_byte(sealed, 5, get_byte(sealed, 5) # 1)",
        "update secret set sealed = set_byte(sealed, 0, 2)",
        "update secret set sealed = substr(sealed, 1, 20)",
        "update secret set sealed = ''",
        "update secret set secret_id = gen_random_uuid() where name = 'stripe'",
        "update secret a set sealed = b.sealed from secret b where a.name = 'stripe' and b.name = 'other'",
        MOVED,
    ],
)
async def test_what_was_changed_or_moved_does_not_open(
    db: Database, org: int, other_org: int, owner: asyncpg.Connection, change: str
) -> None:
    await put(db, org)
    await put(db, org, "other", "another value")
    is_moved = change == MOVED
    await owner.execute(change, *([other_org] if is_moved else []))
    with pytest.raises(Permanent) as caught:
        await Vault(db, RING).open(other_org if is_moved else org, "stripe")
    assert caught.value.code == "seal_broken"
    assert VALUE not in str(caught.value)


async def test_a_value_under_another_keys_id_does_not_open(
    db: Database, org: int, owner: asyncpg.Connection
) -> None:
    other = Seal(b"y" * KEY_BYTES)
    await put(db, org)
    await owner.execute(
        "insert into seal_key (key_id, is_current) values ($1, false)", other.key_id
    )
    await owner.execute("update secret set seal_key_id = $1", other.key_id)
    with pytest.raises(Transient) as away:
        await Vault(db, RING).open(org, "stripe")
    assert away.value.code == "seal_key_mismatch"
    both = KeyRing(Seal(bytes(KEY_BYTES)), other)
    with pytest.raises(Permanent) as caught:
        await Vault(db, both).open(org, "stripe")
    assert caught.value.code == "seal_broken"


async def test_a_host_with_another_key_seals_nothing(db: Database, org: int) -> None:
    await put(db, org)
    stranger = KeyRing(Seal(b"x" * KEY_BYTES))
    with pytest.raises(Permanent) as caught:
        await stranger.check(db)
    assert caught.value.code == "seal_key_mismatch"
    with pytest.raises(Permanent):
        async with db.org(org) as con:
            await secret_store.put(con, stranger, ann(org), "mine", VALUE)
    assert caught.value.details["seal_key_id"] == RING.key_id


async def test_other_orgs_and_the_engine_see_no_secret(
    db: Database, engine_db: EngineDatabase, org: int, other_org: int
) -> None:
    await put(db, org)
    async with db.org(other_org) as con:
        assert await con.fetchval("select count(*) from secret") == 0
    with pytest.raises(Permanent) as caught:
        async with engine_db.duty("test") as con:
            await con.fetchval("select count(*) from secret")
    assert caught.value.code == "database_privilege"


async def test_an_audit_row_tells_of_each_change_without_the_value(
    db: Database, org: int, owner: asyncpg.Connection
) -> None:
    await put(db, org)
    await put(db, org, value="another value")
    async with db.org(org) as con:
        await secret_store.remove(con, ann(org), "stripe")
    rows = await owner.fetch("select action, details::text from audit order by at, audit_id")
    assert [row["action"] for row in rows] == ["secret.created", "secret.changed", "secret.removed"]
    assert not any(VALUE in row["details"] or "another" in row["details"] for row in rows)
