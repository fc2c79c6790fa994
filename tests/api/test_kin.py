"""GET /v1/runs/{id} tells whose child a run is and as what it goes on."""

from __future__ import annotations

from typing import Any

from .conftest import Client, Front, until


async def test_parent_and_successor_are_linked(front: Front, ann: Client) -> None:
    async def counts(ctx: Any, number: int) -> int:
        if number < 2:
            await ctx.continue_as(number + 1)
        return number

    async def parent(ctx: Any, _: Any) -> Any:
        child = await ctx.start("counts", 1)
        return [str(child.run_id), await ctx.join(child)]

    front.flow(counts, permission=None)
    front.flow(parent)
    async with front.worker():
        run_id = (await ann.post("/v1/runs", json={"flow": "parent"})).json()["id"]
        shown = await front.ended(ann, run_id)
        child_id, output = shown["output"]
        child = (await ann.get(f"/v1/runs/{child_id}")).json()
        successor = (await ann.get(f"/v1/runs/{child['continued_to']}")).json()
    assert output == 2
    assert {step["kind"] for step in shown["steps"]} == {"child", "join"}
    assert (child["parent_id"], successor["parent_id"]) == (run_id, run_id)
    assert successor["continued_from"] == child_id
    assert (child["continued_from"], successor["continued_to"]) == (None, None)


async def test_a_parent_goes_on_when_its_child_is_cancelled_by_hand(
    front: Front, ann: Client
) -> None:
    async def naps(ctx: Any, _: Any) -> None:
        await ctx.sleep(3600)

    async def parent(ctx: Any, _: Any) -> None:
        await ctx.run_flow("naps")

    front.flow(naps)
    front.flow(parent)
    async with front.worker():
        run_id = (await ann.post("/v1/runs", json={"flow": "parent"})).json()["id"]
        await until(ann, run_id, "child.started")
        steps = (await ann.get(f"/v1/runs/{run_id}")).json()["steps"]
        child_id = steps[0]["output"]["run_id"]
        assert (await ann.post(f"/v1/runs/{child_id}/cancel")).status_code == 202
        ended = await front.ended(ann, run_id)
    assert ended["state"] == "failed"
    assert (ended["error"]["cause"], ended["error"]["code"]) == ("ChildFailed", "cancelled")
