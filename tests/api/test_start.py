"""POST /v1/runs: what is accepted, what is refused and how."""

from __future__ import annotations

import asyncio
import gzip
import uuid
from typing import Any

import orjson
import pytest
import structlog

from millpond.api.batches import Batches
from millpond.engine.quota_plans import Plans
from millpond.engine.reserving import Reserver
from millpond.errors import InvalidInput, Unavailable
from millpond.types import Intent, Json

from .conftest import ALL, Client, Front, until

QUESTION = {
    "type": "object",
    "properties": {
        "question": {"type": "string", "minLength": 3},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["question"],
    "additionalProperties": False,
}


async def rows(front: Front, table: str) -> list[dict[str, Any]]:
    async with front.engine_db.duty("test") as con:
        return [dict(row) for row in await con.fetch(f"select * from {table}")]


async def test_accepted_run_is_stored_before_the_answer(front: Front, ann: Client) -> None:
    await front.publish(schema=QUESTION, timeout_s=30)
    response = await ann.post(
        "/v1/runs",
        json={
            "flow": "echo",
            "input": {"question": "How long?"},
            "priority": 5,
            "labels": {"ticket": "42"},
        },
        headers={"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"},
    )
    assert response.status_code == 202
    run = response.json()
    assert response.headers["location"] == f"/v1/runs/{run['id']}"
    assert int(response.headers["retry-after"]) >= 1
    assert run["state"] == "queued"
    assert run["labels"] == {"ticket": "42"}
    (stored,) = await rows(front, "run")
    assert str(stored["run_id"]) == run["id"]
    assert stored["org_id"] == front.org_id
    assert stored["subject"] == "user:ann"
    assert stored["timeout_s"] == 30
    assert stored["traceparent"].startswith("00-aaaa")
    assert orjson.loads(stored["input"]) == {"question": "How long?"}
    assert len(await rows(front, "ready")) == 1
    shown = (await ann.get(response.headers["location"])).json()
    assert shown["priority"] == 5
    assert shown["steps"] == []


async def test_accepted_run_is_worked_on(front: Front, ann: Client) -> None:
    async def echo(ctx: Any, text: str) -> dict[str, str]:
        return {"said": text, "by": ctx.subject}

    front.flow(echo)
    async with front.worker():
        run = (await ann.post("/v1/runs", json={"flow": "echo", "input": "hello"})).json()
        ended = await front.ended(ann, run["id"])
    assert ended["state"] == "succeeded"
    assert ended["output"] == {"said": "hello", "by": "user:ann"}
    assert ended["attempts"] == 1


async def test_failed_run_shows_its_error(front: Front, ann: Client) -> None:
    async def broken(ctx: Any, text: str) -> str:
        from millpond.errors import Permanent

        raise Permanent("The well is dry.", code="dry")

    front.flow(broken)
    async with front.worker():
        run = (await ann.post("/v1/runs", json={"flow": "broken", "input": "x"})).json()
        ended = await front.ended(ann, run["id"])
    assert ended["state"] == "failed"
    assert ended["error"]["code"] == "dry"


async def test_delayed_run_is_scheduled(front: Front, ann: Client) -> None:
    await front.publish()
    response = await ann.post("/v1/runs", json={"flow": "echo", "delay_s": 3600})
    assert response.json()["state"] == "scheduled"
    shown = (await ann.get(response.headers["location"])).json()
    assert shown["state"] == "scheduled"
    assert await rows(front, "ready") == []


async def test_newest_version_unless_one_is_named(front: Front, ann: Client) -> None:
    for version in (1, 2, 10):
        await front.publish(version=version)
    assert (await ann.post("/v1/runs", json={"flow": "echo"})).json()["version"] == 10
    old = await ann.post("/v1/runs", json={"flow": "echo", "version": 2})
    assert old.json()["version"] == 2
    unknown = await ann.post("/v1/runs", json={"flow": "echo", "version": 3})
    assert unknown.status_code == 404
    assert unknown.json()["error"]["param"] == "version"


async def test_unknown_flow_comes_with_advice(front: Front, ann: Client) -> None:
    response = await ann.post("/v1/runs", json={"flow": "nowhere"})
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["code"] == "flow_not_found"
    assert problem["error"]["param"] == "flow"
    assert "start a worker" in problem["advice"]


async def test_flow_published_a_moment_ago_is_found(front: Front, ann: Client) -> None:
    assert (await ann.post("/v1/runs", json={"flow": "echo"})).status_code == 404
    await front.publish()
    async with front.db.globals() as con:  # the catalog looks again after 0.1 s
        await con.execute("select pg_sleep(0.11)")
    assert (await ann.post("/v1/runs", json={"flow": "echo"})).status_code == 202


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({}, "input.question"),
        ({"question": 7}, "input.question"),
        ({"question": "?"}, "input.question"),
        ({"question": "How?", "tags": ["a", 2]}, "input.tags.1"),
        ({"question": "How?", "extra": 1}, "input.extra"),
        ("How?", "input"),
        (None, "input"),
    ],
)
async def test_input_that_does_not_fit_names_its_path(
    front: Front, ann: Client, given: Json, param: str
) -> None:
    await front.publish(schema=QUESTION)
    response = await ann.post("/v1/runs", json={"flow": "echo", "input": given})
    assert response.status_code == 422
    problem = response.json()
    assert problem["code"] == "input_mismatch"
    assert problem["error"]["param"] == param
    assert problem["errors"][0]["param"] == param
    assert await rows(front, "run") == []


async def test_refusal_does_not_repeat_what_was_given(front: Front, ann: Client) -> None:
    await front.publish(schema={"type": "object", "properties": {"n": {"type": "integer"}}})
    response = await ann.post("/v1/runs", json={"flow": "echo", "input": {"n": "my secret"}})
    assert response.status_code == 422
    assert "my secret" not in response.text


async def test_new_schema_of_a_version_counts(front: Front, ann: Client) -> None:
    await front.publish(schema={"type": "string"})
    catalog = front.app.state.ports.catalog
    assert (await ann.post("/v1/runs", json={"flow": "echo", "input": "a"})).status_code == 202
    await front.publish(schema={"type": "integer"})
    await catalog._fresh(0.0)
    assert (await ann.post("/v1/runs", json={"flow": "echo", "input": "a"})).status_code == 422
    assert (await ann.post("/v1/runs", json={"flow": "echo", "input": 1})).status_code == 202


async def test_schema_that_refers_elsewhere_fetches_nothing(front: Front, ann: Client) -> None:
    await front.publish(schema={"$ref": "file:///etc/passwd"})
    response = await ann.post("/v1/runs", json={"flow": "echo"})
    assert response.status_code == 500
    assert "passwd" not in response.text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "flow"),
        ({"flow": ""}, "flow"),
        ({"flow": 7}, "flow"),
        ({"flow": "echo", "priority": 101}, "priority"),
        ({"flow": "echo", "priority": -101}, "priority"),
        ({"flow": "echo", "priority": "5"}, "priority"),
        ({"flow": "echo", "priority": True}, "priority"),
        ({"flow": "echo", "delay_s": -1}, "delay_s"),
        ({"flow": "echo", "delay_s": 367 * 86_400}, "delay_s"),
        ({"flow": "echo", "version": 0}, "version"),
        ({"flow": "echo", "version": 2**40}, "version"),
        ({"flow": "echo", "labels": {"a": 1}}, "labels.a"),
        ({"flow": "echo", "labels": {"a": "x" * 257}}, "labels.a"),
        ({"flow": "echo", "labels": {str(n): "" for n in range(17)}}, "labels"),
        ({"flow": "echo", "labels": ["a"]}, "labels"),
        ({"flow": "echo", "queue": ""}, "queue"),
        ({"flow": "echo", "organization": 1}, "organization"),
        ({"flow": "echo", "org_id": 2}, "org_id"),
    ],
)
async def test_field_at_fault_is_named(
    front: Front, ann: Client, body: dict[str, Any], param: str
) -> None:
    await front.publish()
    response = await ann.post("/v1/runs", json=body)
    assert response.status_code == 422
    problem = response.json()
    assert problem["error"]["param"].startswith(param)
    assert problem["error"]["type"] == "invalid_request_error"
    assert problem["error"]["message"] == problem["detail"]


async def test_every_field_at_fault_is_named(front: Front, ann: Client) -> None:
    response = await ann.post("/v1/runs", json={"priority": 500, "delay_s": -1})
    assert {fault["param"] for fault in response.json()["errors"]} == {
        "flow",
        "priority",
        "delay_s",
    }


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1,", b"\xff\xfe", b'{"flow": "echo", "input": NaN}', b'"\\ud800"', b"nul"],
)
async def test_body_that_is_no_json(front: Front, ann: Client, body: bytes) -> None:
    response = await ann.post(
        "/v1/runs", content=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["code"] == "malformed_body"


@pytest.mark.parametrize("body", [b"[]", b"null", b'"echo"', b"7"])
async def test_json_that_is_no_object(front: Front, ann: Client, body: bytes) -> None:
    response = await ann.post(
        "/v1/runs", content=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 422


async def test_body_of_another_type(front: Front, ann: Client) -> None:
    response = await ann.post("/v1/runs", data={"flow": "echo"})
    assert response.status_code == 415
    packed = await ann.post(
        "/v1/runs",
        content=gzip.compress(b'{"flow": "echo"}'),
        headers={"Content-Type": "application/json", "Content-Encoding": "gzip"},
    )
    assert packed.status_code == 400


async def test_too_large_body(front: Front, ann: Client) -> None:
    await front.publish()
    body = {"flow": "echo", "input": "x" * (17 * 1024 * 1024)}
    response = await ann.post("/v1/runs", json=body)
    assert response.status_code == 413
    assert response.json()["code"] == "too_large"


async def test_too_large_body_of_unknown_length(front: Front, ann: Client) -> None:
    async def chunks() -> Any:
        for _ in range(20):
            yield b" " * 1024 * 1024

    response = await ann.post(
        "/v1/runs", content=chunks(), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 413


async def test_a_caller_who_leaves_before_the_body_is_whole_is_no_failure_of_the_server(
    front: Front,
) -> None:
    parts = [
        {"type": "http.request", "body": b'{"flow":', "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        return parts.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/runs",
        "query_string": b"",
        "headers": [(b"authorization", b"Bearer " + front.token().encode())],
    }
    with structlog.testing.capture_logs() as logs:
        await front.app(scope, receive, send)
    assert (parts, sent, logs) == ([], [], [])
    assert await rows(front, "run") == []


async def test_too_large_input_in_a_body_that_is_not(front: Front, ann: Client) -> None:
    await front.publish()
    size_bytes = 16 * 1024 * 1024
    body = {"flow": "echo", "input": "x" * (size_bytes - 1)}
    response = await ann.post("/v1/runs", json=body)
    assert response.status_code == 422
    problem = response.json()
    assert problem["code"] == "value_too_large"
    assert problem["error"]["param"] == "input"
    assert f"{size_bytes + 1} bytes" in problem["detail"]
    assert f"at most {size_bytes} " in problem["detail"]


async def test_a_big_input_is_shown_whole_by_its_run_and_left_out_of_lists(
    front: Front, ann: Client
) -> None:
    await front.publish()
    inputs = ["small", "m" * 4000, "b" * (300 * 1024), "h" * (16 * 1024 * 1024 - 2)]
    ids = []
    for one in inputs:
        response = await ann.post("/v1/runs", json={"flow": "echo", "input": one})
        assert response.status_code == 202
        ids.append(response.json()["id"])
        shown = (await ann.get(f"/v1/runs/{ids[-1]}")).json()
        assert shown["input"] == one
        assert shown["truncated"] == []
    listed = (await ann.get("/v1/runs")).json()["data"]
    assert [run["id"] for run in listed] == ids[::-1]
    assert [run["input"] for run in listed] == [None, None, None, "small"]
    assert [run["truncated"] for run in listed] == [["input"], ["input"], ["input"], []]


@pytest.mark.parametrize(
    "given", ["nul \x00 byte", "\U0001f99f ünïcode", {"": {"a.b": [None, 1e300, -0.0]}}, 2**53]
)
async def test_odd_input_comes_back_as_it_was(front: Front, ann: Client, given: Json) -> None:
    await front.publish()
    response = await ann.post("/v1/runs", json={"flow": "echo", "input": given})
    assert response.status_code == 202
    shown = (await ann.get(response.headers["location"])).json()
    assert shown["input"] == given


async def test_deeply_nested_input_is_answered(front: Front, ann: Client) -> None:
    await front.publish()
    for depth in (130, 250, 500, 1000, 100_000):
        body = b'{"flow": "echo", "input": ' + b"[" * depth + b"]" * depth + b"}"
        response = await ann.post(
            "/v1/runs", content=body, headers={"Content-Type": "application/json"}
        )
        assert response.status_code in (400, 422)
    deep = {"flow": "echo", "input": orjson.loads(b"[" * 100 + b"]" * 100)}
    response = await ann.post("/v1/runs", json=deep)
    assert (await ann.get(response.headers["location"])).json()["input"] == deep["input"]


async def test_queue_of_the_flow_or_of_a_live_worker(front: Front, ann: Client) -> None:
    await front.publish(queue="support")

    async def other(ctx: Any, _: Any) -> None:
        return None

    front.flow(other)
    own = await ann.post("/v1/runs", json={"flow": "echo", "queue": "support"})
    assert own.status_code == 202
    unknown = await ann.post("/v1/runs", json={"flow": "echo", "queue": "express"})
    assert unknown.status_code == 422
    assert unknown.json()["error"]["param"] == "queue"
    async with front.worker(express=1):
        await front.app.state.ports.catalog._fresh(0.0)
        served = await ann.post("/v1/runs", json={"flow": "echo", "queue": "express"})
    assert served.status_code == 202
    assert served.json()["queue"] == "express"


async def test_flow_asks_for_its_own_permission(front: Front, ann: Client) -> None:
    await front.publish("report", permission="reports:run")
    refused = await ann.post("/v1/runs", json={"flow": "report"})
    assert refused.status_code == 403
    assert "reports:run" in refused.json()["detail"]
    boss = await front.client(permissions=ALL | {"reports:run"})
    assert (await boss.post("/v1/runs", json={"flow": "report"})).status_code == 202


async def test_internal_flow_is_nobodys(front: Front) -> None:
    await front.publish("inner", permission=None)
    for permissions in (ALL, frozenset({"*"})):
        caller = await front.client(permissions=permissions)
        response = await caller.post("/v1/runs", json={"flow": "inner"})
        assert response.status_code == 403
        assert response.json()["code"] == "flow_internal"


async def test_malformed_trace_is_left_out(front: Front, ann: Client) -> None:
    await front.publish()
    response = await ann.post(
        "/v1/runs", json={"flow": "echo"}, headers={"traceparent": "'; drop table run"}
    )
    assert response.status_code == 202
    (stored,) = await rows(front, "run")
    assert stored["traceparent"] is None


async def test_accepting_wakes_a_worker(front: Front, ann: Client) -> None:
    async def echo(ctx: Any, text: str) -> str:
        return text

    front.flow(echo)
    async with front.worker():
        run = (await ann.post("/v1/runs", json={"flow": "echo", "input": "x"})).json()
        started = await until(ann, run["id"], "run.started")
    assert uuid.UUID(started["run_id"]) == uuid.UUID(run["id"])


async def test_runs_accepted_at_once_share_transactions(front: Front, ann: Client) -> None:
    await front.publish()
    bodies = [{"flow": "echo", "input": number} for number in range(60)]
    responses = await asyncio.gather(*(ann.post("/v1/runs", json=body) for body in bodies))
    assert {response.status_code for response in responses} == {202}
    stored = {str(row["run_id"]): orjson.loads(row["input"]) for row in await rows(front, "run")}
    told = {r.json()["id"]: n for n, r in enumerate(responses)}
    assert stored == told
    async with front.engine_db.duty("test") as con:
        transactions = await con.fetchval("select count(distinct xmin::text) from run")
    assert transactions < 60


async def test_run_that_cannot_be_stored_does_not_fail_its_neighbours(front: Front) -> None:
    def intent(queue: str) -> Intent:
        return Intent(
            org_id=front.org_id,
            flow="echo",
            version=1,
            queue=queue,
            input=b"{}",
            subject="user:ann",
        )

    batches = Batches(front.db, Reserver(front.db, Plans()))
    intents = [intent("default"), intent("nul \x00"), intent("default"), intent("default")]
    results = await asyncio.gather(
        *(batches.submit(one) for one in intents), return_exceptions=True
    )
    assert isinstance(results[1], InvalidInput)
    assert [result is True for result in results] == [True, False, True, True]
    assert len(await rows(front, "run")) == 3


async def test_request_given_up_does_not_hold_its_batch(front: Front) -> None:
    def intent() -> Intent:
        return Intent(
            org_id=front.org_id,
            flow="echo",
            version=1,
            queue="default",
            input=b"{}",
            subject="user:ann",
        )

    batches = Batches(front.db, Reserver(front.db, Plans()))
    tasks = [asyncio.create_task(batches.submit(intent())) for _ in range(5)]
    await asyncio.sleep(0)
    tasks[2].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [result for number, result in enumerate(results) if number != 2] == [True] * 4
    assert isinstance(results[2], asyncio.CancelledError)


async def test_nobody_in_a_batch_is_told_of_a_run_when_the_commit_fails(
    front: Front, ann: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    await front.publish()
    assert (await ann.post("/v1/runs", json={"flow": "echo"})).status_code == 202

    async def away(*_: object) -> None:
        raise Unavailable("The database is not reachable.", retry_after_s=3)

    for name in ("submit", "submit_alone"):
        monkeypatch.setattr(f"millpond.api.batches.{name}", away)
    responses = await asyncio.gather(
        *(ann.post("/v1/runs", json={"flow": "echo"}) for _ in range(8))
    )
    assert {response.status_code for response in responses} == {503}
    assert {response.headers["retry-after"] for response in responses} == {"3"}
    assert len(await rows(front, "run")) == 1
