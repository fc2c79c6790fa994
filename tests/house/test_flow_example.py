"""The flows of docs/flows.md are taken from the page and run: by themselves, and with a person asked."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import sys
import uuid
from contextlib import asynccontextmanager

import orjson
import pytest

from millpond.engine import events, questions
from millpond.engine.events import Feed
from millpond.engine.submit import submit
from millpond.engine.worker import Worker
from millpond.types import Intent, Principal

SUPPORT = Principal(org_id=0, subject="user:ada", roles=frozenset({"support"}))


def _module(root, folder, first, name):
    """Import the page's code block that begins with a text."""
    page = (root / "docs" / "flows.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```py(?:thon)?\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if block.startswith(first)]
    path = folder / f"{name}.py"
    path.write_text(block, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example(root, tmp_path_factory):
    """Return the module that the page's Python block is."""
    yield _module(root, tmp_path_factory.mktemp("flows"), '"""refunds.py', "refunds_of_the_docs")
    del sys.modules["refunds_of_the_docs"]


@pytest.fixture(scope="module")
def trips(root, tmp_path_factory):
    """Return the module of the page's example of effects and endings."""
    yield _module(root, tmp_path_factory.mktemp("flows"), '"""trips.py', "trips_of_the_docs")
    del sys.modules["trips_of_the_docs"]


@asynccontextmanager
async def at_work(flow, urls, engine_db):
    """Have a worker that has a flow of the page."""
    stop = asyncio.Event()
    worker = Worker(
        database=engine_db,
        engine_url=urls.engine,
        listen_url=urls.engine,
        flows=[flow],
        slots={flow.queue: 4},
        drain_s=1.0,
    )
    working = asyncio.create_task(worker.run(stop))
    try:
        yield
    finally:
        stop.set()
        await working


async def start(db, org, flow, given) -> uuid.UUID:
    intent = Intent(
        org_id=org,
        flow=flow.name,
        version=1,
        queue=flow.queue,
        input=orjson.dumps(given),
        subject="user:eve",
    )
    async with db.org(org) as con:
        await submit(con, [intent])
    return intent.run_id


async def outcome(db, org, run_id):
    async with db.org(org) as con:
        row = await con.fetchrow(
            "select outcome, output, error from run where org_id = $1 and run_id = $2", org, run_id
        )
    assert row["outcome"] == "succeeded", row["error"]
    return orjson.loads(row["output"])


async def test_a_small_refund_is_paid_at_once(example, urls, db, engine_db, org):
    feed = await Feed.connect(urls.app)
    async with at_work(example.decide, urls, engine_db):
        run_id = await start(db, org, example.decide, {"order": "A-100", "reason": "torn"})
        told = [event async for event in events.tail(db, feed, org, run_id)]
    await feed.close()
    paid = {"order": "A-100", "paid_cents": 1900, "decided_by": "policy"}
    assert await outcome(db, org, run_id) == paid
    done = {event.data["name"] for event in told if event.kind == "step.succeeded"}
    assert done == {"refunds.price", "refunds.risk", "refunds.pay"}
    assert [event.data["cents"] for event in told if event.kind == "progress"] == [1900]


async def test_a_large_refund_waits_for_a_person_and_goes_on(example, urls, db, engine_db, org):
    feed = await Feed.connect(urls.app)
    kinds = []
    async with at_work(example.decide, urls, engine_db):
        run_id = await start(db, org, example.decide, {"order": "A-200", "reason": "late"})
        async for event in events.tail(db, feed, org, run_id):
            kinds.append(event.kind)
            if event.kind == "run.awaiting_input":
                async with db.org(org) as con:
                    asked = await con.fetchrow(
                        "select request_id, title from input_request where org_id = $1", org
                    )
                    await questions.resolve(
                        con, org, asked["request_id"], SUPPORT, {"approved": True}
                    )
                assert asked["title"] == "Refund 250.00 for A-200?"
    await feed.close()
    decided = {"order": "A-200", "paid_cents": 25000, "decided_by": "user:ada"}
    assert await outcome(db, org, run_id) == decided
    assert kinds.count("step.succeeded") == 3
    assert (
        kinds.index("input.requested") < kinds.index("input.resolved") < kinds.index("run.resumed")
    )


async def test_a_trip_without_a_room_gives_the_seat_back(trips, urls, db, engine_db, org):
    feed = await Feed.connect(urls.app)
    trips.ROOMS.append("Rome")
    async with at_work(trips.book, urls, engine_db):
        runs = [await start(db, org, trips.book, city) for city in ("Rome", "Atlantis")]
        for run_id in runs:
            last = [event async for event in events.tail(db, feed, org, run_id)][-1]
    await feed.close()
    assert (last.kind, last.data["error"]["code"]) == ("run.failed", "no_room")
    assert await outcome(db, org, runs[0]) == "receipt over 20000"
    assert trips.SEATS == ["Rome"]
    assert trips.TOLD == ["Atlantis: failed"]
