"""The flows that benchmarks run: as small as a flow can be, so that what is measured is the engine.

Called by the measuring process and by worker processes of `benchmarks.worker`. Invariant: they use
nothing of the engine but what any flow author has.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from pydantic import BaseModel, Field

from millpond.db.pool import Database
from millpond.engine.context import Context, StepContext
from millpond.engine.registry import Registry, flow, step

REGISTRY = Registry()
BURN_S = 0.003
A_DAY_S = 86_400.0
# What `filing` works on: documents of one base, with ids that follow from their numbers.
BASE = uuid.UUID(int=1)
DOCUMENTS = 2_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Nap:
    """One run that rested: whose it was, and from when to when its code ran."""

    org_id: int
    run_id: uuid.UUID
    began: float
    ended: float


@dataclass
class Seen:
    """What flow code of this process did: starts counted, rests noted, starts awaited by a run's id."""

    starts: int = 0
    began: float = 0.0
    naps: list[Nap] = field(default_factory=list)
    marks: dict[str, asyncio.Future[float]] = field(default_factory=dict)

    def note(self) -> None:
        """Count a start; the first one starts the clock."""
        if not self.starts:
            self.began = time.perf_counter()
        self.starts += 1

    def forget(self) -> None:
        """Count from none again."""
        self.starts, self.began = 0, 0.0
        self.naps.clear()


SEEN = Seen()


@flow("bench.noop", registry=REGISTRY)
async def noop(ctx: Context, data: dict[str, str]) -> None:
    """Do nothing but be counted."""
    SEEN.note()


class Order(BaseModel):
    """What is accepted over HTTP: the input has a schema, as that of a real flow."""

    customer: str = Field(min_length=1, max_length=100)
    text: str = Field(max_length=1000)


@flow("bench.accepted", permission="runs:start", registry=REGISTRY)
async def accepted(ctx: Context, data: Order) -> None:
    """Do nothing with an order that came over HTTP but be counted."""
    SEEN.note()


@flow("bench.three", registry=REGISTRY)
async def three(ctx: Context, data: dict[str, str]) -> int:
    """Take three durable steps, one after the other."""
    SEEN.note()
    total = 0
    for name in ("a", "b", "c"):
        total += await ctx.step(name, _one)
    return total


@flow("bench.parallel", registry=REGISTRY)
async def parallel(ctx: Context, data: dict[str, str]) -> int:
    """Take three durable steps side by side."""
    SEEN.note()
    return sum(await ctx.parallel(*(ctx.step(name, _one) for name in ("a", "b", "c"))))


@flow("bench.one", registry=REGISTRY)
async def one(ctx: Context, data: dict[str, str]) -> int:
    """Take one durable step."""
    SEEN.note()
    return await ctx.step("a", _one)


@flow("bench.registered", registry=REGISTRY)
async def registered(ctx: Context, data: dict[str, str]) -> int:
    """Take one registered step, which gets a context of its own."""
    SEEN.note()
    return await ctx.step(count_letters, data["text"])


@flow("bench.emit", registry=REGISTRY)
async def emit(ctx: Context, data: dict[str, str]) -> None:
    """Store one progress event."""
    SEEN.note()
    await ctx.emit("half", {"of": 2})


@flow("bench.now", registry=REGISTRY)
async def now(ctx: Context, data: dict[str, str]) -> str:
    """Record the time."""
    SEEN.note()
    return (await ctx.now()).isoformat()


@flow("bench.mapped", registry=REGISTRY)
async def mapped(ctx: Context, data: dict[str, str]) -> int:
    """Take three durable steps by a map."""
    SEEN.note()
    return sum(await ctx.map(lambda name: ctx.step(name, _one), ("a", "b", "c")))


@flow("bench.child", registry=REGISTRY)
async def child(ctx: Context, data: dict[str, str]) -> None:
    """Be a child run that does nothing."""


@flow("bench.parent", registry=REGISTRY)
async def parent(ctx: Context, data: dict[str, str]) -> None:
    """Start a child run and wait for its end, holding nothing."""
    SEEN.note()
    await ctx.run_flow(child, data)


@flow("bench.mark", registry=REGISTRY)
async def mark(ctx: Context, data: dict[str, str]) -> None:
    """Tell whoever awaits this run when its first line ran."""
    now = time.perf_counter()
    waiting = SEEN.marks.pop(str(ctx.run_id), None)
    if waiting is not None and not waiting.done():
        waiting.set_result(now)


class Rest(BaseModel):
    """How long a run rests, and the text that makes inputs as big as everybody's."""

    rest_s: float
    text: str


@flow("bench.nap", registry=REGISTRY)
async def nap(ctx: Context, data: Rest) -> None:
    """Do what most runs do, wait for somebody else."""
    await _rest(ctx, data)


@flow("bench.long_nap", registry=REGISTRY)
async def long_nap(ctx: Context, data: Rest) -> None:
    """Be another flow that rests, whose runs the engine expects to take as long as theirs did."""
    await _rest(ctx, data)


@flow("bench.burn", registry=REGISTRY)
async def burn(ctx: Context, data: dict[str, str]) -> int:
    """Take one step that burns a few milliseconds of processor time in Python."""
    return await ctx.step("burn", _burn)


@flow("bench.holder", registry=REGISTRY)
async def holder(ctx: Context, data: dict[str, str]) -> None:
    """Hold a slot, and a place under every key that the run has, for a day."""
    await asyncio.sleep(A_DAY_S)


@flow("bench.sleeper", registry=REGISTRY)
async def sleeper(ctx: Context, data: dict[str, str]) -> None:
    """Sleep for a day."""
    await ctx.sleep(A_DAY_S)


@flow("bench.filing", registry=REGISTRY)
async def filing(ctx: Context, data: dict[str, str]) -> None:
    """Read twenty rows of the org in one step, write two in another, both as the application's role."""
    SEEN.note()
    number = ctx.run_id.int % DOCUMENTS
    await ctx.step(look, number)
    await ctx.step(keep, number, data["text"])


@flow("bench.asker", registry=REGISTRY)
async def asker(ctx: Context, data: dict[str, str]) -> None:
    """Ask a person and wait."""
    await ctx.ask_human("approve", role="bench", form={"type": "object"}, proposal=data["customer"])


@step("bench.count_letters")
async def count_letters(step_ctx: StepContext, text: str) -> int:
    """Return the length of a text."""
    return len(text)


@step("bench.look", registry=REGISTRY)
async def look(step_ctx: StepContext, number: int) -> int:
    """List twenty documents from one on."""
    async with step_ctx.get(Database).org(step_ctx.org_id) as con:
        rows = await con.fetch(
            "select document_id, title, status, progress from document "
            "where org_id = $1 and base_id = $2 and filename >= $3 order by filename limit 20",
            step_ctx.org_id,
            BASE,
            file_name(number),
        )
    return len(rows)


@step("bench.keep", registry=REGISTRY)
async def keep(step_ctx: StepContext, number: int, text: str) -> None:
    """Write how far a document is, and its text."""
    async with step_ctx.get(Database).org(step_ctx.org_id) as con:
        await con.execute(
            "update document set progress = 0.5, updated_at = clock_timestamp() "
            "where org_id = $1 and document_id = $2",
            step_ctx.org_id,
            document_id(number),
        )
        await con.execute(
            "insert into document_text (org_id, document_id, version, text) values ($1, $2, 1, $3) "
            "on conflict (org_id, document_id, version) do update set text = excluded.text",
            step_ctx.org_id,
            document_id(number),
            text,
        )


def document_id(number: int) -> uuid.UUID:
    """Return the id of the document of a number."""
    return uuid.UUID(int=number + 1)


def file_name(number: int) -> str:
    """Return the name of the document of a number; names sort as numbers do."""
    return f"{number:06}.txt"


async def _rest(ctx: Context, data: Rest) -> None:
    began = time.perf_counter()
    await asyncio.sleep(data.rest_s)
    SEEN.naps.append(
        Nap(org_id=ctx.org_id, run_id=ctx.run_id, began=began, ended=time.perf_counter())
    )


async def _one() -> int:
    return 1


async def _burn() -> int:
    return burn_for(BURN_S, time.thread_time)


def burn_for(seconds: float, clock: Callable[[], float]) -> int:
    """Count in Python until `clock` has gone on by `seconds`; returns how far it came."""
    until, rounds = clock() + seconds, 0
    while clock() < until:
        rounds += sum(range(100)) > 0
    return rounds
