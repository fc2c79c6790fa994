"""Parked lanes, claim by claim: who wakes them, what is written for whom, and how much a claim reads beside them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import pytest
from tests.engine.conftest import Pond
from tests.engine.test_limits import limit, over, second_org

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.engine import ceilings, inputs, limiting
from millpond.engine.claim import Claimed, Claimer
from millpond.engine.limiting import Limiter
from millpond.engine.meters import Meters
from millpond.engine.pauses import Scope, pause, resume
from millpond.engine.submit import submit
from millpond.errors import InvalidInput
from millpond.types import NO_ORG

KEY = "provider:one"
ROOM = f"concurrency 0 0 {KEY}"


class Hand:
    """Claims by hand, as a worker of some queues that has some flows."""

    def __init__(self, pond: Pond, claimer: Claimer) -> None:
        self.pond = pond
        self.claimer = claimer
        self.has_more = False

    @classmethod
    async def register(cls, pond: Pond, *able: str, queues: Sequence[str] = ("default",)) -> Hand:
        worker_id, names = uuid.uuid4(), list(able or ["echo@1"])
        slots = orjson.dumps(dict.fromkeys(queues, 8)).decode()
        async with pond.engine_db.duty("test") as con:
            await con.execute(
                queries("maintenance")["register_worker"],
                *(worker_id, "here", 1, slots, names, 600.0, "", "{}"),
            )
        return cls(
            pond,
            Claimer(
                pond.engine_db, worker_id=worker_id, capabilities=names, estimate_s=lambda _: 1.0
            ),
        )

    async def claim(self, free: Mapping[str, int] | None = None) -> list[Claimed]:
        claimed, self.has_more = await self.claimer.claim(free or {"default": 8})
        return claimed

    async def soon(self, most: int = 12) -> list[Claimed]:
        """Claim as often as claims say that there is more, and once again; returns what came."""
        found = []
        for _ in range(most):
            found += await self.claim()
            if not self.has_more:
                break
        return found + await self.claim()


async def end(pond: Pond, claimed: Sequence[Claimed]) -> None:
    """Let work be over."""
    async with pond.engine_db.duty("test") as con:
        ids = [one.lease.item_id for one in claimed]
        await con.execute("delete from lease where item_id = any($1::uuid[])", ids)
        await con.execute("delete from item where item_id = any($1::uuid[])", ids)


async def send(pond: Pond, count: int = 1, *, flow: str = "echo", **options: Any) -> None:
    """Submit runs that have the key, each in a lane of its own."""
    options.setdefault("keys", [KEY])
    keys = options.pop("keys")
    intents = [
        pond.intent(flow, None, keys=[*keys, f"nth:{uuid.uuid4().hex}"], **options)
        for _ in range(count)
    ]
    async with pond.db.org(intents[0].org_id) as con:
        await submit(con, intents)


async def unlimit(
    pond: Pond, key: str = KEY, org_id: int = NO_ORG, kind: Any = "concurrency"
) -> None:
    async with pond.db.globals() if org_id == NO_ORG else pond.db.org(org_id) as con:
        await ceilings.remove_limit(con, org_id, key, kind)


async def rooms(pond: Pond) -> list[tuple[Any, ...]]:
    async with pond.engine_db.duty("test") as con:
        rows = await con.fetch(
            "select room, queue, capability, due_us from room order by room, queue, capability"
        )
    return [tuple(row) for row in rows]


async def let_be_awake(pond: Pond, org_id: int, *, suffix: str = "") -> None:
    """Put an org's parked lanes into the active order as a claim does that then has no slot for them."""
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "update lane set active = true, capability = capability || $2"
            " where org_id = $1 and parked_on is not null",
            *(org_id, suffix),
        )
        await con.execute("update share set active = true where org_id = $1", org_id)
        if suffix:
            await con.execute(
                "insert into room (room, queue, capability, due_us, version, maximum)"
                " select room, queue, capability || $1, due_us, version, maximum from room",
                suffix,
            )


def orgs(claimed: Sequence[Claimed]) -> list[int]:
    return [one.lease.org_id for one in claimed]


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
    monkeypatch.setattr(limiting, "_MAX_WOKEN", 3)
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
    monkeypatch.setattr(limiting, "_PAGE", 2)
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


async def hold(pond: Pond, org_id: int) -> None:
    async with pond.db.org(org_id) as con:
        await pause(con, org_id, Scope(), "user:ann", "repairs")


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
    await limit(pond.db, KEY, 0)
    await limit(pond.db, "queue:default", 1000)
    await send(pond, 30)
    await send(pond, 2, org_id=other)
    assert await hand.soon() == []
    of_org = "org_id = {} and blocked_at is not null"
    assert await pond.count("lane", "parked_on is not null and not active") == 32
    assert await pond.count("lane", of_org.format(pond.org_id)) == 8
    assert await pond.count("lane", of_org.format(other)) == 2


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


# How much is read under the lock


async def read_by(con: Connection, limiter: Limiter, table: str) -> int:
    """Return how many rows of a table the look at limits reads."""
    read = (
        "select coalesce(sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0)), 0)::int"
        " from pg_stat_xact_user_tables where relname = $1"
    )
    before: int = await con.fetchval(read, table)
    assert await limiter.open(con, ["default"])
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
            " parked_on, parked_s, blocked_at) select $1, n * 4, $2, $3, array[$4], 0, 0, false, $5, n,"
            " case when $6 then clock_timestamp() - interval '1 day' end from generate_series(1, 3000) n",
            *(pond.org_id, queue, able, KEY, ROOM, case == "waiting"),
        )
        await con.execute(
            "insert into room (room, queue, capability, due_us, version, maximum) values ($1, $2, $3, 0, 1, 2)"
            " on conflict do nothing",
            *(ROOM, queue, able),
        )
    if case in ("paused", "waiting"):
        await hold(pond, pond.org_id)
    limiter = Limiter(["echo@1"])
    async with pond.engine_db.duty("test") as con:
        assert await read_by(con, limiter, "lane") < 300


async def test_a_claim_reads_what_was_changed_and_not_all_limits(pond: Pond) -> None:
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
    limiter = Limiter(["echo@1"])
    async with pond.engine_db.duty("test") as con:
        assert not await limiter.open(con, ["default"]), "so much is not read under the lock"
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
    limiter = Limiter(["echo@1"])
    await limit(pond.db, KEY, 3)
    async with pond.engine_db.duty("test") as con:
        assert await limiter.open(con, ["default"])
    await unlimit(pond)
    async with pond.db.org(pond.org_id) as con:
        await con.execute(
            "select limit_changed($1, 'model:none', 'rate') from generate_series(1, 1500) n",
            pond.org_id,
        )
    assert limiter.is_on
    async with pond.engine_db.duty("test") as con:
        assert not await limiter.open(con, ["default"])
    await limiter.begin(pond.engine_db)
    assert not limiter.is_on


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
