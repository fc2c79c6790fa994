"""Schedules, triggers and events by the client, on the real server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.api.conftest import Front
from tests.client.conftest import QUICK

from millpond.client import AsyncClient, Client, Conflict, InvalidRequest, NotFound
from millpond.engine.context import Context


async def test_a_schedule_is_made_changed_run_and_removed(front: Front, pond: AsyncClient) -> None:
    await front.publish()
    made = await pond.schedules.create(
        "nightly",
        "echo",
        "30 2 * * *",
        input={"text": "hi"},
        time_zone="Europe/Berlin",
        labels={"team": "ops"},
        missed="skip",
        overlap="cancel_old",
    )
    assert (made.missed, made.overlap, made.time_zone) == ("skip", "cancel_old", "Europe/Berlin")
    with pytest.raises(Conflict):
        await pond.schedules.create("nightly", "echo", "@daily")
    changed = await pond.schedules.change(made.id, cron="@hourly", version=1)
    assert (changed.cron, changed.version, changed.input) == ("@hourly", 1, {"text": "hi"})
    assert (await pond.schedules.change(made.id, version=None)).version is None
    assert (await pond.schedules.pause(made.id)).is_paused
    run = await pond.schedules.run_now(made.id, idempotency_key="k")
    assert (await pond.schedules.run_now(made.id, idempotency_key="k")).id == run.id
    assert (await run.refresh()).data.labels["millpond.schedule"] == "nightly"
    assert not (await pond.schedules.resume(made.id)).is_paused
    shown = await pond.schedules.get(made.id)
    assert len(shown.next_times) == 5
    assert shown.last_run is not None
    assert shown.last_run.id == run.id
    await pond.schedules.delete(made.id)
    with pytest.raises(NotFound):
        await pond.schedules.get(made.id)


async def test_schedules_are_listed_over_pages(front: Front, pond: AsyncClient) -> None:
    await front.publish()
    names = [f"s{n}" for n in range(5)]
    for name in names:
        await pond.schedules.create(name, "echo", "@daily", is_paused=True)
    assert [one.name async for one in pond.schedules.list(limit=2)] == names[::-1]
    assert [one.name for one in (await pond.schedules.page(name="s3")).data] == ["s3"]


def flows(front: Front) -> None:
    async def review(ctx: Context, given: Any) -> Any:
        return given

    front.flow(review)


async def test_events_start_the_flows_of_their_triggers(front: Front, pond: AsyncClient) -> None:
    flows(front)
    large = {"type": "object", "properties": {"amount": {"minimum": 200}}}
    async with front.worker():
        made = await pond.triggers.create("review", "order.placed", "review", filter=large)
        event = await pond.events.send("order.placed", {"amount": 250}, id="order-1")
        (started,) = event.runs
        assert started.trigger == "review"
        assert (await pond.runs.get(started.run_id)).data.flow == "review"
        assert (await pond.events.send("order.placed", {"amount": 250}, id="order-1")) == event
        with pytest.raises(Conflict):
            await pond.events.send("order.placed", {"amount": 251}, id="order-1")
        many = await pond.events.send_many(
            [
                {"name": "order.placed", "data": {"amount": 300}, "id": "order-2"},
                {"name": "order.placed", "data": {"amount": 10}},
            ]
        )
        assert [len(one.runs) for one in many.data] == [1, 0]
        listed = [one async for one in pond.events.list(name="order.placed", limit=2)]
        assert [one.id for one in listed][1:] == ["order-2", "order-1"]
        assert (await pond.events.page(limit=1)).has_more
        assert (await pond.triggers.get(made.id)).waiting is not None


async def test_one_key_sends_one_event(front: Front, pond: AsyncClient) -> None:
    first = await pond.events.send("order.placed", 1, idempotency_key="k")
    assert (await pond.events.send("order.placed", 1, idempotency_key="k")).id == first.id
    assert (await pond.events.send("order.placed", 1)).id != first.id
    with pytest.raises(InvalidRequest):
        await pond.events.send("order.placed", 2, idempotency_key="k")


async def test_the_sync_client_keeps_triggers(front: Front) -> None:
    def use() -> None:
        with Client(front.url, token=front.token(), patience=QUICK) as pond:
            made = pond.triggers.create(
                "tally", "order.placed", "echo", mode="batch", max_count=10, max_wait_s=60
            )
            changed = pond.triggers.change(made.id, max_count=20, labels={"team": "ops"})
            assert (changed.max_count, changed.max_wait_s) == (20, 60)
            assert pond.triggers.pause(made.id).is_paused
            assert not pond.triggers.resume(made.id).is_paused
            pond.events.send("order.placed", {"amount": 1})
            waiting = pond.triggers.get(made.id).waiting
            assert waiting is not None
            assert waiting.events == 1
            assert [one.name for one in pond.triggers.list()] == ["tally"]
            assert len(pond.triggers.page(limit=1).data) == 1
            pond.triggers.delete(made.id)
            assert list(pond.triggers.list()) == []

    await front.publish()
    await asyncio.to_thread(use)
