"""The claim's lock, kept by a process that was stopped: others claim again after a while."""

from __future__ import annotations

import asyncio
import signal
import sys

import asyncpg
from tests.engine.conftest import DEADLINE_S, Pond
from tests.engine.parking import Hand, send

from millpond.engine.maintenance import Maintenance

# As a claim does: its lock is held until all of the answer is sent.
_CLAIMS = """
import asyncio, sys, asyncpg
async def claim():
    con = await asyncpg.connect(sys.argv[1])
    await con.fetch(
        "select pg_advisory_xact_lock(7741001), repeat('x', 8000) from generate_series(1, 10000000)")
asyncio.run(claim())
"""
_HELD = (
    """select count(*) from pg_locks where locktype = 'advisory' and objid = 7741001 and granted"""
)


async def test_a_session_whose_process_takes_no_answer_does_not_keep_the_claims_lock(
    pond: Pond,
) -> None:
    hand = await Hand.register(pond)
    await send(pond, 1)
    stopped = await asyncio.create_subprocess_exec(sys.executable, "-c", _CLAIMS, pond.urls.engine)
    try:
        async with asyncio.timeout(DEADLINE_S), pond.engine_db.statement("test") as con:
            while not await con.fetchval(_HELD):
                await asyncio.sleep(0.01)
        stopped.send_signal(signal.SIGSTOP)
        maintenance = Maintenance(pond.engine_db, lease_s=2.0)
        assert await maintenance.free_claim() == 0, "it may be at work still"
        ended = 0
        # What stands between, a pooler above all, may take some of the answer yet.
        async with asyncio.timeout(DEADLINE_S):
            while not ended:
                await asyncio.sleep(0.01)
                ended = await maintenance.free_claim(0.0)
        assert ended == 1
        assert len(await hand.claim()) == 1
    finally:
        stopped.kill()
        await stopped.wait()


async def test_a_session_that_is_at_work_under_the_claims_lock_is_left(pond: Pond) -> None:
    """However long it has waited for the lock before."""
    async with pond.engine_db.statement("test") as con, asyncio.timeout(DEADLINE_S):
        at_work = asyncio.create_task(
            con.fetchval("select pg_sleep(3) from pg_advisory_xact_lock(7741001)")
        )
        async with pond.engine_db.statement("other") as other:
            while not await other.fetchval(_HELD):
                assert not at_work.done(), "it was over before anybody looked"
                await asyncio.sleep(0.01)
        assert await Maintenance(pond.engine_db, lease_s=2.0).free_claim(0.0) == 0
        await at_work


async def test_a_session_whose_client_stops_in_the_middle_of_an_exchange_does_not_keep_its_locks(
    pond: Pond,
) -> None:
    """It has prepared a statement and executes it no more, as on a host that is gone: no limit of Postgres ends it."""
    silent = await asyncpg.connect(pond.urls.engine)
    await silent.execute("begin; select pg_advisory_xact_lock(7741002)")
    await silent.prepare("select 1")
    maintenance = Maintenance(pond.engine_db, lease_s=2.0)
    try:
        assert await maintenance.free_claim() == 0, "it may go on"
        assert await maintenance.free_claim(silent_s=0.0) == 1
        async with pond.engine_db.duty("test") as con, asyncio.timeout(DEADLINE_S):
            await con.fetch("select pg_advisory_xact_lock(7741002)")
    finally:
        silent.terminate()
