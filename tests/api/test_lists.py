"""GET /v1/runs: filters, and paging without gaps or duplicates."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from .conftest import Client, Front


async def start(client: Client, number: int = 1, **body: Any) -> list[str]:
    """Start runs one after the other; return their ids in order."""
    ids = []
    for _ in range(number):
        response = await client.post("/v1/runs", json={"flow": "echo", **body})
        assert response.status_code == 202
        ids.append(response.json()["id"])
    return ids


async def listed(client: Client, **params: Any) -> list[str]:
    response = await client.get("/v1/runs", params=params)
    assert response.status_code == 200
    return [run["id"] for run in response.json()["data"]]


async def walk(client: Client, direction: str, **params: Any) -> list[list[str]]:
    """Follow pages to the end in one direction."""
    pages = []
    cursor: dict[str, Any] = dict(params)
    while True:
        page = (await client.get("/v1/runs", params=cursor)).json()
        pages.append([run["id"] for run in page["data"]])
        if not page["has_more"]:
            return pages
        end = page["last_id"] if direction == "after" else page["first_id"]
        cursor = {**params, direction: end}


async def test_empty_list(front: Front, ann: Client) -> None:
    page = (await ann.get("/v1/runs")).json()
    assert page == {"data": [], "has_more": False, "first_id": None, "last_id": None}


async def test_pages_have_no_gaps_and_no_duplicates(front: Front, ann: Client) -> None:
    await front.publish()
    ids = sorted(await start(ann, 23), reverse=True)
    for limit in (1, 5, 22, 23, 24):
        pages = await walk(ann, "after", limit=limit)
        assert [run_id for page in pages for run_id in page] == ids
        assert all(len(page) == limit for page in pages[:-1])


async def test_pages_backward_meet_those_forward(front: Front, ann: Client) -> None:
    await front.publish()
    ids = sorted(await start(ann, 11), reverse=True)
    pages = await walk(ann, "before", limit=4, before=ids[-1])
    assert [run_id for page in reversed(pages) for run_id in page] == ids[:-1]
    assert all(page == sorted(page, reverse=True) for page in pages)


async def test_runs_that_arrive_meanwhile_do_not_disturb_paging(front: Front, ann: Client) -> None:
    await front.publish()
    ids = sorted(await start(ann, 6), reverse=True)
    first = (await ann.get("/v1/runs", params={"limit": 3})).json()
    newer = sorted(await start(ann, 2), reverse=True)
    second = (await ann.get("/v1/runs", params={"limit": 3, "after": first["last_id"]})).json()
    assert [run["id"] for run in first["data"] + second["data"]] == ids
    assert await listed(ann, before=first["first_id"]) == newer


async def test_cursor_need_not_exist(front: Front, ann: Client) -> None:
    await front.publish()
    (run_id,) = await start(ann)
    assert await listed(ann, after="ffffffff-ffff-ffff-ffff-ffffffffffff") == [run_id]
    assert await listed(ann, after="00000000-0000-0000-0000-000000000000") == []
    assert await listed(ann, before="00000000-0000-0000-0000-000000000000") == [run_id]


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 201}, "limit"),
        ({"limit": "many"}, "limit"),
        ({"after": "x"}, "after"),
        ({"before": "7"}, "before"),
        ({"state": "sleeping"}, "state"),
        ({"created_after": "yesterday"}, "created_after"),
        ({"created_after": "2026-01-01T00:00:00"}, "created_after"),
        ({"q": ""}, "q"),
        (
            {
                "after": "00000000-0000-0000-0000-000000000000",
                "before": "00000000-0000-0000-0000-000000000000",
            },
            "before",
        ),
    ],
)
async def test_bad_parameter_is_named(
    front: Front, ann: Client, params: dict[str, Any], param: str
) -> None:
    response = await ann.get("/v1/runs", params=params)
    assert response.status_code == 422
    assert response.json()["error"]["param"].startswith(param)


async def test_filters(front: Front, ann: Client) -> None:
    await front.publish()
    await front.publish("other", queue="llm")
    (plain,) = await start(ann)
    (labelled,) = await start(ann, labels={"ticket": "T-100%"})
    (other,) = await start(ann, flow="other")
    (later,) = await start(ann, delay_s=60)
    (stopped,) = await start(ann)
    assert (await ann.post(f"/v1/runs/{stopped}/cancel")).status_code == 202

    assert set(await listed(ann, flow="other")) == {other}
    assert set(await listed(ann, queue="llm")) == {other}
    assert set(await listed(ann, state="queued")) == {plain, labelled, other}
    assert set(await listed(ann, state="scheduled")) == {later}
    assert set(await listed(ann, state="cancelled")) == {stopped}
    assert set(await listed(ann, state=["cancelled", "scheduled"])) == {stopped, later}
    assert set(await listed(ann, state="queued", flow="echo")) == {plain, labelled}
    assert await listed(ann, state="failed") == []
    assert await listed(ann, flow="nowhere") == []
    assert set(await listed(ann, q="oth")) == {other}
    assert set(await listed(ann, q="T-100%")) == {labelled}
    assert await listed(ann, q="T-1%0") == []
    assert await listed(ann, q="_") == []
    assert await listed(ann, q=later.upper()) == [later]
    assert await listed(ann, q="' or true --") == []


async def test_mixed_states_page_as_one_list(front: Front, ann: Client) -> None:
    await front.publish()
    ids = sorted(await start(ann, 10), reverse=True)
    for run_id in ids[::2]:
        await ann.post(f"/v1/runs/{run_id}/cancel")
    pages = await walk(ann, "after", limit=3, state=["queued", "cancelled"])
    assert [run_id for page in pages for run_id in page] == ids


async def test_filter_by_time(front: Front, ann: Client) -> None:
    await front.publish()
    (first,) = await start(ann)
    made = datetime.fromisoformat((await ann.get(f"/v1/runs/{first}")).json()["created_at"])
    assert made.tzinfo is not None
    assert abs(made - datetime.now(UTC)) < timedelta(minutes=1)
    (second,) = await start(ann)
    after = (made + timedelta(microseconds=1)).isoformat()
    assert await listed(ann, created_after=after) == [second]
    assert await listed(ann, created_before=after) == [first]
    assert await listed(ann, created_after=made.isoformat(), created_before=after) == [first]


async def test_flow_and_queue_lists_before_and_after_a_worker(front: Front, ann: Client) -> None:
    assert (await ann.get("/v1/flows")).json()["data"] == []
    assert (await ann.get("/v1/queues")).json()["data"] == []

    async def answer(ctx: Any, question: str) -> str:
        """Answer a question."""
        return question

    async def inner(ctx: Any, _: Any) -> None:
        """Only for other flows."""

    front.flow(answer, queue="support")
    front.flow(inner, permission=None)
    await front.publish("gone")
    async with front.worker(support=3, default=2):
        await front.app.state.ports.catalog._fresh(0.0)
        flows = {flow["name"]: flow for flow in (await ann.get("/v1/flows")).json()["data"]}
        queues = {queue["name"]: queue for queue in (await ann.get("/v1/queues")).json()["data"]}
    assert list(flows) == ["answer", "gone", "inner"]
    assert flows["answer"]["input_schema"] == {"type": "string"}
    assert flows["answer"]["description"] == "Answer a question."
    assert flows["answer"]["queue"] == "support"
    assert [flow["name"] for flow in flows.values() if flow["is_served"]] == ["answer", "inner"]
    assert [flow["name"] for flow in flows.values() if flow["may_start"]] == ["answer", "gone"]
    assert queues["support"]["slots"] == 3
    assert queues["support"]["workers"] == 1
    assert queues["support"]["queued"] == 0
    assert queues["support"]["oldest_s"] is None


async def test_one_flow(front: Front, ann: Client) -> None:
    await front.publish(version=1, schema={"type": "string"})
    await front.publish(version=3, schema={"type": "integer"})
    flow = (await ann.get("/v1/flows/echo")).json()
    assert flow["version"] == 3
    assert flow["versions"] == [1, 3]
    assert flow["input_schema"] == {"type": "integer"}
    assert (await ann.get("/v1/flows/nowhere")).status_code == 404


async def test_queue_depth_is_the_callers_own(front: Front, ann: Client, other_org: int) -> None:
    await front.publish()
    stranger = await front.client(org_id=other_org)
    await start(ann, 3)
    await start(stranger, 5)
    await start(ann, delay_s=60)
    (queue,) = (await ann.get("/v1/queues")).json()["data"]
    assert queue["queued"] == 3
    assert queue["scheduled"] == 1
    assert queue["oldest_s"] >= 0
    (theirs,) = (await stranger.get("/v1/queues")).json()["data"]
    assert theirs["queued"] == 5


async def test_queue_shows_what_runs_and_what_is_claimed_of_a_deep_line(
    front: Front, ann: Client
) -> None:
    release = asyncio.Event()
    begun = asyncio.Event()

    async def hold(ctx: Any, _: Any) -> None:
        begun.set()
        await release.wait()

    front.flow(hold)
    async with front.worker(default=1):
        await front.app.state.ports.catalog._fresh(0.0)
        ids = await start(ann, 3, flow="hold")
        async with asyncio.timeout(20):
            await begun.wait()
        (queue,) = (await ann.get("/v1/queues")).json()["data"]
        release.set()
        for run_id in ids:
            await front.ended(ann, run_id)
    assert queue["running"] == 1
    assert queue["queued"] == 2
    assert queue["oldest_s"] > 0


async def test_runs_are_found_by_their_labels(front: Front, ann: Client) -> None:
    await front.publish()
    for labels in ({"team": "ops"}, {"team": "ops", "kind": "a=b"}, {"team": "dev"}):
        await ann.post("/v1/runs", json={"flow": "echo", "labels": labels})
    for wanted, count in ((["team=ops"], 2), (["team=ops", "kind=a=b"], 1), (["kind=none"], 0)):
        page = (await ann.get("/v1/runs", params={"label": wanted})).json()
        assert len(page["data"]) == count
    for wrong in (["team"], ["=ops"], ["team=ops", "team=dev"], ["team=a\0"]):
        refused = await ann.get("/v1/runs", params={"label": wrong})
        assert refused.status_code == 422
        assert refused.json()["error"]["param"].startswith("label")
