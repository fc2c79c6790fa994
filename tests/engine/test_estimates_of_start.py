"""When a run can be expected to start: near what then happens, and null with a reason where nobody knows."""

from __future__ import annotations

import asyncio
import uuid
from datetime import datetime
from typing import Any

import pytest
from tests.engine.conftest import DEADLINE_S, Pond
from tests.engine.parking import KEY, Hand
from tests.engine.parking import send as send_with_key
from tests.engine.test_limits import limit, second_org, submit_many
from tests.engine.test_why import Answer, register

from millpond.engine import ordering
from millpond.engine.context import Context
from millpond.engine.ordering import Estimate
from millpond.engine.pauses import Scope, pause
from millpond.engine.why import explain

# What docs/limits.md says of the estimate under a steady load.
FACTOR = 2.0
# How many runs began until a time and in how many seconds, and how many after it and before another one.
PACE = """
select count(*) filter (where started_at <= $1), extract(epoch from $1 - min(started_at))::float8,
       count(*) filter (where started_at > $1 and started_at < $2)
from run
"""


async def estimate(pond: Pond, run_id: uuid.UUID) -> tuple[Estimate, datetime]:
    """Return the estimate for a run, and when it was asked for by the database's clock."""
    async with pond.db.org(pond.org_id) as con:
        found = await explain(con, pond.org_id, run_id)
        now: datetime = await con.fetchval("select clock_timestamp()")
    assert found.estimate is not None
    return found.estimate, now


async def test_in_a_steady_state_it_is_near_what_claims_then_do(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ordering, "LEAST_SEEN_S", 3.0)
    other = await second_org(pond.db)

    async def steady(_ctx: Context, _: Any) -> None:
        await asyncio.sleep(0.1)

    flow = pond.flow(steady)
    async with pond.worker({"default": 4}):
        runs = await submit_many(pond, flow, 240)
        await submit_many(pond, flow, 240, org_id=other)
        async with asyncio.timeout(DEADLINE_S):
            while (told := await estimate(pond, runs[-20]))[0].basis != "pace":
                await asyncio.sleep(0.1)
        found, asked_at = told
        assert found.in_s is not None
        assert found.in_s > 1
        row = await pond.ended(runs[-20])
        async with pond.engine_db.duty("test") as con:
            went, seen_s, ahead = await con.fetchrow(PACE, asked_at, row["started_at"])
    # What then went before it, at the pace that was: how long that takes hangs on what else the machine does meanwhile.
    would_s = (ahead + 1) * seen_s / went
    assert would_s / FACTOR <= found.in_s <= would_s * FACTOR, (would_s, found)


async def test_by_slots_and_what_workers_tell_where_no_pace_is_known(pond: Pond) -> None:
    told = '{"took_s": {"idle@1": 2.0}}'
    await register(pond, in_use='{"default": 4}', told=told)
    ids = [await pond.submit("idle") for _ in range(7)]
    found, _ = await estimate(pond, ids[6])
    # Six before it, and half of each that is being executed: 6 × 2 s + 4 × 1 s on 4 slots.
    assert (found.basis, found.in_s) == ("slots", 4.0)
    assert "6 before it, 4 slots" in found.text


async def test_a_free_slot_is_taken_at_once(pond: Pond) -> None:
    await register(pond, in_use='{"default": 2}')
    ids = [await pond.submit("idle") for _ in range(3)]
    assert [(await estimate(pond, one))[0].basis for one in ids] == ["free_slot"] * 2 + ["slots"]


async def test_nobody_knows_when_a_pause_ends_or_a_worker_comes(pond: Pond) -> None:
    run_id = await pond.submit("idle")
    found, _ = await estimate(pond, run_id)
    assert (found.in_s, found.basis) == (None, "no_worker")
    async with pond.db.org(pond.org_id) as con:
        await pause(con, pond.org_id, Scope(), "user:ann", "")
    found, _ = await estimate(pond, run_id)
    assert (found.in_s, found.basis) == (None, "paused")


async def parked(pond: Pond) -> uuid.UUID:
    """Let a hand fill a limit, and return a run that stands under it."""
    hand = await Hand.register(pond)
    await send_with_key(pond, 3)
    assert await hand.soon()
    async with pond.engine_db.duty("test") as con:
        run_id: uuid.UUID = await con.fetchval(
            "select r.item_id from ready r join lane l using (org_id, lane_id)"
            " where l.parked_on is not null and not l.active order by r.rank desc limit 1"
        )
    return run_id


async def test_of_a_full_limit_that_orgs_share_nobody_knows(pond: Pond) -> None:
    await limit(pond.db, KEY, 1)
    found, _ = await estimate(pond, await parked(pond))
    assert (found.in_s, found.basis) == (None, "full")
    assert KEY in found.text


async def test_of_an_orgs_own_limit_the_ends_are_known_by_what_workers_tell(pond: Pond) -> None:
    await limit(pond.db, KEY, 1, org_id=pond.org_id)
    run_id = await parked(pond)
    found, _ = await estimate(pond, run_id)
    assert (found.in_s, found.basis) == (None, "full"), "no worker has told how long it takes"
    async with pond.engine_db.duty("test") as con:
        await con.execute('update worker set told = \'{"took_s": {"echo@1": 600}}\'')
    found, _ = await estimate(pond, run_id)
    assert (found.basis, found.is_least) == ("limit", True)
    assert found.in_s is not None
    assert 300 < found.in_s <= 600
    async with pond.engine_db.duty("test") as con:
        await con.execute("update lease set claimed_at = claimed_at - interval '1 hour'")
    found, _ = await estimate(pond, run_id)
    assert (found.in_s, found.basis) == (None, "full"), "it is at it for longer than it takes"


async def test_a_rate_tells_when_the_next_may_go(pond: Pond) -> None:
    await limit(pond.db, KEY, 1, kind="rate", period_s=600.0, burst=1)
    found, _ = await estimate(pond, await parked(pond))
    assert (found.basis, found.is_least) == ("limit", True)
    assert found.in_s is not None
    assert 500 < found.in_s <= 600


async def test_a_closed_limit_is_not_expected_to_open(pond: Pond) -> None:
    await limit(pond.db, KEY, 1)
    run_id = await parked(pond)
    await limit(pond.db, KEY, 0)
    found, _ = await estimate(pond, run_id)
    assert (found.in_s, found.basis) == (None, "full")


async def test_what_starts_or_goes_on_by_a_timer_is_not_expected_before(pond: Pond) -> None:
    found, _ = await estimate(pond, await pond.submit("idle", delay_s=3600))
    assert (found.basis, found.is_least) == ("timer", True)
    assert found.in_s is not None
    assert 3000 < found.in_s <= 3600


async def test_people_and_signals_come_when_they_come_and_timers_beside_them_at_last(
    pond: Pond,
) -> None:
    async def ask(ctx: Context, _: None) -> None:
        await ctx.ask_human("ok", role="support", form=Answer, title="Ship it?")

    async def either(ctx: Context, _: None) -> None:
        await ctx.parallel(
            ctx.sleep(3600, name="rest"),
            ctx.ask_human("ok", role="support", form=Answer, title="Ship it?"),
        )

    async def listen(ctx: Context, _: None) -> None:
        await ctx.wait_event("paid")

    for one in (ask, either, listen):
        pond.flow(one)
    async with pond.worker():
        found = {}
        for name, kind in (
            ("ask", "run.awaiting_input"),
            ("either", "run.waiting"),
            ("listen", "run.waiting"),
        ):
            run_id = await pond.submit(name)
            await pond.until(run_id, kind)
            found[name], _ = await estimate(pond, run_id)
    assert (found["ask"].in_s, found["ask"].basis) == (None, "human")
    assert (found["listen"].in_s, found["listen"].basis) == (None, "signal")
    assert found["either"].basis == "timer"
    assert found["either"].in_s is not None
    assert not found["either"].is_least
    assert "something else" in found["either"].text
