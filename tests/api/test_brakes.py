"""Brakes over HTTP: who sees and takes off which, what limits show, and why a run waits."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.security.conftest import World, world

from .conftest import Client, Front

__all__ = ["world"]
KEY = "provider:one"
PATH = "/v1/limits/brakes"
OF_ALL = "/v1/platform/limits/brakes"
YEAR_US = 366 * 86_400 * 1_000_000


async def brake(front: Front, owner: int, key: str = KEY, *, is_open: bool = False) -> None:
    """Put a brake on a key as a worker does, for a year."""
    async with front.engine_db.duty("test") as con:
        await con.execute(
            "insert into brake (owner, key, until_us, factor, in_use, hits, opened_us, over_us, step, reason)"
            " select $1, $2, at + $3, 0.5, 4, 1, case when $4 then at end, at + $3, 'ask', 'model_rate_limited'"
            " from (select (extract(epoch from clock_timestamp()) * 1000000)::bigint as at) n",
            *(owner, key, YEAR_US, is_open),
        )
        await con.execute("select limit_changed($1, $2, 'brake')", owner, key)


async def listed(client: Client, path: str = PATH) -> dict[str, Any]:
    return {one["id"]: one for one in (await client.get(path)).json()["data"]}


async def test_an_org_sees_and_takes_off_its_own_and_sees_everybodys(world: World) -> None:
    front = world.front
    operator = await world.client(await world.person(is_operator=True))
    one, other = await world.owner_of(world.org_id), await world.owner_of(world.other_id)
    await brake(front, world.org_id)
    await brake(front, 0, is_open=True)
    assert {name: found["state"] for name, found in (await listed(one)).items()} == {
        f"own {KEY}": "cooling",
        f"platform {KEY}": "open",
    }
    assert set(await listed(other)) == set(await listed(operator, OF_ALL)) == {f"platform {KEY}"}
    refused = await other.delete(PATH, params={"key": KEY})
    assert (refused.status_code, refused.json()["code"]) == (404, "brake_not_found")
    assert (await one.delete(PATH, params={"key": KEY})).status_code == 204
    assert set(await listed(one)) == {f"platform {KEY}"}, "of its own alone"
    assert (await operator.delete(OF_ALL, params={"key": KEY})).status_code == 204
    assert await listed(one) == {}


async def test_limits_tell_which_part_of_them_is_allowed_now(front: Front, ann: Client) -> None:
    for key in (KEY, "provider:*", "model:m x provider:one"):
        await ann.put("/v1/limits", json={"key": key, "maximum": 8})
    await brake(front, front.org_id)
    found = {one["key"]: one["factor"] for one in (await ann.get("/v1/limits")).json()["data"]}
    assert found == {KEY: 0.0, "provider:*": 1.0, "model:m×provider:one": 0.0}


async def test_a_run_that_is_held_back_says_so_and_goes_once_it_is_taken_off(
    front: Front, ann: Client
) -> None:
    async def ask(_ctx: Any, _: Any) -> int:
        return 1

    front.flow(ask, keys=[KEY])
    await brake(front, 0)
    async with front.worker():
        run_id = (await ann.post("/v1/runs", json={"flow": "ask"})).json()["id"]
        async with asyncio.timeout(20):
            while (why := (await ann.get(f"/v1/runs/{run_id}/why")).json())["reasons"][0][
                "kind"
            ] != "cooldown":
                await asyncio.sleep(0.02)
        first = why["reasons"][0]
        assert (first["key"], first["is_of_platform"]) == (KEY, True)
        assert f"{KEY} is cooling down until" in why["text"]
        async with front.db.globals() as con:
            assert await con.fetchval("select release_brake($1)", KEY)
        assert (await front.ended(ann, run_id))["state"] == "succeeded"
