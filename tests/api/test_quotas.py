"""Quotas over HTTP: what is accepted, what is refused with 402, and what costs nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import orjson
import pytest
import pytest_asyncio

from .conftest import Client, Front, opened, served


@pytest_asyncio.fixture
async def admin(admin_url: str) -> AsyncIterator[asyncpg.Connection]:
    con = await asyncpg.connect(admin_url, server_settings={"search_path": "millpond, public"})
    yield con
    await con.close()


async def limit(admin: asyncpg.Connection, front: Front, **limits: float) -> None:
    """Give the org of a front limits of its own, and let the process hear of them."""
    await admin.execute(
        "update org set overrides = $2, plan_changed_at = clock_timestamp() where org_id = $1",
        front.org_id,
        orjson.dumps(limits).decode(),
    )
    await front.app.state.ports.reserver.refresh()


async def test_a_quota_that_is_used_up_is_told_with_its_numbers(
    front: Front, ann: Client, admin: asyncpg.Connection
) -> None:
    await front.publish()
    await limit(admin, front, runs_per_month=2)
    for _ in range(2):
        assert (await ann.post("/v1/runs", json={"flow": "echo"})).status_code == 202
    refused = await ann.post("/v1/runs", json={"flow": "echo"})
    assert refused.status_code == 402
    problem = refused.json()
    assert problem["code"] == "quota_exceeded"
    assert (problem["quota"], problem["used"], problem["maximum"]) == ("runs_per_month", 2, 2)
    ends_at = await admin.fetchval("select ends_at from quota_count")
    assert problem["renews_at"] == f"{ends_at:%Y-%m-%dT%H:%M:%SZ}"
    assert problem["error"] == {
        "message": problem["detail"],
        "type": "quota_error",
        "code": "quota_exceeded",
        "param": "runs_per_month",
    }


async def test_a_repeat_costs_nothing_also_when_the_quota_is_used_up(
    front: Front, ann: Client, admin: asyncpg.Connection
) -> None:
    await front.publish()
    await limit(admin, front, runs_per_month=1)
    headers = {"Idempotency-Key": "once"}
    body = {"flow": "echo"}
    answers = await asyncio.gather(
        *(ann.post("/v1/runs", json=body, headers=headers) for _ in range(20))
    )
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert (await ann.post("/v1/runs", json=body)).status_code == 402
    again = await ann.post("/v1/runs", json=body, headers=headers)
    assert (again.status_code, again.headers["Idempotency-Replayed"]) == (202, "true")
    other = await ann.post("/v1/runs", json={"flow": "echo", "priority": 3}, headers=headers)
    assert other.status_code == 422


async def test_joining_a_live_run_costs_nothing(
    front: Front, ann: Client, admin: asyncpg.Connection
) -> None:
    await front.publish()
    await limit(admin, front, runs_per_month=1)
    body = {"flow": "echo", "dedup_key": "order-1", "on_duplicate": "join"}
    first = await ann.post("/v1/runs", json=body)
    joined = await ann.post("/v1/runs", json=body)
    assert (joined.status_code, joined.json()["id"]) == (202, first.json()["id"])
    other = await ann.post("/v1/runs", json={**body, "dedup_key": "order-2"})
    assert other.status_code == 402


async def test_batches_reruns_and_single_runs_are_counted_together(
    front: Front, ann: Client, admin: asyncpg.Connection
) -> None:
    await front.publish()
    await limit(admin, front, runs_per_month=6)
    batch = {"runs": [{"flow": "echo"} for _ in range(4)]}
    started = await ann.post("/v1/runs/batch", json=batch)
    assert started.status_code == 202
    run_id = started.json()["ids"][0]
    assert (await ann.post("/v1/runs", json={"flow": "echo"})).status_code == 202
    refused = await ann.post("/v1/runs/batch", json=batch)
    assert (refused.status_code, refused.json()["used"]) == (402, 5)
    assert (await ann.post(f"/v1/runs/{run_id}/rerun")).status_code == 202
    assert (await ann.post(f"/v1/runs/{run_id}/rerun")).status_code == 402
    assert await admin.fetchval("select count(*) from run") == 6


@pytest.mark.parametrize("clients", [16])
async def test_two_api_processes_accept_exactly_the_quota(
    front: Front, ann: Client, admin: asyncpg.Connection, clients: int
) -> None:
    await front.publish()
    await limit(admin, front, runs_per_month=150)
    async with opened(front.urls, front.db) as app, served(app) as url:
        statuses: list[int] = []

        async def ask(address: str) -> None:
            for _ in range(15):
                answer = await ann.post(f"{address}/v1/runs", json={"flow": "echo"})
                statuses.append(answer.status_code)

        await asyncio.gather(
            *(ask(front.url) for _ in range(clients // 2)), *(ask(url) for _ in range(clients // 2))
        )
    assert statuses.count(202) == 150
    assert set(statuses) == {202, 402}
    assert await admin.fetchval("select count(*) from run") == 150


async def test_tokens_and_cost_that_are_spent_refuse_further_runs(
    front: Front, ann: Client, admin: asyncpg.Connection
) -> None:
    await front.publish()
    await limit(admin, front, tokens_per_month=1000)
    assert (await ann.post("/v1/runs", json={"flow": "echo"})).status_code == 202
    await admin.execute(
        "insert into usage_day (org_id, day, flow, model, input_tokens, output_tokens)"
        " values ($1, (clock_timestamp() at time zone 'UTC')::date, 'echo', 'm', 900, 101)",
        front.org_id,
    )
    async with opened(front.urls, front.db) as app, served(app) as url:
        refused = await ann.post(f"{url}/v1/runs", json={"flow": "echo"})
    assert refused.status_code == 402
    assert refused.json()["quota"] == "tokens_per_month"
    assert (refused.json()["used"], refused.json()["maximum"]) == (1001, 1000)


async def test_events_start_what_the_quota_pays_for_and_the_others_are_dropped(
    front: Front, ann: Client, admin: asyncpg.Connection
) -> None:
    await front.publish()
    for name in ("one", "two"):
        wish = {"name": name, "flow": "echo", "event": "order.paid"}
        assert (await ann.post("/v1/triggers", json=wish)).status_code == 201
    await limit(admin, front, runs_per_month=5)
    batch = {"events": [{"name": "order.paid", "data": {}} for _ in range(2)]}
    received = await ann.post("/v1/events/batch", json=batch)
    assert received.status_code == 202
    assert sum(len(one["runs"]) for one in received.json()["data"]) == 4
    received = await ann.post("/v1/events/batch", json=batch)
    assert received.status_code == 202
    assert sum(len(one["runs"]) for one in received.json()["data"]) == 1
    assert await admin.fetchval("select count(*) from run") == 5
    triggers = (await ann.get("/v1/triggers")).json()["data"]
    assert sum(one["dropped"] for one in triggers) == 3
    assert any("quota_exceeded" in (one["last_error"] or "") for one in triggers)
    assert (await ann.post("/v1/runs", json={"flow": "echo"})).status_code == 402
