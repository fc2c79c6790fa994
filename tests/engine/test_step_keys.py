"""Steps that need keys: their tries ride in claims, branches park, and go on with all keys; on a real database."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.engine.conftest import Pond
from tests.engine.parking import Hand, ask_of, end, send, unlimit
from tests.engine.test_brakes import brakes, let_pass, too_much
from tests.engine.test_limits import Gauge, limit, over, second_org, submit_many

from millpond.engine import riding, why
from millpond.engine.context import Context, StepContext
from millpond.engine.operations import cancel
from millpond.engine.pauses import Scope, pause, resume
from millpond.engine.queues import list_queues
from millpond.engine.resting import Rest, rest_alone
from millpond.engine.riding import Riding
from millpond.engine.saturation import saturation
from millpond.engine.saturation_of_all import page_of_all
from millpond.errors import InvalidInput, Transient
from millpond.retry import Retry

KEY = "provider:one"
OTHER = "provider:other"
TABLES = ("step_lease", "step_need", "ready", "lease")


@dataclass
class Gate:
    """Steps that stay until they are let go, by name."""

    entered: dict[str, asyncio.Event] = field(default_factory=dict)
    opened: dict[str, asyncio.Event] = field(default_factory=dict)
    inside: set[str] = field(default_factory=set)

    def _of(self, events: dict[str, asyncio.Event], name: str) -> asyncio.Event:
        return events.setdefault(name, asyncio.Event())

    async def stay(self, name: str) -> str:
        self.inside.add(name)
        self._of(self.entered, name).set()
        try:
            await self._of(self.opened, name).wait()
        finally:
            self.inside.discard(name)
        return name

    def open(self, *names: str) -> None:
        for name in names:
            self._of(self.opened, name).set()

    async def reached(self, name: str) -> None:
        async with asyncio.timeout(20):
            await self._of(self.entered, name).wait()


async def until(pond: Pond, table: str, where: str = "true", count: int = 1) -> None:
    """Wait until there are so many rows."""
    async with asyncio.timeout(20):
        while await pond.count(table, where) != count:
            await asyncio.sleep(0.02)


async def nothing_left(pond: Pond) -> None:
    """Wait until no room is held, and nobody stands in line."""
    for table in TABLES:
        await until(pond, table, count=0)
    await until(pond, "lane", "parked_on is not null and not active", 0)


def staying(pond: Pond, gate: Gate, *keys: str, **options: Any) -> Any:
    """Register a flow whose one step has keys and stays at the gate under its input's name."""

    async def asks(ctx: Context, name: str) -> str:
        return await ctx.step("ask", gate.stay, name, keys=list(keys or [KEY]))

    return pond.flow(asks, **options)


@asynccontextmanager
async def one_inside(pond: Pond, gate: Gate, flow: Any) -> AsyncIterator[uuid.UUID]:
    """Let one run hold the only place while the block goes on; it is over after it."""
    run_id = await pond.submit(flow, "first")
    await gate.reached("first")
    try:
        yield run_id
    finally:
        gate.open("first")


async def in_line(pond: Pond, run_id: uuid.UUID) -> None:
    await until(
        pond,
        "step_need n join item i on i.item_id = n.run_id",
        f"n.run_id = '{run_id}' and i.state = 'waiting'",
    )


async def test_no_more_tries_than_the_maximum_execute_at_once_and_all_get_done(pond: Pond) -> None:
    gauge = Gauge()

    async def asks(ctx: Context, _: Any) -> None:
        for nth in range(2):
            await ctx.step(f"ask {nth}", gauge.hold, "ask", 0.01, keys=[KEY])

    flow = pond.flow(asks)
    await limit(pond.db, KEY, 3)
    async with pond.worker({"default": 12}):
        await submit_many(pond, flow, 30)
        await over(pond, flow, 30)
        assert gauge.most["ask"] == 3
        await nothing_left(pond)
    assert len(gauge.starts) == 60


async def test_limits_are_exact_over_two_workers_and_orgs(pond: Pond) -> None:
    gauge, other = Gauge(), await second_org(pond.db)

    async def asks(ctx: Context, org: str) -> None:
        await ctx.step("ask", _both, gauge, org, keys=[KEY])

    flow = pond.flow(asks)
    await limit(pond.db, KEY, 4)
    await limit(pond.db, f"org:* x {KEY}", 3)
    async with pond.worker({"default": 6}), pond.worker({"default": 6}):
        await submit_many(pond, flow, 20, "one")
        await submit_many(pond, flow, 20, "other", org_id=other)
        await over(pond, flow, 40)
        await nothing_left(pond)
    assert gauge.most["both"] == 4
    assert gauge.most["one"] <= 3
    assert gauge.most["other"] <= 3


async def _both(gauge: Gauge, org: str) -> None:
    await asyncio.gather(gauge.hold(org, 0.02), gauge.hold("both", 0.02))


async def test_a_step_whose_keys_no_limit_concerns_asks_nobody(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("it asked")

    monkeypatch.setattr(Riding, "ask", refuse)

    async def asks(ctx: Context, _: Any) -> str:
        return await ctx.step("ask", _done, keys=[KEY])

    flow = pond.flow(asks)
    await limit(pond.db, OTHER, 1)
    async with pond.worker():
        row = await pond.ended(await pond.submit(flow))
    assert row["output"] == "done"


async def _done() -> str:
    return "done"


async def test_who_waits_in_line_holds_no_slot_and_why_names_what_is_full(pond: Pond) -> None:
    gate = Gate()
    flow = staying(pond, gate)

    async def plain(_ctx: Context, _: Any) -> str:
        return "plain"

    other = pond.flow(plain)
    await limit(pond.db, KEY, 1)
    async with pond.worker({"default": 2}):
        async with one_inside(pond, gate, flow) as first:
            waiting = [
                await pond.submit(flow, f"next {nth}", urgency="interactive") for nth in range(3)
            ]
            for run_id in waiting:
                await in_line(pond, run_id)
            assert (await pond.ended(await pond.submit(other)))["output"] == "plain"
            async with pond.db.org(pond.org_id) as con:
                told = await why.explain(con, pond.org_id, waiting[0])
            assert told.state == "waiting"
            (reason,) = told.reasons
            assert (reason.kind, reason.facts["keys"]) == ("room", [KEY])
            (full,) = [one for one in reason.inner if one.kind == "limit"]
            assert (full.facts["key"], full.facts["maximum"]) == (KEY, 1)
            assert list(full.facts["holders"]) == [first]
            (line,) = [one for one in reason.inner if one.kind == "in_line"]
            assert line.facts["urgency"] == "interactive"
            assert "of interactive work" in line.text
            async with pond.db.org(pond.org_id) as con:
                (queue,) = await list_queues(con, pond.org_id)
            # Who waits for room for a step waits, and is counted once.
            assert (queue.queued, queue.running, queue.waiting) == (0, 1, 3)
            assert queue.oldest_s is None
            async with pond.db.org(pond.org_id) as con:
                found, _ = await saturation(con, pond.org_id)
            (key,) = [one for one in found if one.of == "limit"]
            assert (key.own, key.waiting) == (1, 3)
            assert gate.inside == {"first"}
        gate.open(*(f"next {nth}" for nth in range(3)))
        for run_id in waiting:
            assert (await pond.ended(run_id))["outcome"] == "succeeded"
        await nothing_left(pond)


async def test_branches_that_have_room_go_on_while_another_waits_for_its_own(pond: Pond) -> None:
    gate = Gate()
    first = staying(pond, gate, name="first")

    async def forks(ctx: Context, _: Any) -> list[str]:
        return list(
            await ctx.parallel(
                ctx.step("ask", gate.stay, "held up", keys=[KEY]),
                ctx.step("other", gate.stay, "goes on", keys=[OTHER]),
            )
        )

    flow = pond.flow(forks)
    await limit(pond.db, KEY, 1)
    await limit(pond.db, OTHER, 1)
    async with pond.worker({"default": 2}):
        async with one_inside(pond, gate, first):
            run_id = await pond.submit(flow)
            await gate.reached("goes on")
            await asyncio.sleep(0.3)
            assert gate.inside == {"first", "goes on"}
        await gate.reached("held up")
        assert gate.inside == {"held up", "goes on"}, "in the slot that the run has"
        gate.open("held up", "goes on")
        assert (await pond.ended(run_id))["output"] == ["held up", "goes on"]
        assert "run.waiting" not in await pond.kinds(run_id)
        await nothing_left(pond)


async def test_a_run_goes_on_as_soon_as_any_of_its_parked_branches_can(pond: Pond) -> None:
    gate = Gate()
    both = [staying(pond, gate, KEY, name="one"), staying(pond, gate, OTHER, name="other")]

    async def forks(ctx: Context, _: Any) -> list[str]:
        return list(
            await ctx.parallel(
                ctx.step("ask one", gate.stay, "of one", keys=[KEY]),
                ctx.step("ask other", gate.stay, "of other", keys=[OTHER]),
            )
        )

    flow = pond.flow(forks)
    await limit(pond.db, KEY, 1)
    await limit(pond.db, OTHER, 1)
    async with pond.worker({"default": 4}):
        await pond.submit(both[0], "a")
        await pond.submit(both[1], "b")
        await gate.reached("a")
        await gate.reached("b")
        run_id = await pond.submit(flow)
        await until(pond, "step_need", f"run_id = '{run_id}'", 2)
        gate.open("b")
        await gate.reached("of other")
        assert gate.inside == {"a", "of other"}
        gate.open("a")
        await gate.reached("of one")
        gate.open("of one", "of other")
        assert (await pond.ended(run_id))["output"] == ["of one", "of other"]
        await nothing_left(pond)


async def test_room_is_given_back_between_tries_and_after_the_last(pond: Pond) -> None:
    """While another branch of the run works, so that its lease is there all the time."""
    gate, tries = Gate(), []

    async def fails(ctx: Context, _: Any) -> list[str]:
        return list(
            await ctx.parallel(
                ctx.step("ask", _fail_first, tries, keys=[KEY]),
                ctx.step("works", gate.stay, "works"),
            )
        )

    flow, other = pond.flow(fails), staying(pond, gate)
    await limit(pond.db, KEY, 1)
    async with pond.worker({"default": 4}):
        run_id = await pond.submit(flow)
        await pond.until(run_id, "step.retrying")
        between = await pond.submit(other, "between")
        await gate.reached("between")
        assert len(tries) == 1
        gate.open("between")
        await pond.ended(between)
        await pond.until(run_id, "step.succeeded")
        after = await pond.submit(other, "after")
        await gate.reached("after")
        assert "works" in gate.inside
        gate.open("after", "works")
        await pond.ended(after)
        assert (await pond.ended(run_id))["output"] == ["done", "works"]
        await nothing_left(pond)
    assert len(tries) == 2


async def _fail_first(tries: list[float]) -> str:
    tries.append(time.monotonic())
    if len(tries) == 1:
        raise Transient("not yet", retry_after_s=3.0)
    return "done"


async def test_waiting_in_line_is_not_the_steps_time_but_the_runs(pond: Pond) -> None:
    gate = Gate()

    async def asks(ctx: Context, _: Any) -> str:
        return await ctx.step("ask", _done, keys=[KEY], timeout_s=0.2, retry=Retry(max_tries=1))

    flow, first = pond.flow(asks), staying(pond, gate, name="first")
    await limit(pond.db, KEY, 1)
    async with pond.worker({"default": 4}):
        async with one_inside(pond, gate, first):
            run_id = await pond.submit(flow)
            late = await pond.submit(flow, deadline_s=0.6)
            await in_line(pond, run_id)
            assert (await pond.ended(late))["error"]["code"] == "deadline_exceeded"
            await until(pond, "step_need", count=1)
        assert (await pond.ended(run_id))["output"] == "done"
        await nothing_left(pond)


async def test_the_marker_of_a_once_step_is_made_after_it_has_room(pond: Pond) -> None:
    gate = Gate()

    async def pays(_: StepContext) -> str:
        return "paid"

    pay = pond.step(pays, effect="once", keys=[KEY])

    async def buys(ctx: Context, _: Any) -> str:
        return await ctx.step(pay)

    flow, first = pond.flow(buys), staying(pond, gate)
    await limit(pond.db, KEY, 1)
    async with pond.worker({"default": 4}):
        async with one_inside(pond, gate, first):
            run_id = await pond.submit(flow)
            await in_line(pond, run_id)
            assert await pond.count("step", f"run_id = '{run_id}'") == 0
        assert (await pond.ended(run_id))["output"] == "paid"
        await nothing_left(pond)


async def test_a_once_step_in_doubt_holds_no_room_while_somebody_is_asked(pond: Pond) -> None:
    async def pays(_: StepContext) -> str:
        raise Transient("no answer")

    pay = pond.step(pays, effect="once", keys=[KEY])

    async def buys(ctx: Context, _: Any) -> list[Any]:
        return list(await ctx.parallel(ctx.step(pay), ctx.step("other", asyncio.sleep, 1.5)))

    flow = pond.flow(buys)
    await limit(pond.db, KEY, 1)
    async with pond.worker({"default": 4}):
        run_id = await pond.submit(flow)
        await pond.until(run_id, "input.requested")
        await until(pond, "step_lease", count=0)
        assert await pond.count("lease") == 1, "its other branch works"
        async with pond.db.org(pond.org_id) as con:
            await cancel(con, pond.org_id, run_id, "user:test")


async def test_a_cancel_takes_a_run_out_of_line_and_gives_back_its_room(pond: Pond) -> None:
    gate = Gate()
    flow = staying(pond, gate)
    await limit(pond.db, KEY, 1)
    async with pond.worker({"default": 4}):
        async with one_inside(pond, gate, flow) as first:
            waits, next_up = await pond.submit(flow, "waits"), await pond.submit(flow, "next")
            await in_line(pond, waits)
            await in_line(pond, next_up)
            for run_id in (waits, first):
                async with pond.db.org(pond.org_id) as con:
                    await cancel(con, pond.org_id, run_id, "user:test")
            assert (await pond.ended(waits))["outcome"] == "cancelled"
            assert await pond.count("step_need", f"run_id = '{waits}'") == 0
            assert (await pond.ended(first))["outcome"] == "cancelled"
            await gate.reached("next")
        gate.open("next")
        assert (await pond.ended(next_up))["outcome"] == "succeeded"
        await nothing_left(pond)


async def test_a_pause_holds_what_waits_in_line_and_a_resume_lets_it_go(pond: Pond) -> None:
    gate = Gate()
    flow = staying(pond, gate)
    await limit(pond.db, KEY, 1)
    async with pond.worker({"default": 4}):
        async with one_inside(pond, gate, flow) as first:
            run_id = await pond.submit(flow, "next")
            await in_line(pond, run_id)
            async with pond.db.org(pond.org_id) as con:
                await pause(con, pond.org_id, Scope(flow="asks"), "user:ann", "")
        assert (await pond.ended(first))["outcome"] == "succeeded"
        await asyncio.sleep(0.4)
        assert "next" not in gate.inside
        async with pond.db.org(pond.org_id) as con:
            await resume(con, pond.org_id, Scope(flow="asks"))
        await gate.reached("next")
        gate.open("next")
        assert (await pond.ended(run_id))["outcome"] == "succeeded"
        await nothing_left(pond)


@pytest.mark.parametrize("change", ["raised", "removed"])
async def test_who_waits_goes_on_when_the_limit_is(pond: Pond, change: str) -> None:
    gate = Gate()
    flow = staying(pond, gate)
    await limit(pond.db, KEY, 1)
    async with pond.worker({"default": 4}):
        async with one_inside(pond, gate, flow):
            run_id = await pond.submit(flow, "next")
            await in_line(pond, run_id)
            if change == "raised":
                await limit(pond.db, KEY, 2)
            else:
                await unlimit(pond, KEY)
            await gate.reached("next")
            gate.open("next")
            assert (await pond.ended(run_id))["outcome"] == "succeeded"
        await nothing_left(pond)


async def test_a_key_of_run_and_step_counts_once(pond: Pond) -> None:
    gauge = Gauge()

    async def asks(ctx: Context, _: Any) -> None:
        await ctx.step("ask", gauge.hold, "ask", 0.05, keys=[KEY])

    flow = pond.flow(asks, keys=[KEY])
    await limit(pond.db, KEY, 2)
    async with pond.worker({"default": 8}):
        await submit_many(pond, flow, 8)
        await over(pond, flow, 8)
        await nothing_left(pond)
    assert gauge.most["ask"] == 2


async def test_a_rate_counts_each_try(pond: Pond) -> None:
    gauge = Gauge()

    async def asks(ctx: Context, _: Any) -> None:
        for nth in range(2):
            await ctx.step(f"ask {nth}", gauge.hold, "ask", 0.0, keys=[KEY])

    flow = pond.flow(asks)
    await limit(pond.db, KEY, 20, kind="rate", period_s=1.0, burst=2)
    async with pond.worker({"default": 10}):
        await submit_many(pond, flow, 8)
        await over(pond, flow, 8)
        await nothing_left(pond)
    assert len(gauge.starts) == 16
    # Each is begun within 150 ms of when it was let go, or let go anew.
    assert max(gauge.starts) - min(gauge.starts) > 14 / 20 - 0.25


async def test_a_throttled_step_brakes_its_own_key_for_everybody(pond: Pond) -> None:
    gauge, other = Gauge(), await second_org(pond.db)

    async def throttled(_ctx: StepContext) -> None:
        raise too_much(30.0)

    async def calm(_ctx: StepContext) -> None:
        await gauge.hold("calm", 0.0)

    asked = pond.step(throttled, keys=[KEY], retry=Retry(max_tries=1))
    calmly = pond.step(calm, keys=[KEY])

    async def runs(ctx: Context, which: str) -> None:
        await ctx.step(asked if which == "throttled" else calmly)

    flow = pond.flow(runs)
    await limit(pond.db, OTHER, 1)
    async with pond.worker({"default": 4}):
        await pond.ended(await pond.submit(flow, "throttled"))
        (brake,) = await brakes(pond)
        assert (brake.owner, brake.key) == (0, KEY)
        await submit_many(pond, flow, 1, "calm", org_id=other)
        await until(pond, "step_need", f"org_id = {other}")
        assert not gauge.starts
        await let_pass(pond, 31)
        await over(pond, flow, 2)
        await nothing_left(pond)


async def test_a_key_that_is_given_at_the_call_is_braked_for_its_org_alone(pond: Pond) -> None:
    async def asks(ctx: Context, key: str) -> None:
        async def throttled() -> None:
            raise Transient("too much", retry_after_s=30.0, details={"status": 429})

        await ctx.step("ask", throttled, keys=[key], retry=Retry(max_tries=1))

    flow = pond.flow(asks)
    await limit(pond.db, OTHER, 1)
    async with pond.worker({"default": 4}):
        await pond.ended(await pond.submit(flow, "integration:mine"))
        assert not await brakes(pond)
        (brake,) = await brakes(pond, pond.org_id)
        assert (brake.owner, brake.key) == (pond.org_id, "integration:mine")
        await nothing_left(pond)


async def test_a_run_called_for_several_steps_reserves_what_all_of_them_need(pond: Pond) -> None:
    gate = Gate()

    async def asks(ctx: Context, _: Any) -> None:
        await ctx.parallel(
            ctx.step("left", gate.stay, "left", keys=[OTHER]),
            ctx.step("right", gate.stay, "right", keys=[OTHER]),
        )

    flow = pond.flow(asks, keys=[KEY], tokens=300)
    await limit(pond.db, KEY, 10_000, kind="tokens", period_s=3600.0)
    await limit(pond.db, OTHER, 0)
    async with pond.worker({"default": 4}):
        run_id = await pond.submit(flow, None)
        await until(pond, "step_need", f"run_id = '{run_id}'", 2)
        await until(pond, "item", "state = 'waiting'")
        await limit(pond.db, OTHER, 2)
        await gate.reached("left")
        await gate.reached("right")
        async with pond.engine_db.duty("test") as con:
            assert await con.fetchval("select sum(tokens) from reservation") == 600
        gate.open("left", "right")
        await over(pond, flow, 1)
        await nothing_left(pond)


async def test_a_step_in_line_needs_no_tokens_of_its_own_keys(pond: Pond) -> None:
    gate = Gate()
    flow = staying(pond, gate, tokens=50_000)
    await limit(pond.db, KEY, 0)
    await limit(pond.db, KEY, 100, kind="tokens", period_s=3600.0)
    async with pond.worker({"default": 4}):
        run_id = await pond.submit(flow, "asks")
        await in_line(pond, run_id)
        await limit(pond.db, KEY, 1)
        await gate.reached("asks")
        async with pond.db.globals() as con:
            found, _ = await page_of_all(con, "limit", None, 10)
        places = [one for one in found if one.rule and one.rule.kind == "concurrency"]
        assert [(one.name, one.in_use) for one in places] == [(KEY, 1)]
        gate.open("asks")
        await over(pond, flow, 1)
        await nothing_left(pond)


async def test_lines_of_runs_that_are_over_are_swept(pond: Pond) -> None:
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "insert into step_need (org_id, run_id, step_key, need_id, lane_id, rank, keys) "
            "values ($1, gen_random_uuid(), 'a:0', gen_random_uuid(), 4, 1, '{provider:one}')",
            pond.org_id,
        )
        await con.execute(
            "insert into ready (org_id, lane_id, rank, item_id) select org_id, lane_id, rank, need_id from step_need"
        )
    await riding.sweep(pond.engine_db)
    assert await pond.count("step_need") == await pond.count("ready") == 0


async def test_a_step_in_another_queue_has_its_own_keys_beside_its_runs(pond: Pond) -> None:
    gauge = Gauge()

    async def query(_: StepContext) -> None:
        await gauge.hold("query", 0.03)

    step = pond.step(query, queue="sql", keys=["datasource:orders"])

    async def asks(ctx: Context, _: Any) -> None:
        await ctx.step(step)

    flow = pond.flow(asks, keys=[KEY])
    await limit(pond.db, "datasource:orders", 2)
    async with pond.worker({"default": 8, "sql": 8}):
        await submit_many(pond, flow, 12)
        await over(pond, flow, 12)
        await nothing_left(pond)
    assert gauge.most["query"] == 2
    assert (
        await pond.count(
            "lane", "queue = 'sql' and keys = array['datasource:orders', 'provider:one']"
        )
        > 0
    )


async def test_a_drained_worker_hands_back_who_waits_beside_work_and_it_goes_on_elsewhere(
    pond: Pond,
) -> None:
    gate = Gate()
    first = staying(pond, gate, name="first")

    async def forks(ctx: Context, _: Any) -> list[str]:
        return list(
            await ctx.parallel(
                ctx.step("ask", gate.stay, "held up", keys=[KEY]),
                ctx.step("other", gate.stay, "works"),
            )
        )

    flow = pond.flow(forks)
    await limit(pond.db, KEY, 1)
    async with pond.worker({"default": 1}, flows=[first]):
        async with one_inside(pond, gate, first):
            async with pond.worker({"default": 1}, flows=[flow], drain_s=0.2):
                run_id = await pond.submit(flow)
                await gate.reached("works")
            assert await pond.count("lease") == 1
            assert await pond.count("item", f"item_id = '{run_id}' and state = 'queued'") == 1
        gate.open("held up", "works")
        async with pond.worker({"default": 1}, flows=[flow]):
            assert (await pond.ended(run_id))["output"] == ["held up", "works"]
            await nothing_left(pond)


async def test_a_step_that_the_flow_gives_up_leaves_its_line_and_its_room(pond: Pond) -> None:
    gate = Gate()

    async def asks(ctx: Context, _: Any) -> str:
        try:
            async with asyncio.timeout(0.3):
                return await ctx.step("ask", gate.stay, "never", keys=[KEY])
        except TimeoutError:
            return await ctx.step("other", gate.stay, "other")

    flow = pond.flow(asks)
    await limit(pond.db, KEY, 1)
    async with pond.worker({"default": 4}):
        run_id = await pond.submit(flow)
        await gate.reached("other")
        await until(pond, "step_lease", count=0)
        assert await pond.count("lease") == 1
        gate.open("other")
        assert (await pond.ended(run_id))["output"] == "other"
        await nothing_left(pond)


async def test_steps_of_a_flow_that_is_tried_again_later_stand_in_line_no_more(
    pond: Pond,
) -> None:
    gate = Gate()
    firsts = [staying(pond, gate, KEY, name="one"), staying(pond, gate, OTHER, name="other")]

    async def forks(ctx: Context, _: Any) -> None:
        try:
            async with asyncio.timeout(1.0):
                await ctx.parallel(
                    ctx.step("ask one", _done, keys=[KEY]),
                    ctx.step("ask other", gate.stay, "too long", keys=[OTHER]),
                )
        except TimeoutError as error:
            raise Transient("later", retry_after_s=60.0) from error

    flow = pond.flow(forks)
    await limit(pond.db, KEY, 1)
    await limit(pond.db, OTHER, 1)
    async with pond.worker({"default": 6}):
        await pond.submit(firsts[0], "a")
        await pond.submit(firsts[1], "b")
        await gate.reached("a")
        await gate.reached("b")
        run_id = await pond.submit(flow)
        await until(pond, "step_need", f"run_id = '{run_id}'", 2)
        gate.open("b")
        await gate.reached("too long")
        await pond.until(run_id, "run.retrying")
        assert await pond.count("step_need") == 0
        gate.open("a")
        async with pond.db.org(pond.org_id) as con:
            await cancel(con, pond.org_id, run_id, "user:test")
        await nothing_left(pond)


async def test_keys_of_steps_are_checked(pond: Pond) -> None:
    async def asks(_: StepContext) -> None: ...

    with pytest.raises(InvalidInput, match="no key"):
        pond.step(asks, keys=["what ever"])
    with pytest.raises(InvalidInput, match="by itself"):
        pond.step(asks, keys=["queue:sql"])


# By hand


async def test_an_ask_takes_nothing_that_a_lane_in_line_could_take_now(pond: Pond) -> None:
    """What asks goes after what stood in line, also where only another worker has a slot for that."""
    await limit(pond.db, KEY, 1)
    mine, others = await Hand.register(pond), await Hand.register(pond)
    await send(pond, 1, keys=["nth:run"])
    (run,) = await mine.claim({"default": 1})
    await send(pond, 2)
    (held,) = await others.claim({"default": 1})
    assert await others.claim({"default": 1}) == []  # the second one stands under the room
    ask = ask_of(run)
    await mine.claimer.claim({}, asks=[ask])
    assert not mine.claimer.answers[ask].is_seated
    await end(pond, [held])
    await mine.claimer.claim({}, asks=[ask])
    assert not mine.claimer.answers[ask].is_seated, "the other worker could let the lane go"
    (second,) = await others.claim({"default": 1})
    await end(pond, [second])
    await mine.claimer.claim({}, asks=[ask])
    assert mine.claimer.answers[ask].is_seated
    assert await pond.count("step_lease") == 1


async def test_an_ask_goes_before_lanes_that_no_worker_has_a_slot_for(pond: Pond) -> None:
    await limit(pond.db, KEY, 1)
    mine = await Hand.register(pond)
    await send(pond, 1, keys=["nth:run"])
    (run,) = await mine.claim({"default": 1})
    await send(pond, 2)
    (held,) = await mine.claim({"default": 1})
    assert await mine.claim({"default": 1}) == []
    await end(pond, [held])
    ask = ask_of(run)
    await mine.claimer.claim({}, asks=[ask])
    assert mine.claimer.answers[ask].is_seated


async def test_a_place_is_kept_for_an_ask_that_was_passed_over_for_long(pond: Pond) -> None:
    """A step that waits beside a working branch, while another worker has lanes enough for the key."""
    await limit(pond.db, KEY, 1)
    mine, others = await Hand.register(pond), await Hand.register(pond)
    await send(pond, 1, keys=["nth:run"])
    (run,) = await mine.claim({"default": 1})
    await send(pond, 3)
    (held,) = await others.claim({"default": 1})
    ask = ask_of(run)
    await mine.claimer.claim({}, asks=[ask])
    since_us = mine.claimer.answers[ask].since_us
    assert since_us is not None
    ask.since_us = since_us - 6_000_000
    await mine.claimer.claim({}, asks=[ask])
    assert not mine.claimer.answers[ask].is_seated
    await end(pond, [held])
    assert await others.soon() == [], "what came free is kept"
    await mine.claimer.claim({}, asks=[ask])
    assert mine.claimer.answers[ask].is_seated
    await end(pond, [run])
    assert len(await others.soon()) == 1


async def test_room_counts_for_as_long_as_its_lease_is_there_and_no_longer(pond: Pond) -> None:
    await limit(pond.db, KEY, 1)
    hand = await Hand.register(pond)
    await send(pond, 2, keys=["nth:run"])
    one, other = await hand.claim({"default": 2})
    first, second = ask_of(one), ask_of(other)
    await hand.claimer.claim({}, asks=[first, second])
    assert [hand.claimer.answers[ask].is_seated for ask in (first, second)] == [True, False]
    await hand.claimer.claim({}, asks=[first, second])
    assert hand.claimer.answers[first].is_seated, "its room is its own, also after a lost answer"
    assert not hand.claimer.answers[second].is_seated
    await end(pond, [one])
    await hand.claimer.claim({}, asks=[second])
    assert hand.claimer.answers[second].is_seated


async def test_a_lease_that_is_just_given_back_gets_no_room(pond: Pond) -> None:
    """Its run may stand in line by the time that the claim answers: room for it would be taken for nobody."""
    await limit(pond.db, KEY, 1)
    hand = await Hand.register(pond)
    await send(pond, 1, keys=["nth:run"])
    (run,) = await hand.claim({"default": 1})
    ask = ask_of(run)
    async with pond.engine_db.duty("test") as con:
        await con.execute("delete from lease where item_id = $1", run.lease.item_id)
        await hand.claimer.claim({}, asks=[ask])
        assert not hand.claimer.answers[ask].is_seated
    assert await pond.count("step_lease") == 0


async def test_steps_of_a_run_that_somebody_holds_give_back_only_what_was_picked(
    pond: Pond,
) -> None:
    """One step of it has room and is picked, another has none: the run is locked, so that neither goes."""
    await limit(pond.db, KEY, 1)
    await limit(pond.db, OTHER, 1)
    hand = await Hand.register(pond)
    await send(pond, 1, keys=["nth:run"])
    (run,) = await hand.claim({"default": 1})
    await send(pond, 1)
    (held,) = await hand.claim({"default": 1})
    asks = {"one:0": ask_of(run, key="one:0"), "other:0": ask_of(run, OTHER, key="other:0")}
    rest = Rest(lease=run.lease, step_keys=list(asks), is_human=False, asks=asks)
    await rest_alone(pond.engine_db, rest)
    await send(pond, 1)
    async with pond.engine_db.duty("test") as con:
        await con.execute("select from item where item_id = $1 for update", run.lease.run_id)
        assert await hand.soon() == [], "the only place is in use"
    (again,) = await hand.soon()
    assert again.lease.run_id == run.lease.run_id
    assert [seat.step_key for seat in again.seats] == ["other:0"]
    await end(pond, [held])
    assert len(await hand.soon()) == 1


async def test_an_ask_takes_all_its_keys_or_none(pond: Pond) -> None:
    await limit(pond.db, KEY, 1)
    await limit(pond.db, OTHER, 1)
    hand = await Hand.register(pond)
    await send(pond, 3, keys=["nth:run"])
    runs = await hand.claim({"default": 3})
    asks = [ask_of(runs[0]), ask_of(runs[1], KEY, OTHER), ask_of(runs[2], OTHER)]
    await hand.claimer.claim({}, asks=asks)
    assert [hand.claimer.answers[ask].is_seated for ask in asks] == [True, False, True]
