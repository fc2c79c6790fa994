"""Schedules over HTTP: made, checked, listed, changed, paused, run at once, removed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from .conftest import ALL, DEADLINE_S, Client, Front

STRICT = {
    "type": "object",
    "properties": {"text": {"type": "string"}},
    "required": ["text"],
    "additionalProperties": False,
}
WISH: dict[str, Any] = {
    "name": "nightly",
    "flow": "echo",
    "cron": "30 2 * * *",
    "time_zone": "Europe/Berlin",
    "input": {"text": "hi"},
    "labels": {"team": "ops"},
}
URL = "/v1/schedules"


async def made(client: Client, **changes: Any) -> dict[str, Any]:
    response = await client.post(URL, json={**WISH, **changes})
    assert response.status_code == 201, response.text
    schedule: dict[str, Any] = response.json()
    assert response.headers["location"] == f"{URL}/{schedule['id']}"
    return schedule


async def test_a_schedule_is_made_and_shown_with_its_next_times(front: Front, ann: Client) -> None:
    await front.publish(schema=STRICT)
    schedule = await made(ann)
    assert (schedule["missed"], schedule["overlap"], schedule["version"]) == ("one", "allow", None)
    assert (schedule["created_by"], schedule["last_run_id"]) == ("user:ann", None)
    shown = (await ann.get(f"{URL}/{schedule['id']}")).json()
    assert len(shown["next_times"]) == 5
    assert shown["next_times"][0] == shown["next_due_at"] == schedule["next_due_at"]
    assert shown["last_run"] is None


@pytest.mark.parametrize(
    ("changes", "status", "code", "param"),
    [
        ({"cron": "61 * * * *"}, 422, "cron_invalid", "cron"),
        ({"cron": "* * * *"}, 422, "cron_invalid", "cron"),
        ({"time_zone": "Mars/Base"}, 422, "time_zone_unknown", "time_zone"),
        ({"input": {"text": 7}}, 422, "input_mismatch", "input.text"),
        ({"input": {}}, 422, "input_mismatch", "input.text"),
        ({"flow": "unknown"}, 404, "flow_not_found", "flow"),
        ({"flow": "inner"}, 403, "flow_internal", "flow"),
        ({"queue": "nowhere"}, 422, "queue_unknown", "queue"),
        ({"missed": "some"}, 422, "invalid_input", "missed"),
        ({"overlap": "maybe"}, 422, "invalid_input", "overlap"),
        ({"priority": 101}, 422, "invalid_input", "priority"),
        ({"colour": "red"}, 422, "invalid_input", "colour"),
    ],
)
async def test_a_schedule_that_could_not_run_is_refused_by_field(
    front: Front, ann: Client, changes: dict[str, Any], status: int, code: str, param: str
) -> None:
    await front.publish(schema=STRICT)
    await front.publish("inner", permission=None)
    response = await ann.post(URL, json={**WISH, **changes})
    assert response.status_code == status, response.text
    problem = response.json()
    assert (problem["code"], problem["error"]["param"]) == (code, param)
    assert (await ann.get(URL)).json()["data"] == []


async def test_a_refused_expression_says_what_is_expected(front: Front, ann: Client) -> None:
    await front.publish(schema=STRICT)
    problem = (await ann.post(URL, json={**WISH, "cron": "0 25 * * *"})).json()
    assert "0-23" in problem["detail"]
    assert "MON-FRI" in problem["advice"]


async def test_a_name_stands_once_in_an_org(front: Front, ann: Client, other_org: int) -> None:
    await front.publish()
    await made(ann)
    response = await ann.post(URL, json=WISH)
    assert (response.status_code, response.json()["code"]) == (409, "name_taken")
    second = await made(ann, name="weekly")
    renamed = await ann.patch(f"{URL}/{second['id']}", json={"name": "nightly"})
    assert renamed.status_code == 409
    other = await front.client(org_id=other_org)
    await made(other)


async def test_schedules_are_paged_newest_first(front: Front, ann: Client) -> None:
    await front.publish()
    names = [(await made(ann, name=f"s{n}"))["name"] for n in range(5)]
    first = (await ann.get(URL, params={"limit": 2})).json()
    assert ([one["name"] for one in first["data"]], first["has_more"]) == (["s4", "s3"], True)
    rest = (await ann.get(URL, params={"limit": 9, "after": first["last_id"]})).json()
    assert ([one["name"] for one in rest["data"]], rest["has_more"]) == (["s2", "s1", "s0"], False)
    back = (await ann.get(URL, params={"limit": 2, "before": rest["last_id"]})).json()
    assert ([one["name"] for one in back["data"]], back["has_more"]) == (["s2", "s1"], True)
    assert len(names) == 5


async def test_a_change_leaves_the_rest_and_is_checked(front: Front, ann: Client) -> None:
    await front.publish(schema=STRICT)
    schedule = await made(ann)
    place = f"{URL}/{schedule['id']}"
    changed = (await ann.patch(place, json={"cron": "@hourly", "priority": 3})).json()
    assert (changed["cron"], changed["priority"]) == ("@hourly", 3)
    kept = ("name", "flow", "input", "labels", "time_zone", "missed")
    assert {name: changed[name] for name in kept} == {name: schedule[name] for name in kept}
    assert changed["next_due_at"] != schedule["next_due_at"]
    same_times = (await ann.patch(place, json={"labels": {}})).json()
    assert (same_times["next_due_at"], same_times["labels"]) == (changed["next_due_at"], {})
    for refused, param in (
        ({"input": {}}, "input.text"),
        ({"cron": "x"}, "cron"),
        ({"name": None}, "name"),
    ):
        response = await ann.patch(place, json=refused)
        assert (response.status_code, response.json()["error"]["param"]) == (422, param)


async def test_a_paused_schedule_has_no_times_until_it_is_resumed(
    front: Front, ann: Client
) -> None:
    await front.publish()
    schedule = await made(ann)
    place = f"{URL}/{schedule['id']}"
    for _ in range(2):  # pausing twice is no error
        paused = (await ann.post(f"{place}/pause")).json()
        assert (paused["is_paused"], paused["next_due_at"]) == (True, None)
    assert (await ann.get(place)).json()["next_times"] == []
    for _ in range(2):
        resumed = (await ann.post(f"{place}/resume")).json()
        assert (resumed["is_paused"], resumed["next_due_at"]) == (False, schedule["next_due_at"])


async def test_run_now_starts_a_run_as_the_caller_and_repeats_by_key(
    front: Front, ann: Client
) -> None:
    await front.publish()
    schedule = await made(ann, is_paused=True)
    place = f"{URL}/{schedule['id']}"
    first = await ann.post(f"{place}/run_now", headers={"Idempotency-Key": "k1"})
    again = await ann.post(f"{place}/run_now", headers={"Idempotency-Key": "k1"})
    assert (first.status_code, first.json()) == (202, again.json())
    assert again.headers["idempotency-replayed"] == "true"
    run = (await ann.get(f"/v1/runs/{first.json()['id']}")).json()
    assert (run["subject"], run["input"]) == ("user:ann", {"text": "hi"})
    assert run["labels"] == {"team": "ops", "millpond.schedule": "nightly"}
    shown = (await ann.get(place)).json()
    assert (shown["last_run_id"], shown["last_run"]["state"]) == (run["id"], "queued")
    assert len((await ann.get("/v1/runs")).json()["data"]) == 1


async def test_a_repeat_of_run_now_gets_the_first_answer_though_the_schedule_is_gone(
    front: Front, ann: Client
) -> None:
    await front.publish()
    place = f"{URL}/{(await made(ann))['id']}"
    key = {"Idempotency-Key": "k1"}
    first = await ann.post(f"{place}/run_now", headers=key)
    await ann.delete(place)
    again = await ann.post(f"{place}/run_now", headers=key)
    assert (again.status_code, again.json()) == (202, first.json())
    other = await ann.post(f"{place}/run_now", headers={"Idempotency-Key": "k2"})
    assert other.status_code == 404


async def test_a_schedule_shows_what_its_last_run_is_about_to_readers_of_runs_only(
    front: Front, ann: Client
) -> None:
    await front.publish()
    place = f"{URL}/{(await made(ann))['id']}"
    await ann.post(f"{place}/run_now")
    narrow = await front.client(permissions=frozenset({"schedules:read"}))
    seen, shown = [(await who.get(place)).json()["last_run"] for who in (ann, narrow)]
    assert (seen["input"], seen["labels"]["team"]) == ({"text": "hi"}, "ops")
    assert (shown["input"], shown["labels"]) == (None, {})
    for name in ("id", "flow", "state", "created_at"):
        assert shown[name] == seen[name]


async def test_a_deleted_schedule_is_gone_and_its_runs_stay(front: Front, ann: Client) -> None:
    await front.publish()
    schedule = await made(ann)
    place = f"{URL}/{schedule['id']}"
    run = (await ann.post(f"{place}/run_now")).json()
    assert (await ann.delete(place)).status_code == 204
    for call in (ann.get(place), ann.delete(place), ann.post(f"{place}/pause")):
        assert (await call).status_code == 404
    assert (await ann.get(f"/v1/runs/{run['id']}")).status_code == 200


async def test_a_due_schedule_starts_what_the_api_then_shows(front: Front, ann: Client) -> None:
    async def echo(ctx: Any, given: dict[str, Any]) -> dict[str, Any]:
        return given

    front.flow(echo)
    async with front.worker():
        schedule = await made(ann, cron="* * * * *")
        async with front.engine_db.duty("test") as con:
            await con.execute(
                "update schedule set next_due_at = date_trunc('minute', clock_timestamp())"
            )
        async with asyncio.timeout(DEADLINE_S):
            while not (shown := (await ann.get(f"{URL}/{schedule['id']}")).json())["last_run_id"]:
                await asyncio.sleep(0.05)
        run = await front.ended(ann, shown["last_run_id"])
    assert (run["output"], run["subject"]) == ({"text": "hi"}, "service:schedule:nightly")
    listed = (await ann.get("/v1/runs", params={"q": "nightly"})).json()["data"]
    assert [one["id"] for one in listed] == [run["id"]]


async def test_schedules_need_their_permissions_and_the_flow_s_own(
    front: Front, ann: Client, other_org: int
) -> None:
    await front.publish()
    await front.publish("guarded", permission="reports:run")
    refused = await ann.post(URL, json={**WISH, "flow": "guarded"})
    assert (refused.status_code, refused.json()["code"]) == (403, "permission_missing")
    schedule = await made(ann)
    reader = await front.client(subject="user:eve", permissions=ALL - {"schedules:write"})
    assert (await reader.get(f"{URL}/{schedule['id']}")).status_code == 200
    for call in (
        reader.post(URL, json=WISH),
        reader.delete(f"{URL}/{schedule['id']}"),
        reader.post(f"{URL}/{schedule['id']}/run_now"),
    ):
        assert (await call).status_code == 403
    other = await front.client(org_id=other_org)
    assert (await other.get(f"{URL}/{schedule['id']}")).status_code == 404
    assert (await other.get(URL)).json()["data"] == []


async def test_who_may_not_start_runs_makes_and_runs_no_schedule(front: Front, ann: Client) -> None:
    await front.publish(permission="echo:start")
    privileged = await front.client(permissions=ALL | {"echo:start"})
    schedule = await made(privileged)
    bob = await front.client(permissions=(ALL | {"echo:start"}) - {"runs:start"})
    answers = [
        await bob.post(URL, json={**WISH, "name": "other"}),
        await bob.patch(f"{URL}/{schedule['id']}", json={"priority": 3}),
        await bob.post(f"{URL}/{schedule['id']}/run_now"),
    ]
    for answer in answers:
        assert (answer.status_code, answer.json()["code"]) == (403, "permission_missing")
        assert answer.json()["error"]["param"] == "runs:start"
