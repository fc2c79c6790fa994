"""`ctx.continue_as`: a run ends and its successor starts, both or neither; to others it goes on."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from typing import Any

from tests.engine.conftest import Pond
from tests.engine.test_signals import tell

from millpond.engine.context import Context
from millpond.engine.operations import cancel
from millpond.engine.signals import sent
from millpond.engine.submit import submit
from millpond.errors import InvalidInput, Permanent


async def test_a_run_goes_on_as_a_fresh_one_of_the_same_kind(pond: Pond) -> None:
    async def counts(ctx: Context, number: int) -> str:
        await ctx.emit("at", {"number": number})
        if number < 3:
            await ctx.continue_as(number + 1)
        return f"counted to {number}"

    pond.flow(counts)
    first_id = await pond.submit(
        "counts", 1, priority=3, labels={"a": "b"}, keys=("provider:x",), deadline_s=900.0
    )
    async with pond.engine_db.duty("test") as con:  # most of its time has passed
        await con.execute("update run set deadline_at = deadline_at - interval '10 minutes'")
    async with pond.worker():
        chain = [await pond.ended(first_id)]
        while (following := chain[-1]["continued_to"]) is not None:
            chain.append(await pond.ended(following))
    assert len(chain) == 3
    assert [row["outcome"] for row in chain] == ["succeeded"] * 3
    assert [row["output"] for row in chain] == [None, None, "counted to 3"]
    for before, after in itertools.pairwise(chain):
        assert after["continued_from"] == before["run_id"]
        for same in ("priority", "labels", "keys", "subject", "queue", "version"):
            assert after[same] == before[same]
        assert abs((after["deadline_at"] - before["deadline_at"]).total_seconds()) < 30
        assert after["attempts"] == 1
    kinds = await pond.kinds(first_id)
    assert kinds[-2:] == ["run.continued", "run.succeeded"]
    told = (await pond.events(first_id))[-2].data
    assert uuid.UUID(told["run_id"]) == chain[1]["run_id"]
    for table in ("item", "ready", "lease", "timer"):
        assert await pond.count(table) == 0


async def test_a_parents_join_follows_the_chain_to_its_last_output(pond: Pond) -> None:
    may_end = asyncio.Event()

    async def counts(ctx: Context, number: int) -> int:
        if number < 4:
            await ctx.continue_as(number + 1)
        await ctx.step("hold", may_end.wait)
        return number

    async def waits(ctx: Context, when: str) -> Any:
        child = await ctx.start("counts", 1)
        if when == "late":
            await ctx.wait_event("now")
        return await ctx.join(child)

    pond.flow(counts)
    pond.flow(waits)
    async with pond.worker():
        early, late = await pond.submit("waits", "early"), await pond.submit("waits", "late")
        await pond.until(early, "run.waiting")
        may_end.set()
        assert (await pond.ended(early))["output"] == 4
        async with asyncio.timeout(20):
            while await pond.count("run", "flow = 'counts' and outcome is null"):
                await asyncio.sleep(0.01)
        await tell(pond, late, "now")
        assert (await pond.ended(late))["output"] == 4
    assert await pond.count("run", "parent_id is not null") == 8


async def test_a_live_key_goes_over_to_the_successor(pond: Pond) -> None:
    may_end = asyncio.Event()

    async def counts(ctx: Context, number: int) -> int:
        if number < 2:
            await ctx.continue_as(number + 1)
        await ctx.step("hold", may_end.wait)
        return number

    pond.flow(counts)
    intent = pond.intent("counts", 1, dedup_key="tank:7")
    async with pond.db.org(pond.org_id) as con:
        await con.execute(
            "insert into live_key (org_id, key, run_id) values ($1, $2, $3)",
            pond.org_id,
            "tank:7",
            intent.run_id,
        )
        await submit(con, [intent])
    async with pond.worker():
        following = (await pond.ended(intent.run_id))["continued_to"]
        assert await pond.count("live_key", f"run_id = '{following}'") == 1
        may_end.set()
        row = await pond.ended(following)
    assert row["dedup_key"] == "tank:7"
    assert await pond.count("live_key") == 0


async def test_a_signal_sent_during_the_last_step_reaches_the_successor(pond: Pond) -> None:
    is_in_step, may_end = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        is_in_step.set()
        await may_end.wait()

    async def serves(ctx: Context, number: int) -> list[Any]:
        if number == 1:
            await ctx.wait_event("order")
            await ctx.step("hold", hold)
            await ctx.continue_as(2)
        orders = [await ctx.wait_event("order", timeout_s=30) for _ in range(2)]
        return [[one.data, one.sent_at.isoformat()] for one in orders]

    pond.flow(serves)
    async with pond.worker():
        run_id = await pond.submit("serves", 1)
        await tell(pond, run_id, "order", 1)
        await asyncio.wait_for(is_in_step.wait(), 20)
        late = [await tell(pond, run_id, "order", number) for number in (2, 3)]
        may_end.set()
        following = (await pond.ended(run_id))["continued_to"]
        row = await pond.ended(following)
    assert row["output"] == [[n, one.sent_at.isoformat()] for n, one in enumerate(late, 2)]
    async with pond.db.org(pond.org_id) as con:
        again = await sent(con, pond.org_id, run_id, late[0].signal_id)
    assert again.sent_at == late[0].sent_at
    assert await pond.count("signal", "step_key is null") == 0


async def test_a_run_asked_to_cancel_has_no_successor(pond: Pond) -> None:
    is_there, may_go = asyncio.Event(), asyncio.Event()

    async def stubborn(ctx: Context, _: None) -> None:
        is_there.set()
        try:
            await may_go.wait()
        except asyncio.CancelledError:
            await ctx.continue_as(None)

    pond.flow(stubborn)
    async with pond.worker():
        run_id = await pond.submit("stubborn")
        await asyncio.wait_for(is_there.wait(), 20)
        async with pond.db.org(pond.org_id) as con:
            await cancel(con, pond.org_id, run_id, "user:test")
        pond.hints.cancelled([run_id])
        row = await pond.ended(run_id)
    assert (row["outcome"], row["continued_to"]) == ("cancelled", None)
    assert await pond.count("run") == 1


async def test_a_cancel_that_was_asked_for_wins_over_the_successor(pond: Pond) -> None:
    """Also when the flow has not been told of it yet."""

    async def goes_on(ctx: Context, _: None) -> None:
        async with pond.db.org(pond.org_id) as con:
            await cancel(con, pond.org_id, ctx.run_id, "user:test")
        await ctx.continue_as(None)

    pond.flow(goes_on)
    async with pond.worker():
        row = await pond.ended(await pond.submit("goes_on"))
    assert row["outcome"] == "cancelled"
    assert await pond.count("run") == 1


async def test_children_are_treated_as_at_any_end(pond: Pond) -> None:
    async def naps(ctx: Context, _: None) -> None:
        await ctx.sleep(3600)

    async def quick(ctx: Context, _: None) -> None:
        await ctx.sleep(0.01)

    async def goes_on(ctx: Context, left: int) -> None:
        if left == 0:
            return
        await ctx.start("naps")
        await ctx.start("quick", close="wait")
        await ctx.continue_as(left - 1)

    for function in (naps, quick, goes_on):
        pond.flow(function)
    async with pond.worker():
        run_id = await pond.submit("goes_on", 1)
        await pond.ended(run_id)
        async with pond.db.org(pond.org_id) as con:
            nap_id = await con.fetchval("select run_id from run where flow = 'naps'")
        assert (await pond.ended(nap_id))["outcome"] == "cancelled"
        assert await pond.count("run", "flow = 'quick' and outcome = 'succeeded'") == 1


async def test_an_input_that_does_not_fit_and_a_call_inside_a_branch_are_refused(
    pond: Pond,
) -> None:
    async def tries(ctx: Context, number: int) -> list[str]:
        codes = []
        try:
            await ctx.continue_as("seven")
        except InvalidInput as error:
            codes.append(error.code)

        async def inside() -> None:
            try:
                await ctx.continue_as(7)
            except Permanent as error:
                codes.append(error.code)

        await ctx.parallel(inside())
        return codes

    pond.flow(tries)
    async with pond.worker():
        row = await pond.ended(await pond.submit("tries", 1))
    assert row["output"] == ["invalid_input", "continue_in_branch"]


async def test_another_version_may_go_on(pond: Pond) -> None:
    async def old(ctx: Context, number: int) -> None:
        await ctx.continue_as({"number": number}, version=2)

    async def new(ctx: Context, given: dict[str, int]) -> int:
        return given["number"]

    pond.flow(old, name="grows")
    pond.flow(new, name="grows", version=2)
    async with pond.worker():
        first = await pond.ended(await pond.submit("grows", 5))
        last = await pond.ended(first["continued_to"])
    assert (last["version"], last["output"]) == (2, 5)
