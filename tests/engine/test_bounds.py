"""Steps with keys under a map's bound: no more of them get room than branches can go on; on a real database."""

from __future__ import annotations

from typing import Any

from tests.engine.conftest import Pond
from tests.engine.test_limits import limit
from tests.engine.test_step_keys import KEY, Gate, nothing_left, one_inside, staying, until

from millpond.engine.context import Context
from millpond.engine.pauses import Scope, pause, resume


def mapping(pond: Pond, gate: Gate, keys: dict[str, str], bound: int) -> Any:
    """Register a flow with a branch for each name, whose step has the key of that name, and none where that is ''."""

    async def maps(ctx: Context, _: Any) -> list[str]:
        return await ctx.map(
            lambda name: ctx.step(name, gate.stay, name, keys=[keys[name]] if keys[name] else []),
            list(keys),
            limit=bound,
        )

    return pond.flow(maps, name="maps")


async def test_room_of_branches_that_a_bound_lets_not_begin_is_given_back_at_once(
    pond: Pond,
) -> None:
    """The run is called for all of its branches at once, and its bound lets two of them begin."""
    gate = Gate()
    keys = {name: f"provider:{name}" for name in ("a", "b", "c", "d")}
    flow = mapping(pond, gate, keys, 2)
    other = staying(pond, gate, keys["d"], name="other")
    for key in keys.values():
        await limit(pond.db, key, 0)
    async with pond.worker({"default": 4}):
        run_id = await pond.submit(flow)
        await until(pond, "step_need", count=4)
        await until(pond, "lease", count=0)
        async with pond.db.org(pond.org_id) as con:
            await pause(con, pond.org_id, Scope(), "user:ann", "")
        for key in keys.values():
            await limit(pond.db, key, 1)
        async with pond.db.org(pond.org_id) as con:
            await resume(con, pond.org_id, Scope())
        await gate.reached("a")
        await gate.reached("b")
        other_id = await pond.submit(other, "other")
        await gate.reached("other")
        assert gate.inside == {"a", "b", "other"}
        gate.open("other", *keys)
        assert (await pond.ended(other_id))["outcome"] == "succeeded"
        assert (await pond.ended(run_id))["output"] == list(keys)
        await nothing_left(pond)


async def test_no_more_branches_stand_in_line_for_the_same_keys_than_their_bound_lets_go_on(
    pond: Pond,
) -> None:
    gate = Gate()
    names = [f"item {nth}" for nth in range(5)]
    flow, other = mapping(pond, gate, dict.fromkeys(names, KEY), 2), staying(pond, gate)
    await limit(pond.db, KEY, 1)
    async with pond.worker({"default": 4}):
        async with one_inside(pond, gate, other):
            run_id = await pond.submit(flow)
            await until(pond, "item", f"item_id = '{run_id}' and state = 'waiting'")
            assert await pond.count("step_need", f"run_id = '{run_id}'") == 2
        gate.open(*names)
        assert (await pond.ended(run_id))["output"] == names
        await nothing_left(pond)


async def test_branches_within_branches_stand_in_line_as_far_as_all_their_bounds_let_them(
    pond: Pond,
) -> None:
    gate = Gate()

    async def item(ctx: Context, nth: int) -> list[str]:
        names = [f"{nth} {of}" for of in range(3)]
        return await ctx.map(
            lambda name: ctx.step(name, gate.stay, name, keys=[KEY]), names, limit=2
        )

    async def maps(ctx: Context, _: Any) -> list[list[str]]:
        return await ctx.map(lambda nth: item(ctx, nth), range(4), limit=3)

    flow = pond.flow(maps)
    await limit(pond.db, KEY, 0)
    async with pond.worker({"default": 4}):
        run_id = await pond.submit(flow)
        await until(pond, "item", f"item_id = '{run_id}' and state = 'waiting'")
        async with pond.engine_db.duty("test") as con:
            rows = await con.fetch("select step_key from step_need order by rank")
        items = [row["step_key"].partition("/")[0] for row in rows]
        assert sorted(items) == ["~0.0", "~0.0", "~0.1", "~0.1", "~0.2", "~0.2"]
        gate.open(*(f"{nth} {of}" for nth in range(4) for of in range(3)))
        await limit(pond.db, KEY, 2)
        assert (await pond.ended(run_id))["outcome"] == "succeeded"
        await nothing_left(pond)


async def test_a_branch_without_a_place_in_its_bound_spends_nothing_of_a_rate(pond: Pond) -> None:
    """Its place is another branch's as the rate lets it go: somebody else goes, who waits for an hour otherwise."""
    gate = Gate()
    flow = mapping(pond, gate, {"asks": KEY, "works": ""}, 1)
    asking = staying(pond, gate)

    async def burst(count: int) -> None:
        await limit(pond.db, KEY, 1, kind="rate", period_s=3600.0, burst=count)

    await burst(1)
    async with pond.worker({"default": 4}):
        first = await pond.submit(asking, "first")
        await gate.reached("first")
        run_id = await pond.submit(flow)
        await gate.reached("works")
        await until(pond, "step_lease", "since_us is not null")
        await burst(2)
        await until(pond, "step_lease", "since_us is not null", 0)
        second = await pond.submit(asking, "second")
        await gate.reached("second")
        assert "asks" not in gate.inside
        gate.open("first", "second", "works")
        await until(pond, "step_need")
        await burst(3)
        await gate.reached("asks")
        gate.open("asks")
        for one in (first, second, run_id):
            assert (await pond.ended(one))["outcome"] == "succeeded"
        await nothing_left(pond)
