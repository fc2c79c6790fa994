"""Limits on tokens on a real database: reserved by claims, settled both ways, owed, kept after edits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.engine.conftest import Pond
from tests.engine.parking import KEY, Hand, end, rooms, send, unlimit
from tests.engine.test_limits import limit, over, second_org, submit_many
from tests.models.provider_server import Reply, far_end
from tests.models.test_providers import _streamed

from millpond.engine import fitting, metering, saturation, saturation_of_all, why
from millpond.engine.context import Context, StepContext
from millpond.engine.counting import NEVER
from millpond.engine.leases import Claimed
from millpond.engine.metering import Spent
from millpond.engine.operations import cancel
from millpond.engine.reservations import drop_unlimited
from millpond.errors import InvalidInput
from millpond.models import TextModel, open_text_model
from millpond.models.steps import complete

METER = f"tokens 0 0 {KEY}"


async def tokens(pond: Pond, maximum: int, burst: int | None = None, **options: Any) -> None:
    """Limit tokens per hour, so that none come back while a test looks."""
    options.setdefault("period_s", 3600.0)
    key = options.pop("key", KEY)
    await limit(pond.db, key, maximum, kind="tokens", burst=burst, **options)


async def need(pond: Pond, tokens: int | None, count: int = 1, **options: Any) -> None:
    """Submit runs, each in a lane of its own, that need so many."""
    keys = options.pop("keys", [KEY])
    await send(pond, count, keys=[*keys, *([f"tokens:{tokens}"] if tokens else [])], **options)


async def use(pond: Pond, claimed: Claimed, count: int, model: str = "one:m") -> None:
    """Let work tell that it used tokens of a model."""
    await metering.keep(
        pond.engine_db, claimed.lease, [Spent(model, count - count // 3, count // 3)]
    )


async def reserved(pond: Pond) -> list[tuple[str, int, int]]:
    async with pond.engine_db.duty("test") as con:
        rows = await con.fetch("select room, tokens, used from reservation order by room, tokens")
    return [tuple(row) for row in rows]


async def left(pond: Pond, burst: int, room: str = METER) -> int:
    """Return how many tokens a meter says are left, to the nearest one."""
    async with pond.engine_db.duty("test") as con:
        ahead = await con.fetchval(
            "select (tat_us - extract(epoch from clock_timestamp()) * 1000000) / pace from meter where room = $1",
            room,
        )
    return round(burst - max(0.0, float(ahead)))


async def test_a_claim_reserves_what_each_needs_and_the_rest_waits(pond: Pond) -> None:
    await tokens(pond, 1000)
    hand = await Hand.register(pond)
    await need(pond, 400, 3)
    assert len(await hand.soon()) == 2
    assert await reserved(pond) == [(METER, 400, 0), (METER, 400, 0)]
    assert await left(pond, 1000) == 200
    ((room, _, _, due_us),) = await rooms(pond)
    assert room == f"tokens:400 0 0 {KEY}"
    async with pond.engine_db.duty("test") as con:
        now_us = await con.fetchval(
            "select (extract(epoch from clock_timestamp()) * 1000000)::bigint"
        )
    # 200 of 1,000 in an hour are missing.
    assert 700e6 < due_us - now_us < 720.1e6


async def test_what_was_not_used_comes_back_at_the_next_claim(pond: Pond) -> None:
    await tokens(pond, 1000)
    hand = await Hand.register(pond)
    await need(pond, 500, 3)
    first = await hand.soon()
    await use(pond, first[0], 90)
    await end(pond, first)
    assert len(await hand.soon()) == 1
    assert await left(pond, 1000) == 410
    assert await reserved(pond) == [(METER, 500, 0)]
    assert await pond.count("lease_use") == 0


async def test_what_was_used_beyond_is_owed_while_the_run_goes_on(pond: Pond) -> None:
    await tokens(pond, 1000)
    hand = await Hand.register(pond)
    await need(pond, 100, 1)
    (first,) = await hand.soon()
    await use(pond, first, 60)
    await use(pond, first, 1240)
    await need(pond, 100, 1)
    assert await hand.soon() == []
    assert await left(pond, 1000) == -300
    assert await reserved(pond) == [(METER, 100, 1300)]
    await use(pond, first, 100)
    await end(pond, [first])
    assert await hand.soon() == []
    assert await left(pond, 1000) == -400
    assert await reserved(pond) == []


async def test_a_rescue_lets_the_estimate_stand_or_what_was_told_if_that_is_more(
    pond: Pond,
) -> None:
    from millpond.db.queries import queries

    await tokens(pond, 1000)
    hand = await Hand.register(pond)
    await need(pond, 300, 2)
    first = await hand.soon()
    await use(pond, first[0], 10)
    await use(pond, first[1], 310)
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            queries("maintenance")["unlease"],
            [one.lease.org_id for one in first],
            [one.lease.item_id for one in first],
            [one.lease.token for one in first],
            [None, None],
        )
    await hand.soon()
    assert await left(pond, 1000) == 1000 - 300 - 310
    assert await reserved(pond) == []


async def test_of_a_call_that_was_cut_off_the_estimate_stands(pond: Pond) -> None:
    await tokens(pond, 1000)
    hand = await Hand.register(pond)
    await need(pond, 300, 1)
    (first,) = await hand.soon()
    await metering.keep(pond.engine_db, first.lease, [Spent("one:m", 0, 0, is_cut=True)])
    await hand.soon()
    await use(pond, first, 90)
    await end(pond, [first])
    await hand.soon()
    assert await left(pond, 1000) == 700
    assert await pond.count("usage_part") == 1


async def test_what_never_fits_is_refused_at_once_and_what_does_no_more_is_told_so(
    pond: Pond,
) -> None:
    await tokens(pond, 1000, 500)
    small, large = (
        pond.intent("echo", None, keys=[KEY, key]) for key in ("tokens:500", "tokens:510")
    )
    async with pond.db.org(pond.org_id) as con:
        await fitting.check_fits(con, pond.org_id, [small])
        with pytest.raises(
            InvalidInput, match=f"510 tokens, and {KEY} never has more than 500"
        ) as error:
            await fitting.check_fits(con, pond.org_id, [small, large])
    assert error.value.code == "tokens_above_limit"

    hand = await Hand.register(pond)
    run_id = await pond.submit("echo", None, keys=[KEY, "tokens:400"])
    await tokens(pond, 1000, 300)
    assert await hand.soon() == []
    assert [row[3] for row in await rooms(pond)] == [NEVER]
    async with pond.db.org(pond.org_id) as con:
        text = (await why.explain(con, pond.org_id, run_id)).text
    assert f"{KEY} never has the 400 tokens that it needs" in text
    await tokens(pond, 1000, 400)
    assert len(await hand.soon()) == 1


async def test_why_tells_what_is_needed_what_is_left_and_when(pond: Pond) -> None:
    await tokens(pond, 1000)
    hand = await Hand.register(pond)
    await need(pond, 650)
    await hand.soon()
    run_id = await pond.submit("echo", None, keys=[KEY, "tokens:510"])
    await hand.soon()
    async with pond.db.org(pond.org_id) as con:
        reason = (await why.explain(con, pond.org_id, run_id)).reasons[-2]
    assert reason.text.startswith(f"{KEY} has too few tokens: needs 510, 350 left, the next at ")
    assert reason.text.endswith("; 1,000 in 3600 s are allowed, 1,000 at once.")
    assert (reason.facts["tokens"], reason.facts["left"]) == (510, 350)
    assert reason.facts["until"] is not None


async def test_what_declares_nothing_needs_a_thousand_and_then_what_was_used(pond: Pond) -> None:
    await tokens(pond, 100_000)
    hand = await Hand.register(pond)
    await need(pond, None, 1)
    (first,) = await hand.soon()
    assert await reserved(pond) == [(METER, 1000, 0)]
    await use(pond, first, 5_120)
    await end(pond, [first])
    await need(pond, None, 1)
    assert len(await hand.soon()) == 1
    assert await reserved(pond) == [(METER, 5200, 0)]


async def test_what_was_only_learned_is_never_more_than_there_is(pond: Pond) -> None:
    await tokens(pond, 600)
    hand = await Hand.register(pond)
    await need(pond, None, 2)
    (first,) = await hand.soon()
    assert await reserved(pond) == [(METER, 600, 0)]
    await end(pond, [first])
    assert len(await hand.soon()) == 1


async def test_use_counts_under_the_provider_and_model_that_it_was_of(pond: Pond) -> None:
    await tokens(pond, 10_000)
    await tokens(pond, 10_000, key="provider:two")
    await tokens(pond, 10_000, key="org:* x model:m")
    hand = await Hand.register(pond)
    await need(pond, 100, keys=[KEY, "provider:two", "model:m"])
    (first,) = await hand.soon()
    await use(pond, first, 700, "two:m")
    await use(pond, first, 50, "two:other")
    await use(pond, first, 8, "unheard-of")
    await hand.soon()
    by_room = {room: used for room, _, used in await reserved(pond)}
    assert by_room == {
        METER: 8,
        "tokens 0 0 provider:two": 758,
        f"tokens 0 {pond.org_id} model:m": 758,
    }


async def test_all_rooms_of_all_kinds_or_none(pond: Pond) -> None:
    await tokens(pond, 1000)
    await limit(pond.db, "queue:default", 1)
    await limit(pond.db, KEY, 10, kind="rate", period_s=3600.0, burst=10)
    hand = await Hand.register(pond)
    await need(pond, 100, 3)
    assert len(await hand.soon()) == 1
    assert await left(pond, 1000) == 900
    assert len(await reserved(pond)) == 1


async def test_an_orgs_own_limit_holds_beside_that_of_the_platform(pond: Pond) -> None:
    other = await second_org(pond.db)
    await tokens(pond, 1000)
    await tokens(pond, 300, org_id=pond.org_id)
    hand = await Hand.register(pond)
    await need(pond, 200, 3)
    await need(pond, 200, 3, org_id=other)
    got = [one.lease.org_id for one in await hand.soon()]
    assert sorted(got) == sorted([pond.org_id] + [other] * 3)
    assert await left(pond, 300, f"tokens {pond.org_id} {pond.org_id} {KEY}") == 100


async def test_a_large_need_is_not_starved_by_small_ones(pond: Pond) -> None:
    """The head of the large one has waited for long: what comes back is kept for it."""
    await tokens(pond, 1000)
    hand = await Hand.register(pond)
    await need(pond, 500, 2)
    first = await hand.soon()
    await need(pond, 900, 1)
    assert await hand.soon() == []
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "update lane set blocked_at = blocked_at - interval '1 minute' where blocked_at is not null"
        )
    await need(pond, 100, 5)
    await end(pond, first[:1])
    assert await hand.soon() == []
    await end(pond, first[1:])
    assert len(await hand.soon()) == 2
    assert await reserved(pond) == [(METER, 100, 0), (METER, 900, 0)]


async def test_edits_keep_what_is_used_and_hold_at_the_next_claim(pond: Pond) -> None:
    await tokens(pond, 1000)
    hand = await Hand.register(pond)
    await need(pond, 400, 4)
    assert len(await hand.soon()) == 2
    await tokens(pond, 100_000, 1300)
    assert len(await hand.soon()) == 1
    # 1,200 of 1,300 are used, whatever the pace; more come back soon now.
    assert 95 <= await left(pond, 1300) <= 300
    await unlimit(pond, kind="tokens")
    assert len(await hand.soon()) == 1


async def test_nothing_is_left_of_limits_that_are_gone(pond: Pond) -> None:
    await tokens(pond, 1000)
    hand = await Hand.register(pond)
    await need(pond, 400, 2)
    first = await hand.soon()
    await use(pond, first[0], 20)
    assert await drop_unlimited(pond.engine_db) == 0
    await unlimit(pond, kind="tokens")
    await end(pond, first[:1])
    assert await drop_unlimited(pond.engine_db) == 1
    await end(pond, first[1:])
    assert await drop_unlimited(pond.engine_db) == 2
    assert await pond.count("reservation") == await pond.count("lease_use") == 0


async def test_where_no_tokens_are_limited_nothing_is_written_of_them(pond: Pond) -> None:
    await limit(pond.db, KEY, 10)
    hand = await Hand.register(pond)
    await need(pond, 400, 2)
    first = await hand.soon()
    await use(pond, first[0], 20)
    assert await pond.count("reservation") == await pond.count("lease_use") == 0
    assert await pond.count("meter") == 0


async def test_runs_of_a_worker_are_settled_by_what_their_steps_tell(pond: Pond) -> None:
    async def ask(step: StepContext, count: int) -> None:
        step.spend("one:m", input_tokens=count, output_tokens=1)

    asked = pond.step(ask)

    async def answer(ctx: Context, count: int) -> None:
        await ctx.step(asked, count)

    flow = pond.flow(answer, keys=[KEY], tokens=300)
    await tokens(pond, 1000, 1500)
    async with pond.worker({"default": 8}):
        await submit_many(pond, flow, 10, 99)
        # More than a third of them at once is reserved; the rest go as that is settled.
        await over(pond, flow, 10)
        async with asyncio.timeout(10):
            while await pond.count("reservation"):
                pond.hints.wake(["default"])
                await asyncio.sleep(0.05)
    assert await pond.count("lease_use") == 0
    # 100 each; of 1,000 in an hour a few have come back.
    assert 500 <= await left(pond, 1500) <= 515


async def test_a_run_that_waits_holds_nothing_and_reserves_anew(pond: Pond) -> None:
    async def answer(ctx: Context, _: Any) -> None:
        await ctx.sleep(3600.0)

    flow = pond.flow(answer, keys=[KEY], tokens=300)
    await tokens(pond, 1000)
    async with pond.worker({"default": 2}):
        run_id = await pond.submit(flow)
        await pond.until(run_id, "run.waiting")
        async with asyncio.timeout(10):
            while await pond.count("reservation"):
                pond.hints.wake(["default"])
                await asyncio.sleep(0.02)
        assert await left(pond, 1000) == 1000
        async with pond.db.org(pond.org_id) as con:
            await cancel(con, pond.org_id, run_id, subject="user:test")


async def test_a_cooldown_lowers_tokens_per_period_and_keeps_what_is_used(pond: Pond) -> None:
    await tokens(pond, 1000)
    hand = await Hand.register(pond)
    await need(pond, 400, 2)
    await hand.soon()
    async with pond.engine_db.duty("test") as con:
        now_us = await con.fetchval(
            "select (extract(epoch from clock_timestamp()) * 1000000)::bigint"
        )
        await con.execute(
            "insert into brake (owner, key, until_us, factor, in_use, hits, over_us, step, reason)"
            " values (0, $1, $2::bigint, 0.5, 9, 1, $2::bigint + 50000000, 'ask', 'down')",
            *(KEY, now_us),
        )
        await con.execute("select limit_changed(0, $1, 'brake')", KEY)
        before = await con.fetchval("select pace from meter")
    await need(pond, 100, 1)
    assert len(await hand.soon()) == 1
    async with pond.engine_db.duty("test") as con:
        pace = await con.fetchval("select pace from meter where room = $1", METER)
    assert 1.8 * before < pace <= 2 * before
    assert await left(pond, 1000) == 100


async def test_a_provider_on_a_socket_and_the_meter_count_alike_and_a_cut_call_keeps_its_estimate(
    pond: Pond,
) -> None:
    async def answer(ctx: Context, _: Any) -> str:
        return (await ctx.step(complete, "hello")).text

    flow = pond.flow(answer, keys=["provider:openai", "model:m"], tokens=100)
    await tokens(pond, 1000, key="provider:openai")
    meter = "tokens 0 0 provider:openai"
    replies = [*[Reply(chunks=_streamed("openai"))] * 5, Reply(hang=True)]
    async with far_end(*replies) as far:
        model = open_text_model("openai:m", far.url + "/v1", "key")
        async with pond.worker({"default": 3}, resources={TextModel: model}):
            await submit_many(pond, flow, 5)
            await over(pond, flow, 5)
            # 16 each, by the provider's own count.
            async with asyncio.timeout(10):
                while await pond.count("reservation"):
                    pond.hints.wake(["default"])
                    await asyncio.sleep(0.02)
            assert len(far.requests) == 5
            assert abs(await left(pond, 1000, meter) - (1000 - 5 * 16)) <= 5
            cut = await pond.submit(flow)
            async with asyncio.timeout(10):
                while len(far.requests) < 6:
                    await asyncio.sleep(0.02)
            async with pond.db.org(pond.org_id) as con:
                await cancel(con, pond.org_id, cut, subject="user:test")
            pond.hints.cancelled([cut])
            assert (await pond.ended(cut))["outcome"] == "cancelled"
            async with asyncio.timeout(10):
                while await pond.count("reservation"):
                    pond.hints.wake(["default"])
                    await asyncio.sleep(0.02)
            assert abs(await left(pond, 1000, meter) - (1000 - 5 * 16 - 100)) <= 10
        await model.close()


async def test_a_child_that_could_never_go_fails_at_once(pond: Pond) -> None:
    async def small(_ctx: Context, _: Any) -> str:
        return "done"

    child = pond.flow(small, keys=[KEY], tokens=200)

    async def parent(ctx: Context, tokens: int | None) -> str:
        return await ctx.run_flow(child, None, tokens=tokens)

    flow = pond.flow(parent)
    await tokens(pond, 1000)
    async with pond.worker({"default": 4}):
        assert (await pond.ended(await pond.submit(flow, None)))["output"] == "done"
        ended = await pond.ended(await pond.submit(flow, 1001))
    assert (ended["outcome"], ended["error"]["code"]) == ("failed", "tokens_above_limit")


async def test_saturation_counts_what_waits_whatever_it_needs(pond: Pond) -> None:
    await tokens(pond, 1000)
    hand = await Hand.register(pond)
    await need(pond, 900)
    assert len(await hand.soon()) == 1
    await need(pond, 400, 2)
    await need(pond, 500)
    assert await hand.soon() == []
    async with pond.db.globals() as con:
        (of_all,), _ = await saturation_of_all.page_of_all(con, "limit", None, 10)
    async with pond.db.org(pond.org_id) as con:
        own, _ = await saturation.saturation(con, pond.org_id)
    (of_org,) = [one for one in own if one.of == "limit"]
    assert (of_all.waiting, of_all.own, of_all.in_use) == (3, 1, None)
    assert (of_org.waiting, of_org.own, of_org.in_use) == (3, 1, None)
    assert of_all.until is None  # a small one could go
