"""Limits on a real database: exact counts, edits, pairs, rates, parked lanes, many keys at once."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from tests.engine.conftest import Pond

from millpond.db.pool import Database
from millpond.engine import ceilings, limiting
from millpond.engine.claim import Claimer
from millpond.engine.rules import Kind, Rule
from millpond.engine.submit import submit
from millpond.errors import Conflict, InvalidInput, NotFound
from millpond.types import NO_ORG

# How often what is measured may be measured anew.
ROUNDS = 6


@dataclass
class Gauge:
    """Counts what executes at once, by name, and how much there ever was."""

    now: Counter[str] = field(default_factory=Counter)
    most: Counter[str] = field(default_factory=Counter)
    starts: list[float] = field(default_factory=list)

    async def hold(self, name: str, for_s: float) -> None:
        """Be one of those at `name` for a while."""
        self.starts.append(time.monotonic())
        self.now[name] += 1
        self.most[name] = max(self.most[name], self.now[name])
        await asyncio.sleep(for_s)
        self.now[name] -= 1


async def limit(
    db: Database,
    key: str,
    maximum: int,
    *,
    org_id: int = NO_ORG,
    kind: Kind = "concurrency",
    period_s: float | None = None,
    burst: int | None = None,
) -> None:
    """Set a limit, of the platform unless of an org."""
    rule = Rule(owner=org_id, key=key, kind=kind, maximum=maximum, period_s=period_s, burst=burst)
    async with db.globals() if org_id == NO_ORG else db.org(org_id) as con:
        await ceilings.set_limit(con, org_id, rule, "user:test")


async def second_org(db: Database) -> int:
    """Make another org."""
    async with db.globals() as con:
        slug = f"other-{uuid.uuid4().hex[:8]}"
        made: int = await con.fetchval(
            "insert into org (slug, name) values ($1, $1) returning org_id", slug
        )
        return made


async def submit_many(
    pond: Pond, flow: Any, count: int, data: Any = None, **options: Any
) -> list[uuid.UUID]:
    """Submit runs in one transaction and hint their queue."""
    intents = [pond.intent(flow, data, **options) for _ in range(count)]
    async with pond.db.org(intents[0].org_id) as con:
        await submit(con, intents)
    pond.hints.wake([intents[0].queue])
    return [intent.run_id for intent in intents]


async def over(pond: Pond, flow: Any, count: int, *, within_s: float = 30.0) -> None:
    """Wait until so many runs of a flow have ended, of whatever org."""
    async with asyncio.timeout(within_s):
        while await pond.count("run", f"flow = '{flow.name}' and outcome is not null") < count:
            await asyncio.sleep(0.02)


def a_flow(pond: Pond, gauge: Gauge, for_s: float = 0.02, **options: Any) -> Any:
    """Register a flow that is at its own name for a while."""

    async def held(_ctx: Any, _: Any) -> None:
        await gauge.hold(options["name"], for_s)

    return pond.flow(held, **options)


async def test_no_more_than_the_maximum_execute_at_once_and_all_get_done(pond: Pond) -> None:
    gauge = Gauge()
    flow = a_flow(pond, gauge, name="limited", keys=["provider:openai"])
    await limit(pond.db, "provider:openai", 3)
    async with pond.worker({"default": 20}):
        await submit_many(pond, flow, 40)
        await over(pond, flow, 40)
    assert gauge.most["limited"] == 3
    assert await pond.count("lane", "parked_on is not null") == 0


async def test_a_key_is_counted_over_orgs_and_a_pair_for_each_org(pond: Pond) -> None:
    gauge, other = Gauge(), await second_org(pond.db)
    both = Gauge()

    async def held(_ctx: Any, org: str) -> None:
        await asyncio.gather(gauge.hold(org, 0.03), both.hold("both", 0.03))

    flow = pond.flow(held, name="shared", keys=["provider:openai"])
    await limit(pond.db, "provider:openai", 3)
    await limit(pond.db, "org:* x provider:openai", 2)
    async with pond.worker({"default": 20}):
        await submit_many(pond, flow, 15, "one")
        await submit_many(pond, flow, 15, "other", org_id=other)
        await over(pond, flow, 30)
    assert both.most["both"] == 3
    assert gauge.most == {"one": 2, "other": 2}


async def test_an_org_limits_its_own_work_and_nobody_elses(pond: Pond) -> None:
    gauge, other = Gauge(), await second_org(pond.db)

    async def held(_ctx: Any, org: str) -> None:
        await gauge.hold(org, 0.05)

    flow = pond.flow(held, name="own")
    await limit(pond.db, "flow:own", 1, org_id=pond.org_id)
    async with pond.worker({"default": 20}):
        await submit_many(pond, flow, 6, "one")
        await submit_many(pond, flow, 6, "other", org_id=other)
        await over(pond, flow, 12)
    assert gauge.most["one"] == 1
    assert gauge.most["other"] > 1


async def test_edits_hold_from_the_next_claim_on(pond: Pond) -> None:
    gauge = Gauge()
    flow = a_flow(pond, gauge, name="edited", keys=["integration:crm"], for_s=0.05)
    await limit(pond.db, "integration:crm", 0)
    async with pond.worker({"default": 20}):
        await submit_many(pond, flow, 30)
        await asyncio.sleep(0.3)
        assert gauge.most["edited"] == 0, "a maximum of 0 lets nothing go"
        await limit(pond.db, "integration:crm", 2)
        async with asyncio.timeout(20):
            while gauge.most["edited"] < 2:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert gauge.most["edited"] == 2
        await limit(pond.db, "integration:*", 5)
        await asyncio.sleep(0.2)
        assert gauge.most["edited"] == 2, "the more exact limit holds"
        async with pond.db.globals() as con:
            await ceilings.remove_limit(con, NO_ORG, "integration:crm", "concurrency")
        await submit_many(pond, flow, 30)  # however many of the first are left by now
        await over(pond, flow, 60)
    assert gauge.most["edited"] == 5


async def test_lowering_a_limit_lets_what_runs_go_on_and_nothing_more(pond: Pond) -> None:
    gauge = Gauge()
    flow = a_flow(pond, gauge, name="lowered", keys=["model:m"], for_s=0.3)
    await limit(pond.db, "model:m", 6)
    async with pond.worker({"default": 20}):
        await submit_many(pond, flow, 12)
        async with asyncio.timeout(5):
            while gauge.now["lowered"] < 6:
                await asyncio.sleep(0.01)
        await limit(pond.db, "model:m", 1)
        async with asyncio.timeout(5):
            while gauge.now["lowered"] > 1:
                await asyncio.sleep(0.01)
        gauge.most.clear()
        await over(pond, flow, 12)
    assert gauge.most["lowered"] == 1


async def test_a_limit_counts_what_began_before_it_was_set(pond: Pond) -> None:
    gauge = Gauge()
    flow = a_flow(pond, gauge, name="earlier", keys=["model:m"], for_s=0.4)
    async with pond.worker({"default": 20}):
        await submit_many(pond, flow, 4)
        async with asyncio.timeout(5):
            while gauge.now["earlier"] < 4:
                await asyncio.sleep(0.01)
        await limit(pond.db, "model:m", 4)
        await submit_many(pond, flow, 8)
        await over(pond, flow, 12)
    assert gauge.most["earlier"] == 4


async def test_what_needs_two_keys_takes_both_or_none(pond: Pond) -> None:
    """Work on either key alone keeps both busy; in between, what needs both is never half admitted."""
    gauge = Gauge()

    async def held(_ctx: Any, keys: list[str]) -> None:
        await asyncio.gather(*(gauge.hold(key, 0.03) for key in keys))

    flows = {
        name: pond.flow(held, name=f"uses-{name}", keys=[f"model:{key}" for key in name])
        for name in ("a", "b", "ab")
    }
    await limit(pond.db, "model:*", 2)
    async with pond.worker({"default": 20}):
        for name, flow in flows.items():
            for _ in range(12):
                await pond.submit(flow, list(name))
        for flow in flows.values():
            await over(pond, flow, 12)
    assert gauge.most == {"a": 2, "b": 2}


async def test_a_run_that_waits_holds_no_place(pond: Pond) -> None:
    flow = pond.flow(_sleeper, name="sleeper", keys=["model:m"])
    await limit(pond.db, "model:m", 1)
    async with pond.worker({"default": 20}):
        await submit_many(pond, flow, 5)
        async with asyncio.timeout(20):
            while await pond.count("event", "kind = 'run.waiting'") < 5:
                await asyncio.sleep(0.02)
    assert await pond.count("item", "state = 'waiting'") == 5, "all of them sleep at the same time"


async def _sleeper(ctx: Any, _: Any) -> None:
    await ctx.sleep(3600.0)


async def test_a_rate_lets_through_its_burst_and_then_one_by_one(pond: Pond) -> None:
    gauge = Gauge()
    flow = a_flow(pond, gauge, name="paced", keys=["provider:slow"], for_s=0.0)
    await limit(pond.db, "provider:slow", 20, kind="rate", period_s=1.0, burst=5)
    took: list[float] = []
    async with pond.worker({"default": 50}):
        # On a busy machine some rounds are slow; that the rate goes to waste would be seen in each of them.
        while len(took) < ROUNDS and (not took or took[-1] > 40 / 20 / 0.9):
            gauge.starts.clear()
            await submit_many(pond, flow, 45)
            await over(pond, flow, 45 * (len(took) + 1))
            took.append(gauge.starts[-1] - gauge.starts[0])
            for nth, start in enumerate(gauge.starts):
                for count, end in enumerate(gauge.starts[nth:], 1):
                    assert count <= 20 * (end - start + 0.25) + 5
            await asyncio.sleep(0.3)  # until the whole burst is there again
    assert min(took) >= 40 / 20 - 0.25
    assert min(took) <= 40 / 20 / 0.9, "at least nine tenths of the rate are used"


async def test_what_needs_two_keys_goes_though_others_keep_each_of_them_busy(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limiting, "PATIENCE_S", 0.4)
    ends: list[str] = []

    async def held(_ctx: Any, keys: str) -> None:
        # The halves of the two keys end at different times, so that both are never free by chance.
        await asyncio.sleep({"a": 0.05, "b": 0.071}.get(keys, 0.01))
        ends.append(keys)

    flows = {
        name: pond.flow(held, name=f"uses-{name}", keys=[f"model:{key}" for key in name])
        for name in ("a", "b", "ab")
    }
    await limit(pond.db, "model:*", 3)
    for name in ("a", "b"):
        await submit_many(pond, flows[name], 150, name)
    await submit_many(pond, flows["ab"], 1, "ab")
    async with pond.worker({"default": 20}):
        await over(pond, flows["ab"], 1, within_s=10)
        assert len(ends) < 150, "it did not wait until the others were over"
        for name in ("a", "b"):
            await over(pond, flows[name], 150)


async def test_all_gets_done_whatever_keys_and_limits(pond: Pond) -> None:
    """Runs of two orgs with all sets of four keys, under limits of every kind that are changed meanwhile."""
    random, other = Random(7), await second_org(pond.db)
    gauge = Gauge()

    async def held(_ctx: Any, keys: list[str]) -> None:
        await asyncio.gather(*(gauge.hold(key, random.uniform(0.001, 0.02)) for key in keys))

    flow = pond.flow(held, name="any")
    names = ["model:a", "model:b", "provider:c", "provider:d"]
    nameless = (
        "parked_on is not null and not exists (select from room r where r.room = lane.parked_on"
        " and r.queue = lane.queue and r.capability = lane.capability)"
    )
    await limit(pond.db, "model:*", 3)
    await limit(pond.db, "org:* x provider:*", 2)
    await limit(pond.db, "provider:d", 100, kind="rate", period_s=1.0, burst=3)
    await limit(pond.db, "flow:any", 8, org_id=other)
    async with pond.worker({"default": 20}), pond.worker({"default": 20}):
        for org_id in (pond.org_id, other):
            for _ in range(150):
                keys = random.sample(names, random.randint(0, 4))
                await pond.submit(flow, keys, keys=keys, org_id=org_id)
        for maximum in (1, 4, 2):
            await limit(pond.db, "model:a", maximum)
            await asyncio.sleep(0.2)
            assert await pond.count("lane", nameless) == 0
        await over(pond, flow, 300, within_s=40)
    assert gauge.most["model:b"] <= 3
    assert gauge.most["provider:c"] <= 4
    assert await pond.count("lane", "parked_on is not null") == 0
    assert await pond.count("ready") == 0


async def test_ten_thousand_parked_lanes_do_not_slow_others(pond: Pond) -> None:
    """Lanes that wait for one key cost a claim nothing: it reads as many rows as without them."""
    gauge = Gauge()
    stuck = a_flow(pond, gauge, name="stuck", keys=["provider:down"])
    free = a_flow(pond, gauge, name="free", for_s=0.0)
    await limit(pond.db, "provider:down", 0)
    async with pond.worker({"default": 20}) as worker:
        async with asyncio.timeout(20):
            while not await pond.count("worker"):
                await asyncio.sleep(0.01)
        claimer = Claimer(
            pond.engine_db,
            worker_id=worker.worker_id,
            capabilities=[stuck.capability, free.capability],
            estimate_s=lambda _: 0.01,
        )
        assert not (await claimer.claim({"default": 1}))[0]
        intents = [
            pond.intent(stuck, nth, keys=["provider:down", f"ticket:{nth}"])
            for nth in range(10_000)
        ]
        async with pond.db.org(pond.org_id) as con:
            await submit(con, intents)
        pond.hints.wake(["default"])
        async with asyncio.timeout(120):
            while await pond.count("lane", "parked_on is not null and not active") < 10_000:
                await asyncio.sleep(0.05)
        assert not (await claimer.claim({"default": 1}))[0]
        assert await _lanes_read(pond, [stuck.capability, free.capability]) < 100
        await submit_many(pond, free, 50)
        await over(pond, free, 50, within_s=10)
        assert gauge.most["stuck"] == 0


async def _lanes_read(pond: Pond, able: list[str]) -> int:
    """Return how many rows of lanes the look at rooms and at heads reads."""
    read = (
        "select coalesce(sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0)), 0)::int"
        " from pg_stat_xact_user_tables where relname = 'lane'"
    )
    async with pond.engine_db.duty("test") as con:
        nothing: int = await con.fetchval(read)
        assert await con.fetchval("select count(cursor_rank) from lane") >= 10_000
        before: int = await con.fetchval(read)
        assert before - nothing >= 10_000, "such reads are counted"
        await con.fetch(
            "select * from claim_rooms($1, $2, 0, 100, 500, '{-1}', '{\"\"}', '{\"\"}', 5)",
            ["default"],
            able,
        )
        await con.fetch(
            "select * from claim_heads(10, $1, $2, $3, $4, 16)",
            uuid.uuid4(),
            ["default"],
            [256],
            able,
        )
        after: int = await con.fetchval(read)
    return after - before


async def test_what_is_no_limit_is_refused(pond: Pond) -> None:
    async with pond.db.org(pond.org_id) as con:
        for key in ("org:*", "org:nobody", "org:* x model:m"):
            with pytest.raises(InvalidInput):
                await _set(con, pond.org_id, key)
    async with pond.db.globals() as con:
        with pytest.raises(NotFound):
            await _set(con, NO_ORG, "org:nobody-has-this-slug")
        with pytest.raises(NotFound):
            await ceilings.remove_limit(con, NO_ORG, "model:none", "rate")
        with pytest.raises(InvalidInput):
            await _set(con, NO_ORG, "model:m", kind="rate")
        with pytest.raises(InvalidInput):
            await _set(con, NO_ORG, "model:m", period_s=1.0)


async def test_an_org_has_a_bounded_number_of_limits(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "MAX_LIMITS", 1)
    async with pond.db.org(pond.org_id) as con:
        await _set(con, pond.org_id, "model:one")
        await _set(con, pond.org_id, "model:one")
        with pytest.raises(Conflict):
            await _set(con, pond.org_id, "model:two")


async def _set(con: Any, org_id: int, key: str, **options: Any) -> None:
    kind = options.pop("kind", "concurrency")
    rule = Rule(owner=org_id, key=key, kind=kind, maximum=1, **options)
    await ceilings.set_limit(con, org_id, rule, "user:test")
