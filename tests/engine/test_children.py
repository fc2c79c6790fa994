"""Child runs: started once, joined whenever they end, treated by their close policy."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pytest
from pydantic import BaseModel
from tests.engine.conftest import Pond
from tests.engine.test_signals import tell

from millpond.engine import operations, reruns
from millpond.engine.context import Child, ChildFailed, Context
from millpond.engine.registry import Flow
from millpond.errors import InvalidInput, NotFound, Permanent
from millpond.retry import Retry


class Page(BaseModel):
    number: int
    text: str = ""


async def cancel(pond: Pond, run_id: uuid.UUID) -> None:
    async with pond.db.org(pond.org_id) as con:
        stopped = await operations.stop(con, pond.org_id, run_id, "user:test")
    pond.hints.cancelled([run_id])
    pond.hints.wake([one.queue for one in stopped.readied])


async def children_of(pond: Pond, run_id: uuid.UUID) -> list[Any]:
    async with pond.db.org(pond.org_id) as con:
        return await con.fetch(
            "select * from run where parent_id = $1 order by created_at, run_id", run_id
        )


def reader(pond: Pond) -> Flow:
    async def read(ctx: Context, page: Page) -> Page:
        async def look(number: int) -> str:
            return f"page {number}"

        return Page(number=page.number, text=await ctx.step("look", look, page.number))

    return pond.flow(read)


async def test_a_child_runs_as_its_parent_and_its_output_comes_back_typed(pond: Pond) -> None:
    read = reader(pond)

    async def book(ctx: Context, _: None) -> list[str]:
        page: Page = await ctx.run_flow(read, Page(number=1))
        named = await ctx.run_flow("read", {"number": 2}, output=Page)
        return [page.text, named.text, (await ctx.run_flow("read", {"number": 3}))["text"]]

    pond.flow(book)
    async with pond.worker():
        run_id = await pond.submit("book", priority=7, labels={"shelf": "a"})
        row = await pond.ended(run_id)
    assert row["output"] == ["page 1", "page 2", "page 3"]
    first, *_ = children = await children_of(pond, run_id)
    assert len(children) == 3
    assert (first["subject"], first["priority"]) == ("user:test", 7)
    assert first["labels"] == '{"shelf":"a"}'
    assert (first["parent_key"], first["close_policy"]) == ("read:0", "cancel")
    kinds = [kind for kind in await pond.kinds(run_id) if kind.startswith("child.")]
    assert kinds == ["child.started", "child.ended"] * 3
    assert await pond.count("chore") == 0


async def test_a_waiting_parent_holds_no_slot(pond: Pond) -> None:
    """With one slot, parent and child take turns."""
    read = reader(pond)

    async def book(ctx: Context, pages: int) -> list[str]:
        found = await ctx.map(lambda n: ctx.run_flow(read, {"number": n}), range(pages), limit=3)
        return [page.text for page in found]

    pond.flow(book)
    async with pond.worker({"default": 1}):
        row = await pond.ended(await pond.submit("book", 8))
    assert row["output"] == [f"page {n}" for n in range(8)]


async def test_a_child_that_ended_before_the_join_is_found(pond: Pond) -> None:
    read = reader(pond)
    may_join = asyncio.Event()

    async def book(ctx: Context, _: None) -> str:
        child = await ctx.start(read, {"number": 4})
        await ctx.step("hold", may_join.wait)
        page: Page = await ctx.join(child)
        return page.text

    pond.flow(book)
    async with pond.worker():
        run_id = await pond.submit("book")
        started = await pond.until(run_id, "child.started")
        await pond.ended(uuid.UUID(started.data["run_id"]))
        may_join.set()
        row = await pond.ended(run_id)
    assert row["output"] == "page 4"
    assert row["attempts"] == 1


async def test_a_child_joined_twice_at_once_tells_both(pond: Pond) -> None:
    may_end = asyncio.Event()

    async def slow(ctx: Context, _: None) -> str:
        await ctx.step("hold", may_end.wait)
        return "done"

    async def twice(ctx: Context, _: None) -> list[str]:
        child = await ctx.start(pond.registry.flows["slow", 1])
        return list(await ctx.parallel(ctx.join(child), ctx.join(child)))

    pond.flow(slow)
    pond.flow(twice)
    async with pond.worker():
        run_id = await pond.submit("twice")
        await pond.until(run_id, "run.waiting")
        may_end.set()
        assert (await pond.ended(run_id))["output"] == ["done", "done"]


async def test_a_failed_or_cancelled_child_raises_what_became_of_it(pond: Pond) -> None:
    async def fails(ctx: Context, _: None) -> None:
        raise InvalidInput("the page is blank", code="blank")

    async def naps(ctx: Context, _: None) -> None:
        await ctx.sleep(3600)

    async def sees(ctx: Context, _: None) -> list[Any]:
        told: list[Any] = []
        for flow in ("fails", "naps"):
            child = await ctx.start(flow)
            try:
                await ctx.join(child)
            except ChildFailed as failed:
                is_its = failed.run_id == child.run_id
                told.append([failed.outcome, failed.code, failed.step, failed.message, is_its])
        return told

    for function in (fails, naps, sees):
        pond.flow(function)
    async with pond.worker():
        run_id = await pond.submit("sees")
        started = await pond.until(run_id, "child.started", nth=2)
        child_id = uuid.UUID(started.data["run_id"])
        await pond.until(child_id, "run.waiting")
        await cancel(pond, child_id)
        row = await pond.ended(run_id)
    assert row["output"] == [
        ["failed", "blank", "fails", "the page is blank", True],
        ["cancelled", "cancelled", "naps", "it was cancelled", True],
    ]


async def test_an_uncaught_failure_of_a_child_fails_the_parent(pond: Pond) -> None:
    async def fails(ctx: Context, _: None) -> None:
        raise InvalidInput("the page is blank", code="blank")

    async def trusts(ctx: Context, _: None) -> None:
        await ctx.run_flow("fails")

    pond.flow(fails)
    pond.flow(trusts)
    async with pond.worker():
        row = await pond.ended(await pond.submit("trusts"))
    assert (row["error"]["code"], row["error"]["cause"]) == ("blank", "ChildFailed")


async def test_no_attempt_starts_a_child_twice(pond: Pond) -> None:
    """Also when the attempt ends between the child's start and the next record."""
    read = reader(pond)
    bodies = 0

    async def book(ctx: Context, _: None) -> list[str]:
        nonlocal bodies
        bodies += 1
        child: Child = await ctx.start(read, {"number": 1})
        if bodies < 3:
            raise ConnectionError("the body stumbled")
        page: Page = await ctx.join(child)
        return [page.text]

    pond.flow(book, retry=Retry(max_tries=5, base_s=0.01, cap_s=0.02))
    async with pond.worker():
        run_id = await pond.submit("book")
        assert (await pond.ended(run_id))["output"] == ["page 1"]
    assert bodies >= 3
    assert len(await children_of(pond, run_id)) == 1


async def test_the_end_of_a_parent_means_what_the_close_policy_says(pond: Pond) -> None:
    may_end = asyncio.Event()

    async def naps(ctx: Context, _: None) -> None:
        await ctx.sleep(3600)

    async def ends(ctx: Context, _: None) -> None:
        await ctx.step("hold", may_end.wait)

    async def parent(ctx: Context, _: None) -> str:
        await ctx.start("naps", name="cut")
        await ctx.start("naps", name="left", close="abandon")
        await ctx.start("ends", name="kept", close="wait")
        return "over"

    for function in (naps, ends, parent):
        pond.flow(function)
    async with pond.worker():
        run_id = await pond.submit("parent")
        await pond.until(run_id, "run.waiting")
        by_key = {row["parent_key"]: row["run_id"] for row in await children_of(pond, run_id)}
        assert (await pond.run_row(run_id))["outcome"] is None
        may_end.set()
        assert (await pond.ended(run_id))["output"] == "over"
        assert (await pond.ended(by_key["cut:0"]))["outcome"] == "cancelled"
        assert (await pond.run_row(by_key["kept:0"]))["outcome"] == "succeeded"
        assert (await pond.run_row(by_key["left:0"]))["outcome"] is None
        cancelled = (await pond.events(by_key["cut:0"]))[-1]
        assert cancelled.data == {"by": f"run:{run_id}", "reason": "its parent has ended"}
        assert await pond.count("chore") == 0


async def test_a_failing_parent_waits_for_its_child_too_and_fails_as_it_did(pond: Pond) -> None:
    may_end = asyncio.Event()

    async def ends(ctx: Context, _: None) -> None:
        await ctx.step("hold", may_end.wait)
        raise InvalidInput("this does not matter")

    async def parent(ctx: Context, _: None) -> None:
        await ctx.start("ends", close="wait")
        raise Permanent("the parent is done for", code="done_for")

    pond.flow(ends)
    pond.flow(parent)
    async with pond.worker():
        run_id = await pond.submit("parent")
        await pond.until(run_id, "run.waiting")
        may_end.set()
        assert (await pond.ended(run_id))["error"]["code"] == "done_for"


async def test_a_cancelled_parent_does_not_wait_for_its_child(pond: Pond) -> None:
    async def naps(ctx: Context, _: None) -> None:
        await ctx.sleep(3600)

    async def parent(ctx: Context, _: None) -> None:
        await ctx.start("naps", close="wait")

    pond.flow(naps)
    pond.flow(parent)
    async with pond.worker():
        run_id = await pond.submit("parent")
        await pond.until(run_id, "run.waiting")
        await cancel(pond, run_id)
        assert (await pond.ended(run_id))["outcome"] == "cancelled"
        (child,) = await children_of(pond, run_id)
        assert child["outcome"] is None
        assert await pond.count("chore") == 0


async def test_cancelling_a_parent_cancels_its_children_and_theirs(pond: Pond) -> None:
    is_working = asyncio.Event()

    async def leaf(ctx: Context, _: None) -> None:
        async def work() -> None:
            is_working.set()
            await asyncio.Event().wait()

        await ctx.step("work", work)

    async def middle(ctx: Context, _: None) -> None:
        await ctx.run_flow("leaf")

    async def top(ctx: Context, _: None) -> None:
        await ctx.run_flow("middle")

    for function in (leaf, middle, top):
        pond.flow(function)
    async with pond.worker():
        top_id = await pond.submit("top")
        await asyncio.wait_for(is_working.wait(), 20)
        (middle_row,) = await children_of(pond, top_id)
        (leaf_row,) = await children_of(pond, middle_row["run_id"])
        await pond.until(top_id, "run.waiting")
        await pond.until(middle_row["run_id"], "run.waiting")
        await cancel(pond, top_id)
        for run_id in (top_id, middle_row["run_id"], leaf_row["run_id"]):
            assert (await pond.ended(run_id))["outcome"] == "cancelled"
    for table in ("item", "ready", "lease", "chore"):
        assert await pond.count(table) == 0


async def test_a_flow_that_starts_itself_ends_at_the_last_generation(pond: Pond) -> None:
    async def again(ctx: Context, depth: int) -> str:
        try:
            child = await ctx.start("again", depth + 1)
        except Permanent as error:
            return f"{error.code} {depth}"
        deepest: str = await ctx.join(child)
        return deepest

    pond.flow(again)
    async with pond.worker():
        row = await pond.ended(await pond.submit("again", 1))
    assert row["output"] == "too_deep 32"
    assert await pond.count("run") == 32


async def test_what_cannot_be_started_is_refused_where_it_is_asked_for(pond: Pond) -> None:
    read = reader(pond)

    async def tries(ctx: Context, _: None) -> list[str]:
        codes = []
        try:
            await ctx.start("no.such.flow")
        except NotFound as error:
            codes.append(error.code)
        try:
            await ctx.start(read, {"number": "one"})
        except InvalidInput as error:
            codes.append(error.param or "")
        try:
            await ctx.start(read, {"number": 1}, priority=1000)
        except InvalidInput as error:
            codes.append(error.param or "")
        return codes

    pond.flow(tries)
    async with pond.worker():
        row = await pond.ended(await pond.submit("tries"))
    assert row["output"] == ["flow_not_found", "input", "priority"]
    assert await pond.count("run") == 1


async def test_many_children_that_end_together_wake_their_parents_once_each(pond: Pond) -> None:
    """Parents and children of several levels end in the same batches without standing still."""

    async def leaf(ctx: Context, number: int) -> int:
        await ctx.sleep(0.001 * (number % 5))
        return number

    async def branch(ctx: Context, number: int) -> int:
        leaves = [ctx.run_flow("leaf", number * 10 + n) for n in range(4)]
        return sum(await ctx.parallel(*leaves))

    async def root(ctx: Context, count: int) -> int:
        return sum(await ctx.map(lambda n: ctx.run_flow("branch", n), range(count), limit=50))

    for function in (leaf, branch, root):
        pond.flow(function)
    async with pond.worker({"default": 30}):
        runs = [await pond.submit("root", 12) for _ in range(3)]
        outputs = [(await pond.ended(run_id))["output"] for run_id in runs]
    expected = sum(number * 10 + n for number in range(12) for n in range(4))
    assert outputs == [expected] * 3
    assert await pond.count("run") == 3 * (1 + 12 + 48)
    assert await pond.count("item") == 0


@pytest.mark.parametrize("where", ["flow", "step"])
async def test_a_childs_error_with_the_character_zero_ends_child_and_parent(
    pond: Pond, where: str
) -> None:
    async def refuse() -> None:
        raise Permanent("a byte \x00 in it", code="odd\x00byte")

    async def breaks(ctx: Context, where: str) -> None:
        if where == "step":
            await ctx.step("refuse", refuse)
        await refuse()

    async def outer(ctx: Context, where: str) -> list[str]:
        try:
            await ctx.run_flow("breaks", where)
        except ChildFailed as failed:
            return [failed.code, failed.message]
        return []

    pond.flow(breaks)
    pond.flow(outer)
    async with pond.worker():
        row = await pond.ended(await pond.submit("outer", where))
    code, message = row["output"]
    assert code == "odd\ufffdbyte"
    assert "a byte \ufffd in it" in message


async def test_a_stored_error_with_the_character_zero_is_joined_and_read(pond: Pond) -> None:
    async def breaks(ctx: Context, _: None) -> None:
        raise Permanent("no", code="no")

    async def outer(ctx: Context, _: None) -> str:
        child = await ctx.start("breaks")
        await ctx.wait_event("go")
        try:
            await ctx.join(child)
        except ChildFailed as failed:
            return failed.code
        return ""

    pond.flow(breaks)
    pond.flow(outer)
    async with pond.worker():
        run_id = await pond.submit("outer")
        await pond.until(run_id, "child.started")
        (child,) = await children_of(pond, run_id)
        await pond.ended(child["run_id"])
        async with pond.engine_db.duty("test") as con:
            await con.execute(
                "update run set error = $2 where run_id = $1",
                child["run_id"],
                '{"code":"a\\u0000b","message":"c"}',
            )
        await tell(pond, run_id, "go")
        assert (await pond.ended(run_id))["output"] == "failed"
        async with pond.db.org(pond.org_id) as con:
            source = await reruns.read(con, pond.org_id, child["run_id"])
    assert (source.outcome, source.is_poison) == ("failed", False)
