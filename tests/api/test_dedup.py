"""Deduplication keys: of the runs with one key, one is live at a time."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest

from millpond.engine import dedup
from millpond.engine.deadlines import expire
from millpond.engine.submit import submit
from millpond.types import Intent

from .conftest import ALL, Client, Front, until


async def post(client: Client, key: str = "order-1", **body: Any) -> httpx2.Response:
    headers = {"Idempotency-Key": body.pop("idempotency")} if "idempotency" in body else {}
    return await client.post(
        "/v1/runs", json={"flow": "echo", "dedup_key": key, **body}, headers=headers
    )


async def live(front: Front) -> dict[str, str]:
    """Read which runs hold which keys."""
    async with front.engine_db.duty("test") as con:
        rows = await con.fetch("select key, run_id from live_key")
    return {row["key"]: str(row["run_id"]) for row in rows}


async def states(client: Client) -> list[str]:
    page = (await client.get("/v1/runs", params={"limit": 200})).json()
    return sorted(run["state"] for run in page["data"])


@pytest.mark.parametrize("on_duplicate", ["reject", "join", "cancel_old"])
async def test_of_50_concurrent_submits_one_run_is_live(
    front: Front, ann: Client, on_duplicate: str
) -> None:
    await front.publish()
    responses = await asyncio.gather(*(post(ann, on_duplicate=on_duplicate) for _ in range(50)))
    found = await states(ann)
    assert [state for state in found if state != "cancelled"] == ["queued"]
    (holder,) = (await live(front)).values()
    assert (await ann.get(f"/v1/runs/{holder}")).json()["state"] == "queued"
    statuses = sorted(response.status_code for response in responses)
    if on_duplicate == "reject":
        assert statuses == [202] + [409] * 49
    else:
        assert set(statuses) == {202}
    if on_duplicate == "join":
        assert {response.json()["id"] for response in responses} == {holder}
        assert sum(response.json()["is_new"] for response in responses) == 1
    if on_duplicate == "cancel_old":
        assert len({response.json()["id"] for response in responses}) == 50


async def test_a_refusal_names_the_live_run(front: Front, ann: Client) -> None:
    await front.publish()
    first = (await post(ann)).json()
    refused = await post(ann)
    assert refused.status_code == 409
    problem = refused.json()
    assert problem["code"] == "duplicate_run"
    assert problem["run_id"] == first["id"]
    assert first["id"] in problem["detail"]
    assert await states(ann) == ["queued"]


async def test_a_join_answers_with_the_live_run(front: Front, ann: Client) -> None:
    await front.publish()
    first = await post(ann, labels={"a": "b"})
    joined = await post(ann, on_duplicate="join", priority=7)
    assert joined.status_code == 202
    assert joined.headers["run-joined"] == "true"
    assert joined.headers["location"] == first.headers["location"]
    assert joined.json() == {**first.json(), "is_new": False}
    assert "run-joined" not in first.headers
    assert await states(ann) == ["queued"]


@pytest.mark.parametrize("on_duplicate", ["reject", "join", "cancel_old"])
async def test_a_key_of_another_flow_s_run_is_refused_whatever_is_asked(
    front: Front, ann: Client, on_duplicate: str
) -> None:
    await front.publish()
    await front.publish("payroll", permission="payroll:start")
    owner = await front.client(permissions=ALL | {"payroll:start"})
    first = (await post(owner, flow="payroll", labels={"who": "all"})).json()
    refused = await post(ann, on_duplicate=on_duplicate)
    assert (refused.status_code, refused.json()["code"]) == (409, "duplicate_run")
    assert refused.json()["run_id"] == first["id"]
    batch = {"runs": [{"flow": "echo", "dedup_key": "order-1", "on_duplicate": on_duplicate}]}
    assert (await ann.post("/v1/runs/batch", json=batch)).status_code == 409
    assert await states(ann) == ["queued"]


@pytest.mark.parametrize("delay_s", [0, 3600])
async def test_an_old_run_that_nobody_executes_is_replaced_at_once(
    front: Front, ann: Client, delay_s: float
) -> None:
    await front.publish()
    old = (await post(ann, delay_s=delay_s)).json()["id"]
    new = (await post(ann, on_duplicate="cancel_old")).json()
    assert new["is_new"]
    assert await live(front) == {"order-1": new["id"]}
    assert (await ann.get(f"/v1/runs/{new['id']}")).json()["dedup_key"] == "order-1"
    shown = (await ann.get(f"/v1/runs/{old}")).json()
    assert shown["state"] == "cancelled"
    last = (await ann.get(f"/v1/runs/{old}/events")).json()["data"][-1]
    assert last["data"] == {"by": "user:ann", "reason": f"replaced by run {new['id']}"}


async def test_a_running_run_is_asked_to_stop_and_its_end_leaves_the_key(
    front: Front, ann: Client
) -> None:
    may_end = asyncio.Event()

    async def echo(ctx: Any, given: Any) -> Any:
        if given != "old":
            return given
        try:
            await asyncio.Event().wait()
        finally:
            await may_end.wait()

    front.flow(echo)
    async with front.worker():
        old = (await post(ann, input="old")).json()["id"]
        await until(ann, old, "run.started")
        new = (await post(ann, on_duplicate="cancel_old", delay_s=3600)).json()["id"]
        assert await live(front) == {"order-1": new}
        may_end.set()
        assert (await front.ended(ann, old))["state"] == "cancelled"
    assert await live(front) == {"order-1": new}
    assert (await post(ann)).json()["run_id"] == new


async def test_a_key_is_free_once_its_run_has_ended_however(front: Front, ann: Client) -> None:
    async def echo(ctx: Any, given: Any) -> Any:
        if given == "fail":
            raise ValueError("no")
        return given

    front.flow(echo)
    async with front.worker():
        for given in ("fine", "fail"):
            run = (await post(ann, input=given)).json()
            await front.ended(ann, run["id"])
            assert await live(front) == {}
    cancelled = (await post(ann)).json()["id"]
    await ann.post(f"/v1/runs/{cancelled}/cancel")
    assert (await post(ann, deadline_s=60)).status_code == 202
    async with front.engine_db.duty("test") as con:
        await con.execute("update timer set due_at = clock_timestamp()")
    await expire(front.engine_db)
    assert await live(front) == {}


async def test_keys_belong_to_one_org(front: Front, ann: Client, other_org: int) -> None:
    await front.publish()
    stranger = await front.client(org_id=other_org)
    assert (await post(ann)).status_code == 202
    assert (await post(stranger)).status_code == 202


async def test_replacing_needs_the_right_to_cancel(front: Front) -> None:
    await front.publish()
    starter = await front.client(permissions=ALL - {"runs:cancel"})
    refused = await post(starter, on_duplicate="cancel_old")
    assert refused.status_code == 403
    assert refused.json()["error"]["param"] == "runs:cancel"
    assert (await post(starter, on_duplicate="join")).status_code == 202


async def test_a_repeat_of_the_request_gives_the_first_answer(front: Front, ann: Client) -> None:
    await front.publish()
    first = await post(ann, idempotency="k1")
    again = await post(ann, idempotency="k1")
    assert again.json() == first.json()
    assert again.headers["idempotency-replayed"] == "true"
    assert "run-joined" not in again.headers


async def test_a_repeat_of_a_join_gives_the_joined_run(front: Front, ann: Client) -> None:
    await front.publish()
    await post(ann)
    joined = await post(ann, on_duplicate="join", idempotency="k2")
    await ann.post(f"/v1/runs/{joined.json()['id']}/cancel")
    again = await post(ann, on_duplicate="join", idempotency="k2")
    assert again.json() == joined.json()
    assert again.headers["run-joined"] == again.headers["idempotency-replayed"] == "true"


async def test_a_refused_request_leaves_its_idempotency_key_free(front: Front, ann: Client) -> None:
    await front.publish()
    first = (await post(ann)).json()["id"]
    assert (await post(ann, idempotency="k3")).status_code == 409
    await ann.post(f"/v1/runs/{first}/cancel")
    assert (await post(ann, idempotency="k3")).status_code == 202


async def test_held_keys_do_not_fail_the_neighbours_in_a_batch(front: Front, ann: Client) -> None:
    await front.publish()
    for number in range(0, 40, 2):
        await post(ann, key=f"order-{number}")
    plain = [ann.post("/v1/runs", json={"flow": "echo"}) for _ in range(20)]
    keyed = [post(ann, key=f"order-{number}", idempotency=f"i{number}") for number in range(40)]
    responses = await asyncio.gather(*plain, *keyed)
    assert {response.status_code for response in responses[:20]} == {202}
    assert [response.status_code for response in responses[20:]] == [409, 202] * 20


async def test_submits_that_take_keys_in_other_orders_do_not_deadlock(
    front: Front, ann: Client
) -> None:
    await front.publish()
    keys = [f"k{number}" for number in range(12)]

    async def batch(order: list[str]) -> httpx2.Response:
        runs = [{"flow": "echo", "dedup_key": key, "on_duplicate": "join"} for key in order]
        return await ann.post("/v1/runs/batch", json={"runs": runs})

    responses = await asyncio.gather(*(batch(keys if n % 2 else keys[::-1]) for n in range(16)))
    assert {response.status_code for response in responses} == {202}
    assert await states(ann) == ["queued"] * 12


async def test_a_key_left_by_a_run_that_is_no_more_is_taken(front: Front, ann: Client) -> None:
    await front.publish()
    old = (await post(ann)).json()["id"]
    async with front.engine_db.duty("test") as con:
        await con.execute("delete from item where item_id = $1", old)
    new = await post(ann)
    assert new.status_code == 202
    assert await live(front) == {"order-1": new.json()["id"]}


@pytest.mark.parametrize("key", ["", "x" * 256, "a\x00b"])
async def test_a_malformed_key_is_named(front: Front, ann: Client, key: str) -> None:
    await front.publish()
    response = await post(ann, key=key)
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "dedup_key"


async def test_a_rival_that_keeps_a_key_open_does_not_hold_up_runs_without_one(
    front: Front, ann: Client
) -> None:
    await front.publish()
    async with front.db.org(front.org_id) as con:
        rival = Intent(
            org_id=front.org_id,
            flow="echo",
            version=1,
            queue="default",
            input=b"1",
            subject="user:bob",
            dedup_key="order-1",
        )
        assert await dedup.take(con, front.org_id, [rival]) == {rival.run_id}
        held = asyncio.create_task(post(ann))
        async with asyncio.timeout(10):
            for _ in range(5):
                assert (await ann.post("/v1/runs", json={"flow": "echo"})).status_code == 202
        assert not held.done()
        await submit(con, [rival])
    assert (await held).json()["run_id"] == str(rival.run_id)


async def test_keys_change_hands_while_their_runs_end(front: Front, ann: Client) -> None:
    async def echo(ctx: Any, given: Any) -> Any:
        async def nothing() -> None:
            await asyncio.sleep(0.002)

        await ctx.step("nothing", nothing)
        return given

    front.flow(echo)
    ways = ["cancel_old", "join", "reject", "cancel_old"]
    async with front.worker():
        responses = await asyncio.gather(
            *(post(ann, key=f"k{n % 3}", on_duplicate=ways[n % 4]) for n in range(200))
        )
        async with asyncio.timeout(20):
            while await live(front):
                await asyncio.sleep(0.02)
    assert {response.status_code for response in responses} <= {202, 409}
    ids = {response.json()["id"] for response in responses if response.status_code == 202}
    async with front.engine_db.duty("test") as con:
        assert await con.fetchval("select count(*) from item") == 0
        rows = await con.fetch("select outcome, count(*) from run group by 1")
    assert sum(row["count"] for row in rows) == len(ids)
    assert {row["outcome"] for row in rows} <= {"succeeded", "cancelled"}


async def test_a_repeat_takes_the_key_of_its_run_when_it_is_free(front: Front, ann: Client) -> None:
    await front.publish()
    first = (await post(ann)).json()["id"]
    live_yet = await ann.post(f"/v1/runs/{first}/rerun")
    assert (live_yet.status_code, live_yet.json()["code"]) == (409, "duplicate_run")
    await ann.post(f"/v1/runs/{first}/cancel")
    key = {"Idempotency-Key": "r"}
    answers = await asyncio.gather(
        *(ann.post(f"/v1/runs/{first}/rerun", headers=key) for _ in range(4))
    )
    assert {answer.status_code for answer in answers} == {202}
    repeat = answers[0].json()["id"]
    assert {answer.json()["id"] for answer in answers} == {repeat}
    assert await live(front) == {"order-1": repeat}
    assert (await ann.get(f"/v1/runs/{repeat}")).json()["dedup_key"] == "order-1"
    refused = await ann.post(f"/v1/runs/{first}/rerun")
    assert (refused.status_code, refused.json()["run_id"]) == (409, repeat)
