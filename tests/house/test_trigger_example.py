"""The triggered flows of docs/flows.md are taken from the page, started by events, and run."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import sys
import uuid

import orjson
import pytest

from millpond.engine import events, inbound, triggers
from millpond.engine.events import Feed
from millpond.engine.inbound import Incoming
from millpond.engine.triggers import Draft
from millpond.engine.worker import Worker


@pytest.fixture(scope="module")
def example(root, tmp_path_factory):
    """Return the module that the page's block about events is."""
    page = (root / "docs" / "flows.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "EventInput" in block]
    path = tmp_path_factory.mktemp("flows") / "orders_of_the_docs.py"
    path.write_text(block, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[path.stem]


async def test_the_flows_of_the_page_are_started_by_events(example, urls, db, engine_db, org):
    stop = asyncio.Event()
    flows = [example.review, example.tally]
    worker = Worker(
        database=engine_db,
        engine_url=urls.engine,
        listen_url=urls.engine,
        flows=flows,
        slots={"default": 4},
        drain_s=1.0,
    )
    each = Draft(name="one", event="order.placed", flow="orders.review")
    pairs = {"mode": "batch", "max_count": 2, "max_wait_s": 60.0}
    many = Draft(name="many", event="order.placed", flow="orders.tally", **pairs)
    for draft, flow in ((each, example.review), (many, example.tally)):
        triggers.check_flow(draft, flow.input.json_schema())
    async with db.org(org) as con:
        for draft in (each, many):
            await triggers.create(con, org, draft, "user:ann")
    feed = await Feed.connect(urls.app)
    working = asyncio.create_task(worker.run(stop))
    try:
        async with asyncio.timeout(30):
            started = await send(db, engine_db, org)
            for run_id in started:
                async for _ in events.tail(db, feed, org, run_id):
                    pass
    finally:
        stop.set()
        await working
        await feed.close()
    async with db.org(org) as con:
        rows = await con.fetch("select output from run where org_id = $1", org)
    assert sorted(orjson.loads(row["output"]) for row in rows) == [100, 250, 350]


async def send(db, engine_db, org) -> list[uuid.UUID]:
    """Send two events once the worker has published its flows; returns the runs."""
    while True:
        async with engine_db.duty("test") as con:
            if await con.fetchval("select count(*) from flow_version") == 2:
                break
        await asyncio.sleep(0.02)
    placed = [
        Incoming(event_id=f"o{amount}", name="order.placed", data={"amount": amount})
        for amount in (100, 250)
    ]
    async with db.org(org) as con:
        _, readied = await inbound.receive(con, org, placed, "user:ann")
    assert len(readied) == 3
    return [one.run_id for one in readied]
