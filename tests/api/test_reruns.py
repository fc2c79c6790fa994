"""Doing a run again: from the start, from a step on, after quarantine; what is kept and what runs anew."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import asyncpg
import httpx2
import orjson
from pydantic import BaseModel

from millpond.db.queries import queries
from millpond.engine.context import Context
from millpond.engine.lanes import SUSPECT_DEATHS
from millpond.engine.registry import step
from millpond.errors import Permanent
from millpond.retry import Retry

from .conftest import ALL, Client, Front, until


class Number(BaseModel):
    """An input with a schema."""

    n: int
    note: str = ""


class Calls:
    """What steps did, in the order in which they did it."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def note(self, name: str, value: Any) -> Any:
        self.made.append(name)
        return value


def chain(front: Front, calls: Calls, **options: Any) -> None:
    """Register a flow of three steps, two of them side by side after the first."""

    async def chain(ctx: Context, data: Number) -> dict[str, int]:
        async def first() -> int:
            return calls.note("first", data.n) * 10

        async def left() -> int:
            return calls.note("left", data.n) + 1

        async def right() -> int:
            return calls.note("right", data.n) + 2

        async def last() -> int:
            return calls.note("last", data.n) + 3

        a = await ctx.step("first", first)
        b, c = await ctx.parallel(ctx.step("left", left), ctx.step("right", right))
        await ctx.emit("half", {"n": data.n})
        return {"a": a, "b": b, "c": c, "d": await ctx.step("last", last)}

    front.flow(chain, **options)


async def start(client: Client, flow: str, data: Any, **more: Any) -> str:
    answer = await client.post("/v1/runs", json={"flow": flow, "input": data, **more})
    assert answer.status_code == 202, answer.text
    run_id: str = answer.json()["id"]
    return run_id


async def rerun(client: Client, run_id: str, **body: Any) -> dict[str, Any]:
    answer = await client.post(f"/v1/runs/{run_id}/rerun", json=body)
    assert answer.status_code == 202, answer.text
    document: dict[str, Any] = answer.json()
    return document


async def keys(client: Client, run_id: str) -> list[str]:
    return [step["key"] for step in (await client.get(f"/v1/runs/{run_id}")).json()["steps"]]


def refused(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    document: dict[str, Any] = answer.json()
    assert document["code"] == code
    return document


async def test_a_rerun_from_the_start_repeats_everything(front: Front, ann: Client) -> None:
    calls = Calls()
    chain(front, calls)
    async with front.worker():
        first = await start(ann, "chain", {"n": 1}, labels={"case": "7"}, priority=3)
        await front.ended(ann, first)
        accepted = await rerun(ann, first)
        run = await front.ended(ann, accepted["id"])
    assert calls.made.count("first") == 2
    assert (run["output"], run["labels"], run["priority"]) == (
        {"a": 10, "b": 2, "c": 3, "d": 4},
        {"case": "7"},
        3,
    )
    assert (accepted["rerun_of"], accepted["rerun_from"]) == (first, None)
    assert (run["rerun_of"], run["rerun_from"], run["reruns"]) == (first, None, [])
    assert (await ann.get(f"/v1/runs/{first}")).json()["reruns"] == [run["id"]]
    queued = (await ann.get(f"/v1/runs/{run['id']}/events")).json()["data"][0]
    assert queued["data"] == {"flow": "chain", "queue": "default", "rerun_of": first}


async def test_a_rerun_from_a_step_keeps_what_had_ended_before_it(
    front: Front, ann: Client
) -> None:
    calls = Calls()
    chain(front, calls)
    async with front.worker():
        first = await start(ann, "chain", {"n": 1})
        before = await front.ended(ann, first)
        last = [step["key"] for step in before["steps"]][-1]
        assert last.startswith("last")
        calls.made.clear()
        accepted = await rerun(ann, first, from_step=last, input={"n": 5})
        run = await front.ended(ann, accepted["id"])
    # The body saw the new input, recorded steps kept their results.
    assert calls.made == ["last"]
    assert run["output"] == {"a": 10, "b": 2, "c": 3, "d": 8}
    assert run["input"] == {"n": 5}
    assert (run["rerun_from"], run["attempts"]) == (last, 1)
    events = (await ann.get(f"/v1/runs/{run['id']}/events")).json()["data"]
    assert [one["kind"] for one in events if one["step"]] == ["step.succeeded"]
    assert events[0]["data"]["rerun_from"] == last


async def test_a_rerun_from_the_first_step_keeps_nothing(front: Front, ann: Client) -> None:
    calls = Calls()
    chain(front, calls)
    async with front.worker():
        first = await start(ann, "chain", {"n": 1})
        begin = (await front.ended(ann, first))["steps"][0]["key"]
        calls.made.clear()
        await front.ended(ann, (await rerun(ann, first, from_step=begin))["id"])
    assert sorted(calls.made) == ["first", "last", "left", "right"]


async def test_a_rerun_from_a_branch_keeps_branches_that_were_over(
    front: Front, ann: Client
) -> None:
    calls = Calls()

    async def fan(ctx: Context, n: int) -> list[int]:
        async def quick() -> int:
            return calls.note("quick", 1)

        async def slow() -> int:
            return calls.note("slow", 2)

        async def late() -> int:
            await ctx.sleep(0.2, name="pause")
            return await ctx.step("slow", slow)

        return list(await ctx.parallel(ctx.step("quick", quick), late()))

    front.flow(fan)
    async with front.worker():
        first = await start(ann, "fan", 0)
        await front.ended(ann, first)
        target = next(key for key in await keys(ann, first) if "slow" in key)
        calls.made.clear()
        run = await front.ended(ann, (await rerun(ann, first, from_step=target))["id"])
    assert run["output"] == [1, 2]
    assert calls.made == ["slow"]


async def test_decisions_and_sleeps_before_the_step_are_kept(front: Front, ann: Client) -> None:
    async def decide(ctx: Context, n: int) -> dict[str, Any]:
        async def pay() -> int:
            if n == 0:
                raise ValueError("no")
            return n

        form = {"type": "object"}
        decision = await ctx.ask_human("ok", role="support", form=form, proposal={"n": 1})
        await ctx.sleep(1.05, name="cool down")
        return {"by": decision.resolved_by, "paid": await ctx.step("pay", pay)}

    front.flow(decide, retry=Retry(max_tries=1, unknown_tries=1))
    async with front.worker():
        first = await start(ann, "decide", 0)
        asked = await until(ann, first, "input.requested")
        answer = {"answer": {"yes": True}}
        request_id = asked["data"]["request_id"]
        await ann.post(f"/v1/input-requests/{request_id}/resolve", json=answer)
        before = await front.ended(ann, first)
        assert before["state"] == "failed"
        pay = before["steps"][-1]["key"]
        accepted = await rerun(ann, first, from_step=pay, input=7)
        run = await front.ended(ann, accepted["id"])
    assert run["output"] == {"by": "user:ann", "paid": 7}
    kinds = [one["kind"] for one in (await ann.get(f"/v1/runs/{run['id']}/events")).json()["data"]]
    assert "input.requested" not in kinds
    assert "sleep.started" not in kinds


async def test_what_a_once_step_did_is_kept_whatever_its_place(
    front: Front, ann: Client, admin_url: str
) -> None:
    calls = Calls()
    chain(front, calls)
    async with front.worker():
        first = await start(ann, "chain", {"n": 1})
        steps = (await front.ended(ann, first))["steps"]
        admin = await asyncpg.connect(admin_url)
        await admin.execute(
            "update millpond.step set effect = 'once', seq = 2 where step_key like '%last%'"
        )
        calls.made.clear()
        run = await front.ended(ann, (await rerun(ann, first, from_step=steps[0]["key"]))["id"])
        copied = await admin.fetchrow(
            "select effect, seq, attempt from millpond.step"
            " where run_id = $1 and step_key like '%last%'",
            run["id"],
        )
        await admin.close()
    assert "last" not in calls.made
    assert sorted(calls.made) == ["first", "left", "right"]
    assert tuple(copied) == ("once", None, 0)


async def test_a_step_whose_effect_is_unknown_is_kept_as_begun(
    front: Front, ann: Client, admin_url: str
) -> None:
    chain(front, Calls())
    async with front.worker():
        first = await start(ann, "chain", {"n": 1})
        steps = (await front.ended(ann, first))["steps"]
    admin = await asyncpg.connect(admin_url)
    await admin.execute(
        "update millpond.step set effect = 'once', state = 'unknown' where step_key like '%last%'"
    )
    accepted = await rerun(ann, first, from_step=steps[0]["key"])
    rows = await admin.fetch(
        "select name, state from millpond.step where run_id = $1", accepted["id"]
    )
    await admin.close()
    assert [tuple(row) for row in rows] == [("last", "begun")]


async def test_what_was_undone_is_done_again_and_what_is_kept_is_undone_again(
    front: Front, ann: Client
) -> None:
    calls = Calls()
    refusals = ["first"]

    @step("unbook", registry=front.registry)
    async def unbook(step_ctx: Any, what: str) -> None:
        if what in refusals:
            raise Permanent("too late")
        calls.note(f"un-{what}", None)

    async def trip(ctx: Context, _: Any) -> None:
        async def book(what: str) -> str:
            return calls.note(what, what)

        async def refuse() -> None:
            raise Permanent("no")

        for what in ("first", "second"):
            await ctx.step("book", book, what, undo=unbook)
        await ctx.step("refuse", refuse)

    front.flow(trip)
    async with front.worker():
        first = await start(ann, "trip", None)
        ended = await front.ended(ann, first)
        assert calls.made == ["first", "second", "un-second"]
        calls.made.clear()
        refusals.clear()
        again = await rerun(ann, first, from_step="refuse:0")
        assert (await front.ended(ann, again["id"]))["state"] == ended["state"] == "failed"
    # The first booking stands, since it could not be undone; the second is made anew.
    assert calls.made == ["second", "un-second", "un-first"]


async def test_large_values_are_copied_with_their_steps(
    front: Front, ann: Client, admin_url: str
) -> None:
    chain(front, Calls())
    async with front.worker():
        first = await start(ann, "chain", {"n": 1})
        steps = (await front.ended(ann, first))["steps"]
        admin = await asyncpg.connect(admin_url)
        await admin.execute(
            """
            set search_path = millpond;
            insert into payload (org_id, run_id, slot, body)
              select org_id, run_id, 'step:' || step_key, output from step where output is not null;
            insert into payload (org_id, run_id, slot, body)
              select org_id, run_id, 'input', '{"n": 4}' from run;
            update run set input = null
            """
        )
        accepted = await rerun(ann, first, from_step=steps[-1]["key"])
        slots = await admin.fetch(
            "select slot from millpond.payload where run_id = $1 order by slot", accepted["id"]
        )
        await admin.close()
        run = await front.ended(ann, accepted["id"])
    assert [row["slot"] for row in slots] == sorted(
        f"step:{step['key']}" for step in steps[:-1] if step["output"] is not None
    )
    assert run["output"]["d"] == 7


async def test_an_unknown_step_names_those_near_it(front: Front, ann: Client) -> None:
    chain(front, Calls())
    async with front.worker():
        first = await start(ann, "chain", {"n": 1})
        await front.ended(ann, first)
        answer = await ann.post(f"/v1/runs/{first}/rerun", json={"from_step": "lasst:0"})
        document = refused(answer, 422, "step_unknown")
        assert document["error"]["param"] == "from_step"
        assert (
            next(key for key in await keys(ann, first) if key.startswith("last"))
            in document["advice"]
        )


async def test_only_a_finished_run_is_repeated_from_a_step(front: Front, ann: Client) -> None:
    async def rest(ctx: Context, n: int) -> int:
        await ctx.sleep(600, name="long")
        return n

    front.flow(rest)
    async with front.worker():
        first = await start(ann, "rest", 1)
        await until(ann, first, "run.waiting")
        answer = await ann.post(f"/v1/runs/{first}/rerun", json={"from_step": "long:0"})
        refused(answer, 409, "not_finished")
        second = await rerun(ann, first)
        await until(ann, second["id"], "run.waiting")
    assert (await ann.get(f"/v1/runs/{first}")).json()["state"] == "waiting"


async def test_another_input_is_validated(front: Front, ann: Client) -> None:
    chain(front, Calls())
    async with front.worker():
        first = await start(ann, "chain", {"n": 1})
        await front.ended(ann, first)
        answer = await ann.post(f"/v1/runs/{first}/rerun", json={"input": {"n": "one"}})
        document = refused(answer, 422, "input_mismatch")
        assert document["error"]["param"] == "input.n"
        refused(
            await ann.post(f"/v1/runs/{first}/rerun", json={"input": None}), 422, "input_mismatch"
        )


async def test_the_same_version_is_used_while_it_is_served_else_the_newest(
    front: Front, ann: Client
) -> None:
    await front.publish("echo", version=1)
    first = await start(ann, "echo", {"n": 1})
    await front.publish("echo", version=2)
    # Nobody serves either: the run's own.
    assert (await rerun(ann, first))["version"] == 1
    await _serve(front, "echo@2")
    assert (await _rerun_when_known(ann, first, 2))["version"] == 2
    await _serve(front, "echo@1")
    assert (await _rerun_when_known(ann, first, 1))["version"] == 1


async def _serve(front: Front, capability: str) -> None:
    """Register a worker that has one flow version, and does nothing."""
    async with front.engine_db.duty("test") as con:
        await con.execute(
            queries("maintenance")["register_worker"],
            uuid.uuid4(),
            "here",
            1,
            orjson.dumps({"default": 1}).decode(),
            [capability],
            600.0,
            "",
            "{}",
        )


async def _rerun_when_known(client: Client, run_id: str, version: int) -> dict[str, Any]:
    """Rerun until the API has read which workers there are, at most its two seconds."""
    async with asyncio.timeout(10):
        while (accepted := await rerun(client, run_id))["version"] != version:
            await asyncio.sleep(0.1)
    return accepted


async def test_a_repeated_request_returns_the_first_rerun(front: Front, ann: Client) -> None:
    chain(front, Calls())
    async with front.worker():
        first = await start(ann, "chain", {"n": 1})
        await front.ended(ann, first)
        path, headers = f"/v1/runs/{first}/rerun", {"Idempotency-Key": "again"}
        one = await ann.post(path, json={"input": {"n": 2}}, headers=headers)
        two = await ann.post(path, json={"input": {"n": 2}}, headers=headers)
        assert (one.status_code, two.status_code) == (202, 202)
        assert one.json() == two.json()
        assert two.headers["Idempotency-Replayed"] == "true"
        three = await ann.post(path, json={"input": {"n": 3}}, headers=headers)
        refused(three, 422, "idempotency_key_reused")


async def test_who_may_not_start_the_flow_may_not_rerun_it(front: Front, ann: Client) -> None:
    chain(front, Calls(), permission="chains:start")
    async with front.worker():
        privileged = await front.client(permissions=ALL | {"chains:start"})
        first = await start(privileged, "chain", {"n": 1})
        refused(await ann.post(f"/v1/runs/{first}/rerun"), 403, "permission_missing")
        assert (await rerun(privileged, first))["rerun_of"] == first


async def test_another_orgs_run_does_not_exist(front: Front, ann: Client, other_org: int) -> None:
    chain(front, Calls())
    async with front.worker():
        first = await start(ann, "chain", {"n": 1})
        await front.ended(ann, first)
        bob = await front.client(org_id=other_org, subject="user:bob")
        for verb in ("rerun", "release"):
            refused(await bob.post(f"/v1/runs/{first}/{verb}"), 404, "not_found")


async def poisoned(front: Front, client: Client, admin_url: str) -> str:
    """Make a run that was failed as poison after its first three steps."""
    first = await start(client, "chain", {"n": 1})
    await front.ended(client, first)
    admin = await asyncpg.connect(admin_url)
    await admin.execute(
        """
        set search_path = millpond;
        update run set outcome = 'failed', output = null, error = '{"class": "Poison", "code": "poison"}';
        delete from step where step_key like '%last%'
        """
    )
    await admin.close()
    return first


async def test_a_released_run_goes_on_alone_from_all_that_was_recorded(
    front: Front, ann: Client, admin_url: str
) -> None:
    calls = Calls()
    chain(front, calls)
    operator = await front.client(
        subject="user:op", permissions=frozenset({"runs:operate", "runs:read"})
    )
    async with front.worker():
        first = await poisoned(front, ann, admin_url)
        path, headers = f"/v1/runs/{first}/release", {"Idempotency-Key": "k"}
        answer = await operator.post(path, json={"reason": "more memory"}, headers=headers)
        assert answer.status_code == 202, answer.text
        again = await operator.post(path, json={"reason": "more memory"}, headers=headers)
        assert again.json() == answer.json()
        run_id = answer.json()["id"]
        events = await until(operator, run_id, "run.queued")
        assert events["id"] > 1
        released = (await operator.get(f"/v1/runs/{run_id}/events")).json()["data"][1]
    assert released["kind"] == "run.released"
    assert released["data"] == {"by": "user:op", "reason": "more memory"}
    run = (await operator.get(f"/v1/runs/{run_id}")).json()
    assert (run["subject"], run["rerun_of"], run["rerun_from"]) == ("user:ann", first, None)
    assert len(run["steps"]) == 4
    # It is nobody's who is not alone with it.
    async with front.engine_db.duty("test") as con:
        item = await con.fetchrow("select state, deaths, lane_id & 2 as alone from item")
    assert tuple(item) == ("queued", SUSPECT_DEATHS, 2)


async def test_only_poison_is_released(front: Front, ann: Client) -> None:
    chain(front, Calls())
    async with front.worker():
        first = await start(ann, "chain", {"n": 1})
        await front.ended(ann, first)
        refused(await ann.post(f"/v1/runs/{first}/release"), 409, "not_poison")
    reader = await front.client(permissions=ALL - {"runs:operate"})
    refused(await reader.post(f"/v1/runs/{first}/release"), 403, "permission_missing")
