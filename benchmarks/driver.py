"""The driver of Millpond: answers the same orders as the peers' drivers, in a process of its own.

Run by `benchmarks.systems`; speaks the wire of `peers/wire.py`. Settings: one worker, with `measures`' slots.
"""

from __future__ import annotations

import asyncio
import sys

import orjson

from benchmarks import measures, neighbours
from benchmarks.flows import noop, three
from benchmarks.ground import Ground, Server, open_ground, quiet
from millpond.cli.loop import run_loop
from millpond.db.embedded import Urls
from millpond.types import Json


async def answer(at: Ground, order: str, count: int) -> dict[str, Json]:
    """Carry out one order."""
    if order == "submit":
        found = await measures.submit_one_by_one(at, count=count)
        return {
            "took_s": found.took,
            "commits_s": found.commits,
            "transactions_s": found.transactions,
        }
    if order == "bulk":
        return {"took_s": await measures.bulk(at, count=count)}
    if order == "idle":
        return {"took_s": await measures.idle_dispatch(at, count=count)}
    if order == "noisy":
        return await neighbours.noisy(at, count=count)
    flow, slots = {
        "drain": (noop, measures.DRAIN_SLOTS),
        "steps": (three, measures.STEPS_SLOTS),
    }[order]
    return {"took_s": count / await measures.drain(at, flow, count=count, slots=slots)}


async def serve() -> None:
    """Set up, then answer orders until standard input closes."""
    setup = orjson.loads(await asyncio.to_thread(sys.stdin.readline))
    async with open_ground(Server(Urls(**setup["urls"]))) as at:
        print('{"ready":true}', flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            order = orjson.loads(line)
            found = await answer(at, order["do"], order["count"])
            print(orjson.dumps(found).decode(), flush=True)


if __name__ == "__main__":
    quiet()
    run_loop(serve())
