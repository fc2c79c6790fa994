"""Recorded runs over HTTP: what a replay of limits needs of runs that have ended, and nothing else of them."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.security.conftest import World, world

from millpond.engine.context import StepContext
from millpond.engine.registry import step

from .conftest import Client, Front

__all__ = ["world"]

PATH = "/v1/limits/recorded-runs"
OF_ALL = "/v1/platform/limits/recorded-runs"


async def _begin(client: Client, flow: str, **more: Any) -> str:
    answer = await client.post("/v1/runs", json={"flow": flow, **more})
    assert answer.status_code == 202, answer.text
    run_id: str = answer.json()["id"]
    return run_id


async def test_ended_runs_are_told_of_with_what_workers_spent_on_them(
    front: Front, ann: Client
) -> None:
    """The time of a wait is not the workers'; what has not ended is left out."""
    may_end = asyncio.Event()

    async def sleeping(ctx: Any, _: Any) -> None:
        await ctx.sleep(2.0)

    async def hold(_ctx: Any, _: Any) -> None:
        await may_end.wait()

    front.flow(sleeping, keys=["model:m"])
    front.flow(hold)
    async with front.worker():
        slept = await _begin(ann, "sleeping", priority=3, keys=["provider:openai"])
        held = await _begin(ann, "hold")
        ended = await front.ended(ann, slept)
        (one,) = (await ann.get(PATH)).json()["data"]
        may_end.set()
        await front.ended(ann, held)
        assert {run["id"] for run in (await ann.get(PATH)).json()["data"]} == {slept, held}
    assert (one["id"], one["flow"], one["queue"]) == (slept, "sleeping", "default")
    assert (one["keys"], one["priority"]) == (["model:m", "provider:openai"], 3)
    assert one["started_at"] == ended["started_at"]
    lasted = datetime.fromisoformat(ended["finished_at"]) - datetime.fromisoformat(
        ended["started_at"]
    )
    assert lasted.total_seconds() >= 2.0
    assert 0 < one["worked_s"] <= lasted.total_seconds() - 1.5
    assert "input" not in one


async def test_what_a_run_used_is_told_by_its_own_keys_and_to_operators_by_those_of_its_flow(
    world: World,
) -> None:
    """Of all of its steps, also of one elsewhere and of a call that was cut off; of an older run nobody knows.

    What a step with another provider among its own keys used of that is told apart, and not by name.
    """
    front = world.front

    async def ask(at: StepContext, count: int) -> None:
        at.spend("openai:mini", input_tokens=count, output_tokens=1)
        at.spend("openai:large", input_tokens=count, output_tokens=2)

    async def other(at: StepContext) -> None:
        at.spend("anthropic:big", input_tokens=7, output_tokens=0)

    async def cut(at: StepContext) -> None:
        at.spend_unknown("other:large")

    here = step("ask", registry=front.registry)(ask)
    elsewhere = step("ask_there", queue="llm", registry=front.registry)(ask)
    own = step("own", keys=["provider:anthropic"], registry=front.registry)(other)
    odd = step("odd", keys=["provider:openai"], registry=front.registry)(other)
    cutting = step("cut", registry=front.registry)(cut)

    async def asking(ctx: Any, _: Any) -> None:
        await ctx.step(here, 10)
        await ctx.step(own)
        await ctx.step(odd)
        await ctx.step(elsewhere, 20)
        await ctx.step(cutting)

    async def resting(_ctx: Any, _: Any) -> None:
        return None

    async def sleeping(ctx: Any, _: Any) -> None:
        await ctx.sleep(600.0)

    front.flow(asking, keys=["provider:openai"], tokens=500, urgency="interactive")
    front.flow(sleeping)
    front.flow(resting)
    owner = await world.owner_of(world.org_id)
    operator = await world.client(await world.person(is_operator=True))
    async with front.worker(default=4, llm=4):
        asked = await _begin(owner, "asking", keys=["model:mini"])
        await front.ended(owner, asked)
        rested, old = await _begin(owner, "resting"), await _begin(owner, "resting")
        for run_id in (rested, old):
            await front.ended(owner, run_id)
        slept = await _begin(owner, "sleeping")
        while (await owner.get(f"/v1/runs/{slept}")).json()["state"] != "waiting":
            await asyncio.sleep(0.05)
        assert (await owner.post(f"/v1/runs/{slept}/cancel")).status_code < 300
        await front.ended(owner, slept)
    await world.owner.execute("update run set tells_use = false where run_id = $1", uuid.UUID(old))
    runs = {run["id"]: run for run in (await owner.get(PATH)).json()["data"]}
    both, provider = ["model:mini", "provider:openai"], ["provider:openai"]
    assert runs[asked]["used"] == [
        {"keys": [], "tokens": 7, "is_lost": True},
        {"keys": both, "tokens": 32, "is_lost": False},
        {"keys": ["provider:"], "tokens": 7, "is_lost": False},
        {"keys": provider, "tokens": 34, "is_lost": False},
    ]
    assert (runs[asked]["tokens"], runs[asked]["urgency"]) == (500, "interactive")
    assert (runs[rested]["used"], runs[old]["used"]) == ([], None)
    # No worker ended it, which would have told all.
    assert runs[slept]["used"] is None
    assert runs[rested]["urgency"] == "standard"
    seen = {run["id"]: run for run in (await operator.get(OF_ALL)).json()["data"]}
    assert seen[f"{world.org_id}-{uuid.UUID(asked).hex}"]["used"] == [
        {"keys": [], "tokens": 7, "is_lost": True},
        {"keys": ["provider:"], "tokens": 7, "is_lost": False},
        {"keys": provider, "tokens": 66, "is_lost": False},
    ]
    assert seen[f"{world.org_id}-{uuid.UUID(old).hex}"]["used"] is None


async def test_a_run_that_was_to_begin_later_arrives_when_it_was_due(
    front: Front, ann: Client
) -> None:
    async def quick(_ctx: Any, _: Any) -> None:
        return None

    front.flow(quick)
    async with front.worker():
        run_id = await _begin(ann, "quick", delay_s=1.5)
        ended = await front.ended(ann, run_id)
    (one,) = (await ann.get(PATH)).json()["data"]
    made, ready = (datetime.fromisoformat(at) for at in (ended["created_at"], one["ready_at"]))
    assert (ready - made).total_seconds() >= 1.4


async def test_recorded_runs_are_paged_newest_first_and_filtered(front: Front, ann: Client) -> None:
    async def quick(_ctx: Any, _: Any) -> None:
        return None

    front.flow(quick)
    async with front.worker():
        runs = []
        for _ in range(3):
            runs.append(await _begin(ann, "quick"))
            await front.ended(ann, runs[-1])
    page = (await ann.get(PATH, params={"limit": 2})).json()
    assert ([run["id"] for run in page["data"]], page["has_more"]) == (runs[:0:-1], True)
    rest = (await ann.get(PATH, params={"limit": 2, "after": page["last_id"]})).json()
    assert ([run["id"] for run in rest["data"]], rest["has_more"]) == (runs[:1], False)
    assert (await ann.get(PATH, params={"queue": "other"})).json()["data"] == []
    later = (datetime.now(UTC) + timedelta(minutes=1)).isoformat()
    assert (await ann.get(PATH, params={"since": later})).json()["data"] == []
    naive = await ann.get(PATH, params={"since": "2026-01-01T00:00:00"})
    assert (naive.status_code, naive.json()["error"]["param"]) == (422, "since")


async def test_operators_see_runs_of_all_orgs_without_what_callers_gave(world: World) -> None:
    async def quick(_ctx: Any, _: Any) -> None:
        return None

    operator = await world.client(await world.person(is_operator=True))
    owners = {org_id: await world.owner_of(org_id) for org_id in (world.org_id, world.other_id)}
    world.front.flow(quick, keys=["model:m"])
    async with world.front.worker():
        for client in owners.values():
            for _ in range(2):
                run_id = await _begin(client, "quick", keys=["integration:secret-name"])
                await world.front.ended(client, run_id)
    found, after = [], None
    while True:
        page = (await operator.get(OF_ALL, params={"limit": 3} | _given(after))).json()
        found += page["data"]
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert [run["org"] for run in found] == [
        slug for org_id in sorted(owners) for slug in [world.slugs[org_id]] * 2
    ]
    assert {tuple(run["keys"]) for run in found} == {("model:m",)}
    refused = await owners[world.org_id].get(OF_ALL)
    assert refused.status_code == 403
    async with world.front.db.org(world.org_id) as con:
        rows = await con.fetch(
            "select * from recorded_of_all($1, 0, $1, null, 10)",
            "00000000-0000-0000-0000-000000000000",
        )
    assert rows == []


def _given(after: str | None) -> dict[str, str]:
    return {} if after is None else {"after": after}
