"""Nobody decides on a run that they started, by themselves or through a key or program of theirs."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from typing import Any

import pytest
from pydantic import BaseModel

from millpond.engine import schedules, triggers
from millpond.engine.context import Context
from millpond.engine.inbound import Incoming, receive
from millpond.engine.questions import resolve
from millpond.engine.submit import submit
from millpond.engine.triggers import EventInput
from millpond.errors import Forbidden
from millpond.identity import organizations
from millpond.types import Principal, Standing, new_id

from .conftest import Pond

ANN, BOB, KEY, ROBOT, ROBOTS_KEY = (new_id() for _ in range(5))
SUBJECTS = {
    "ann": f"user:{ANN}",
    "bob": f"user:{BOB}",
    "ann's key": f"key:{KEY}",
    "ann's robot": f"service:{ROBOT}",
    "her robot's key": f"key:{ROBOTS_KEY}",
}


class Approval(BaseModel):
    """A decision."""

    approved: bool


async def asked(pond: Pond, starter: str) -> uuid.UUID:
    """Start a run that asks, for one of them, and return the id of its question."""

    async def approve(ctx: Context, _: None) -> None:
        await ctx.ask_human("approve", role="support", form=Approval)

    flow = pond.flow(approve)
    async with pond.db.org(pond.org_id) as con:
        await con.execute(
            f"""
            insert into service_principal (org_id, service_id, name, role, created_by)
              values ({pond.org_id}, '{ROBOT}', 'robot', 'builder', 'user:{ANN}');
            insert into api_key (org_id, key_id, name, prefix, digest, owner, scopes, created_by) values
              ({pond.org_id}, '{KEY}', 'k', 'a', 'd', 'user:{ANN}', '{{}}', 'user:{ANN}'),
              ({pond.org_id}, '{ROBOTS_KEY}', 'r', 'b', 'd', 'service:{ROBOT}', '{{}}', 'service:{ROBOT}');
            """
        )
        intent = replace(pond.intent(flow), subject=SUBJECTS[starter])
        await submit(con, [intent])
    async with pond.worker():
        await pond.until(intent.run_id, "run.awaiting_input")
    async with pond.db.org(pond.org_id) as con:
        request_id: uuid.UUID = await con.fetchval("select request_id from input_request")
    return request_id


async def decide(pond: Pond, request_id: uuid.UUID, who: str, *, is_fixed: bool = False) -> None:
    principal = Principal(
        org_id=pond.org_id,
        subject=SUBJECTS[who],
        roles=frozenset({"support"}),
        standing=None if is_fixed else Standing(stamp=1),
    )
    async with pond.db.org(pond.org_id) as con:
        await resolve(con, pond.org_id, request_id, principal, {"approved": True})


OWN = [
    ("ann", "ann"),
    ("ann's key", "ann"),
    ("ann", "ann's key"),
    ("ann's robot", "ann"),
    ("ann", "ann's robot"),
    ("her robot's key", "ann"),
    ("ann's key", "her robot's key"),
]


@pytest.mark.parametrize(("starter", "decider"), OWN)
async def test_nobody_decides_on_their_own_run(pond: Pond, starter: str, decider: str) -> None:
    request_id = await asked(pond, starter)
    with pytest.raises(Forbidden) as caught:
        await decide(pond, request_id, decider)
    assert caught.value.code == "own_run"
    await decide(pond, request_id, "bob")


async def test_a_fixed_token_of_the_machine_decides_on_its_own_run(pond: Pond) -> None:
    await decide(pond, await asked(pond, "ann"), "ann", is_fixed=True)


async def test_the_policy_of_the_org_may_allow_it(pond: Pond) -> None:
    request_id = await asked(pond, "ann")
    owner = Principal(org_id=pond.org_id, subject=SUBJECTS["bob"], roles=frozenset({"owner"}))
    for may in (False, True):
        async with pond.db.org(pond.org_id) as con:
            await organizations.change(con, owner, policy_changes={"may_resolve_own": may})
        if not may:
            with pytest.raises(Forbidden):
                await decide(pond, request_id, "ann")
    await decide(pond, request_id, "ann")


async def first_run(pond: Pond) -> uuid.UUID:
    """Wait for a run that nobody submitted here."""
    async with asyncio.timeout(20):
        while True:
            async with pond.db.org(pond.org_id) as con:
                if (run_id := await con.fetchval("select run_id from run")) is not None:
                    found: uuid.UUID = run_id
                    return found
            await asyncio.sleep(0.02)


async def fired(pond: Pond, changed_by: str | None = None) -> uuid.UUID:
    """Let Ann's schedule fire, perhaps after somebody changed it; return the question that its run asks."""

    async def approve(ctx: Context, _: None) -> None:
        await ctx.ask_human("approve", role="support", form=Approval)

    flow = pond.flow(approve)
    draft = schedules.Draft(name="nightly", flow=flow.name, cron="* * * * *", input=None)
    async with pond.worker():
        async with pond.db.org(pond.org_id) as con:
            made = await schedules.create(con, pond.org_id, draft, SUBJECTS["ann"])
            if changed_by is not None:
                other = replace(draft, priority=3)
                await schedules.change(con, pond.org_id, made, other, SUBJECTS[changed_by])
            await con.execute(
                "update schedule set next_due_at = date_trunc('minute', now()) - interval '1 minute'"
            )
        run_id = await first_run(pond)
        await pond.until(run_id, "run.awaiting_input")
    async with pond.db.org(pond.org_id) as con:
        request_id: uuid.UUID = await con.fetchval("select request_id from input_request")
    return request_id


@pytest.mark.parametrize(
    "statement",
    [
        "select 1",
        "delete from schedule",
        "update schedule set name = 'weekly'",
        "update schedule set created_by = 'user:somebody'",
    ],
)
async def test_who_made_a_schedule_decides_on_none_of_its_runs_whatever_becomes_of_it(
    pond: Pond, statement: str
) -> None:
    request_id = await fired(pond)
    async with pond.db.org(pond.org_id) as con:
        await con.execute(statement)
    with pytest.raises(Forbidden):
        await decide(pond, request_id, "ann")
    await decide(pond, request_id, "bob")


async def test_who_changed_a_schedule_stands_behind_its_runs_too(pond: Pond) -> None:
    request_id = await fired(pond, changed_by="bob")
    for who in ("ann", "bob"):
        with pytest.raises(Forbidden):
            await decide(pond, request_id, who)


async def test_who_sent_an_event_stands_behind_what_it_started(pond: Pond) -> None:
    async def approve(ctx: Context, _: EventInput[Any]) -> None:
        await ctx.ask_human("approve", role="support", form=Approval)

    flow = pond.flow(approve)
    draft = triggers.Draft(name="placed", event="order.placed", flow=flow.name)
    async with pond.worker():
        async with pond.db.org(pond.org_id) as con:
            await triggers.create(con, pond.org_id, draft, SUBJECTS["bob"])
            order = Incoming(event_id="o-1", name="order.placed", data=1)
            await receive(con, pond.org_id, [order], SUBJECTS["ann's key"])
        await pond.until(await first_run(pond), "run.awaiting_input")
    async with pond.db.org(pond.org_id) as con:
        request_id: uuid.UUID = await con.fetchval("select request_id from input_request")
        await con.execute(
            f"insert into api_key (org_id, key_id, name, prefix, digest, owner, scopes, created_by) values "
            f"({pond.org_id}, '{KEY}', 'k', 'a', 'd', 'user:{ANN}', '{{}}', 'user:{ANN}')"
        )
    for who in ("ann", "bob"):
        with pytest.raises(Forbidden):
            await decide(pond, request_id, who)
