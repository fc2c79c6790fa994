"""Rooms that lanes of several queues need, on a real database: places go by what orgs used over all queues."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from tests.engine.conftest import Pond
from tests.engine.parking import KEY, ROOM, Hand, end, hold, orgs, send, unlimit
from tests.engine.test_limits import limit, second_org

from millpond.engine import crossings
from millpond.engine.charging import settle_crossings
from millpond.engine.leases import Claimed
from millpond.engine.submit import submit

QUEUES = ("llm", "sql")


async def fill(hand: Hand, slots: int = 8) -> list[Claimed]:
    """Claim for both queues as long as claims say that there is more."""
    found: list[Claimed] = []
    for _ in range(12):
        found += await hand.claim(dict.fromkeys(QUEUES, slots))
        if not hand.has_more:
            break
    return found


async def many(pond: Pond, queue: str, org_id: int, count: int = 40) -> None:
    """Submit runs of one lane that have the key."""
    intents = [
        pond.intent("echo", None, keys=[KEY], queue=queue, org_id=org_id) for _ in range(count)
    ]
    async with pond.db.org(org_id) as con:
        await submit(con, intents)


async def turns(pond: Pond, hand: Hand, rounds: int) -> Counter[int]:
    """Claim and let all of it end, so many times; returns how many of each org went."""
    went: Counter[int] = Counter()
    for _ in range(rounds):
        claimed = await fill(hand)
        went.update(orgs(claimed))
        await end(pond, claimed)
    return went


async def stands(pond: Pond) -> dict[int, float]:
    async with pond.engine_db.duty("test") as con:
        rows = await con.fetch("select org_id, virtual_s from crossing_share where room = $1", ROOM)
    return {row["org_id"]: row["virtual_s"] for row in rows}


async def test_orgs_in_two_queues_share_the_places_of_a_key(pond: Pond) -> None:
    """Whichever queue is looked at first, and whoever else the others are."""
    other, third = await second_org(pond.db), await second_org(pond.db)
    await limit(pond.db, KEY, 3)
    hand = await Hand.register(pond, queues=QUEUES)
    await many(pond, "llm", pond.org_id)
    await many(pond, "sql", other)
    await many(pond, "sql", third)
    await end(pond, await fill(hand))
    assert await pond.count("crossing") == 1
    went = await turns(pond, hand, 8)
    assert went == {pond.org_id: 8, other: 8, third: 8}


async def test_an_org_in_both_queues_gets_no_more_than_one_in_one(pond: Pond) -> None:
    other = await second_org(pond.db)
    await limit(pond.db, KEY, 2)
    hand = await Hand.register(pond, queues=QUEUES)
    for queue in QUEUES:
        await many(pond, queue, pond.org_id)
    await many(pond, "sql", other)
    await end(pond, await fill(hand))
    went = await turns(pond, hand, 12)
    assert abs(went[pond.org_id] - went[other]) <= 2


async def test_an_org_with_many_lanes_gets_no_more_places(pond: Pond) -> None:
    """Lanes that were parked together are not woken together: what their org used since then counts."""
    other = await second_org(pond.db)
    await limit(pond.db, KEY, 2)
    hand = await Hand.register(pond, queues=QUEUES)
    await send(pond, 20, queue="llm")
    await many(pond, "sql", other)
    await end(pond, await fill(hand))
    went = await turns(pond, hand, 8)
    assert abs(went[pond.org_id] - went[other]) <= 2


async def test_places_go_by_what_was_used_and_not_by_what_was_expected(pond: Pond) -> None:
    other = await second_org(pond.db)
    await limit(pond.db, KEY, 2)
    hand = await Hand.register(pond, queues=QUEUES)
    await many(pond, "llm", pond.org_id)
    await many(pond, "sql", other)
    await end(pond, await fill(hand))
    await settle_crossings(pond.engine_db, {(pond.org_id, "llm", ROOM): 6.0})
    before = await stands(pond)
    went = await turns(pond, hand, 6)
    assert before[pond.org_id] - before[other] == pytest.approx(6.0, abs=2.0)
    assert went[other] - went[pond.org_id] == pytest.approx(6, abs=2)


async def test_what_is_given_back_takes_the_clock_back(pond: Pond) -> None:
    async with pond.engine_db.duty("test") as con:
        await con.execute("insert into crossing values ($1, 420.0)", ROOM)
        await con.execute("insert into crossing_share values ($1, $2, 480.0)", pond.org_id, ROOM)
        await con.execute("insert into share values ($1, 'llm', 2, 0, false)", pond.org_id)
    await settle_crossings(pond.engine_db, {(pond.org_id, "llm", ROOM): -800.0})
    assert await stands(pond) == {pond.org_id: 80.0}
    async with pond.engine_db.duty("test") as con:
        assert await con.fetchval("select virtual_s from crossing") == 80.0


async def test_a_queue_without_slots_leaves_its_places_to_the_other(pond: Pond) -> None:
    other = await second_org(pond.db)
    await limit(pond.db, KEY, 4)
    hand = await Hand.register(pond, queues=QUEUES)
    await many(pond, "llm", pond.org_id)
    await many(pond, "sql", other)
    await end(pond, await fill(hand))
    claimed = await hand.claim({"llm": 1, "sql": 8})
    assert Counter(orgs(claimed)) == {pond.org_id: 1, other: 3}


async def test_a_paused_org_stands_in_nobodys_way(pond: Pond) -> None:
    other = await second_org(pond.db)
    await limit(pond.db, KEY, 2)
    hand = await Hand.register(pond, queues=QUEUES)
    await many(pond, "llm", pond.org_id)
    await many(pond, "sql", other)
    await end(pond, await fill(hand))
    await hold(pond, pond.org_id)
    assert await turns(pond, hand, 4) == {other: 8}


async def test_a_crossing_without_its_limit_lets_everything_go_and_is_taken_away(
    pond: Pond,
) -> None:
    other = await second_org(pond.db)
    await limit(pond.db, KEY, 2)
    hand = await Hand.register(pond, queues=QUEUES)
    await many(pond, "llm", pond.org_id, 10)
    await many(pond, "sql", other, 10)
    claimed = await fill(hand)
    assert await pond.count("crossing") == 1
    assert not await crossings.drop_over(pond.engine_db), "lanes stand there"
    await unlimit(pond)
    for _ in range(4):
        claimed += await fill(hand)
    assert Counter(orgs(claimed)) == {pond.org_id: 10, other: 10}
    await fill(hand)
    assert await crossings.drop_over(pond.engine_db) == 1
    assert await pond.count("crossing_share") == 0


async def test_a_room_of_one_queue_or_of_one_org_is_no_crossing(pond: Pond) -> None:
    """Nothing is written for it then."""
    await limit(pond.db, KEY, 1)
    await limit(pond.db, "org:*", 2)
    hand = await Hand.register(pond, queues=QUEUES)
    await many(pond, "llm", pond.org_id)
    for queue in QUEUES:
        async with pond.db.org(pond.org_id) as con:
            await submit(con, [pond.intent("echo", None, queue=queue) for _ in range(4)])
    claimed = await fill(hand)
    assert await pond.count("room") >= 3
    await end(pond, claimed)
    await fill(hand)
    assert await pond.count("crossing") == 0


async def test_workers_share_a_key_by_worker_time_over_queues(pond: Pond) -> None:
    """Of one flow: what is expected of a run is the same, what it uses is not."""
    other = await second_org(pond.db)
    long_s, short_s = 0.1, 0.02
    ended: Counter[int] = Counter()

    async def work(_ctx: Any, org_id: int) -> None:
        await asyncio.sleep(long_s if org_id == pond.org_id else short_s)
        ended[org_id] += 1

    flow = pond.flow(work, name="crossed", keys=[KEY])
    await limit(pond.db, KEY, 3)
    for org_id, queue, count in ((pond.org_id, "llm", 150), (other, "sql", 700)):
        async with pond.db.org(org_id) as con:
            await submit(
                con,
                [pond.intent(flow, org_id, org_id=org_id, queue=queue) for _ in range(count)],
            )
    async with pond.worker({"llm": 6, "sql": 6}):
        async with asyncio.timeout(60):
            while ended[other] < 250 and ended[pond.org_id] < 100:
                await asyncio.sleep(0.01)
        short, long = ended[other] * short_s, ended[pond.org_id] * long_s
    # By count of runs the long ones would have five times as much; before crossings the first queue had it all.
    assert short / 2 <= long <= 2 * short
