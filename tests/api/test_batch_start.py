"""POST /v1/runs/batch: many runs, all or none."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest

from .conftest import ALL, Client, Front

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}


async def post(client: Client, runs: Any, key: str | None = None) -> httpx2.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    return await client.post("/v1/runs/batch", json={"runs": runs}, headers=headers)


def wishes(number: int, **more: Any) -> list[dict[str, Any]]:
    return [{"flow": "echo", "input": {"x": n}, **more} for n in range(number)]


async def count(front: Front, table: str = "run") -> int:
    async with front.engine_db.duty("test") as con:
        number: int = await con.fetchval(f"select count(*) from {table}")
    return number


async def test_a_thousand_runs_are_accepted_in_order_in_one_transaction(
    front: Front, ann: Client
) -> None:
    await front.publish(schema=SCHEMA)
    response = await post(ann, wishes(1000))
    assert response.status_code == 202
    answer = response.json()
    assert len(set(answer["ids"])) == 1000
    assert answer["joined"] == []
    async with front.engine_db.duty("test") as con:
        rows = await con.fetch("select run_id, input, xmin::text from run")
    inputs = {str(row["run_id"]): row["input"] for row in rows}
    assert [inputs[run_id] for run_id in answer["ids"]] == [f'{{"x":{n}}}' for n in range(1000)]
    assert len({row["xmin"] for row in rows}) == 1


async def test_runs_of_a_batch_are_worked_on(front: Front, ann: Client) -> None:
    async def echo(ctx: Any, given: Any) -> Any:
        return given

    front.flow(echo)
    async with front.worker():
        ids = (await post(ann, wishes(5))).json()["ids"]
        ended = await asyncio.gather(*(front.ended(ann, run_id) for run_id in ids))
    assert [run["output"] for run in ended] == [{"x": n} for n in range(5)]


async def test_every_bad_entry_is_named_and_nothing_is_accepted(front: Front, ann: Client) -> None:
    await front.publish(schema=SCHEMA)
    await front.publish("inner", permission=None)
    await front.publish("report", permission="reports:run")
    runs = [
        *wishes(2),
        {"flow": "echo", "input": {"x": "three"}},
        {"flow": "nowhere"},
        {"flow": "echo", "input": {"x": 1}, "priority": 500, "wrong": 1},
        {"flow": "inner"},
        {"flow": "report"},
        {"flow": "echo", "input": {"x": 1}, "queue": "express"},
        {"flow": "echo", "input": {"x": 1}, "deadline_s": 5, "delay_s": 6},
        7,
        {"flow": "echo", "input": {"x": 1}, "dedup_key": "k"},
        {"flow": "echo", "input": {"x": 1}, "dedup_key": "k"},
    ]
    response = await post(ann, runs)
    assert response.status_code == 422
    problem = response.json()
    assert problem["code"] == "batch_invalid"
    assert [fault["param"] for fault in problem["errors"]] == [
        "runs[2].input.x",
        "runs[3].flow",
        "runs[4].priority",
        "runs[4].wrong",
        "runs[5].flow",
        "runs[6].flow",
        "runs[7].queue",
        "runs[8].deadline_s",
        "runs[9]",
        "runs[11].dedup_key",
    ]
    assert problem["error"]["param"] == "runs[2].input.x"
    assert "9 of 12" in problem["detail"]
    assert await count(front) == await count(front, "ready") == await count(front, "live_key") == 0


@pytest.mark.parametrize(("number", "status"), [(0, 422), (1, 202), (1001, 422)])
async def test_a_batch_has_from_1_to_1000_runs(
    front: Front, ann: Client, number: int, status: int
) -> None:
    await front.publish()
    assert (await post(ann, wishes(number))).status_code == status


async def test_a_repeat_returns_the_same_ids(front: Front, ann: Client) -> None:
    await front.publish()
    responses = await asyncio.gather(*(post(ann, wishes(3), key="b1") for _ in range(8)))
    assert {response.status_code for response in responses} == {202}
    assert len({tuple(response.json()["ids"]) for response in responses}) == 1
    replayed = [r for r in responses if "idempotency-replayed" in r.headers]
    assert len(replayed) == 7
    assert await count(front) == 3
    other = await post(ann, wishes(4), key="b1")
    assert other.status_code == 422
    assert other.json()["code"] == "idempotency_key_reused"


async def test_a_repeat_survives_a_newer_schema(front: Front, ann: Client) -> None:
    await front.publish()
    first = await post(ann, wishes(2), key="b1")
    await front.publish(schema={"type": "string"})
    await front.app.state.ports.catalog._fresh(0.0)
    assert (await post(ann, wishes(2), key="b1")).json() == first.json()
    assert (await post(ann, wishes(2), key="b2")).status_code == 422


async def test_a_refused_batch_leaves_its_key_free(front: Front, ann: Client) -> None:
    await front.publish()
    held = (await ann.post("/v1/runs", json={"flow": "echo", "dedup_key": "k"})).json()["id"]
    runs = [*wishes(2), {"flow": "echo", "dedup_key": "k"}]
    refused = await post(ann, runs, key="b1")
    assert refused.status_code == 409
    assert refused.json()["error"]["param"] == "runs[2].dedup_key"
    assert refused.json()["run_id"] == held
    assert await count(front) == 1
    await ann.post(f"/v1/runs/{held}/cancel")
    assert (await post(ann, runs, key="b1")).status_code == 202


async def test_entries_join_and_replace_live_runs(front: Front, ann: Client) -> None:
    await front.publish()
    first = await post(ann, [{"flow": "echo", "dedup_key": key} for key in ("a", "b")])
    a, b = first.json()["ids"]
    runs = [
        {"flow": "echo"},
        {"flow": "echo", "dedup_key": "b", "on_duplicate": "join"},
        {"flow": "echo", "dedup_key": "a", "on_duplicate": "cancel_old"},
    ]
    answer = (await post(ann, runs, key="b1")).json()
    assert answer["ids"][1] == b
    assert answer["joined"] == [1]
    assert (await ann.get(f"/v1/runs/{a}")).json()["state"] == "cancelled"
    assert (await post(ann, runs, key="b1")).json() == answer
    assert await count(front) == 4


async def test_replacing_in_a_batch_needs_the_right_to_cancel(front: Front) -> None:
    await front.publish()
    starter = await front.client(permissions=ALL - {"runs:cancel"})
    runs = [{"flow": "echo", "dedup_key": "a", "on_duplicate": "cancel_old"}]
    response = await post(starter, runs)
    assert response.status_code == 422
    fault = response.json()["errors"][0]
    assert fault["code"] == "permission_missing"
    assert fault["param"].endswith("].on_duplicate")


async def test_a_flows_own_deadline_counts_unless_one_is_given(front: Front, ann: Client) -> None:
    await front.publish(deadline_s=60)
    runs = [{"flow": "echo"}, {"flow": "echo", "deadline_s": 600}, {"flow": "echo", "delay_s": 90}]
    ids = (await post(ann, runs)).json()["ids"]
    async with front.engine_db.duty("test") as con:
        rows = await con.fetch(
            "select run_id, extract(epoch from deadline_at - created_at)::float8 as s from run"
        )
    seconds = {str(row["run_id"]): row["s"] for row in rows}
    assert [seconds[run_id] for run_id in ids] == [60, 600, 150]
    assert (await ann.get("/v1/flows/echo")).json()["deadline_s"] == 60
