"""How runs with steps in other queues and with big results look from outside."""

from __future__ import annotations

from typing import Any

from tests.api.conftest import Client, Front, until

from millpond.engine.context import Context, StepContext
from millpond.engine.registry import step


async def test_a_step_in_another_queue_is_shown_waiting_there(front: Front, ann: Client) -> None:
    async def look(step_ctx: StepContext) -> int:
        return 7

    remote = step("look", queue="sql", registry=front.registry)(look)

    async def ask(ctx: Context, _: Any) -> int:
        return await ctx.step(remote)

    front.flow(ask)
    async with front.worker(default=2):
        run_id = (await ann.post("/v1/runs", json={"flow": "ask"})).json()["id"]
        await until(ann, run_id, "run.waiting")
        shown = (await ann.get(f"/v1/runs/{run_id}")).json()
        queues = {one["name"]: one for one in (await ann.get("/v1/queues")).json()["data"]}
        [waiting] = shown["steps"]
        assert [waiting["name"], waiting["state"], waiting["queue"], waiting["tries"]] == [
            "look",
            "waiting",
            "sql",
            0,
        ]
        assert queues["sql"]["queued"] == 1
        assert queues["sql"]["workers"] == 0
        assert queues["default"]["waiting"] == 1
        async with front.worker(sql=1):
            await until(ann, run_id, "run.succeeded")
    shown = (await ann.get(f"/v1/runs/{run_id}")).json()
    [done] = shown["steps"]
    assert [done["state"], done["output"], done["queue"], done["tries"]] == ["done", 7, None, 1]


async def test_big_results_are_shown_whole_by_their_run_and_left_out_of_lists(
    front: Front, ann: Client
) -> None:
    async def double(text: str) -> str:
        return text * 2

    async def grow(ctx: Context, text: str) -> str:
        return await ctx.step("double", double, text)

    front.flow(grow)
    text = "é" * (100 * 1024)
    async with front.worker(default=2):
        given = {"flow": "grow", "input": text}
        run_id = (await ann.post("/v1/runs", json=given)).json()["id"]
        await until(ann, run_id, "run.succeeded")
    shown = (await ann.get(f"/v1/runs/{run_id}")).json()
    assert shown["output"] == shown["steps"][0]["output"] == text * 2
    assert shown["truncated"] == []
    [listed] = (await ann.get("/v1/runs")).json()["data"]
    assert [listed["input"], listed["output"]] == [None, None]
    assert listed["truncated"] == ["input", "output"]
