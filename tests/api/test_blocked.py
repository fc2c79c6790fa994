"""POST /v1/runs/{id}/resume, what a blocked run shows, and questions about unknown outcomes."""

from __future__ import annotations

from typing import Any

from millpond.engine.registry import step

from .conftest import ALL, Client, Front, until


async def start(client: Client, flow: str) -> str:
    run: str = (await client.post("/v1/runs", json={"flow": flow})).json()["id"]
    return run


async def _one() -> int:
    return 1


def register(front: Front, name: str) -> None:
    """Register `changing` anew, with a step of this name before its sleep."""

    async def changing(ctx: Any, _: Any) -> str:
        await ctx.step(name, _one)
        await ctx.sleep(1.1)
        return "done"

    front.registry.flows.clear()
    front.flow(changing)


async def test_blocked_run_names_both_and_goes_on_when_resumed(front: Front, ann: Client) -> None:
    register(front, "first")
    async with front.worker():
        run_id = await start(ann, "changing")
        await until(ann, run_id, "run.waiting")
        assert (await ann.get(f"/v1/runs/{run_id}")).json()["blocked"] is None
    register(front, "second")
    async with front.worker():
        await until(ann, run_id, "run.blocked")
        shown = (await ann.get(f"/v1/runs/{run_id}")).json()
    assert shown["state"] == "waiting"
    assert shown["blocked"]["code"] == "history_mismatch"
    assert (shown["blocked"]["asked"], shown["blocked"]["recorded"]) == ("second:0", "first:0")
    register(front, "first")
    async with front.worker():
        response = await ann.post(f"/v1/runs/{run_id}/resume")
        assert response.status_code == 202
        assert response.headers["location"] == f"/v1/runs/{run_id}"
        assert response.json()["blocked"] is None
        assert (await front.ended(ann, run_id))["output"] == "done"
        again = await ann.post(f"/v1/runs/{run_id}/resume")
    assert (again.status_code, again.json()["code"]) == (409, "not_blocked")
    events = (await ann.get(f"/v1/runs/{run_id}/events")).json()["data"]
    (unblocked,) = [event for event in events if event["kind"] == "run.unblocked"]
    assert unblocked["data"] == {"by": "user:ann"}


async def test_resume_needs_its_permission_and_a_run(front: Front, ann: Client) -> None:
    await front.publish()
    run_id = await start(ann, "echo")
    bob = await front.client(permissions=ALL - {"runs:operate"})
    assert (await bob.post(f"/v1/runs/{run_id}/resume")).status_code == 403
    unknown = "0199aaaa-0000-7000-8000-000000000000"
    assert (await ann.post(f"/v1/runs/{unknown}/resume")).status_code == 404


async def test_unknown_outcome_is_a_question_whose_answer_has_to_fit(
    front: Front, ann: Client
) -> None:
    @step("pay", effect="once", ask_role="support", registry=front.registry)
    async def pay(step_ctx: Any) -> int:
        raise ConnectionError("reset")

    async def shop(ctx: Any, _: Any) -> int:
        paid: int = await ctx.step(pay)
        return paid

    front.flow(shop)
    async with front.worker():
        run_id = await start(ann, "shop")
        await until(ann, run_id, "run.awaiting_input")
        shown = (await ann.get(f"/v1/runs/{run_id}")).json()
        assert [one["state"] for one in shown["steps"]] == ["unknown"]
        (question,) = shown["input_requests"]
        assert question["kind"] == "outcome"
        url = f"/v1/input-requests/{question['id']}/resolve"
        wrong = await ann.post(url, json={"answer": {"outcome": "done", "output": "thirty"}})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (422, "answer.output")
        right = await ann.post(url, json={"answer": {"outcome": "done", "output": 30}})
        assert right.status_code == 200
        assert (await front.ended(ann, run_id))["output"] == 30


async def test_cancel_of_a_run_with_an_undo_is_queued_for_a_worker(
    front: Front, ann: Client
) -> None:
    undone: list[int] = []

    @step("unbook", registry=front.registry)
    async def unbook(step_ctx: Any, number: int) -> None:
        undone.append(number)

    async def trip(ctx: Any, _: Any) -> None:
        await ctx.step("book", _one, undo=unbook)
        await ctx.sleep(1000)

    front.flow(trip)
    async with front.worker():
        run_id = await start(ann, "trip")
        await until(ann, run_id, "run.waiting")
        response = await ann.post(f"/v1/runs/{run_id}/cancel", json={"reason": "rain"})
        assert response.status_code == 202
        assert response.json()["cancel_requested"] is True
        assert (await front.ended(ann, run_id))["state"] == "cancelled"
    assert undone == [1]
