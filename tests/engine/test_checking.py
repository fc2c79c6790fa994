"""Recorded histories against the code of today, and code that was changed since."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests import histories
from tests.engine import golden_flows
from tests.engine.conftest import Pond
from tests.engine.test_once import _answer, _request

from millpond.engine.checking import Checked, check
from millpond.engine.context import Context
from millpond.engine.operations import cancel
from millpond.engine.registry import Flow, Registry
from millpond.errors import Permanent
from millpond.types import Principal

SUPPORT = Principal(org_id=0, subject="user:kim", roles=frozenset({"support"}))
ORDER = {"item": "kettle", "cents": 1900}


async def test_golden_histories_are_replayed_by_the_code_of_today(
    pond: Pond, pytestconfig: pytest.Config
) -> None:
    if pytestconfig.getoption("--renew-golden"):
        pond.registry = golden_flows.REGISTRY
        async with pond.worker():
            run_id = await pond.submit("golden.order", ORDER)
            await pond.until(run_id, "run.awaiting_input")
            await histories.save("order-waiting", pond.engine_db, run_id)
            await _answer(pond, await _request(pond, run_id), {"approved": True}, SUPPORT)
            await pond.ended(run_id)
        await histories.save("order-ended", pond.engine_db, run_id)
    for name in ("order-waiting", "order-ended"):
        found = await histories.replayed(name, golden_flows.order)
        assert found.result == "ok", str(found)


async def _check(pond: Pond, *flows: Flow) -> list[Checked]:
    return [one async for one in check(pond.engine_db, flows, {}, limit=10)]


async def _one() -> int:
    return 1


def _flow(pond: Pond, *names: str, fails: bool = False) -> Flow:
    """Register `changing` anew: a step of each name, then a sleep or an error."""

    async def changing(ctx: Context, is_long: bool) -> None:
        for name in names:
            await ctx.step(name, _one)
        if fails:
            raise Permanent("always", code="always")
        if is_long:
            await ctx.sleep(1000)

    pond.registry = Registry()
    return pond.flow(changing)


async def test_check_finds_where_code_leaves_the_history_and_writes_nothing(pond: Pond) -> None:
    same = _flow(pond, "first", "second")
    async with pond.worker():
        short = await pond.submit("changing", data=False)
        await pond.ended(short)
        long = await pond.submit("changing", data=True)
        await pond.until(long, "run.waiting")
        never_begun = await pond.submit("changing", data=True, delay_s=500)
    rows = "select count(*), sum(xmin::text::bigint) from (select xmin from step union all select xmin from item) x"
    async with pond.engine_db.duty("test") as con:
        before = await con.fetchrow(rows)
    checked = await _check(pond, same)
    assert [(one.run_id, one.state) for one in checked] == [(long, "waiting"), (short, "succeeded")]
    assert never_begun not in {one.run_id for one in checked}
    assert [one.comparison.result for one in checked] == ["ok", "ok"]
    assert [one.steps for one in checked] == [3, 2]
    swapped = await _check(pond, _flow(pond, "second", "first"))
    assert [one.comparison.result for one in swapped] == ["mismatch", "mismatch"]
    mismatch = swapped[0].comparison.mismatch
    assert mismatch is not None
    assert (mismatch.asked, mismatch.recorded) == ("second:0", "first:0")
    shorter = await _check(pond, _flow(pond, "first"))
    assert [one.comparison.result for one in shorter] == ["mismatch", "mismatch"]
    assert "without asking for second:0" in str(shorter[1].comparison)
    longer = await _check(pond, _flow(pond, "first", "second", "third"))
    assert [one.comparison.result for one in longer] == ["mismatch", "ok"]
    async with pond.engine_db.duty("test") as con:
        assert await con.fetchrow(rows) == before


async def test_an_error_after_the_last_record_is_told_and_no_mismatch(pond: Pond) -> None:
    _flow(pond, "first")
    async with pond.worker():
        await pond.ended(await pond.submit("changing", data=False))
    (checked,) = await _check(pond, _flow(pond, "first", fails=True))
    assert checked.comparison.result == "raised"
    assert "always" in str(checked.comparison)


async def test_a_history_with_children_is_replayed_without_starting_or_joining_any(
    pond: Pond,
) -> None:
    async def leaf(ctx: Context, _: None) -> int:
        return 7

    child_flow = pond.flow(leaf)

    async def tree(ctx: Context, waits: bool) -> int:
        child = await ctx.start(child_flow, None)
        if waits:
            await ctx.sleep(500)
        got = await ctx.join(child)
        await ctx.step("after", _one)
        return int(got)

    flow = pond.flow(tree)
    async with pond.worker():
        whole = await pond.submit("tree", data=False)
        await pond.ended(whole)
        begun = await pond.submit("tree", data=True)
        await pond.until(begun, "run.waiting")
    before = await pond.count("run")
    checked = {one.run_id: one for one in await _check(pond, flow)}
    assert {one.comparison.result for one in checked.values()} == {"ok"}
    assert {whole, begun} == set(checked)
    assert await pond.count("run") == before


async def test_check_goes_past_a_time_limit_that_had_passed_in_the_flow(pond: Pond) -> None:
    async def limited(ctx: Context, _: None) -> Any:
        try:
            async with asyncio.timeout(0.2):
                await ctx.step("never", asyncio.Event().wait)
        except TimeoutError:
            await ctx.step("instead", _one)
        await ctx.sleep(1000)

    flow = pond.flow(limited)
    async with pond.worker():
        run_id = await pond.submit("limited")
        await pond.until(run_id, "run.waiting")
        (checked,) = await _check(pond, flow)
        assert checked.comparison.result == "ok"
        assert checked.comparison.mismatch is None
        async with pond.db.org(pond.org_id) as con:
            await cancel(con, pond.org_id, run_id, "user:test")


async def test_a_run_that_went_on_as_another_or_failed_as_before_is_no_fault(pond: Pond) -> None:
    async def counting(ctx: Context, left: int) -> int:
        await ctx.step("one", _one)
        if left:
            await ctx.continue_as(left - 1)
        return left

    async def failing(ctx: Context, _: None) -> None:
        await ctx.step("one", _one)
        raise Permanent("always", code="always")

    async def failing_anew(ctx: Context, _: None) -> None:
        await ctx.step("one", _one)
        raise Permanent("otherwise", code="always")

    flows = (pond.flow(counting), pond.flow(failing, name="failing"))
    async with pond.worker():
        first = await pond.submit("counting", 1)
        await pond.ended(first)
        await pond.ended(await pond.submit("failing", None))
    found = await _check(pond, *flows)
    assert len(found) >= 2
    assert {one.comparison.result for one in found} == {"ok"}
    pond.registry = Registry()
    (changed,) = await _check(pond, pond.flow(failing_anew, name="failing"))
    assert changed.comparison.result == "raised"
