"""Commits whose answer is lost, and attempts whose lease is gone: nothing starts or ends twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.engine.conftest import Pond
from tests.engine.test_signals import tell

from millpond.db.pool import Connection
from millpond.engine.context import Context
from millpond.errors import Unavailable


@pytest.fixture
def lost(pond: Pond, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Duties of which each next commit goes through but its answer is lost."""
    names: list[str] = []
    duty = pond.engine_db.duty

    @asynccontextmanager
    async def broken(name: str, **options: Any) -> AsyncIterator[Connection]:
        async with duty(name, **options) as con:
            yield con
        if name in names:
            names.remove(name)
            raise Unavailable("the connection broke after the commit")

    monkeypatch.setattr(pond.engine_db, "duty", broken)
    return names


async def test_a_child_is_started_once_and_found_again(pond: Pond, lost: list[str]) -> None:
    async def leaf(ctx: Context, number: int) -> int:
        return number

    async def parent(ctx: Context, _: None) -> int:
        lost.append("child")
        child = await ctx.start("leaf", 7)
        lost.append("join")
        number: int = await ctx.join(child)
        return number

    pond.flow(leaf)
    pond.flow(parent)
    async with pond.worker():
        run_id = await pond.submit("parent")
        assert (await pond.ended(run_id))["output"] == 7
    assert lost == []
    assert await pond.count("run") == 2
    kinds = [kind for kind in await pond.kinds(run_id) if kind.startswith("child.")]
    assert kinds == ["child.started", "child.ended"]


async def test_a_wait_takes_its_signal_once(pond: Pond, lost: list[str]) -> None:
    async def reads(ctx: Context, _: None) -> list[Any]:
        lost.append("signal")
        first = await ctx.wait_event("letter")
        return [first.data, (await ctx.wait_event("letter")).data]

    pond.flow(reads)
    run_id = await pond.submit("reads")
    await tell(pond, run_id, "letter", 1)
    await tell(pond, run_id, "letter", 2)
    async with pond.worker():
        row = await pond.ended(run_id)
    assert (row["output"], row["attempts"]) == ([1, 2], 1)
    assert lost == []
    assert (await pond.kinds(run_id)).count("signal.awaited") == 2


async def test_a_run_has_one_successor(pond: Pond, lost: list[str]) -> None:
    async def counts(ctx: Context, number: int) -> int:
        if number < 2:
            lost.append("continue")
            await ctx.continue_as(number + 1)
        return number

    pond.flow(counts)
    async with pond.worker():
        first = await pond.ended(await pond.submit("counts", 1))
        assert (await pond.ended(first["continued_to"]))["output"] == 2
    assert lost == []
    assert await pond.count("run") == 2


async def test_ends_with_duties_that_are_stored_are_found_again(
    pond: Pond, lost: list[str]
) -> None:
    started: list[str] = []

    async def holds(ctx: Context, name: str) -> str:
        started.append(name)
        if len(started) == 1:
            lost.append("end")
        return name

    pond.flow(holds)
    async with pond.worker() as worker:
        runs = [await pond.submit("holds", key, dedup_key=key) for key in ("first", "second")]
        assert [(await pond.ended(run_id))["outcome"] for run_id in runs] == ["succeeded"] * 2
        while worker._tasks:
            await asyncio.wait(list(worker._tasks))
            await asyncio.sleep(0)  # those that are over leave the set a turn later
    assert lost == []
    assert len(started) == 2


@pytest.mark.parametrize("call", ["start", "join", "wait_event", "continue_as"])
async def test_an_attempt_without_its_lease_changes_nothing(pond: Pond, call: str) -> None:
    async def leaf(ctx: Context, _: None) -> None:
        await ctx.sleep(3600)

    async def parent(ctx: Context, _: None) -> None:
        child = await ctx.start("leaf")
        async with pond.engine_db.duty("test") as con:
            await con.execute(
                "update item set token = gen_random_uuid() where item_id = $1", ctx.run_id
            )
        if call == "start":
            await ctx.start("leaf")
        elif call == "join":
            await ctx.join(child)
        elif call == "wait_event":
            await ctx.wait_event("letter")
        else:
            await ctx.continue_as(None)

    pond.flow(leaf)
    pond.flow(parent)
    async with pond.worker() as worker:
        run_id = await pond.submit("parent")
        await pond.until(run_id, "child.started")
        while worker._tasks:
            await asyncio.wait(list(worker._tasks))
            await asyncio.sleep(0)  # those that are over leave the set a turn later
    assert await pond.count("run") == 2
    assert await pond.count("step", f"run_id = '{run_id}'") == 1
    assert (await pond.kinds(run_id))[-1] == "child.started"
    assert (await pond.run_row(run_id))["outcome"] is None
