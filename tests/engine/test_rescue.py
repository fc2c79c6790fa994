"""Rescue: whose silence counts as a death, and whose does not."""

from __future__ import annotations

import asyncio
import time
import uuid
from datetime import timedelta
from pathlib import Path

import pytest
from tests.conftest import TEST_OPTIONS
from tests.engine.conftest import DEADLINE_S, Pond

from millpond.db.embedded import EmbeddedPostgres
from millpond.db.migrate import migrate
from millpond.db.pool import Database, EngineDatabase
from millpond.db.queries import queries
from millpond.engine import maintenance as maintenance_room
from millpond.engine.claim import Claimer
from millpond.engine.leases import Lease
from millpond.engine.maintenance import Maintenance
from millpond.engine.submit import submit
from millpond.types import Intent

LEASE_S = 1.0
_SQL = queries("maintenance")
_SILENCE = "update worker set expires_at = clock_timestamp() - interval '1 s'"


async def _held(
    db: Database, engine_db: EngineDatabase, org_id: int, count: int = 1
) -> list[Lease]:
    """Submit runs and claim them by hand, under a session that lasts."""
    intents = [
        Intent(
            org_id=org_id,
            flow="held",
            version=1,
            queue="default",
            input=b"null",
            subject="user:test",
        )
        for _ in range(count)
    ]
    async with db.org(org_id) as con:
        await submit(con, intents)
    worker_id = uuid.uuid4()
    async with engine_db.duty("test") as con:
        sql = _SQL["register_worker"]
        await con.execute(sql, worker_id, "here", 1, "{}", [], 600.0, "", "{}")
    claimer = Claimer(
        engine_db, worker_id=worker_id, capabilities=["held@1"], estimate_s=lambda _: 1.0
    )
    leases: list[Lease] = []
    while len(leases) < count:
        claimed, _ = await claimer.claim({"default": count - len(leases)})
        leases += [one.lease for one in claimed]
    return leases


async def _do(engine_db: EngineDatabase, sql: str) -> None:
    async with engine_db.duty("test") as con:
        await con.execute(sql)


async def _deaths(engine_db: EngineDatabase) -> list[int]:
    async with engine_db.duty("test") as con:
        return [row["deaths"] for row in await con.fetch("select deaths from item")]


async def _old_enough(engine_db: EngineDatabase) -> None:
    """Wait until Postgres has been up for longer than a lease."""
    async with asyncio.timeout(DEADLINE_S), engine_db.statement("test") as con:
        await con.execute(
            "select pg_sleep(greatest(0, $1 - extract(epoch from"
            " clock_timestamp() - pg_postmaster_start_time())))",
            1.5 * LEASE_S,
        )


async def _until_rescued(maintenance: Maintenance) -> float:
    """Do the chore until something is given back; returns how long nothing was."""
    began = time.monotonic()
    async with asyncio.timeout(DEADLINE_S):
        while not await maintenance.rescue():
            await asyncio.sleep(0.05)
    return time.monotonic() - began


async def test_a_silent_worker_is_rescued_from_at_once_and_its_death_is_counted(
    pond: Pond,
) -> None:
    await _old_enough(pond.engine_db)
    await _held(pond.db, pond.engine_db, pond.org_id)
    maintenance = Maintenance(pond.engine_db, lease_s=LEASE_S)
    assert await maintenance.rescue() == []
    await _do(pond.engine_db, _SILENCE)
    assert len(await maintenance.rescue()) == 1
    assert await _deaths(pond.engine_db) == [1]


async def test_a_machine_that_was_suspended_lets_everybody_beat_again_and_charges_no_death(
    pond: Pond,
) -> None:
    """Its own clock stood still; only the database's tells of the time that passed."""
    await _old_enough(pond.engine_db)
    await _held(pond.db, pond.engine_db, pond.org_id)
    maintenance = Maintenance(pond.engine_db, lease_s=LEASE_S)
    assert await maintenance.rescue() == []
    assert maintenance._database_tick is not None
    maintenance._database_tick -= timedelta(minutes=1)
    await _do(pond.engine_db, _SILENCE)
    assert await _until_rescued(maintenance) >= LEASE_S
    assert await _deaths(pond.engine_db) == [0]


async def test_who_notices_a_gap_without_having_the_turn_waits_with_the_others(pond: Pond) -> None:
    await _old_enough(pond.engine_db)
    await _held(pond.db, pond.engine_db, pond.org_id)
    maintenance = Maintenance(pond.engine_db, lease_s=LEASE_S)
    assert await maintenance.rescue() == []
    assert maintenance._database_tick is not None
    maintenance._database_tick -= timedelta(minutes=1)
    await _do(pond.engine_db, _SILENCE)
    async with pond.engine_db.duty("test") as con:
        turn = await con.fetchrow(_SQL["take_turn"])
        assert turn is not None
        assert turn["is_mine"]
        assert await maintenance.rescue() == []
    assert await _until_rescued(maintenance) >= LEASE_S / 2
    assert await _deaths(pond.engine_db) == [0]


async def test_what_a_draining_worker_held_comes_back_without_a_death(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what is more than one rescue takes: its session stays until nothing is held under it."""
    monkeypatch.setattr(maintenance_room, "_BATCH", 2)
    await _old_enough(pond.engine_db)
    await _held(pond.db, pond.engine_db, pond.org_id, count=3)
    maintenance = Maintenance(pond.engine_db, lease_s=LEASE_S)
    assert await maintenance.rescue() == []
    await _do(pond.engine_db, f"{_SILENCE}, draining = true")
    rescued = [len(await maintenance.rescue()) for _ in range(2)]
    assert rescued == [2, 1]
    assert await _deaths(pond.engine_db) == [0, 0, 0]
    await _do(pond.engine_db, _SILENCE.replace("1 s", "1 minute"))
    assert await maintenance.rescue() == []
    assert await pond.count("worker") == 0


async def test_what_a_draining_worker_had_claimed_just_then_comes_back_without_a_death(
    pond: Pond,
) -> None:
    """Its claim is committed when its session has expired already, and nothing was held under it before."""
    await _old_enough(pond.engine_db)
    await _held(pond.db, pond.engine_db, pond.org_id)
    maintenance = Maintenance(pond.engine_db, lease_s=LEASE_S)
    assert await maintenance.rescue() == []
    async with pond.engine_db.duty("test") as con:
        claims = await con.fetch("delete from lease returning *")
    await _do(pond.engine_db, f"{_SILENCE}, draining = true")
    assert await maintenance.rescue() == []
    async with pond.engine_db.duty("test") as con:
        for row in claims:
            columns, places = ", ".join(row.keys()), ", ".join(f"${n + 1}" for n in range(len(row)))
            await con.execute(f"insert into lease ({columns}) values ({places})", *row.values())
    assert len(await maintenance.rescue()) == 1
    assert await _deaths(pond.engine_db) == [0]


async def test_after_a_restart_of_postgres_rescue_waits_a_lease_and_charges_no_death(
    data_dir: Path,
) -> None:
    server = EmbeddedPostgres(data_dir, owner_note="tests", options=TEST_OPTIONS)
    urls = await server.start()
    try:
        await migrate(urls.owner, app_url=urls.app, engine_url=urls.engine)
        db, engine_db = await Database.connect(urls.app), await EngineDatabase.connect(urls.engine)
        async with db.globals() as con:
            sql = "insert into org (slug, name) values ('young', 'Young') returning org_id"
            org_id = await con.fetchval(sql)
        await _held(db, engine_db, org_id)
        await _do(engine_db, "delete from worker")
        await db.close()
        await engine_db.close()
        await server.stop()
        urls = await server.start()
        engine_db = await EngineDatabase.connect(urls.engine)
        # Longer than it takes to come to the first rescue.
        lease_s = 3 * LEASE_S
        maintenance = Maintenance(engine_db, lease_s=lease_s)
        assert await _until_rescued(maintenance) >= lease_s
        assert await _deaths(engine_db) == [0]
        await engine_db.close()
    finally:
        await server.stop()
