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
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from tests.crash import elsewhere, patterns
from tests.crash.flows import REGISTRY
from tests.crash.sink import Sink

from millpond.db.pool import Connection, Database
from millpond.engine.blocking import resume
from millpond.engine.operations import cancel
from millpond.engine.questions import resolve
from millpond.engine.signals import send
from millpond.engine.submit import submit
from millpond.errors import Conflict, MillpondError, NotFound
from millpond.types import Backing, Intent, Principal

HUMAN = Principal(org_id=0, subject="user:kim", roles=frozenset({"support", "operator"}))
# Flow, input and further fields of one round of intents.
MIX: Sequence[tuple[str, Any, dict[str, Any]]] = (
    ("crash.steps", None, {}),
    ("crash.steps", None, {"delay_s": 0.3}),
    ("crash.fan", None, {}),
    ("crash.sleeper", None, {}),
    ("crash.cut", None, {}),
    ("crash.opens", None, {}),
    ("crash.asks", None, {}),
    ("crash.asks", 0.5, {"labels": {"unanswered": "yes"}}),
    ("crash.flaky", None, {}),
    ("crash.body", None, {}),
    ("crash.fails", False, {}),
    ("crash.fails", True, {}),
    ("crash.sleeper", None, {"labels": {"cancel": "yes"}}),
    *[("crash.together", None, {})] * 4,
    ("crash.doubts", None, {}),
    ("crash.undone", None, {}),
    ("crash.hears", None, {}),
    ("crash.parent", None, {}),
    ("crash.continues", 0, {}),
    ("crash.changed", None, {}),
    ("crash.dozes", None, {"deadline_s": 0.6}),
    ("crash.takes", elsewhere.BIG, {}),
    ("crash.elsewhere", None, {}),
    ("crash.elsewhere", None, {"labels": {"cancel": "yes"}}),
    ("crash.abandons", None, {"labels": {"cancel": "yes"}}),
    ("crash.revoked", None, {"backing": Backing(1, "runs:start")}),
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
    """Those who submit, answer, signal, resume and cancel; what they were told was accepted is kept."""

    db: Database
    org_id: int
    sink: Sink
    accepted: list[uuid.UUID] = field(default_factory=list)
    cancels: set[uuid.UUID] = field(default_factory=set)
    told: set[uuid.UUID] = field(default_factory=set)

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
                "select request_id, q.kind, proposal from input_request q join run using (org_id, run_id)"
                " where state = 'pending' and labels->>'unanswered' is null"
            )
            live = await con.fetch(
                "select run_id, flow, blocked is not null as is_blocked, attempt > 0 as is_begun,"
                " exists (select from event e where e.org_id = item.org_id and e.run_id = item.run_id"
                " and e.kind = 'step.started') as has_told"
                " from item join run using (org_id, run_id) where item.kind = 'run'"
            )
        for row in asked:
            answer = self._answer(row["kind"], orjson.loads(row["proposal"]))
            await self._act(
                lambda con, row=row, answer=answer: resolve(
                    con, self.org_id, row["request_id"], HUMAN, answer=answer
                )
            )
        for row in live:
            run_id = row["run_id"]
            if row["is_blocked"]:
                await self._act(lambda con, one=run_id: resume(con, self.org_id, one, "user:kim"))
            # Where a step elsewhere is to be dropped, it is under way and has nothing more to write.
            is_ripe = row["has_told"] if row["flow"] == "crash.abandons" else row["is_begun"]
            if is_ripe and run_id in self.cancels:
                await self._act(lambda con, one=run_id: cancel(con, self.org_id, one, "user:kim"))
            if row["is_begun"] and row["flow"] == "crash.hears" and run_id not in self.told:
                await self._act(lambda con, one=run_id: self._tell(con, one))
                self.told.add(run_id)

    def _answer(self, kind: str, proposal: Any) -> Any:
        """Approve or not; of an outcome in doubt, say what the sink has seen."""
        if kind == "question":
            return {"approved": random.random() < 0.5}
        number = self.sink.effects.get(proposal["idempotency_key"])
        if number is None:
            return {"outcome": "not_done"}
        return {"outcome": "done", "output": number}

    async def _tell(self, con: Connection, run_id: uuid.UUID) -> None:
        """Send the signal that a run waits for; a repeat has the same id."""
        await send(
            con,
            self.org_id,
            run_id,
            signal_id=uuid.uuid5(run_id, patterns.SIGNAL),
            name=patterns.SIGNAL,
            data="heard",
            subject=HUMAN.subject,
        )

    async def _act(self, act: Callable[[Connection], Awaitable[object]]) -> None:
        """Do one thing in a transaction; what came too late is no error."""
        with contextlib.suppress(Conflict, NotFound):
            async with self.db.org(self.org_id) as con:
                await act(con)

    async def until_left(self, holding: Collection[str], timeout_s: float) -> None:
        """Wait until nothing is live but what was not cancelled of the flows that hold."""
        left = None
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    with contextlib.suppress(MillpondError):
                        left = await self.left(holding)
                        if not left:
                            return
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"still live after {timeout_s} s: {left}") from None

    async def left(self, holding: Collection[str] = ()) -> list[tuple[str, str, int]]:
        """Return flow, state and deaths of each live run and step but those that hold."""
        async with self.db.org(self.org_id) as con:
            rows = await con.fetch(
                "select flow, state, deaths from item join run using (org_id, run_id)"
                " where flow <> all($1::text[]) or run_id = any($2::uuid[]) order by flow",
                list(holding),
                list(self.cancels),
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
