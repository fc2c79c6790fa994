"""Cooldowns and breakers on a real database: told by workers, obeyed by every claim, worn off, taken off."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.engine.conftest import Pond
from tests.engine.parking import KEY, Hand, end, rooms, send
from tests.engine.test_limits import limit, over, second_org, submit_many
from tests.models.provider_server import Reply, far_end
from tests.models.test_providers import ERROR, OPENAI

from millpond.engine import easing, why
from millpond.engine.brakes import TRIPS_AFTER, Brake
from millpond.engine.context import Context, StepContext
from millpond.engine.leases import Claimed, Lease
from millpond.engine.throttling import Throttling, drop_over
from millpond.errors import Permanent, Transient
from millpond.models import TextModel, open_text_model
from millpond.types import NO_ORG

PLATFORM = "brake 0 0 provider:one"
DOWN = Transient("no answer", limit_keys=[KEY])


def too_much(wish_s: float | None = 30.0, *keys: str) -> Transient:
    return Transient(
        "too much", retry_after_s=wish_s, details={"status": 429}, limit_keys=keys or [KEY]
    )


async def declare(pond: Pond, *keys: str) -> None:
    """Let the flow `echo` declare keys, as its worker publishes it."""
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "insert into flow_version (flow, version, queue, input_schema, keys)"
            " values ('echo', 1, 'default', '{}', $1)",
            list(keys or [KEY]),
        )


async def brakes(pond: Pond, org_id: int | None = None) -> list[Brake]:
    async with pond.db.globals() if org_id is None else pond.db.org(org_id) as con:
        return [one.brake for one in await easing.list_brakes(con)]


async def let_pass(pond: Pond, seconds: float) -> None:
    """Let all brakes, and what was told by them, be so much older."""
    us = round(seconds * 1e6)
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "with b as (update brake set until_us = until_us - $1, over_us = over_us - $1,"
            " opened_us = opened_us - $1 returning owner, key)"
            " select limit_changed(owner, key, 'brake') from b",
            us,
        )


async def one(hand: Hand) -> Claimed:
    (claimed,) = await hand.claim({"default": 1})
    return claimed


async def test_a_cooldown_told_by_one_worker_is_obeyed_by_the_claims_of_all(pond: Pond) -> None:
    await declare(pond)
    first, second = await Hand.register(pond), await Hand.register(pond)
    await send(pond, 3)
    held = await one(first)
    await Throttling(pond.engine_db).failed(held.lease, "ask", too_much(30.0))
    assert await second.soon() == []
    assert await first.soon() == []
    ((room, _, _, due_us),) = await rooms(pond)
    (brake,) = await brakes(pond)
    assert (room, due_us) == (PLATFORM, brake.until_us), "looked at again when it ends, not before"
    await end(pond, [held])
    await let_pass(pond, 31)
    # How many go at a time by now depends on the time that passes; tests/property/test_brakes.py holds how many.
    went = await second.soon()
    assert went
    await let_pass(pond, 120)
    assert len([*went, *await first.soon()]) == 2
    assert await rooms(pond) == []


async def test_nothing_is_lowered_twice_while_it_cools_and_ends_only_move_on(pond: Pond) -> None:
    await declare(pond)
    hand = await Hand.register(pond)
    await send(pond, 2)
    claimed = await hand.claim()
    throttling = Throttling(pond.engine_db)
    for wish_s in (20.0, 5.0, 40.0):
        await throttling.failed(claimed[0].lease, "ask", too_much(wish_s))
    (brake,) = await brakes(pond)
    assert (brake.factor, brake.hits, brake.in_use) == (0.5, 1, 2)
    async with pond.engine_db.duty("test") as con:
        changes = await con.fetchval("select count(*) from limit_change where kind = 'brake'")
    assert changes == 2, "the second answer changed nothing"


async def test_a_cooldown_lowers_limits_on_its_key_and_they_come_back(pond: Pond) -> None:
    await declare(pond)
    await limit(pond.db, KEY, 8)
    hand = await Hand.register(pond)
    await send(pond, 20)
    claimed = await hand.claim({"default": 20})
    assert len(claimed) == 8
    await Throttling(pond.engine_db).failed(claimed[0].lease, "ask", too_much(30.0))
    await end(pond, claimed)
    assert await hand.soon() == []
    await let_pass(pond, 31)
    claimed = await hand.soon()
    assert len(claimed) == 4, "half of eight"
    await end(pond, claimed)
    await let_pass(pond, 100)
    assert len(await hand.soon()) == 8


async def test_what_a_flow_does_not_declare_is_braked_for_its_own_org_alone(pond: Pond) -> None:
    other = await second_org(pond.db)
    await declare(pond, "provider:another")
    hand = await Hand.register(pond)
    await send(pond, 1)
    held = await one(hand)
    await send(pond, 1)
    await send(pond, 1, org_id=other)
    # Its caller gave it the key: whatever answered may be the caller's own.
    await Throttling(pond.engine_db).failed(held.lease, "ask", too_much(30.0))
    assert [claimed.lease.org_id for claimed in await hand.soon()] == [other]
    assert [brake.owner for brake in await brakes(pond, pond.org_id)] == [pond.org_id]
    assert await brakes(pond, other) == []
    assert await brakes(pond) == []


async def test_an_error_that_names_no_key_is_about_the_runs_only_provider(pond: Pond) -> None:
    await declare(pond)
    hand = await Hand.register(pond)
    await send(pond, 1, keys=[KEY, "model:m"])
    held = await one(hand)
    throttling = Throttling(pond.engine_db)
    await throttling.failed(held.lease, "ask", ValueError("no status"))
    await throttling.failed(held.lease, "ask", Transient("wait", retry_after_s=9.0))
    assert await brakes(pond) == []
    error = Transient("429", details={"status": 429})
    await throttling.failed(held.lease, "ask", error)
    assert [(brake.owner, brake.key) for brake in await brakes(pond)] == [(NO_ORG, KEY)]


async def test_a_worker_that_lost_its_lease_tells_nothing(pond: Pond) -> None:
    await declare(pond)
    hand = await Hand.register(pond)
    await send(pond, 1)
    held = await one(hand)
    lease = held.lease._replace(token=uuid.uuid4())
    await Throttling(pond.engine_db).failed(lease, "ask", too_much())
    assert await brakes(pond) == []


async def test_a_brake_that_is_taken_off_lets_work_go_at_once(pond: Pond) -> None:
    await declare(pond)
    hand = await Hand.register(pond)
    await send(pond, 3)
    held = await one(hand)
    await Throttling(pond.engine_db).failed(held.lease, "ask", too_much(600.0))
    assert await hand.soon() == []
    async with pond.db.globals() as con:
        await easing.release(con, KEY)
    assert len(await hand.soon()) == 2
    assert await rooms(pond) == []


async def test_brakes_that_are_over_are_deleted_and_claims_are_in_one_message_again(
    pond: Pond,
) -> None:
    await declare(pond)
    hand = await Hand.register(pond)
    await send(pond, 1)
    held = await one(hand)
    await Throttling(pond.engine_db).failed(held.lease, "ask", too_much(30.0))
    await hand.claim()
    assert hand.claimer.limits.is_on
    await let_pass(pond, 31)
    assert await drop_over(pond.engine_db) == 0, "it recovers still"
    await let_pass(pond, 60)
    assert await drop_over(pond.engine_db) == 1
    await hand.claim()
    assert not hand.claimer.limits.is_on


async def test_a_head_that_cools_down_keeps_no_place_from_others(pond: Pond) -> None:
    """It waits for a time, and not for others' ends: what it needs besides is theirs meanwhile."""
    await declare(pond)
    await limit(pond.db, "model:m", 1)
    hand = await Hand.register(pond)
    await send(pond, 1)
    held = await one(hand)
    await Throttling(pond.engine_db).failed(held.lease, "ask", too_much(60.0))
    await send(pond, 1, keys=[KEY, "model:m"])
    assert await hand.soon() == []
    assert await pond.count("lane", "parked_on is not null and blocked_at is null") == 1
    await send(pond, 1, keys=["model:m"])
    assert len(await hand.soon()) == 1


async def test_why_tells_of_the_cooldown_and_of_the_breaker(pond: Pond) -> None:
    await declare(pond)
    hand = await Hand.register(pond)
    await send(pond, 1)
    held = await one(hand)
    throttling = Throttling(pond.engine_db)
    run_id = await pond.submit("echo", keys=[KEY])
    await throttling.failed(held.lease, "ask", too_much(30.0))
    await hand.soon()

    async def reasons() -> list[why.Reason]:
        async with pond.db.org(pond.org_id) as con:
            return list((await why.explain(con, pond.org_id, run_id)).reasons)

    first = (await reasons())[0]
    assert first.kind == "cooldown"
    assert first.text.startswith(f"{KEY} is cooling down until 20")
    assert first.facts["until"] is not None
    await let_pass(pond, 31)
    for _ in range(TRIPS_AFTER):
        await throttling.failed(held.lease, "ask", DOWN)
    first = (await reasons())[0]
    assert first.kind == "breaker"
    assert f"The breaker of {KEY} is open since" in first.text
    assert "next probe at 20" in first.text


async def test_a_breaker_opens_after_failures_in_a_row_and_closes_by_a_probe(pond: Pond) -> None:
    await declare(pond)
    first, second = await Hand.register(pond), await Hand.register(pond)
    await send(pond, 6)
    held = await one(first)
    throttling, elsewhere = Throttling(pond.engine_db), Throttling(pond.engine_db)
    for _ in range(TRIPS_AFTER - 1):
        await throttling.failed(held.lease, "ask", DOWN)
    assert throttling.is_watched(pond.org_id, "ask")
    await throttling.succeeded(held.lease, "ask")
    assert not throttling.is_watched(pond.org_id, "ask"), "a success ends the row"
    for _ in range(TRIPS_AFTER - 1):
        await throttling.failed(held.lease, "ask", DOWN)
    assert await brakes(pond) == []
    await throttling.failed(held.lease, "ask", DOWN)
    (opened,) = await brakes(pond)
    assert opened.opened_us is not None
    assert await second.soon() == []
    await end(pond, [held])
    await let_pass(pond, 11)
    (probe,) = await second.soon()
    assert await first.soon() == [], "one probe at a time"
    elsewhere.watch(second.claimer.limits.opened)
    await elsewhere.failed(probe.lease, "ask", DOWN)
    (again,) = await brakes(pond)
    assert (again.hits, again.factor) == (2, 0.25)
    await end(pond, [probe])
    assert await second.soon() == []
    await let_pass(pond, 21)
    (probe,) = await first.soon()
    elsewhere.watch(first.claimer.limits.opened)
    assert elsewhere.is_watched(pond.org_id, "ask")
    assert not elsewhere.is_watched(pond.org_id, "another step")
    await elsewhere.succeeded(probe.lease, "ask")
    (closed,) = await brakes(pond)
    assert closed.opened_us is None
    await let_pass(pond, 5)
    assert len(await second.soon()) > 1


async def test_failures_in_a_row_are_counted_over_all_workers(pond: Pond) -> None:
    """A breaker opens after as many as with one worker; a success where one was seen ends the row."""
    await declare(pond)
    hand = await Hand.register(pond)
    await send(pond, 1)
    lease = (await one(hand)).lease
    workers = [Throttling(pond.engine_db) for _ in range(TRIPS_AFTER)]
    for each in workers[:-1]:
        await each.failed(lease, "ask", DOWN)
    await workers[0].succeeded(lease, "ask")
    await workers[0].failed(lease, "another step", DOWN)
    for each in workers[:-1]:
        await each.failed(lease, "ask", DOWN)
    assert await brakes(pond) == []
    await workers[-1].failed(lease, "ask", DOWN)
    (opened,) = await brakes(pond)
    assert opened.opened_us is not None
    assert await pond.count("failing", "step = 'ask'") == 0, "the next row begins anew"


async def test_failures_of_one_moment_are_each_counted_once(pond: Pond) -> None:
    await declare(pond)
    hand = await Hand.register(pond)
    await send(pond, 1)
    lease = (await one(hand)).lease
    workers = [Throttling(pond.engine_db) for _ in range(2)]
    await asyncio.gather(
        *(
            each.failed(lease, "ask", DOWN)
            for each in workers
            for _ in range((TRIPS_AFTER - 1) // 2)
        )
    )
    assert await pond.count("failing", f"failures = {TRIPS_AFTER - 1}") == 1
    assert await brakes(pond) == []
    await asyncio.gather(*(workers[0].failed(lease, "ask", DOWN) for _ in range(3)))
    assert len(await brakes(pond)) == 1


async def test_a_row_of_failures_is_broken_off_by_a_minute(pond: Pond) -> None:
    await declare(pond)
    hand = await Hand.register(pond)
    await send(pond, 1)
    lease = (await one(hand)).lease
    throttling, elsewhere = Throttling(pond.engine_db), Throttling(pond.engine_db)
    for _ in range(TRIPS_AFTER - 1):
        await throttling.failed(lease, "ask", DOWN)
        await throttling.failed(lease, "another step", DOWN)
    async with pond.engine_db.duty("test") as con:
        await con.execute("update failing set failed_us = failed_us - 61000000")
    await elsewhere.failed(lease, "ask", DOWN)
    assert await brakes(pond) == []
    await drop_over(pond.engine_db)
    assert await pond.count("failing") == 1, "of others that were broken off nothing is left"
    async with pond.engine_db.duty("test") as con:
        await con.execute("update failing set failed_us = failed_us - 61000000")
    await drop_over(pond.engine_db)
    assert await pond.count("failing") == 0


async def trip(throttling: Throttling, lease: Lease) -> None:
    for _ in range(TRIPS_AFTER):
        await throttling.failed(lease, "ask", DOWN)


async def test_a_breaker_that_nobody_probes_ends(pond: Pond) -> None:
    """The step that opened it may be no more, and would hold its key to one run at a time for ever."""
    await declare(pond)
    hand = await Hand.register(pond)
    await send(pond, 4)
    held = await one(hand)
    await trip(Throttling(pond.engine_db), held.lease)
    await end(pond, [held])
    await let_pass(pond, 11)
    assert await drop_over(pond.engine_db) == 0
    assert len(await hand.soon()) == 1
    await let_pass(pond, 3600)
    assert await brakes(pond) == []
    assert len(await hand.soon()) == 2
    assert await drop_over(pond.engine_db) == 1


async def test_an_answer_that_refuses_closes_a_breaker_as_a_result_does(pond: Pond) -> None:
    await declare(pond)
    hand = await Hand.register(pond)
    await send(pond, 2)
    held = await one(hand)
    throttling = Throttling(pond.engine_db)
    await trip(throttling, held.lease)
    await end(pond, [held])
    await let_pass(pond, 11)
    probe = await one(hand)
    throttling.watch(hand.claimer.limits.opened)
    await throttling.failed(probe.lease, "ask", Permanent("what?", details={"status": 404}))
    (brake,) = await brakes(pond)
    assert brake.opened_us is None


async def test_a_success_on_another_key_closes_no_breaker(pond: Pond) -> None:
    hand = await Hand.register(pond)
    await send(pond, 2)
    await send(pond, 1, keys=["provider:two"])
    claimed = await hand.claim()
    keys = {}
    async with pond.engine_db.duty("test") as con:
        for each in claimed:
            sql = (
                "select k from lease join lane l using (org_id, lane_id), unnest(l.keys) k"
                " where item_id = $1 and k like 'provider:%'"
            )
            keys[await con.fetchval(sql, each.lease.item_id)] = each
    throttling = Throttling(pond.engine_db)
    await trip(throttling, keys[KEY].lease)
    await let_pass(pond, 11)
    await hand.claim()
    throttling.watch(hand.claimer.limits.opened)
    await throttling.succeeded(keys["provider:two"].lease, "ask")
    (brake,) = await brakes(pond, pond.org_id)
    assert brake.opened_us is not None
    await throttling.succeeded(keys[KEY].lease, "ask")
    (brake,) = await brakes(pond, pond.org_id)
    assert brake.opened_us is None


async def test_the_breaker_of_one_org_makes_steps_of_others_wait_for_nothing(pond: Pond) -> None:
    other = await second_org(pond.db)
    hand = await Hand.register(pond)
    await send(pond, 1)
    await send(pond, 1, org_id=other)
    leases = {each.lease.org_id: each.lease for each in await hand.claim()}
    throttling = Throttling(pond.engine_db)
    await trip(throttling, leases[pond.org_id])
    await hand.claim()
    throttling.watch(hand.claimer.limits.opened)
    assert throttling.is_watched(pond.org_id, "ask")
    assert not throttling.is_watched(other, "ask")
    async with locked_brakes(pond):
        await throttling.failed(leases[other], "ask", DOWN)
        await throttling.succeeded(leases[other], "ask")
    assert not throttling.is_watched(other, "ask")


async def test_many_refusals_of_one_moment_are_told_once(pond: Pond) -> None:
    await declare(pond)
    hand = await Hand.register(pond)
    await send(pond, 1)
    held = await one(hand)
    throttling = Throttling(pond.engine_db)
    await throttling.failed(held.lease, "ask", too_much(60.0))
    async with locked_brakes(pond):
        for _ in range(20):
            await throttling.failed(held.lease, "ask", too_much(30.0))
    (before,) = await brakes(pond)
    await throttling.failed(held.lease, "ask", too_much(90.0))
    (after,) = await brakes(pond)
    assert after.until_us > before.until_us, "a longer wish is told at once"


@asynccontextmanager
async def locked_brakes(pond: Pond) -> AsyncIterator[None]:
    """Hold the lock of those who change brakes: whoever waits for it fails the test."""
    async with pond.engine_db.duty("test") as con, asyncio.timeout(20):
        await con.execute("select pg_advisory_xact_lock(7741003)")
        yield


async def test_waiters_of_a_provider_obey_its_retry_after_over_two_workers(pond: Pond) -> None:
    """A real provider on a socket says 429 once; nobody asks it before it wished, whichever worker has the run."""
    asked: list[float] = []

    async def hello(step: StepContext) -> str:
        asked.append(time.monotonic())
        return (await step.get(TextModel).complete("hello")).text  # type: ignore[type-abstract]

    step = pond.step(hello)

    async def ask(ctx: Context, _: Any) -> str:
        return await ctx.step(step)

    flow = pond.flow(ask, keys=["provider:openai"])
    wish_s = 3.0
    refused = Reply(status=429, body=ERROR, headers={"retry-after": str(int(wish_s))})
    async with far_end(refused, Reply(body=OPENAI)) as far:
        model = open_text_model("openai:m", far.url + "/v1", "key")
        resources = {TextModel: model}
        async with (
            pond.worker({"default": 4}, resources=resources),
            pond.worker({"default": 4}, resources=resources),
        ):
            first = await pond.submit(flow)
            await pond.until(first, "step.retrying")
            await submit_many(pond, flow, 10)
            await over(pond, flow, 11)
            assert len(far.requests) == len(asked) == 12
            # The refusal was told of before it was recorded, and recorded before it was heard of here.
            assert min(asked[1:]) >= asked[0] + wish_s
        await model.close()
