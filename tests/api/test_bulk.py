"""Acting on many runs: counted before, then done by a run that can be cancelled and taken over."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg

from millpond.db.queries import queries
from millpond.engine import bulk
from millpond.engine.bulk import Operator
from millpond.engine.context import Context
from millpond.engine.registry import Flow, step
from millpond.engine.worker import Worker

from .conftest import ALL, Client, Front, until

FILL = """
with made as (
  insert into millpond.run (org_id, run_id, flow, version, queue, subject, input, labels, outcome, finished_at,
                            attempts)
  select $1::bigint, gen_random_uuid(), $2, 1, 'default', 'user:ann', '{}', $4::json, 'failed', clock_timestamp(), 1
  from generate_series(1, $3::int) n returning org_id, run_id
)
insert into millpond.event (org_id, run_id, event_no, kind) select org_id, run_id, 1, 'run.failed' from made
"""


def rest(front: Front) -> Flow:
    """Register a flow that waits for a long time."""

    async def rest(ctx: Context, n: int) -> int:
        await ctx.sleep(600, name="long")
        return n

    return front.flow(rest)


def operator(front: Front) -> dict[type, object]:
    """Register the bulk flow; returns what its steps need."""
    front.registry.add_flow(bulk.bulk)
    return {Operator: Operator(db=front.db, hints=front.app.state.ports.hints)}


async def start(client: Client, flow: str, data: Any, **more: Any) -> str:
    answer = await client.post("/v1/runs", json={"flow": flow, "input": data, **more})
    assert answer.status_code == 202, answer.text
    run_id: str = answer.json()["id"]
    return run_id


async def act(client: Client, action: str, **body: Any) -> str:
    answer = await client.post("/v1/runs/bulk", json={"action": action, **body})
    assert answer.status_code == 202, answer.text
    assert answer.json()["flow"] == "millpond.bulk"
    run_id: str = answer.json()["id"]
    return run_id


async def preview(client: Client, action: str, **wanted: Any) -> dict[str, Any]:
    body = {"action": action, "filter": wanted, "dry_run": True}
    answer = await client.post("/v1/runs/bulk", json=body)
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


async def fill(admin_url: str, org_id: int, flow: str, count: int, labels: str = "{}") -> None:
    admin = await asyncpg.connect(admin_url)
    await admin.execute(FILL, org_id, flow, count, labels)
    await admin.close()


async def state(client: Client, run_id: str) -> str:
    found: str = (await client.get(f"/v1/runs/{run_id}")).json()["state"]
    return found


async def test_all_that_fit_are_cancelled_and_no_other(front: Front, ann: Client) -> None:
    rest(front)
    async with front.worker(operator(front), default=30):
        wanted = [await start(ann, "rest", n, labels={"batch": "7"}) for n in range(7)]
        other = await start(ann, "rest", 9, labels={"batch": "8"})
        for run_id in [*wanted, other]:
            await until(ann, run_id, "run.waiting")
        told = await preview(ann, "cancel", flow="rest", labels={"batch": "7"})
        assert (told["matched"], told["is_exact"], len(told["examples"])) == (7, True, 5)
        body = {"filter": {"flow": "rest", "labels": {"batch": "7"}}, "reason": "wrong data"}
        run = await front.ended(ann, await act(ann, "cancel", **body))
    assert run["output"] == {"matched": 7, "done": 7, "skipped": 0, "errors": 0, "examples": []}
    assert {await state(ann, run_id) for run_id in wanted} == {"cancelled"}
    assert await state(ann, other) == "waiting"
    last = (await ann.get(f"/v1/runs/{wanted[0]}/events")).json()["data"][-1]
    assert last["data"] == {"by": "user:ann", "reason": "wrong data"}


async def test_many_pages_are_rerun_with_progress(
    front: Front, ann: Client, admin_url: str
) -> None:
    done: list[int] = []

    async def count(ctx: Context, data: dict[str, Any]) -> int:
        done.append(1)
        return len(done)

    front.flow(count)
    await fill(admin_url, front.org_id, "count", 450)
    await fill(admin_url, front.org_id, "another", 3)
    async with front.worker(operator(front), default=30):
        bulk_id = await act(ann, "rerun", filter={"states": ["failed"]})
        run = await front.ended(ann, bulk_id)
        assert run["output"]["matched"] == 453
        assert run["output"]["done"] == 450
        # Nobody may start a flow that nobody has published.
        assert run["output"]["skipped"] == 3
        events = (await ann.get(f"/v1/runs/{bulk_id}/events")).json()["data"]
        told = [one["data"] for one in events if one["kind"] == "progress"]
        assert [one["matched"] for one in told] == [200, 400, 453]
        assert told[-1]["name"] == "bulk"
        repeats = await preview(
            ann, "rerun", flow="count", states=["succeeded", "queued", "running"]
        )
        assert repeats["matched"] == 450
        assert all(one["rerun_of"] for one in repeats["examples"])
        assert {one["subject"] for one in repeats["examples"]} == {"user:ann"}


async def test_it_never_acts_on_itself_or_on_what_it_made(front: Front, ann: Client) -> None:
    async def quick(ctx: Context, n: int) -> int:
        return n

    front.flow(quick)
    async with front.worker(operator(front)):
        first = await start(ann, "quick", 1)
        await front.ended(ann, first)
        every = ["queued", "running", "succeeded", "failed", "cancelled", "waiting"]
        run = await front.ended(ann, await act(ann, "rerun", filter={"states": every}))
        assert run["output"]["matched"] == 1
        again = await front.ended(ann, await act(ann, "cancel", filter={"states": every}))
    # The first run, its repeat and the bulk run before: all have ended, so that none is cancelled.
    assert again["state"] == "succeeded"
    assert (again["output"]["matched"], again["output"]["skipped"]) == (3, 3)


async def test_a_bulk_run_is_cancelled_between_its_runs(
    front: Front, ann: Client, admin_url: str
) -> None:
    async def count(ctx: Context, data: dict[str, Any]) -> int:
        return 1

    front.flow(count)
    await fill(admin_url, front.org_id, "count", 2_000)
    async with front.worker(operator(front), default=1):
        bulk_id = await act(ann, "rerun", filter={"states": ["failed"]})
        await until(ann, bulk_id, "progress")
        await ann.post(f"/v1/runs/{bulk_id}/cancel")
        run = await front.ended(ann, bulk_id)
    assert run["state"] == "cancelled"
    told = await preview(ann, "cancel", flow="count", states=["queued", "succeeded", "running"])
    assert 200 <= told["matched"] < 2_000


async def test_another_worker_goes_on_and_reruns_nothing_twice(
    front: Front, ann: Client, admin_url: str
) -> None:
    async def count(ctx: Context, data: dict[str, Any]) -> int:
        return 1

    front.flow(count)
    # So many that it is not over before its worker is forgotten.
    await fill(admin_url, front.org_id, "count", 3_000)
    resources = operator(front)
    await front.publish("count")
    bulk_id = await act(ann, "rerun", filter={"states": ["failed"]})
    admin = await asyncpg.connect(admin_url)
    async with front.worker(resources, default=1) as worker:
        await _some_reruns(admin)
        await _forget(front, worker)
        run = await front.ended(ann, bulk_id)
    await admin.close()
    assert run["attempts"] == 2
    assert run["output"]["done"] == 3_000
    async with front.engine_db.duty("test") as con:
        rows = await con.fetch("select rerun_of, count(*) from run group by 1 having count(*) > 1")
    assert [row for row in rows if row["rerun_of"] is not None] == []


async def _some_reruns(admin: Any) -> None:
    """Wait until more runs were made than before."""
    count = "select count(*) from millpond.run where rerun_of is not null"
    before = await admin.fetchval(count)
    async with asyncio.timeout(30):
        while await admin.fetchval(count) <= before:
            await asyncio.sleep(0.005)


async def _forget(front: Front, worker: Worker) -> None:
    """Take the worker's session away, as after a long silence."""
    async with front.engine_db.duty("test") as con:
        await con.execute(queries("maintenance")["remove_worker"], worker.worker_id)


async def test_a_preview_counts_exactly_up_to_ten_thousand(
    front: Front, ann: Client, admin_url: str
) -> None:
    await fill(admin_url, front.org_id, "count", 10_000)
    told = await preview(ann, "rerun", flow="count")
    assert (told["matched"], told["is_exact"]) == (10_000, True)
    await fill(admin_url, front.org_id, "count", 1)
    told = await preview(ann, "rerun", flow="count")
    assert (told["matched"], told["is_exact"]) == (10_000, False)


async def test_the_callers_rights_decide(front: Front, ann: Client, other_org: int) -> None:
    rest(front)
    async with front.worker(operator(front)):
        run_id = await start(ann, "rest", 1)
        await until(ann, run_id, "run.waiting")
        reader = await front.client(permissions=ALL - {"runs:cancel", "runs:start"})
        for action in ("cancel", "rerun"):
            body = {"action": action, "filter": {"flow": "rest"}}
            answer = await reader.post("/v1/runs/bulk", json=body)
            assert (answer.status_code, answer.json()["code"]) == (403, "permission_missing")
        bob = await front.client(org_id=other_org, subject="user:bob")
        assert (await preview(bob, "cancel", flow="rest"))["matched"] == 0
        # Who may start runs but not of this flow: the run is skipped.
        front.flow(_guarded, name="guarded", permission="guarded:start")
    async with front.worker(operator(front)):
        privileged = await front.client(permissions=ALL | {"guarded:start"})
        await front.ended(privileged, await start(privileged, "guarded", 1))
        run = await front.ended(ann, await act(ann, "rerun", filter={"flow": "guarded"}))
    assert (run["output"]["matched"], run["output"]["skipped"]) == (1, 1)


async def test_a_version_that_asks_for_more_than_the_newest_is_not_rerun_without_it(
    front: Front, ann: Client
) -> None:
    for version, permission in ((1, "guarded:start"), (2, "runs:start")):
        front.flow(_guarded, name="guarded", version=version, permission=permission)
    async with front.worker(operator(front)):
        privileged = await front.client(permissions=ALL | {"guarded:start"})
        for version in (1, 2):
            run_id = await start(privileged, "guarded", 1, version=version)
            await front.ended(privileged, run_id)
        run = await front.ended(ann, await act(ann, "rerun", filter={"flow": "guarded"}))
        made = await preview(ann, "rerun", flow="guarded")
    assert (run["output"]["done"], run["output"]["skipped"]) == (1, 1)
    repeats = [one for one in made["examples"] if one["rerun_of"]]
    assert [one["version"] for one in repeats] == [2]


async def _guarded(ctx: Context, n: int) -> int:
    return n


async def test_it_is_not_started_by_hand(front: Front, ann: Client) -> None:
    async with front.worker(operator(front)):
        body = {"flow": "millpond.bulk", "input": {"action": "cancel", "filter": {}}}
        answer = await ann.post("/v1/runs", json=body)
    assert (answer.status_code, answer.json()["code"]) == (403, "flow_internal")


async def test_a_filter_names_something(front: Front, ann: Client) -> None:
    for wanted in ({}, {"states": []}):
        answer = await ann.post("/v1/runs/bulk", json={"action": "cancel", "filter": wanted})
        assert (answer.status_code, answer.json()["code"]) == (422, "filter_empty")
    wanted = {"created_before": "2026-01-01T00:00:00"}
    answer = await ann.post("/v1/runs/bulk", json={"action": "cancel", "filter": wanted})
    assert answer.json()["error"]["param"] == "filter.created_before"


async def test_endings_are_skipped_where_that_is_asked(front: Front, ann: Client) -> None:
    undone: list[int] = []

    async def undo(value: int) -> None:
        undone.append(value)

    async def book() -> int:
        return 7

    unbook = step("unbook", registry=front.registry)(undo)

    async def trip(ctx: Context, n: int) -> None:
        await ctx.step("book", book, undo=unbook)
        await ctx.sleep(600, name="long")

    front.flow(trip)
    async with front.worker(operator(front)):
        run_id = await start(ann, "trip", 1)
        await until(ann, run_id, "run.waiting")
        body = {"filter": {"flow": "trip"}, "skip_endings": True}
        await front.ended(ann, await act(ann, "cancel", **body))
        assert (await front.ended(ann, run_id))["state"] == "cancelled"
    assert undone == []
    refused = await ann.post("/v1/runs/bulk", json={"action": "rerun", **body})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "skip_endings")


async def test_a_repeated_request_is_one_bulk_run(front: Front, ann: Client) -> None:
    body = {"action": "cancel", "filter": {"created_before": "2026-01-01T00:00:00Z"}}
    answers = [
        await ann.post("/v1/runs/bulk", json=body, headers={"Idempotency-Key": "b"})
        for _ in range(2)
    ]
    assert answers[0].json() == answers[1].json()
