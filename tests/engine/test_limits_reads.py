"""How much a claim reads of limits and parked lanes; meters of rates; keys of old runs; how often a worker looks."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.engine.conftest import Pond
from tests.engine.parking import KEY, ROOM, Hand, end, hold, send, unlimit
from tests.engine.test_limits import limit, second_org

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.engine import ceilings, due_rooms, inputs
from millpond.engine.limiting import Limiter
from millpond.engine.meters import Meters
from millpond.engine.rulebook import RuleBook
from millpond.errors import InvalidInput

# How much is read under the lock


async def read_by(con: Connection, limiter: Limiter, table: str) -> int:
    """Return how many rows of a table the look at limits reads."""
    read = (
        "select coalesce(sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0)), 0)::int"
        " from pg_stat_xact_user_tables where relname = $1"
    )
    before: int = await con.fetchval(read, table)
    assert await limiter.open(con, {"default": 8})
    after: int = await con.fetchval(read, table)
    return after - before


@pytest.mark.parametrize("case", ["paused", "unable", "of another queue", "waiting"])
async def test_lanes_that_may_not_be_woken_are_not_walked(pond: Pond, case: str) -> None:
    """A room with place, and three thousand lanes under it that this worker cannot let go."""
    hand = await Hand.register(pond)
    await limit(pond.db, KEY, 2)
    await send(pond, 1)
    assert len(await hand.soon()) == 1
    able, queue = ("other@1" if case == "unable" else "echo@1"), "default"
    if case == "of another queue":
        queue = "llm"
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "insert into lane (org_id, lane_id, queue, capability, keys, offset_us, cursor_rank, active,"
            " parked_on, parked_s, blocked_at)"
            " select $1::bigint, n * 4, $2::text, $3::text, array[$4::text], 0, 0, false, $5::text, n,"
            " case when $6::bool then clock_timestamp() - interval '1 day' end from generate_series(1, 3000) n",
            *(pond.org_id, queue, able, KEY, ROOM, case == "waiting"),
        )
        await con.execute(
            "insert into room (room, queue, capability, due_us, version, maximum) values ($1, $2, $3, 0, 1, 2)"
            " on conflict do nothing",
            *(ROOM, queue, able),
        )
    if case in ("paused", "waiting"):
        await hold(pond, pond.org_id)
    limiter = Limiter(["echo@1"], lambda _: 1.0)
    async with pond.engine_db.duty("test") as con:
        assert await read_by(con, limiter, "lane") < 600


async def test_a_claim_reads_what_was_changed_and_not_all_limits(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "MAX_LIMITS", 10_000)
    async with pond.db.org(pond.org_id) as con:
        await con.execute(
            "insert into org_limit (org_id, key, kind, maximum, set_by)"
            " select $1, 'model:m' || n, 'concurrency', n, 'user:test' from generate_series(1, 3000) n",
            pond.org_id,
        )
        await con.execute(
            "select limit_changed($1, 'model:m' || n, 'concurrency') from generate_series(1, 3000) n",
            pond.org_id,
        )
    limiter = Limiter(["echo@1"], lambda _: 1.0)
    async with pond.engine_db.duty("test") as con:
        assert not await limiter.open(con, {"default": 8}), "so much is not read under the lock"
    await limiter.begin(pond.engine_db)
    await limit(pond.db, "model:m7", 70, org_id=pond.org_id)
    await limit(pond.db, "model:new", 5)
    async with pond.engine_db.duty("test") as con:
        assert await read_by(con, limiter, "org_limit") <= 2
    lane = {"org_id": pond.org_id, "queue": "default", "capability": "echo@1"}
    for key, maximum in (("model:m7", 70), ("model:m2999", 2999), ("model:new", 5)):
        row: Any = {**lane, "lane_id": maximum, "keys": [key]}
        assert [room.left for room in limiter.rooms(row)] == [maximum]


async def test_limits_that_were_removed_while_nobody_looked_are_none(pond: Pond) -> None:
    limiter = Limiter(["echo@1"], lambda _: 1.0)
    await limit(pond.db, KEY, 3)
    async with pond.engine_db.duty("test") as con:
        assert await limiter.open(con, {"default": 8})
    await unlimit(pond)
    async with pond.db.org(pond.org_id) as con:
        await con.execute(
            "select limit_changed($1, 'model:none', 'rate') from generate_series(1, 1500) n",
            pond.org_id,
        )
    assert limiter.is_on
    async with pond.engine_db.duty("test") as con:
        assert not await limiter.open(con, {"default": 8})
    await limiter.begin(pond.engine_db)
    assert not limiter.is_on


async def versions(pond: Pond) -> dict[str, int]:
    """Return by limits of which version the times of rooms are told."""
    async with pond.engine_db.duty("test") as con:
        rows = await con.fetch("select room, version from room")
    return {row["room"]: row["version"] for row in rows}


async def test_a_change_of_one_orgs_limits_makes_nobody_look_at_rooms_of_others(pond: Pond) -> None:
    """Rooms with a time are looked at anew where their own org's limits have changed, or the platform's."""
    other = await second_org(pond.db)
    hand = await Hand.register(pond)
    for org_id in (pond.org_id, other):
        await limit(pond.db, KEY, 0, org_id=org_id)
        await send(pond, 1, org_id=org_id)
    assert await hand.soon() == []
    before = await versions(pond)
    assert len(before) == 2
    await limit(pond.db, "model:m", 1, org_id=other)
    assert await hand.soon() == []
    after = await versions(pond)
    mine, theirs = (f"concurrency {org_id} {org_id} {KEY}" for org_id in (pond.org_id, other))
    assert after[mine] == before[mine]
    assert after[theirs] > before[theirs]
    await limit(pond.db, "model:m", 1)
    assert await hand.soon() == []
    assert set((await versions(pond)).values()) == {max(after.values()) + 1}


async def test_rooms_of_an_org_whose_limits_changed_are_looked_at_whoever_claims_next(
    pond: Pond,
) -> None:
    """Also by a worker that learnt of the change before, in a claim for another queue."""
    hand = await Hand.register(pond, queues=("default", "llm"))
    await limit(pond.db, KEY, 0, org_id=pond.org_id)
    await send(pond, 2)
    assert await hand.soon() == []
    await limit(pond.db, KEY, 1, org_id=pond.org_id)
    assert await hand.claim({"llm": 8}) == []
    assert len(await hand.soon()) == 1


async def test_a_change_that_is_read_and_came_after_the_look_at_rooms_is_looked_at_next(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand, other = await Hand.register(pond), await second_org(pond.db)
    await limit(pond.db, KEY, 0, org_id=pond.org_id)
    await send(pond, 1)
    assert await hand.soon() == []
    real, late = RuleBook.catch_up, [KEY]

    async def catch_up(book: RuleBook, con: Connection, version: int) -> bool:
        if late:
            await limit(pond.db, late.pop(), 1, org_id=pond.org_id)
        return await real(book, con, version)

    monkeypatch.setattr(RuleBook, "catch_up", catch_up)
    await limit(pond.db, KEY, 1, org_id=other)
    assert await hand.claim() == []
    assert len(await hand.soon()) == 1


async def test_rooms_are_looked_at_when_more_was_changed_than_the_log_keeps(pond: Pond) -> None:
    hand = await Hand.register(pond)
    await limit(pond.db, KEY, 0, org_id=pond.org_id)
    await send(pond, 1)
    assert await hand.soon() == []
    await limit(pond.db, KEY, 1, org_id=pond.org_id)
    other = await second_org(pond.db)
    async with pond.db.org(other) as con:
        await con.execute(
            "select limit_changed($1, 'model:none', 'rate') from generate_series(1, 1500) n", other
        )
    assert len(await hand.soon()) == 1


async def test_rooms_whose_lanes_find_no_slot_keep_no_other_room_waiting(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rooms have place than a claim wakes lanes of: each has its turn."""
    monkeypatch.setattr(due_rooms, "_MAX_ROOMS", 1)
    hand = await Hand.register(pond)
    await limit(pond.db, "model:*", 1)
    held = []
    for nth in range(3):
        await send(pond, 1, keys=[f"model:{nth}"])
        held += await hand.soon()
    for nth in range(3):
        await send(pond, 1, keys=[f"model:{nth}"])
    assert await hand.soon() == []
    await end(pond, held)
    limiter = Limiter(["echo@1"], lambda _: 1.0)
    for _ in range(3):
        await limiter.begin(pond.engine_db)
        # A claim that then has no slot for what it woke.
        async with pond.engine_db.duty("test") as con:
            assert await limiter.open(con, {"default": 8})
        assert limiter.has_more
    assert await pond.count("lane", "parked_on is not null and active") == 3


# Rates


async def test_a_raised_rate_holds_at_once(pond: Pond) -> None:
    hand = await Hand.register(pond)
    await limit(pond.db, KEY, 1, kind="rate", period_s=86_400.0)
    await send(pond, 3)
    assert len(await hand.soon()) == 1
    await limit(pond.db, KEY, 1000, kind="rate", period_s=1.0, burst=2)
    async with asyncio.timeout(5):
        while not await hand.claim():
            await asyncio.sleep(0.01)


async def test_what_a_rate_let_go_and_was_not_begun_in_time_is_admitted_anew(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run needs beyond its lease is read once so slowly that its place in the rate is past."""
    real, waits = inputs.complete, [0.3]

    async def slow_once(*args: Any) -> Any:
        if waits:
            await asyncio.sleep(waits.pop())
        return await real(*args)

    monkeypatch.setattr(inputs, "complete", slow_once)
    begun: list[int] = []

    async def paced(_ctx: Any, n: int) -> None:
        begun.append(n)

    flow = pond.flow(paced, keys=[KEY])
    await limit(pond.db, KEY, 10, kind="rate", period_s=1.0)
    run_id = await pond.submit(flow, 1)
    async with pond.worker({"default": 2}):
        await pond.ended(run_id)
    assert begun == [1]
    kinds = await pond.kinds(run_id)
    assert kinds.index("run.released") > kinds.index("run.started")
    assert kinds.count("run.resumed") == 1


async def test_a_meter_that_cannot_be_kept_is_refused(pond: Pond) -> None:
    with pytest.raises(InvalidInput) as refused:
        await limit(pond.db, KEY, 1, kind="rate", period_s=86_400.0 * 31, burst=2**31 - 1)
    assert refused.value.param == "burst"
    assert "burst" in str(refused.value)


async def test_meters_that_tell_nothing_more_are_deleted(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    await limit(pond.db, "model:held", 1, kind="rate", period_s=86_400.0)
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "insert into meter (room, tat_us) select 'rate 0 0 ' || name,"
            " (extract(epoch from clock_timestamp() + h * interval '1 hour') * 1000000)::bigint"
            " from (values ('model:held', 5), ('model:past', -1), ('provider:none', 5)) v(name, h)"
        )
    assert await Meters(pond.engine_db).sweep() == 2
    assert await pond.count("meter", "room = 'rate 0 0 model:held'") == 1


async def test_a_meter_that_a_claim_moves_meanwhile_stays(pond: Pond) -> None:
    async with pond.engine_db.duty("test") as con:
        await con.execute("insert into meter (room, tat_us) values ('rate 0 0 a:b', 2)")
        assert await con.fetchval(queries("limiting")["drop_meters"], ["rate 0 0 a:b"], [1]) == 0
        assert await con.fetchval(queries("limiting")["drop_meters"], ["rate 0 0 a:b"], [2]) == 1


# Old keys, and how often a worker looks


async def test_keys_that_would_be_refused_today_do_not_stop_claims(pond: Pond) -> None:
    hand = await Hand.register(pond)
    await limit(pond.db, "note:* x model:*", 1)
    await send(pond, 1, keys=["note:a×b×c", "×", "model:m", "no key at all"])
    assert len(await hand.soon()) == 1


async def test_only_the_end_of_work_in_a_full_room_is_waited_for(pond: Pond) -> None:
    hand = await Hand.register(pond, "echo@1", "other@1")
    await limit(pond.db, "model:closed", 0)
    await send(pond, 1, keys=["model:closed"])
    assert await hand.soon() == []
    assert hand.claimer.limits.awaited == frozenset(), "no end of work opens what is closed"
    await limit(pond.db, KEY, 1)
    await send(pond, 2)
    await send(pond, 1, flow="other", keys=["model:free"])
    assert len(await hand.soon()) == 2
    await hand.claim()
    assert hand.claimer.limits.awaited == {"echo@1"}
    assert hand.claimer.limits.poll_s(1.0, 0.1) == 0.1
