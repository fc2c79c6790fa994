"""Texts and times that the database cannot hold, or people not read: refused by the name of their field."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import Client, Front

RUN: dict[str, Any] = {"flow": "echo"}
SCHEDULE: dict[str, Any] = {"name": "n", "flow": "echo", "cron": "@daily"}
TRIGGER: dict[str, Any] = {"name": "n", "event": "e", "flow": "echo"}
EVENT: dict[str, Any] = {"name": "e"}
ID = "0198c0de-0000-7000-8000-000000000000"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/runs", {**RUN, "labels": {"a": "x\0"}}, "labels.a"),
        ("/v1/runs", {**RUN, "labels": {"a\n": "x"}}, "labels.a\n.[key]"),
        ("/v1/runs", {**RUN, "flow": "ec\0ho"}, "flow"),
        ("/v1/runs", {**RUN, "queue": "a\x1b[0m"}, "queue"),
        ("/v1/runs", {**RUN, "dedup_key": "a\0"}, "dedup_key"),
        ("/v1/runs", {**RUN, "labels": {"millpond.trigger": "x"}}, "labels.millpond.trigger.[key]"),
        ("/v1/runs/batch", {"runs": [{**RUN, "labels": {"a": "\0"}}]}, "runs[0].labels.a"),
        ("/v1/runs/bulk", {"action": "cancel", "filter": {"q": "\0"}}, "filter.q"),
        ("/v1/runs/bulk", {"action": "cancel", "filter": {"labels": {"a": "\0"}}}, "filter.labels.a"),
        ("/v1/runs/bulk", {"action": "cancel", "filter": {"flow": "a"}, "reason": "\0"}, "reason"),
        (f"/v1/runs/{ID}/cancel", {"reason": "a\0"}, "reason"),
        (f"/v1/runs/{ID}/rerun", {"from_step": "a\0"}, "from_step"),
        (f"/v1/runs/{ID}/release", {"reason": "a\0"}, "reason"),
        ("/v1/queues/default/pause", {"reason": "a\0"}, "reason"),
        ("/v1/queues/de%00fault/pause", {}, "name"),
        ("/v1/flows/ec%00ho/pause", {}, "name"),
        ("/v1/org/pause", {"reason": "a\0"}, "reason"),
        ("/v1/schedules", {**SCHEDULE, "name": "a\0"}, "name"),
        ("/v1/schedules", {**SCHEDULE, "name": ID}, "name"),
        ("/v1/schedules", {**SCHEDULE, "name": ID.replace("-", "")}, "name"),
        ("/v1/schedules", {**SCHEDULE, "time_zone": "U\0TC"}, "time_zone"),
        ("/v1/schedules", {**SCHEDULE, "labels": {"a": "\0"}}, "labels.a"),
        ("/v1/triggers", {**TRIGGER, "name": ID}, "name"),
        ("/v1/triggers", {**TRIGGER, "event": "a\0"}, "event"),
        ("/v1/triggers", {**TRIGGER, "labels": {"millpond.event": "1"}}, "labels.millpond.event.[key]"),
        ("/v1/events", {**EVENT, "id": "a\0"}, "id"),
        ("/v1/events", {**EVENT, "name": "a\0"}, "name"),
        ("/v1/events/batch", {"events": [{**EVENT, "id": "a\0"}]}, "events.0.id"),
        ("/v1/knowledge-bases/a%00b/search", {"query": "x"}, "name"),
        ("/v1/knowledge-bases/ab/search", {"query": "x\0"}, "query"),
    ],
)  # fmt: skip
async def test_a_text_that_cannot_be_kept_is_refused_by_field(
    front: Front, ann: Client, path: str, body: dict[str, Any], param: str
) -> None:
    await front.publish()
    response = await ann.post(path, json=body)
    assert response.status_code == 422, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("path", "params", "param"),
    [
        ("/v1/runs", {"q": "\0"}, "q"),
        ("/v1/runs", {"flow": "\0"}, "flow"),
        ("/v1/runs", {"queue": "\0"}, "queue"),
        ("/v1/runs", {"created_after": "0001-01-01T00:00:00+14:00"}, "created_after"),
        ("/v1/runs", {"created_before": "9999-12-31T23:59:59-14:00"}, "created_before"),
        ("/v1/schedules", {"name": "\0"}, "name"),
        ("/v1/triggers", {"name": "\0"}, "name"),
        ("/v1/events", {"name": "\0"}, "name"),
        ("/v1/events", {"after": "\0"}, "after"),
        ("/v1/input-requests", {"role": "\0"}, "role"),
        ("/v1/flows/a%00", {}, "name"),
    ],
)
async def test_a_question_that_cannot_be_asked_is_refused_by_field(
    front: Front, ann: Client, path: str, params: dict[str, str], param: str
) -> None:
    response = await ann.get(path, params=params)
    assert response.status_code == 422, response.text
    assert response.json()["error"]["param"] == param


async def test_a_bulk_filter_has_times_of_our_days(ann: Client) -> None:
    for name in ("created_after", "created_before"):
        wanted = {name: "0001-01-01T00:00:00+14:00"}
        answer = await ann.post("/v1/runs/bulk", json={"action": "cancel", "filter": wanted})
        assert answer.status_code == 422
        assert answer.json()["error"]["param"] == f"filter.{name}"


async def test_runs_are_found_by_labels_that_millpond_set(front: Front, ann: Client) -> None:
    body = {"action": "cancel", "filter": {"labels": {"millpond.trigger": "x"}}, "dry_run": True}
    answer = await ann.post("/v1/runs/bulk", json=body)
    assert answer.status_code == 200
