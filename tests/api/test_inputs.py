"""Input requests: shown, decided once, by who may, for what was shown."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import BaseModel

from .conftest import Client, Front, until


class Approval(BaseModel):
    """A decision on a draft."""

    approved: bool
    note: str = ""


@pytest.fixture
async def asking(front: Front) -> AsyncIterator[Front]:
    """A worker with a flow that asks support to approve its input."""

    async def approve(ctx: Any, draft: str) -> dict[str, Any]:
        decision = await ctx.ask_human(
            "approve", role="support", form=Approval, proposal={"draft": draft}, title="Send it?"
        )
        return {"approved": decision.answer.approved, "by": decision.resolved_by}

    front.flow(approve)
    async with front.worker():
        yield front


async def ask(client: Client, draft: str = "Dear Ann") -> tuple[str, dict[str, Any]]:
    """Start a run that asks; return its id and its question."""
    run_id = (await client.post("/v1/runs", json={"flow": "approve", "input": draft})).json()["id"]
    await until(client, run_id, "run.awaiting_input")
    page = (await client.get("/v1/input-requests", params={"run_id": run_id})).json()
    (request,) = page["data"]
    return run_id, request


async def resolve(client: Client, request: dict[str, Any], **body: Any) -> Any:
    body.setdefault("answer", {"approved": True})
    return await client.post(f"/v1/input-requests/{request['id']}/resolve", json=body)


async def test_question_is_shown_answered_and_the_run_goes_on(asking: Front, ann: Client) -> None:
    run_id, request = await ask(ann)
    assert request["title"] == "Send it?"
    assert request["role"] == "support"
    assert request["proposal"] == {"draft": "Dear Ann"}
    assert request["form"]["properties"]["approved"]["type"] == "boolean"
    assert request["state"] == "pending"
    run = (await ann.get(f"/v1/runs/{run_id}")).json()
    assert run["state"] == "awaiting_input"
    assert run["input_requests"] == [request]
    assert (await ann.get(f"/v1/input-requests/{request['id']}")).json() == request

    response = await resolve(ann, request, digest=request["digest"])
    assert response.status_code == 200
    resolved = response.json()
    assert resolved["state"] == "resolved"
    assert resolved["resolved_by"] == "user:ann"
    assert resolved["answer"] == {"approved": True}
    ended = await asking.ended(ann, run_id)
    assert ended["output"] == {"approved": True, "by": "user:ann"}
    assert ended["input_requests"] == []


async def test_of_two_people_at_once_exactly_one_decides(asking: Front, ann: Client) -> None:
    bob = await asking.client(subject="user:bob")
    for _ in range(5):
        run_id, request = await ask(ann)
        yes, no = await asyncio.gather(
            resolve(ann, request, answer={"approved": True}),
            resolve(bob, request, answer={"approved": False}),
        )
        assert sorted([yes.status_code, no.status_code]) == [200, 409]
        output = (await asking.ended(ann, run_id))["output"]
        assert output == (
            {"approved": True, "by": "user:ann"}
            if yes.status_code == 200
            else {"approved": False, "by": "user:bob"}
        )


async def test_decided_question_cannot_be_decided_again(asking: Front, ann: Client) -> None:
    _, request = await ask(ann)
    assert (await resolve(ann, request)).status_code == 200
    again = await resolve(ann, request)
    assert again.status_code == 409
    assert again.json()["code"] == "not_pending"


async def test_answer_that_does_not_fit_the_form(asking: Front, ann: Client) -> None:
    _, request = await ask(ann)
    for answer, param in (
        ({"approved": "maybe"}, "answer.approved"),
        ({}, "answer"),
        (7, "answer"),
    ):
        response = await resolve(ann, request, answer=answer)
        assert response.status_code == 422
        assert response.json()["error"]["param"].startswith(param)
    assert (await resolve(ann, request)).status_code == 200


async def test_decision_for_something_else_is_refused(asking: Front, ann: Client) -> None:
    _, request = await ask(ann)
    response = await resolve(ann, request, digest="0" * 64)
    assert response.status_code == 409
    assert response.json()["error"]["param"] == "digest"


@pytest.mark.parametrize("digest", ["", "xyz", "0" * 63, 7])
async def test_malformed_digest(asking: Front, ann: Client, digest: Any) -> None:
    _, request = await ask(ann)
    response = await resolve(ann, request, digest=digest)
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "digest"


async def test_role_is_needed(asking: Front, ann: Client) -> None:
    _, request = await ask(ann)
    viewer = await asking.client(roles=("viewer",))
    assert (await resolve(viewer, request)).status_code == 403
    assert (await viewer.get(f"/v1/input-requests/{request['id']}")).status_code == 200
    owner = await asking.client(roles=("owner",))
    assert (await resolve(owner, request)).status_code == 200


async def test_question_of_another_org_does_not_exist(
    asking: Front, ann: Client, other_org: int
) -> None:
    _, request = await ask(ann)
    stranger = await asking.client(org_id=other_org, roles=("owner", "support"))
    assert (await resolve(stranger, request)).status_code == 404
    assert (await stranger.get(f"/v1/input-requests/{request['id']}")).status_code == 404
    assert (await stranger.get("/v1/input-requests")).json()["data"] == []


async def test_cancelled_run_takes_its_question_along(asking: Front, ann: Client) -> None:
    run_id, request = await ask(ann)
    assert (await ann.post(f"/v1/runs/{run_id}/cancel")).json()["state"] == "cancelled"
    assert (await resolve(ann, request)).status_code == 409
    shown = (await ann.get(f"/v1/input-requests/{request['id']}")).json()
    assert shown["state"] == "cancelled"


async def test_filters_and_pages(asking: Front, ann: Client) -> None:
    asked = [(await ask(ann, f"draft {number}"))[1]["id"] for number in range(5)]
    done = asked.pop()
    await resolve(ann, {"id": done})

    async def listed(**params: Any) -> list[str]:
        page = (await ann.get("/v1/input-requests", params=params)).json()
        return [request["id"] for request in page["data"]]

    assert set(await listed()) == {*asked, done}
    assert set(await listed(state="pending")) == set(asked)
    assert await listed(state="resolved") == [done]
    assert await listed(role="owner") == []
    assert set(await listed(role="support", state="pending")) == set(asked)
    ordered = sorted(asked, reverse=True)
    first = (await ann.get("/v1/input-requests", params={"state": "pending", "limit": 3})).json()
    assert [request["id"] for request in first["data"]] == ordered[:3]
    assert first["has_more"]
    assert await listed(state="pending", after=first["last_id"]) == ordered[3:]


async def test_unknown_question(front: Front, ann: Client) -> None:
    response = await resolve(ann, {"id": "0199aaaa-0000-7000-8000-000000000000"})
    assert response.status_code == 404


async def test_answer_is_required(front: Front, ann: Client) -> None:
    response = await ann.post(
        "/v1/input-requests/0199aaaa-0000-7000-8000-000000000000/resolve", json={}
    )
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "answer"
