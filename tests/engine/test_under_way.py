"""A try that lasts is told of, once, and one that is over is neither told of nor kept."""

from __future__ import annotations

import pytest
from tests.engine.conftest import Pond

from millpond.engine.context import Context, StepFailed
from millpond.engine.manners import Manner
from millpond.engine.plans import Plan
from millpond.engine.scope import ANNOUNCE_S, UnderWay, announce
from millpond.errors import Permanent
from millpond.retry import DEFAULT_RETRY


def plan(name: str) -> Plan:
    return Plan(name, f"{name}:0", Manner(DEFAULT_RETRY))


def test_only_tries_that_last_are_told_of_and_each_once() -> None:
    told: list[Plan] = []
    long, short, late = plan("same"), plan("same"), plan("late")
    under_way: dict[Plan, UnderWay] = {
        one: (began, told.append) for one, began in ((long, 0.0), (short, 0.0), (late, ANNOUNCE_S))
    }
    announce(under_way, 0.9 * ANNOUNCE_S)
    assert told == []
    del under_way[short]
    announce(under_way, 1.5 * ANNOUNCE_S)
    assert told == [long]
    announce(under_way, 1.9 * ANNOUNCE_S)
    assert told == [long]
    announce(under_way, 2 * ANNOUNCE_S)
    assert told == [long, late]
    assert under_way == {}


def test_a_try_that_is_begun_again_is_told_of_by_its_own_time() -> None:
    told: list[Plan] = []
    again, other = plan("again"), plan("other")
    under_way: dict[Plan, UnderWay] = {again: (0.0, told.append), other: (0.01, told.append)}
    del under_way[again]
    under_way[again] = 0.02, told.append
    announce(under_way, 0.015 + ANNOUNCE_S)
    assert told == [other]
    announce(under_way, 0.02 + ANNOUNCE_S)
    assert told == [other, again]


async def test_a_try_that_is_over_is_not_kept(pond: Pond) -> None:
    kept = []

    async def double(n: int) -> int:
        return n * 2

    async def fail(n: int) -> int:
        raise Permanent("no")

    async def steps(ctx: Context, n: int) -> None:
        await ctx.step("double", double, n)
        kept.append(len(ctx._scope.under_way))
        with pytest.raises(StepFailed):
            await ctx.step("fail", fail, n)
        kept.append(len(ctx._scope.under_way))

    flow = pond.flow(steps)
    async with pond.worker():
        await pond.ended(await pond.submit(flow, 1))
    assert kept == [0, 0]
