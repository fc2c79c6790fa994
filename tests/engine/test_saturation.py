"""How full limits, queues and an org are, as the org may see it, and how little is read for it."""

from __future__ import annotations

import pytest
from tests.engine.conftest import Pond
from tests.engine.parking import KEY, ROOM, Hand, end, send
from tests.engine.test_limits import limit

from millpond.db.queries import queries
from millpond.engine import saturation
from millpond.engine.saturation import Saturation


async def told(pond: Pond, org_id: int) -> tuple[dict[str, Saturation], bool]:
    async with pond.db.org(org_id) as con:
        found, has_more = await saturation.saturation(con, org_id)
    return {f"{one.of} {one.name}" if one.of != "org" else "org": one for one in found}, has_more


async def test_what_is_in_use_and_what_waits_is_told_to_each_org_of_its_own(
    pond: Pond, other_org: int
) -> None:
    hand = await Hand.register(pond)
    await limit(pond.db, KEY, 2)
    await limit(pond.db, "model:mine", 5, org_id=pond.org_id)
    await send(pond, 4, keys=[KEY, "model:mine"])
    await send(pond, 3, org_id=other_org)
    claimed = await hand.soon()
    assert len(claimed) == 2
    mine = sum(one.lease.org_id == pond.org_id for one in claimed)
    found, has_more = await told(pond, pond.org_id)
    shared, own = found[f"limit {KEY}"], found["limit model:mine"]
    assert (shared.in_use, shared.maximum, shared.own) == (2, 2, mine)
    assert (shared.waiting, shared.is_waiting_exact, shared.is_exact) == (4 - mine, True, False)
    assert shared.oldest_s is not None
    assert 0 <= shared.oldest_s < 60
    assert (own.in_use, own.maximum, own.is_exact, own.waiting) == (mine, 5, True, 0)
    assert (found["org"].in_use, found["org"].waiting) == (mine, 4 - mine)
    assert (found["queue default"].maximum, found["queue default"].own) == (8, mine)
    assert not has_more
    other, _ = await told(pond, other_org)
    assert set(other) == {"org", "queue default", f"limit {KEY}"}
    assert (other[f"limit {KEY}"].own, other[f"limit {KEY}"].waiting) == (2 - mine, 1 + mine)
    await end(pond, claimed)
    assert len(await hand.soon()) == 2
    found, _ = await told(pond, pond.org_id)
    assert found["limit model:mine"].in_use == 4 - mine - found[f"limit {KEY}"].waiting


async def test_a_rate_has_no_places_and_tells_when_the_next_may_go(pond: Pond) -> None:
    hand = await Hand.register(pond)
    await limit(pond.db, KEY, 1, kind="rate", period_s=600.0, burst=1)
    await send(pond, 3)
    assert len(await hand.soon()) == 1
    found, _ = await told(pond, pond.org_id)
    rate = found[f"limit {KEY}"]
    assert (rate.in_use, rate.own, rate.waiting) == (None, 1, 2)
    assert rate.until is not None
    async with pond.engine_db.duty("test") as con:
        ahead_s = await con.fetchval(
            "select extract(epoch from $1::timestamptz - clock_timestamp())::float8", rate.until
        )
    assert 500 < ahead_s <= 600


async def test_counts_stop_at_their_caps_and_say_so(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = await Hand.register(pond)
    await limit(pond.db, KEY, 0)
    await limit(pond.db, "model:*", 0)
    await send(pond, 4)
    await send(pond, 2, keys=["model:a"])
    await send(pond, 1, keys=["model:b"])
    assert not await hand.soon()
    found, has_more = await told(pond, pond.org_id)
    assert [one.waiting for one in found.values() if one.of == "limit"] == [4, 2, 1]
    assert not has_more
    monkeypatch.setattr(saturation, "MAX_SHOWN", 2)
    found, has_more = await told(pond, pond.org_id)
    assert [one.name for one in found.values() if one.of == "limit"] == [KEY, "model:a"]
    assert has_more
    monkeypatch.setattr(saturation, "_MAX_WAITING", 3)
    found, _ = await told(pond, pond.org_id)
    limits = [one for one in found.values() if one.of == "limit"]
    assert sum(one.waiting for one in limits) <= 3
    assert not any(one.is_waiting_exact for one in limits)


async def test_lanes_of_others_under_the_same_key_are_not_walked(
    pond: Pond, other_org: int
) -> None:
    hand = await Hand.register(pond)
    await limit(pond.db, KEY, 1)
    await send(pond, 3)
    assert len(await hand.soon()) == 1
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "insert into lane (org_id, lane_id, queue, capability, keys, offset_us, cursor_rank, active,"
            " parked_on, parked_s) select $1::bigint, n, 'default', 'echo@1', array[$2::text], 0, 0, false,"
            " $3::text, n from generate_series(1, 5000) n",
            *(other_org, KEY, ROOM),
        )
        await con.execute("analyze lane")
    read = (
        "select coalesce(sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0)), 0)::int"
        " from pg_stat_xact_user_tables where relname = 'lane'"
    )
    async with pond.db.org(pond.org_id) as con:
        before = await con.fetchval(read)
        found, _ = await saturation.saturation(con, pond.org_id)
        after = await con.fetchval(read)
    (key,) = [one for one in found if one.of == "limit"]
    assert key.waiting == 2
    assert after - before < 100


async def test_the_statements_go_by_key(pond: Pond) -> None:
    await send(pond, 300)
    statements = {"held": (10_000,), "parked": (5_000, 10_000)}
    async with pond.db.org(pond.org_id) as con:
        for name, caps in statements.items():
            plan = await con.fetch(f"explain {queries('saturation')[name]}", pond.org_id, *caps)
            text = "\n".join(row[0] for row in plan)
            for table in ("lane", "lease", "ready"):
                assert f"Seq Scan on {table}" not in text, text
