"""Runs that together pass every commit point, and the people who decide on them.

Used by the crash tests, whose worker processes execute it, and by the storms. Invariant: nothing here
talks to a worker; like callers and people it knows the database alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from tests.crash.flows import REGISTRY
from tests.crash.sink import Sink

from millpond.db.pool import Database
from millpond.engine.operations import cancel
from millpond.engine.submit import submit
from millpond.engine.waits import resolve
from millpond.errors import Conflict, MillpondError, NotFound
from millpond.types import Intent, Principal

HUMAN = Principal(org_id=0, subject="user:kim", roles=frozenset({"support"}))
# Flow, input and further fields of one round of intents.
MIX: Sequence[tuple[str, Any, dict[str, Any]]] = (
    ("crash.steps", None, {}),
    ("crash.steps", None, {"delay_s": 0.3}),
    ("crash.fan", None, {}),
    ("crash.sleeper", None, {}),
    ("crash.asks", None, {}),
    ("crash.asks", 0.5, {"labels": {"unanswered": "yes"}}),
    ("crash.flaky", None, {}),
    ("crash.body", None, {}),
    ("crash.fails", False, {}),
    ("crash.fails", True, {}),
    ("crash.sleeper", None, {"labels": {"cancel": "yes"}}),
)


def intent(org_id: int, flow: str, data: Any = None, **more: Any) -> Intent:
    """Make an intent of one of the workload's flows."""
    return Intent(
        org_id=org_id,
        flow=flow,
        version=1,
        queue=REGISTRY.flows[flow, 1].queue,
        input=orjson.dumps(data),
        subject="user:test",
        **more,
    )


def mixed(org_id: int) -> list[Intent]:
    """Make one round of intents."""
    return [intent(org_id, flow, data, **more) for flow, data, more in MIX]


@dataclass
class People:
    """Those who submit, answer and cancel; what they were told was accepted is kept."""

    db: Database
    org_id: int
    accepted: list[uuid.UUID] = field(default_factory=list)
    cancels: set[uuid.UUID] = field(default_factory=set)

    async def submit(self, intents: Sequence[Intent]) -> None:
        """Submit in one transaction; a submit without an answer counts as not accepted."""
        self.cancels |= {one.run_id for one in intents if "cancel" in one.labels}
        async with self.db.org(self.org_id) as con:
            ids = await submit(con, intents)
        self.accepted += ids

    async def decide(self) -> None:
        """Answer open questions, and cancel what is to be cancelled once it has begun; for ever."""
        while True:
            with contextlib.suppress(MillpondError):
                await self._decide_all()
            await asyncio.sleep(0.05)

    async def _decide_all(self) -> None:
        async with self.db.org(self.org_id) as con:
            asked = await con.fetch(
                "select request_id from input_request join run using (org_id, run_id)"
                " where state = 'pending' and labels->>'unanswered' is null"
            )
            begun = await con.fetch(
                "select run_id from item where attempt > 0 and run_id = any($1::uuid[])",
                list(self.cancels),
            )
        for row in asked:
            with contextlib.suppress(Conflict):
                async with self.db.org(self.org_id) as con:
                    answer = {"approved": random.random() < 0.5}
                    await resolve(con, self.org_id, row["request_id"], HUMAN, answer=answer)
        for row in begun:
            with contextlib.suppress(Conflict, NotFound):
                async with self.db.org(self.org_id) as con:
                    await cancel(con, self.org_id, row["run_id"], HUMAN.subject)

    async def until_left(self, most: int, timeout_s: float) -> None:
        """Wait until at most so many runs have not ended."""
        left = None
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    with contextlib.suppress(MillpondError):
                        left = await self.left()
                        if len(left) <= most:
                            return
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"still live after {timeout_s} s: {left}") from None

    async def left(self) -> list[tuple[str, str, int]]:
        """Return flow, state and deaths of each run that has not ended."""
        async with self.db.org(self.org_id) as con:
            rows = await con.fetch(
                "select flow, state, deaths from item join run using (org_id, run_id) order by flow"
            )
        return [tuple(row) for row in rows]


@asynccontextmanager
async def worker_process(
    engine_url: str, sink: Sink, *, crash: str = "", lease_s: float = 3.0, slots: int = 30
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Start a worker process that crashes where it is ordered to; kill what is left of it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.crash.worker_process",
        stdin=subprocess.PIPE,
        env={**os.environ, "MILLPOND_CRASH": crash},
    )
    assert process.stdin is not None
    orders = {"engine": engine_url, "sink": str(sink.path), "lease_s": lease_s, "slots": slots}
    process.stdin.write(orjson.dumps(orders) + b"\n")
    with contextlib.suppress(ConnectionError):
        await process.stdin.drain()
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
