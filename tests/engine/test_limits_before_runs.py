"""A limit that was stored before a run came holds for that run, wherever a claim was meanwhile; on a real database."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from tests.engine.conftest import DEADLINE_S, Pond
from tests.engine.test_limits import limit

from millpond.db.queries import queries
from millpond.engine import claim
from millpond.engine.claim import Claimer
from millpond.engine.limiting import Limiter
from millpond.engine.registry import Flow
from millpond.engine.submit import submit

KEY = "provider:one"
GATE = 4711
# Whoever reads what came waits at the gate, in the middle of its claim.
WAIT_AT_GATE = f"""
create function millpond.at_gate() returns boolean language plpgsql volatile as $$
begin
  perform pg_advisory_xact_lock_shared({GATE});
  return true;
end
$$;
grant execute on function millpond.at_gate() to millpond_engine;
create policy at_gate on millpond.arrival as restrictive for select to millpond_engine using (millpond.at_gate());
"""


@asynccontextmanager
async def shut_gate(pond: Pond) -> AsyncIterator[None]:
    con = await asyncpg.connect(pond.urls.owner)
    try:
        await con.execute(WAIT_AT_GATE)
        await con.fetchval("select pg_advisory_lock($1::bigint)", GATE)
        yield
    finally:
        await con.close()


async def _somebody_waits(pond: Pond) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await pond.count("pg_locks", f"objid = {GATE} and not granted"):
            await asyncio.sleep(0.01)


async def _come(pond: Pond, flow: Any) -> uuid.UUID:
    async with pond.db.org(pond.org_id) as con:
        (run_id,) = await submit(con, [pond.intent(flow, 1)])
    return run_id


@pytest.mark.parametrize("way", ["at once", "decided", "by other limits"])
async def test_a_limit_holds_for_runs_that_came_after_it(
    pond: Pond, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(
        claim, "_LIMIT_S", DEADLINE_S
    )  # it stands at the gate in the middle of a claim
    flow, claimer = await _claimer(pond)
    if way == "by other limits":
        await limit(pond.db, "provider:other", 5)
    await claimer.claim({"default": 10})
    assert claimer.limits.is_on == (way == "by other limits")
    await _come(pond, flow)
    claimer._is_calm = way == "at once"
    async with shut_gate(pond):
        claiming = asyncio.create_task(claimer.claim({"default": 10}))
        await _somebody_waits(pond)
        await limit(pond.db, KEY, 0)
        later = await _come(pond, flow)
    async with asyncio.timeout(DEADLINE_S):
        claimed, _ = await claiming
    assert later not in {one.lease.item_id for one in claimed}
    claimed, _ = await claimer.claim({"default": 10})
    assert not claimed


async def test_limits_that_are_changed_all_the_time_hold_up_nobody(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim that one change has overtaken is made anew, once."""
    flow, claimer = await _claimer(pond)
    await limit(pond.db, KEY, 5)
    await claimer.claim({"default": 10})
    run_id = await _come(pond, flow)
    note = Limiter.note

    def overtaken(limiter: Limiter, first: Any, last: Any) -> bool:
        note(limiter, first, last)
        return False

    monkeypatch.setattr(Limiter, "note", overtaken)
    claimed, _ = await claimer.claim({"default": 10})
    assert [one.lease.item_id for one in claimed] == [run_id]


async def test_what_is_read_of_limits_before_a_claim_at_once_holds_for_it(pond: Pond) -> None:
    flow, claimer = await _claimer(pond)
    await claimer.claim({"default": 10})
    await limit(pond.db, KEY, 0)
    await _come(pond, flow)
    claimer.limits._is_behind = True  # as after a claim that saw it and failed
    assert claimer._is_calm
    claimed, _ = await claimer.claim({"default": 10})
    assert not claimed


async def _claimer(pond: Pond) -> tuple[Flow, Claimer]:
    """Return a flow with the key, and who claims its runs."""

    async def asks(_ctx: Any, _: Any) -> None:
        return None

    flow, worker_id = pond.flow(asks, keys=[KEY]), uuid.uuid4()
    async with pond.engine_db.duty("register") as con:
        await con.execute(
            queries("maintenance")["register_worker"],
            worker_id, "here", 1, "{}", [flow.capability], 30.0, "0", "{}",
        )  # fmt: skip
    claimer = Claimer(
        pond.engine_db,
        worker_id=worker_id,
        capabilities=[flow.capability],
        estimate_s=lambda _: 0.001,
    )
    return flow, claimer
