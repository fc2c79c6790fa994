"""What a type checker makes of the client: checked by mypy in `test_typing`, never executed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Coroutine, Iterator
from typing import Any, assert_type

from millpond.client import (
    AsyncClient,
    AsyncRun,
    BulkPreview,
    Client,
    Event,
    Flow,
    InboundEvent,
    Page,
    Run,
    RunBatch,
    RunData,
    Schedule,
    SearchResult,
    Signal,
    Why,
)


def sync(pond: Client) -> None:
    """Results are there at once."""
    run = pond.runs.start("support.answer", {"text": "hi"}, on_duplicate="join", deadline_s=60)
    assert_type(run, Run)
    assert_type(run.why(), Why)
    assert_type(run.signal("paid", {"cents": 1}), Signal)
    assert_type(run.rerun(from_step="one:0"), Run)
    assert_type(run.release("more memory"), Run)
    assert_type(run.cancel("no", skip_endings=True), Run)
    assert_type(run.wait(timeout_s=1.0), Run)
    assert_type(run.events(), Iterator[Event])
    assert_type(pond.runs.list(flow="support.answer"), Iterator[RunData])
    assert_type(pond.runs.page(limit=1), Page[RunData])
    assert_type(pond.runs.start_many([{"flow": "support.answer"}]), RunBatch)
    assert_type(pond.runs.bulk("cancel", flow="support.answer"), Run)
    assert_type(pond.runs.bulk_dry_run("cancel", flow="support.answer"), BulkPreview)
    assert_type(pond.flows.list(), Iterator[Flow])
    assert_type(pond.schedules.create("nightly", "report", "@daily"), Schedule)
    assert_type(pond.schedules.run_now(run.id), Run)
    assert_type(pond.knowledge.search("shop", "kettle?"), SearchResult)


async def later(pond: AsyncClient) -> None:
    """Results are awaited, and lists are iterated over by `async for`."""
    starting = assert_type(pond.runs.start("support.answer"), Coroutine[Any, Any, AsyncRun])
    awaitable: Awaitable[AsyncRun] = starting
    run = await awaitable
    assert_type(run, AsyncRun)
    assert_type(await run.why(), Why)
    assert_type(await run.signal("paid"), Signal)
    assert_type(await run.rerun(input=None), AsyncRun)
    assert_type(await run.cancel(), AsyncRun)
    assert_type(await run.wait(), AsyncRun)
    assert_type(pond.runs.list(), AsyncIterator[RunData])
    assert_type(await pond.events.send("order.placed"), InboundEvent)
    async for event in run.events():
        assert_type(event, Event)


def refused(pond: Client) -> None:
    """Each of these is wrong, and told so: an ignore that is not needed is an error too."""
    pond.runs.start()  # type: ignore[call-arg]
    pond.runs.start("f", on_duplicate="perhaps")  # type: ignore[arg-type]
    pond.runs.start("f", dedupkey="x")  # type: ignore[call-arg]
    pond.runs.start_many([{"input": 1}])  # type: ignore[typeddict-item]
    pond.runs.bulk("delete", flow="f")  # type: ignore[arg-type]
    pond.runs.list(colour="red")  # type: ignore[call-arg]
    pond.triggers.change("id", mode="each")  # type: ignore[call-arg]


async def forgotten(pond: AsyncClient) -> None:
    """A call that nobody awaits is told of, too."""
    pond.runs.start("f")  # type: ignore[unused-coroutine]
