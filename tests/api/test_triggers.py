"""Triggers and events over HTTP: made, checked, sent, repeated, listed, paused, removed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic import BaseModel

from millpond.engine import triggers
from millpond.engine.triggers import EventInput, EventsInput

from .conftest import ALL, Client, Front


class Order(BaseModel):
    amount: int


async def ship(ctx: Any, given: EventInput[Order]) -> int:
    return given.event.data.amount


async def tally(ctx: Any, given: EventsInput[Order]) -> list[int]:
    return [event.data.amount for event in given.events]


SINGLE = EventInput[Order].model_json_schema()
MANY = EventsInput[Order].model_json_schema()
WISH: dict[str, Any] = {"name": "ship", "event": "order.placed", "flow": "ship"}
URL, EVENTS = "/v1/triggers", "/v1/events"


@pytest.fixture
async def shop(front: Front) -> Front:
    """An API on which the flows `ship` and `tally` are published."""
    await front.publish("ship", schema=SINGLE)
    await front.publish("tally", schema=MANY)
    await front.publish("inner", permission=None)
    return front


async def made(client: Client, **changes: Any) -> dict[str, Any]:
    response = await client.post(URL, json={**WISH, **changes})
    assert response.status_code == 201, response.text
    trigger: dict[str, Any] = response.json()
    assert response.headers["location"] == f"{URL}/{trigger['id']}"
    return trigger


async def sent(client: Client, amount: Any, **more: Any) -> dict[str, Any]:
    body = {"name": "order.placed", "data": {"amount": amount}, **more}
    response = await client.post(EVENTS, json=body)
    assert response.status_code == 202, response.text
    event: dict[str, Any] = response.json()
    return event


async def test_an_event_is_answered_with_the_runs_that_it_started(
    front: Front, ann: Client
) -> None:
    front.flow(ship)
    async with front.worker():
        await made(ann)
        event = await sent(ann, 7)
        (started,) = event["runs"]
        run = await front.ended(ann, started["run_id"])
    assert (started["trigger"], run["output"], run["subject"]) == (
        "ship",
        7,
        "service:trigger:ship",
    )
    assert run["input"]["event"]["data"] == event["data"] == {"amount": 7}
    assert (event["sent_by"], event["object"]) == ("user:ann", "inbound_event")


@pytest.mark.parametrize(
    ("changes", "status", "code", "param"),
    [
        ({"flow": "unknown"}, 404, "flow_not_found", "flow"),
        ({"flow": "inner"}, 403, "flow_internal", "flow"),
        ({"flow": "tally"}, 422, "input_mismatch", "flow"),
        ({"mode": "batch", "max_count": 3, "max_wait_s": 1}, 422, "input_mismatch", "flow"),
        ({"mode": "debounce"}, 422, "invalid_input", "period_s"),
        ({"mode": "sometimes"}, 422, "invalid_input", "mode"),
        ({"period_s": 1}, 422, "invalid_input", "period_s"),
        ({"mode": "throttle", "period_s": 0}, 422, "invalid_input", "period_s"),
        ({"filter": {"type": "nonsense"}}, 422, "bad_schema", "filter"),
        ({"queue": "nowhere"}, 422, "queue_unknown", "queue"),
        ({"colour": "red"}, 422, "invalid_input", "colour"),
    ],
)
async def test_a_trigger_that_could_not_start_its_flow_is_refused_by_field(
    shop: Front, ann: Client, changes: dict[str, Any], status: int, code: str, param: str
) -> None:
    response = await ann.post(URL, json={**WISH, **changes})
    assert response.status_code == status, response.text
    problem = response.json()
    assert (problem["code"], problem["error"]["param"]) == (code, param)
    assert (await ann.get(URL)).json()["data"] == []


async def test_a_repeat_by_id_or_key_is_answered_as_the_first(shop: Front, ann: Client) -> None:
    await made(ann)
    first = await sent(ann, 7, id="o-1")
    assert await sent(ann, 7, id="o-1") == first
    other = await ann.post(EVENTS, json={"name": "order.placed", "data": 8, "id": "o-1"})
    assert (other.status_code, other.json()["code"]) == (409, "event_id_reused")
    body = {"name": "order.placed", "data": {"amount": 8}}
    keyed = [await ann.post(EVENTS, json=body, headers={"Idempotency-Key": "k1"}) for _ in range(2)]
    assert keyed[0].json() == keyed[1].json()
    assert [one.headers.get("idempotency-replayed") for one in keyed] == [None, "true"]
    other = await ann.post(EVENTS, json={**body, "data": 9}, headers={"Idempotency-Key": "k1"})
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    bob = await shop.client(subject="user:bob")
    again = await bob.post(EVENTS, json=body, headers={"Idempotency-Key": "k1"})
    assert again.json()["id"] != keyed[0].json()["id"]
    assert len((await ann.get("/v1/runs")).json()["data"]) == 3


async def test_a_key_stands_for_an_event_with_an_id_and_for_a_batch(
    shop: Front, ann: Client
) -> None:
    await made(ann)
    body = {"name": "order.placed", "data": {"amount": 8}, "id": "o-1"}
    key = {"Idempotency-Key": "k1"}
    first, again = [await ann.post(EVENTS, json=body, headers=key) for _ in range(2)]
    assert (first.status_code, first.json()) == (202, again.json())
    assert again.headers["idempotency-replayed"] == "true"
    other = await ann.post(EVENTS, json={**body, "id": "o-2"}, headers=key)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    batch = {"events": [{"name": "order.placed", "data": {"amount": n}} for n in range(3)]}
    answers = await asyncio.gather(
        *(ann.post(f"{EVENTS}/batch", json=batch, headers=key) for _ in range(4))
    )
    assert {answer.status_code for answer in answers} == {202}
    assert all(answer.json() == answers[0].json() for answer in answers)
    replayed = [answer.headers.get("idempotency-replayed") for answer in answers]
    assert sorted(map(str, replayed)) == ["None", "true", "true", "true"]
    other = await ann.post(f"{EVENTS}/batch", json={"events": [body]}, headers=key)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    assert len((await ann.get("/v1/runs")).json()["data"]) == 4


async def test_events_are_sent_in_batches_all_or_none(shop: Front, ann: Client) -> None:
    await made(ann)
    orders = [{"name": "order.placed", "data": {"amount": n}, "id": f"o{n}"} for n in range(30)]
    response = await ann.post(f"{EVENTS}/batch", json={"events": orders})
    assert response.status_code == 202
    data = response.json()["data"]
    assert [event["id"] for event in data] == [f"o{n}" for n in range(30)]
    assert all(len(event["runs"]) == 1 for event in data)
    bad = [{"name": "order.placed", "data": 1, "id": "new"}, {**orders[0], "data": 2}]
    assert (await ann.post(f"{EVENTS}/batch", json={"events": bad})).status_code == 409
    for wrong in ([], [{"data": 1}], [{"name": "n"}] * 1001):
        assert (await ann.post(f"{EVENTS}/batch", json={"events": wrong})).status_code == 422
    assert "new" not in [one["id"] for one in (await ann.get(EVENTS)).json()["data"]]


async def test_events_are_paged_newest_first_with_their_runs(shop: Front, ann: Client) -> None:
    await made(ann)
    for n in range(5):
        await sent(ann, n, id=f"o{n}")
    await sent(ann, 9, id="z", name="other")
    first = (await ann.get(EVENTS, params={"limit": 2, "name": "order.placed"})).json()
    assert ([one["id"] for one in first["data"]], first["has_more"]) == (["o4", "o3"], True)
    assert all(len(one["runs"]) == 1 for one in first["data"])
    rest = (await ann.get(EVENTS, params={"after": first["last_id"]})).json()
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == (["o2", "o1", "o0"], False)
    back = (await ann.get(EVENTS, params={"limit": 2, "before": rest["last_id"]})).json()
    assert ([one["id"] for one in back["data"]], back["has_more"]) == (["o2", "o1"], True)
    both = await ann.get(EVENTS, params={"before": "o1", "after": "o2"})
    assert both.status_code == 422


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"data": 1}, 422, "name"),
        ({"name": ""}, 422, "name"),
        ({"name": "n", "id": ""}, 422, "id"),
        ({"name": "n", "data": "x" * 200_000}, 413, "data"),
        ({"name": "n", "more": 1}, 422, "more"),
    ],
)
async def test_an_event_that_cannot_be_received_is_refused_by_field(
    front: Front, ann: Client, body: dict[str, Any], status: int, param: str
) -> None:
    response = await ann.post(EVENTS, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


async def test_a_trigger_shows_what_waits_for_it(shop: Front, ann: Client) -> None:
    wish = {"flow": "tally", "mode": "batch", "max_count": 9, "max_wait_s": 3600}
    trigger = await made(ann, **wish, group_by="amount")
    for amount in (1, 1, 2):
        assert (await sent(ann, amount))["runs"] == []
    shown = (await ann.get(f"{URL}/{trigger['id']}")).json()
    assert shown["waiting"] == {"groups": 2, "events": 3, "dropped": 0}


async def test_a_trigger_is_changed_paused_and_removed(shop: Front, ann: Client) -> None:
    trigger = await made(ann, mode="throttle", period_s=60)
    place = f"{URL}/{trigger['id']}"
    only_large = {"properties": {"amount": {"minimum": 10}}}
    changed = (await ann.patch(place, json={"filter": only_large, "period_s": 5})).json()
    assert (changed["filter"], changed["period_s"], changed["mode"]) == (only_large, 5, "throttle")
    assert (await sent(ann, 1))["runs"] == []
    for refused, param in (
        ({"mode": "each"}, "mode"),
        ({"period_s": None}, "period_s"),
        ({"flow": "tally"}, "flow"),
    ):
        response = await ann.patch(place, json=refused)
        assert (response.status_code, response.json()["error"]["param"]) == (422, param)
    assert (await ann.post(f"{place}/pause")).json()["is_paused"] is True
    assert (await sent(ann, 50))["runs"] == []
    assert (await ann.post(f"{place}/resume")).json()["is_paused"] is False
    assert len((await sent(ann, 50))["runs"]) == 1
    assert (await ann.delete(place)).status_code == 204
    assert (await ann.get(place)).status_code == 404
    assert (await sent(ann, 50))["runs"] == []


async def test_triggers_are_paged_and_found_by_name(shop: Front, ann: Client) -> None:
    for n in range(3):
        await made(ann, name=f"t{n}")
    taken = await ann.post(URL, json={**WISH, "name": "t1"})
    assert (taken.status_code, taken.json()["code"]) == (409, "name_taken")
    first = (await ann.get(URL, params={"limit": 2})).json()
    assert ([one["name"] for one in first["data"]], first["has_more"]) == (["t2", "t1"], True)
    rest = (await ann.get(URL, params={"after": first["last_id"]})).json()
    assert [one["name"] for one in rest["data"]] == ["t0"]
    named = (await ann.get(URL, params={"name": "t1"})).json()
    assert [one["name"] for one in named["data"]] == ["t1"]


async def test_triggers_and_events_need_their_permissions_and_stay_in_their_org(
    shop: Front, ann: Client, other_org: int
) -> None:
    trigger = await made(ann)
    sender = await shop.client(subject="key:shop", permissions=frozenset({"events:send"}))
    assert len((await sent(sender, 7))["runs"]) == 1
    for call in (sender.get(EVENTS), sender.get(URL), sender.post(URL, json=WISH)):
        assert (await call).status_code == 403
    reader = await shop.client(permissions=ALL - {"triggers:write", "events:send"})
    assert (await reader.get(f"{URL}/{trigger['id']}")).status_code == 200
    assert (await reader.post(EVENTS, json={"name": "n"})).status_code == 403
    assert (await reader.delete(f"{URL}/{trigger['id']}")).status_code == 403
    other = await shop.client(org_id=other_org)
    assert (await other.get(f"{URL}/{trigger['id']}")).status_code == 404
    assert (await sent(other, 7))["runs"] == []
    assert [one["runs"] for one in (await other.get(EVENTS)).json()["data"]] == [[]]


async def test_who_may_not_start_runs_makes_no_trigger(front: Front) -> None:
    await front.publish("ship", schema=SINGLE, permission="ship:start")
    bob = await front.client(permissions=(ALL | {"ship:start"}) - {"runs:start"})
    answer = await bob.post(URL, json=WISH)
    assert (answer.status_code, answer.json()["code"]) == (403, "permission_missing")
    assert answer.json()["error"]["param"] == "runs:start"


async def test_a_flow_that_would_not_see_the_event_is_refused(front: Front, ann: Client) -> None:
    class Deaf(BaseModel):
        n: int = 0

    class Open(BaseModel, extra="allow"):
        n: int = 0

    await front.publish("deaf", schema=Deaf.model_json_schema())
    await front.publish("open", schema=Open.model_json_schema())
    await front.publish("any", schema={})
    for changes in ({}, {"mode": "batch", "max_count": 2, "max_wait_s": 1}):
        refused = await ann.post(URL, json={**WISH, "flow": "deaf", **changes})
        assert (refused.status_code, refused.json()["code"]) == (422, "input_mismatch")
    for flow in ("open", "any"):
        await made(ann, name=flow, flow=flow)


async def test_one_event_starts_a_bounded_number_of_flows(
    shop: Front, ann: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triggers, "MAX_LISTENERS", 3)
    for n in range(3):
        await made(ann, name=f"t{n}")
    refused = await ann.post(URL, json={**WISH, "name": "t3"})
    assert (refused.status_code, refused.json()["code"]) == (409, "too_many_triggers")
    await made(ann, name="t3", event="other")
