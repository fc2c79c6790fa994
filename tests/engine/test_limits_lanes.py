"""Parked lanes, claim by claim: who wakes them, and what one worker or org does not do to another."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.engine.conftest import Pond
from tests.engine.parking import (
    KEY,
    ROOM,
    Hand,
    end,
    hold,
    let_be_awake,
    orgs,
    rooms,
    send,
    unlimit,
)
from tests.engine.test_limits import limit, over, second_org

from millpond.engine import due_rooms, limiting
from millpond.engine.pauses import Scope, resume
from millpond.engine.submit import submit

# What no limit holds up any more


async def test_lanes_go_on_when_the_last_limit_is_removed(pond: Pond) -> None:
    async def echo(_ctx: Any, _: Any) -> None:
        return None

    flow = pond.flow(echo)
    await limit(pond.db, KEY, 0)
    async with pond.worker({"default": 4}):
        await send(pond, 30)
        pond.hints.wake(["default"])
        async with asyncio.timeout(20):
            while await pond.count("lane", "parked_on is not null") < 30:
                await asyncio.sleep(0.02)
        await unlimit(pond)
        pond.hints.wake(["default"])
        await over(pond, flow, 30)
        async with asyncio.timeout(5):
            while await pond.count("room"):
                await asyncio.sleep(0.02)
    assert await pond.count("lane", "parked_on is not null or blocked_at is not null") == 0


async def test_a_worker_that_never_knew_the_limit_wakes_what_it_left(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(due_rooms, "_MAX_WOKEN", 3)
    first = await Hand.register(pond)
    await limit(pond.db, KEY, 0)
    await send(pond, 8)
    assert await first.soon() == []
    assert await pond.count("lane", "parked_on is not null and not active") == 8
    await unlimit(pond)
    later = await Hand.register(pond)
    assert len(await later.soon()) == 8
    assert await pond.count("room") == 0
    assert await pond.count("lane", "parked_on is not null") == 0


async def test_a_lane_that_was_awake_when_its_limit_went_takes_more_work_later(pond: Pond) -> None:
    hand = await Hand.register(pond)
    await limit(pond.db, KEY, 0)
    intent = pond.intent("echo", None, keys=[KEY])
    async with pond.db.org(pond.org_id) as con:
        await submit(con, [intent])
    assert await hand.soon() == []
    await let_be_awake(pond, pond.org_id)
    await unlimit(pond)
    assert len(await hand.soon()) == 1
    async with pond.db.org(pond.org_id) as con:
        await submit(con, [pond.intent("echo", None, keys=[KEY])])
    assert len(await hand.soon()) == 1, "it is not taken for parked"


async def test_lanes_of_a_queue_without_free_slots_are_not_forgotten(pond: Pond) -> None:
    hand = await Hand.register(pond, queues=("default", "llm"))
    await limit(pond.db, KEY, 0)
    await send(pond, 3)
    assert await hand.claim({"default": 8, "llm": 8}) == []
    await unlimit(pond)
    for _ in range(3):
        assert await hand.claim({"llm": 8}) == []
    assert len(await hand.soon()) == 3


# What one worker sees and another does not


async def test_a_worker_that_cannot_do_parked_work_changes_nothing_for_those_who_can(
    pond: Pond,
) -> None:
    await limit(pond.db, KEY, 5, kind="rate", period_s=1.0)
    able = await Hand.register(pond)
    of_other_queue = await Hand.register(pond, queues=("llm",))
    of_other_work = await Hand.register(pond, "other@1")
    await send(pond, 2)
    assert len(await able.claim()) == 1
    before = await rooms(pond)
    assert len(before) == 1
    await asyncio.sleep(0.25)
    for _ in range(3):
        assert await of_other_queue.claim({"llm": 8}) == []
        assert await of_other_work.claim() == []
        assert await rooms(pond) == before
    assert of_other_queue.claimer.limits.poll_s(1.0, 0.1) == 1.0
    assert len(await able.claim()) == 1


async def test_a_room_is_found_however_many_others_are_looked_at_at_every_claim(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(due_rooms, "_PAGE", 2)
    await limit(pond.db, "model:*", 1)
    hand = await Hand.register(pond)
    holders = {}
    for nth in range(7):
        await send(pond, 1, keys=[f"model:{nth}"])
        holders[nth] = await hand.soon()
        assert len(holders[nth]) == 1
    for nth in range(7):
        await send(pond, 1, keys=[f"model:{nth}"])
    assert await hand.soon() == []
    assert len(await rooms(pond)) == 7
    for nth in (6, 0, 3):
        await end(pond, holders[nth])
        found = [one for _ in range(5) for one in await hand.claim()]
        assert len(found) == 1, nth


# Pauses, and work that is executed alone


@pytest.mark.parametrize("suffix", ["", "!"])
async def test_an_awake_lane_that_cannot_be_met_does_not_hold_a_room(
    pond: Pond, suffix: str
) -> None:
    """Of a paused org, or of work that another process executes alone."""
    hand, other = await Hand.register(pond), await second_org(pond.db)
    await limit(pond.db, KEY, 1)
    await send(pond, 1)
    holder = await hand.soon()
    await send(pond, 1)
    await send(pond, 1, org_id=other)
    assert await hand.soon() == []
    await let_be_awake(pond, pond.org_id, suffix=suffix)
    if not suffix:
        await hold(pond, pond.org_id)
    await end(pond, holder)
    assert orgs(await hand.soon()) == [other]
    assert await pond.count("lane", "parked_on is not null") == 0


async def test_parked_lanes_of_a_paused_org_let_others_pass_and_go_once_it_is_resumed(
    pond: Pond,
) -> None:
    hand, other = await Hand.register(pond), await second_org(pond.db)
    await limit(pond.db, KEY, 1)
    await send(pond, 1)
    holder = await hand.soon()
    await send(pond, 60)
    assert await hand.soon() == []
    await send(pond, 1, org_id=other)
    assert await hand.soon() == []
    await hold(pond, pond.org_id)
    await end(pond, holder)
    found = await hand.soon()
    assert orgs(found) == [other]
    await end(pond, found)
    assert await hand.soon() == []
    async with pond.db.org(pond.org_id) as con:
        await resume(con, pond.org_id, Scope())
    for _ in range(60):
        found = await hand.soon()
        assert orgs(found) == [pond.org_id]
        await end(pond, found)


# Room that is kept


async def test_an_org_has_room_kept_for_few_of_its_lanes(pond: Pond) -> None:
    hand, other = await Hand.register(pond), await second_org(pond.db)
    await limit(pond.db, KEY, 1)
    await limit(pond.db, "queue:default", 1000)
    await send(pond, 1)
    assert len(await hand.soon()) == 1
    await send(pond, 30)
    await send(pond, 2, org_id=other)
    assert await hand.soon() == []
    of_org = "org_id = {} and blocked_at is not null"
    assert await pond.count("lane", "parked_on is not null and not active") == 32
    assert await pond.count("lane", of_org.format(pond.org_id)) == 2
    assert await pond.count("lane", of_org.format(other)) == 2


async def test_nothing_is_kept_for_what_a_closed_limit_holds(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limiting, "PATIENCE_S", 0.0)
    hand = await Hand.register(pond)
    await limit(pond.db, KEY, 1)
    await limit(pond.db, "queue:default", 1000)
    await send(pond, 2)
    assert len(await hand.soon()) == 1
    assert await pond.count("lane", "blocked_at is not null") == 1
    await limit(pond.db, KEY, 0)
    assert await hand.soon() == []
    assert await pond.count("lane", "blocked_at is not null") == 0


async def test_a_full_limit_of_one_org_keeps_no_room_from_others(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own limit is full; its head waits for long; the place on the shared key goes to whoever is next."""
    monkeypatch.setattr(limiting, "PATIENCE_S", 0.0)
    hand, other = await Hand.register(pond), await second_org(pond.db)
    await limit(pond.db, "queue:default", 1, org_id=pond.org_id)
    await limit(pond.db, KEY, 2)
    await send(pond, 2)
    assert orgs(await hand.soon()) == [pond.org_id]
    await send(pond, 1, org_id=other)
    assert orgs(await hand.soon()) == [other], "the one place that is left is kept for nobody"


# What somebody holds locked, and who has no slot


async def test_a_lane_found_full_beside_locked_work_is_not_forgotten(pond: Pond) -> None:
    """Three rounds of a claim in vain, each for items that somebody holds locked."""
    other = await second_org(pond.db)
    hand = await Hand.register(pond)
    await limit(pond.db, KEY, 1)
    await send(pond, 1, org_id=other)
    holder = await hand.claim({"default": 4})
    assert orgs(holder) == [other]
    async with pond.db.org(pond.org_id) as con:
        held = await submit(con, [pond.intent("echo", n) for n in range(60)])
    async with pond.engine_db.duty("holder") as con:
        await con.execute("select from item where item_id = any($1::uuid[]) for update", held)
        for _ in range(3):
            assert await hand.claim({"default": 4}) == []
        await send(pond, 1, org_id=other)
        assert await hand.claim({"default": 4}) == []
    await end(pond, holder)
    found: list[int] = []
    for _ in range(30):
        found += orgs(await hand.claim({"default": 4}))
    assert found.count(other) == 1
    assert len(found) == 61


async def test_no_place_is_kept_for_a_queue_that_has_no_slot_free(pond: Pond) -> None:
    other = await second_org(pond.db)
    hand = await Hand.register(pond, queues=("default", "llm"))
    for key in (KEY, "model:two"):
        await limit(pond.db, key, 1)
    holder = await _passed_over(pond, hand, other)
    await send(pond, 2)
    await end(pond, holder)
    async with pond.engine_db.duty("test") as con:
        await con.execute("""update worker set in_use = '{"llm": 8}'""")
    assert len(await hand.claim({"default": 8})) == 1, "the place is not kept: nobody could use it"


async def test_a_place_is_kept_for_a_queue_that_has_a_slot_free(pond: Pond) -> None:
    other = await second_org(pond.db)
    hand = await Hand.register(pond, queues=("default", "llm"))
    for key in (KEY, "model:two"):
        await limit(pond.db, key, 1)
    holder = await _passed_over(pond, hand, other)
    await send(pond, 2)
    await end(pond, holder)
    assert await hand.claim({"default": 8}) == []
    assert orgs(await hand.claim({"llm": 8})) == [other]


async def test_a_place_is_kept_for_a_queue_whose_slots_go_round(pond: Pond) -> None:
    """All are in use whenever its workers tell how many are: somebody claimed for it of late."""
    other = await second_org(pond.db)
    hand = await Hand.register(pond, queues=("default", "llm"))
    for key in (KEY, "model:two"):
        await limit(pond.db, key, 1)
    holder = await _passed_over(pond, hand, other)
    await _tell_full(pond, "llm")
    await send(pond, 2)
    await send(pond, 1, queue="llm", keys=["model:of-no-limit"])
    assert len(await hand.claim({"llm": 1})) == 1
    await end(pond, holder)
    assert await hand.claim({"default": 8}) == []
    assert orgs(await hand.claim({"llm": 8})) == [other]


async def test_a_place_is_kept_for_a_queue_that_is_claimed_for(pond: Pond) -> None:
    """By what its workers tell it has no free slot, but here is one."""
    other = await second_org(pond.db)
    hand = await Hand.register(pond, queues=("default", "llm"))
    for key in (KEY, "model:two"):
        await limit(pond.db, key, 1)
    holder = await _passed_over(pond, hand, other)
    await _tell_full(pond, "llm")
    await send(pond, 2, queue="llm")
    async with pond.engine_db.duty("test") as con:
        await con.execute("update share set virtual_s = 100 where org_id = $1", other)
    await end(pond, holder)
    assert orgs(await hand.claim({"llm": 8})) == [other], "the others would go first"


async def test_heads_that_nobody_has_a_slot_for_stand_in_no_others_way(pond: Pond) -> None:
    """More of them wait, and for longer, than a claim looks at of all heads that wait for room to be kept."""
    other = await second_org(pond.db)
    hand = await Hand.register(pond, queues=("default", "llm"))
    for key in (KEY, "model:two"):
        await limit(pond.db, key, 1)
    await _tell_full(pond, "llm")
    await send(pond, 1)
    holder = await hand.claim({"default": 8})
    await send(pond, 1, org_id=other, keys=[KEY, "model:two"])
    assert await hand.claim({"default": 8}) == []
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "update lane set blocked_at = clock_timestamp() - interval '1 minute' where blocked_at is not null"
        )
        await con.execute("update share set virtual_s = 100 where org_id = $1", other)
        await con.execute(
            "insert into lane (org_id, lane_id, queue, capability, keys, offset_us, cursor_rank, active,"
            " parked_on, parked_s, blocked_at)"
            " select n, n * 4, 'llm', 'echo@1', array[$1::text, 'model:two'], 0, 0, false, $2::text, n,"
            " clock_timestamp() - interval '1 day' from generate_series(1000, 1300) n",
            *(KEY, ROOM),
        )
    await send(pond, 2)
    await end(pond, holder)
    assert orgs(await hand.claim({"default": 8})) == [other]


async def _tell_full(pond: Pond, queue: str) -> None:
    async with pond.engine_db.duty("test") as con:
        await con.execute("update worker set in_use = json_build_object($1::text, 8)", queue)


async def _passed_over(pond: Pond, hand: Hand, org_id: int) -> list[Any]:
    """Let a lane in another queue, which needs two keys, be passed over for long; returns what holds one of them."""
    await send(pond, 1)
    holder = await hand.claim({"default": 8})
    assert len(holder) == 1
    await send(pond, 1, org_id=org_id, queue="llm", keys=[KEY, "model:two"])
    assert await hand.claim({"llm": 8}) == []
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "update lane set blocked_at = blocked_at - interval '1 minute' where blocked_at is not null"
        )
    return holder
