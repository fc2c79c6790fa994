"""For how long limits and queues were full: looked at once a second by whoever has the turn, kept for an hour."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest
from tests.engine.conftest import DEADLINE_S, Pond
from tests.engine.parking import KEY, ROOM, Hand, end, send
from tests.engine.test_limits import limit, second_org
from tests.engine.test_saturation import told

from millpond.db.queries import queries
from millpond.engine.sampling import Sampler

_SQL = queries("saturation")


async def look(pond: Pond, sampler: Sampler, *, after_s: float = 1.0) -> None:
    """Let so much time have passed since the last look, and look."""
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "update sampling set at = clock_timestamp() - $1 * interval '1 second'", after_s
        )
    assert await sampler.sample()


async def begun(pond: Pond) -> Sampler:
    sampler = Sampler(pond.engine_db)
    assert not await sampler.sample(), "the first look only begins"
    return sampler


async def full(pond: Pond, kind: str, name: str) -> tuple[float, float]:
    """Return for how long it was looked at, and for how long something was full."""
    async with pond.db.globals() as con:
        (row,) = await con.fetch(_SQL["fullness"], [kind], [name], 60.0)
    return round(row["seen_s"], 1), round(row["full_s"], 1)


async def use(pond: Pond, in_use: str, told: str = "{}") -> None:
    async with pond.engine_db.duty("test") as con:
        await con.execute("update worker set in_use = $1, told = $2", in_use, told)


async def test_a_queue_is_full_while_work_waits_and_no_slot_is_free(pond: Pond) -> None:
    hand = await Hand.register(pond)
    sampler = await begun(pond)
    await look(pond, sampler)
    await send(pond, 12)
    claimed = await hand.claim()
    assert len(claimed) == 8
    await use(pond, '{"default": 8}', '{"went": {"default": 8}}')
    await look(pond, sampler)
    await use(pond, '{"default": 8}', '{"went": {"default": 11}}')
    await look(pond, sampler)
    assert await full(pond, "queue", "default") == (3.0, 2.0)
    async with pond.db.globals() as con:
        (row,) = await con.fetch(_SQL["fullness"], ["queue"], ["default"], 60.0)
    assert row["went"] == 11
    await end(pond, claimed)
    assert len(await hand.claim()) == 4
    await use(pond, '{"default": 8}')
    await look(pond, sampler)
    await look(pond, sampler)
    assert await full(pond, "queue", "default") == (5.0, 2.0), "full slots, but nothing waits"


async def test_a_room_is_full_without_a_place_and_its_orgs_while_work_stands_under_it(
    pond: Pond,
) -> None:
    hand = await Hand.register(pond)
    other = await second_org(pond.db)
    await limit(pond.db, KEY, 2)
    await limit(pond.db, "model:*", 1, kind="rate", period_s=600.0, burst=1)
    sampler = await begun(pond)
    await send(pond, 1)
    await send(pond, 1, org_id=other, keys=["model:mini"])
    first = await hand.soon()
    assert len(first) == 2
    await look(pond, sampler)
    rate = "rate 0 0 model:mini"
    assert await full(pond, "room", ROOM) == (1.0, 0.0)
    assert await full(pond, "room", rate) == (1.0, 1.0)
    assert await full(pond, "org", str(pond.org_id)) == (1.0, 0.0)
    await send(pond, 2)
    await hand.soon()
    await look(pond, sampler)
    assert await full(pond, "room", ROOM) == (2.0, 1.0)
    assert await full(pond, "org", str(pond.org_id)) == (2.0, 1.0)
    assert await full(pond, "org", str(other)) == (2.0, 0.0)
    mine, _ = await told(pond, pond.org_id)
    half = pytest.approx(0.5, abs=0.1)
    assert (mine[f"limit {KEY}"].full.of_minute, mine["org"].full.of_minute) == (half, half)
    assert mine[f"limit {KEY}"].full.of_hour == half
    assert mine["queue default"].full.of_minute == 0.0


async def test_a_second_is_counted_once_and_a_gap_is_not(pond: Pond) -> None:
    first = await begun(pond)
    second = Sampler(pond.engine_db)
    await look(pond, first)
    async with pond.engine_db.duty("test") as con:
        await con.execute("update sampling set at = clock_timestamp() + interval '1 minute'")
    assert not await second.sample()
    await look(pond, second, after_s=100.0)
    seen_s, _ = await full(pond, "queue", "default")
    assert seen_s == 3.0


async def test_figures_outlive_whoever_looked_and_go_after_an_hour(pond: Pond) -> None:
    hand = await Hand.register(pond)
    await limit(pond.db, KEY, 1)
    await send(pond, 2)
    await hand.soon()
    await look(pond, await begun(pond))
    await look(pond, Sampler(pond.engine_db))
    assert await full(pond, "room", ROOM) == (2.0, 2.0)
    async with pond.engine_db.duty("test") as con:
        await con.execute("update fullness set at = at - interval '63 minutes'")
    assert await full(pond, "room", ROOM) == (0.0, 0.0)
    await look(pond, Sampler(pond.engine_db))
    assert await pond.count("fullness", "at < clock_timestamp() - interval '1 hour'") == 0


async def test_nobody_is_told_before_anybody_has_looked(pond: Pond) -> None:
    await Hand.register(pond)
    found, _ = await told(pond, pond.org_id)
    assert found["org"].full.of_minute is None
    assert found["queue default"].full.of_hour is None


async def test_an_org_is_told_of_its_own_and_of_what_all_share(pond: Pond) -> None:
    other = await second_org(pond.db)
    names: Mapping[str, bool] = {
        ROOM: True,
        f"concurrency 0 {pond.org_id} {KEY}": True,
        f"concurrency {other} {other} {KEY}": False,
        f"concurrency 0 {other} ": False,
    }
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "insert into fullness (kind, name, at, full_s)"
            " select k, n, clock_timestamp(), 1 from unnest($1::text[], $2::text[]) u(k, n)",
            ["seen", *["room"] * len(names), "org"],
            ["", *names, str(other)],
        )
    async with pond.db.org(pond.org_id) as con:
        rows = await con.fetch(
            _SQL["fullness"], [*["room"] * len(names), "org"], [*names, str(other)], 60.0
        )
    seen = {row["name"]: row["full_s"] > 0 for row in rows}
    assert seen == {**names, str(other): False}


async def test_without_limits_leases_are_not_looked_at(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = await begun(pond)

    async def never(*_: object) -> list[object]:
        raise AssertionError

    monkeypatch.setattr(sampler, "_limits", never)
    await look(pond, sampler)
    await limit(pond.db, KEY, 1)
    with pytest.raises(AssertionError):
        await look(pond, sampler)


async def test_workers_look_and_tell_what_they_took(pond: Pond) -> None:
    async def quick(_ctx: object, _: object) -> None:
        return None

    pond.flow(quick)
    async with pond.worker() as worker:
        await pond.ended(await pond.submit("quick"))
        async with asyncio.timeout(DEADLINE_S):
            while not await pond.count("fullness", "kind = 'seen' and full_s > 0.5"):
                await asyncio.sleep(0.05)
            while not await pond.count(
                "worker",
                f"worker_id = '{worker.worker_id}' and told->'went'->>'default' = '1'"
                " and (told->'took_s'->>'quick@1')::float8 > 0",
            ):
                await asyncio.sleep(0.05)
