"""Plans, prices and usage over HTTP: operators set them, members see what is used."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest
from tests.api.test_quotas import admin

from .conftest import Client, Front

__all__ = ["admin"]


async def _by_flow(client: Client) -> Any:
    return (await client.get("/v1/usage", params={"by": "flow"})).json()


@pytest.fixture
async def operator(front: Front) -> Client:
    """An operator of the platform."""
    return await front.client(subject="user:olga")


async def test_an_org_is_limited_as_soon_as_it_has_a_plan(
    front: Front, ann: Client, operator: Client
) -> None:
    await front.publish()
    body = {"title": "Small", "limits": {"runs_per_month": 2, "runs_per_day": 5}}
    made = await operator.put("/v1/platform/plans/small", json=body)
    assert made.status_code == 200, made.text
    assert made.json()["limits"] == body["limits"]
    given = await operator.put(
        f"/v1/platform/orgs/{front.org_id}/plan",
        json={"plan": "small", "overrides": {"runs_per_month": 1, "runs_per_day": None}},
    )
    assert given.status_code == 200
    assert (await ann.post("/v1/runs", json={"flow": "echo"})).status_code == 202
    assert (await ann.post("/v1/runs", json={"flow": "echo"})).status_code == 402
    shown = (await ann.get("/v1/quotas")).json()
    assert (shown["plan"], shown["is_default_plan"]) == ("small", False)
    [quota] = shown["quotas"]
    assert (quota["quota"], quota["used"], quota["maximum"]) == ("runs_per_month", 1, 1)
    assert (await operator.get(f"/v1/platform/orgs/{front.org_id}/quotas")).json() == shown
    more = {"plan": "small", "overrides": {}}
    await operator.put(f"/v1/platform/orgs/{front.org_id}/plan", json=more)
    assert (await ann.post("/v1/runs", json={"flow": "echo"})).status_code == 202
    assert (await ann.post("/v1/runs", json={"flow": "echo"})).status_code == 402


async def test_runs_of_a_time_without_a_limit_count_when_it_is_there_again(
    front: Front, ann: Client, operator: Client, admin: asyncpg.Connection
) -> None:
    await front.publish()

    async def limit(most: int | None) -> None:
        body = {"overrides": {"runs_per_month": most}}
        given = await operator.put(f"/v1/platform/orgs/{front.org_id}/plan", json=body)
        assert given.status_code == 200, given.text

    async def start(runs: int) -> list[int]:
        return [
            (await ann.post("/v1/runs", json={"flow": "echo"})).status_code for _ in range(runs)
        ]

    await limit(3)
    assert await start(2) == [202, 202]
    await limit(None)
    assert await start(3) == [202, 202, 202]
    await limit(6)
    taken = "select taken from quota_count where org_id = $1"
    assert await admin.fetchval(taken, front.org_id) == 5
    assert await start(2) == [202, 402]


async def test_the_default_plan_is_that_of_every_org_without_one(
    front: Front, ann: Client, operator: Client
) -> None:
    await front.publish()
    body = {"limits": {"runs_per_day": 1}, "is_default": True}
    await operator.put("/v1/platform/plans/free", json=body)
    plans = (await operator.get("/v1/platform/plans")).json()["data"]
    assert [one["name"] for one in plans if one["is_default"]] == ["free"]
    assert (await ann.post("/v1/runs", json={"flow": "echo"})).status_code == 202
    assert (await ann.post("/v1/runs", json={"flow": "echo"})).status_code == 402
    # Put again without the word it stays the default one, which cannot be removed.
    await operator.put("/v1/platform/plans/free", json={"limits": {}})
    gone = await operator.delete("/v1/platform/plans/free")
    assert (gone.status_code, gone.json()["code"]) == (409, "plan_in_use")


@pytest.mark.parametrize(
    "limits",
    [
        {"runs_per_year": 1},
        {"runs_per_day": -1},
        {"runs_per_day": 1.5},
        {"requests_per_s": 0},
    ],
)
async def test_limits_that_make_no_sense_are_refused(
    operator: Client, limits: dict[str, float]
) -> None:
    refused = await operator.put("/v1/platform/plans/odd", json={"limits": limits})
    assert refused.status_code == 422
    assert refused.json()["error"]["param"] == f"limits.{next(iter(limits))}"


async def test_usage_is_summed_as_it_is_asked_for(
    front: Front, ann: Client, admin: asyncpg.Connection, other_org: int
) -> None:
    rows = [
        (front.org_id, "2026-03-01", "a", "", 2, 1.5, 0, 0, 0),
        (front.org_id, "2026-03-01", "a", "m", 0, 0, 10, 1, 100),
        (front.org_id, "2026-03-02", "b", "m", 0, 0, 20, 2, 200),
        (front.org_id, "2026-04-01", "b", "", 9, 9, 0, 0, 0),
        (other_org, "2026-03-01", "a", "", 50, 50, 0, 0, 0),
    ]
    for row in rows:
        await admin.execute(
            "insert into usage_day values ($1, $2::text::date, $3, $4, $5, $6, $7, $8, $9)", *row
        )
    march = {"since": "2026-03-01", "until": "2026-03-31"}
    found = (await ann.get("/v1/usage", params=march)).json()
    assert found["total"] == {
        "runs": 2,
        "worker_s": 1.5,
        "input_tokens": 30,
        "output_tokens": 3,
        "cost_micros": 300,
    }
    assert [one["day"] for one in found["data"]] == ["2026-03-02", "2026-03-01"]
    parted = (await ann.get("/v1/usage", params={**march, "by": ["model", "flow"]})).json()
    assert [(one["flow"], one["model"], one["input_tokens"]) for one in parted["data"]] == [
        ("a", "", 0),
        ("a", "m", 10),
        ("b", "m", 20),
    ]
    one = (await ann.get("/v1/usage", params={**march, "flow": "b"})).json()
    assert one["total"]["cost_micros"] == 200
    odd = await ann.get("/v1/usage", params={"since": "2026-04-01", "until": "2026-03-01"})
    assert odd.status_code == 422


async def test_a_finished_run_shows_in_this_months_usage(front: Front, ann: Client) -> None:
    async def echo(_: object, value: int) -> int:
        return value

    front.flow(echo)
    async with front.worker():
        started = await ann.post("/v1/runs", json={"flow": "echo", "input": 1})
        await front.ended(ann, started.json()["id"])
        async with asyncio.timeout(20):
            while not (found := await _by_flow(ann))["total"]["runs"]:
                await asyncio.sleep(0.05)
    assert found["data"][0]["flow"] == "echo"
    assert found["since"] == f"{datetime.now(UTC):%Y-%m}-01"


async def test_a_price_holds_from_now_on(operator: Client, admin: asyncpg.Connection) -> None:
    body = {"input_micros": 3, "output_micros": 15}
    made = await operator.put("/v1/platform/prices/openai:gpt/large", json=body)
    assert made.json()["model"] == "openai:gpt/large"
    assert await admin.fetchval("select output_micros from model_price") == 15
    listed = (await operator.get("/v1/platform/prices")).json()["data"]
    assert [one["id"] for one in listed] == ["openai:gpt/large"]
    assert (await operator.delete("/v1/platform/prices/openai:gpt/large")).status_code == 204
    assert (await operator.delete("/v1/platform/prices/openai:gpt/large")).status_code == 404
