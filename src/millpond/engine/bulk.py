"""Bulk: the built-in flow `millpond.bulk`, which cancels or reruns all runs that fit a filter.

Submitted by the API as the caller's subject, executed by every worker. Invariants: it acts on runs made
before it, never on itself or on what it makes; each page of at most 200 runs is found in one step and
acted on in another, and acting twice on a run is the same as once, so that a crash repeats nothing.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, Field

from millpond.db.pool import Database
from millpond.db.queries import queries
from millpond.engine import operations, quotas, reruns
from millpond.engine.context import Context, StepContext
from millpond.engine.hints import Hints
from millpond.engine.registry import capability, flow, step
from millpond.engine.reruns import Repeat
from millpond.engine.rights import backing_of
from millpond.engine.views import FlowView, PageOf, RunFilter, find_runs, list_flows
from millpond.errors import Conflict, MillpondError, NotFound, Transient
from millpond.types import Backing, RunState, new_id

FLOW = "millpond.bulk"
VERSION = 1
QUEUE = "default"
PAGE = 200
_EXAMPLES = 20
_SQL = queries("reruns")


@dataclass(frozen=True, kw_only=True, slots=True)
class Operator:
    """What bulk steps act through: the application's pool and hints; a resource of the worker."""

    db: Database
    hints: Hints


class BulkFilter(BaseModel):
    """Which runs an action is for, as `RunFilter` in JSON."""

    states: list[RunState] = Field(default_factory=list)
    flow: str | None = None
    queue: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    q: str | None = None
    labels: dict[str, str] = Field(default_factory=dict)

    def wanted(self, *, before: datetime | None = None) -> RunFilter:
        """Return the filter of runs made before a time."""
        times = [one for one in (self.created_before, before) if one is not None]
        return RunFilter(
            states=frozenset(self.states),
            flow=self.flow,
            queue=self.queue,
            created_after=self.created_after,
            created_before=min(times, default=None),
            search=self.q,
            labels=self.labels,
        )


class BulkWish(BaseModel):
    """What is done to which runs; `flows` are the flow versions, as `name@version`, that the caller may start."""

    action: Literal["cancel", "rerun"]
    filter: BulkFilter
    reason: str = ""
    skip_endings: bool = False
    flows: list[str] = Field(default_factory=list)


class Found(BaseModel):
    """A run to act on, and the id that its repeat gets."""

    run_id: uuid.UUID
    repeat_id: uuid.UUID


class Page(BaseModel):
    """One page of runs, newest first."""

    runs: list[Found]
    has_more: bool


class Trouble(BaseModel):
    """Why one run could not be acted on."""

    run_id: uuid.UUID
    code: str
    message: str


class BulkResult(BaseModel):
    """What became of the runs that fitted: done, skipped since they had changed, or failed."""

    matched: int = 0
    done: int = 0
    skipped: int = 0
    errors: int = 0
    examples: list[Trouble] = Field(default_factory=list, description="The first errors.")

    def plus(self, other: BulkResult) -> BulkResult:
        """Return both together."""
        return BulkResult(
            matched=self.matched + other.matched,
            done=self.done + other.done,
            skipped=self.skipped + other.skipped,
            errors=self.errors + other.errors,
            examples=[*self.examples, *other.examples][:_EXAMPLES],
        )


@step("millpond.bulk.begin")
async def begin(step: StepContext) -> datetime:
    """Return when this run was made: what is younger is not touched."""
    async with step.get(Operator).db.org(step.org_id) as con:
        made_at: datetime = await con.fetchval(_SQL["made_at"], step.org_id, step.run_id)
    return made_at


@step("millpond.bulk.find")
async def find(
    step: StepContext, wanted: BulkFilter, before: datetime, after: uuid.UUID | None
) -> Page:
    """Find the next page of runs, older than `after`."""
    async with step.get(Operator).db.org(step.org_id) as con:
        ids, has_more = await find_runs(
            con, step.org_id, wanted.wanted(before=before), PageOf(limit=PAGE, after=after)
        )
    runs = [Found(run_id=one, repeat_id=new_id()) for one in ids]
    return Page(runs=runs, has_more=has_more)


@step("millpond.bulk.act", timeout_s=600)
async def act(step: StepContext, wish: BulkWish, page: Page, before: BulkResult) -> BulkResult:
    """Act on each run of a page, and tell how far it is."""
    made = BulkResult(matched=len(page.runs))
    hand = _Hand(step.get(Operator), step.org_id, step.run_id, step.subject, wish)
    if wish.action == "rerun":
        await hand.read_flows()
    for found in page.runs:
        try:
            is_done = await (hand.cancel if wish.action == "cancel" else hand.rerun)(found)
        except Transient:
            raise
        except MillpondError as error:
            made.errors += 1
            trouble = Trouble(run_id=found.run_id, code=error.code, message=error.message)
            made.examples = [*made.examples, trouble][:_EXAMPLES]
        else:
            made.done += is_done
            made.skipped += not is_done
    so_far = before.plus(made).model_dump(exclude={"examples"})
    await step.emit("bulk", {"action": wish.action, **so_far})
    return made


@flow(FLOW, version=VERSION, queue=QUEUE, permission=None)
async def bulk(ctx: Context, wish: BulkWish) -> BulkResult:
    """Cancel or rerun all runs that fit a filter and were made before this one."""
    before = await ctx.step(begin)
    total = BulkResult()
    after: uuid.UUID | None = None
    has_more = True
    while has_more:
        page = await ctx.step(find, wish.filter, before, after)
        if not page.runs:
            break
        total = total.plus(await ctx.step(act, wish, page, total))
        after, has_more = page.runs[-1].run_id, page.has_more
    return total


class _Hand:
    """Acts on one run at a time, each in a transaction of its own."""

    def __init__(
        self, operator: Operator, org_id: int, run_id: uuid.UUID, subject: str, wish: BulkWish
    ) -> None:
        self._operator = operator
        self._org_id = org_id
        self._run_id = run_id
        self._backing: Backing | None = None
        self._subject = subject
        self._wish = wish
        self._flows: Mapping[str, Sequence[FlowView]] = {}

    async def read_flows(self) -> None:
        """Read which versions of flows there are."""
        flows: defaultdict[str, list[FlowView]] = defaultdict(list)
        async with self._operator.db.org(self._org_id) as con:
            for one in await list_flows(con):
                flows[one.name].append(one)
            made = await con.fetchrow(_SQL["made_at"], self._org_id, self._run_id)
        self._flows = flows
        self._backing = None if made is None else backing_of(made)

    async def cancel(self, found: Found) -> bool:
        """Cancel a run; False when it has ended otherwise meanwhile, or is gone."""
        try:
            async with self._operator.db.org(self._org_id) as con:
                await operations.cancel(
                    con,
                    self._org_id,
                    found.run_id,
                    self._subject,
                    self._wish.reason,
                    skip_endings=self._wish.skip_endings,
                )
        except (NotFound, Conflict):
            return False
        self._operator.hints.cancelled([found.run_id])
        self._operator.hints.changed([found.run_id])
        return True

    async def rerun(self, found: Found) -> bool:
        """Rerun a run from its start; False when the caller may not, or it is gone."""
        async with self._operator.db.org(self._org_id) as con:
            if await con.fetchval(_SQL["made_at"], self._org_id, found.repeat_id) is not None:
                return True
            try:
                source = await reruns.read(con, self._org_id, found.run_id)
            except NotFound:
                return False
            versions = self._flows.get(source.flow)
            if not versions:
                return False
            # The version that would run counts: versions of a flow may ask for different permissions.
            code = reruns.pick(versions, source.version)
            if capability(code.name, code.version) not in self._wish.flows:
                return False
            repeat = Repeat(
                version=code.version,
                timeout_s=code.timeout_s,
                subject=self._subject,
                input=source.input,
                run_id=found.repeat_id,
                backing=self._backing and _needing(self._backing, code.permission),
            )
            await quotas.spend_one(con, self._org_id)
            intent = await reruns.rerun(con, source, repeat)
        self._operator.hints.wake([intent.queue])
        return True


def _needing(backing: Backing, permission: str | None) -> Backing:
    """Return the backing of a repeat that a caller with this one starts."""
    words = {"runs:start", *([permission] if permission else [])}
    return backing._replace(permission=" ".join(sorted(words)))
