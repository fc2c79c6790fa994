"""Views: what the API and the console show of runs, questions and flows.

Called by the API inside an org transaction. Invariant: it only reads, and every statement names the
org; JSON columns stay text, so that nothing is parsed on its way out.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TypeVar

import orjson

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine import payloads
from millpond.engine.payloads import INPUT, OUTPUT
from millpond.errors import NotFound
from millpond.types import FINAL_STATES, STANDARD, Json, RunState, Urgency

_SQL = queries("views")
# What a list shows of an input or output; more would make a page of runs megabytes.
LISTED_BYTES = 2048
_WHOLE_BYTES = 2**31 - 1
_HIGHEST_ID = uuid.UUID(int=2**128 - 1)
_View = TypeVar("_View")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunView:
    """A run as it stands now; `input`, `output`, `error`, `labels` and `blocked` are JSON text.

    A list leaves out inputs and outputs above `LISTED_BYTES`.
    """

    run_id: uuid.UUID
    flow: str
    version: int
    queue: str
    state: RunState
    priority: int
    input: str | None
    output: str | None
    error: str | None
    subject: str
    attempts: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    labels: str
    cancel_requested: bool
    rerun_of: uuid.UUID | None
    rerun_from: str | None
    blocked: str | None
    deadline_at: datetime | None
    dedup_key: str | None
    urgency: Urgency

    @property
    def truncated(self) -> list[str]:
        """Which values are left out here: a run always has an input, a succeeded one an output."""
        has_output = self.state == RunState.SUCCEEDED
        left_out = {INPUT: self.input is None, OUTPUT: has_output and self.output is None}
        return [name for name, is_left_out in left_out.items() if is_left_out]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepView:
    """A recorded step; `output` and `error` are JSON text.

    `queue` is the other queue in which it waits or is executed now.
    """

    step_key: str
    name: str
    kind: str
    state: str
    output: str | None
    error: str | None
    tries: int
    started_at: datetime
    finished_at: datetime | None
    queue: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Kin:
    """The runs that a run comes from and goes on as."""

    parent_id: uuid.UUID | None
    continued_from: uuid.UUID | None
    continued_to: uuid.UUID | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestView:
    """A question to a human; `form`, `proposal` and `answer` are JSON text."""

    request_id: uuid.UUID
    run_id: uuid.UUID
    step_key: str
    role: str
    title: str
    form: str
    proposal: str
    digest: bytes
    state: str
    kind: str
    expires_at: datetime | None
    created_at: datetime
    answer: str | None
    resolved_by: str | None
    resolved_at: datetime | None


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowView:
    """A flow version that some worker published; schemas and needed labels are parsed."""

    name: str
    version: int
    queue: str
    permission: str | None
    description: str
    input_schema: Json
    output_schema: Json
    timeout_s: float | None
    deadline_s: float | None
    published_at: datetime
    needs: Json
    is_served: bool
    keys: Sequence[str] = ()
    urgency: Urgency = STANDARD


@dataclass(frozen=True, kw_only=True, slots=True)
class EventPosition:
    """How far the events of a run go, and whether more can follow."""

    last_no: int
    is_over: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class PageOf:
    """Which part of a list, newest first: up to `limit` after one id, or before another."""

    limit: int = 50
    after: uuid.UUID | None = None
    before: uuid.UUID | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFilter:
    """What runs to list; an empty filter means all. `search` looks in flow, labels and id.

    A run fits `labels` that has all of them.
    """

    states: frozenset[RunState] = frozenset()
    flow: str | None = None
    queue: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    search: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


async def list_runs(
    con: Connection, org_id: int, wanted: RunFilter, page: PageOf
) -> tuple[list[RunView], bool]:
    """Return one page of runs, newest first, and whether more follow in the page's direction."""
    kept, has_more = await find_runs(con, org_id, wanted, page)
    return await show_runs(con, org_id, kept), has_more


async def find_runs(
    con: Connection, org_id: int, wanted: RunFilter, page: PageOf
) -> tuple[list[uuid.UUID], bool]:
    """Return the ids of one page of runs, newest first, and whether more follow."""
    final = sorted(wanted.states & FINAL_STATES)
    live = sorted(wanted.states - FINAL_STATES)
    ids: set[uuid.UUID] = set()
    if not wanted.states:
        ids |= await _run_ids(con, "run_page", org_id, wanted, page)
    if final:
        ids |= await _run_ids(con, "finished_run_page", org_id, wanted, page, final)
    if live:
        ids |= await _run_ids(con, "live_run_page", org_id, wanted, page, live)
    return _cut(ids, page)


async def get_run(con: Connection, org_id: int, run_id: uuid.UUID) -> RunView:
    """Return one run, whole; raises NotFound when the org has none with this id."""
    found = await show_runs(con, org_id, [run_id], max_bytes=_WHOLE_BYTES)
    if not found:
        raise NotFound(f"run {run_id} does not exist", param="run_id")
    apart = await payloads.read(con, [(org_id, run_id, slot) for slot in found[0].truncated])
    return replace(
        found[0],
        input=apart.get((org_id, run_id, INPUT), found[0].input),
        output=apart.get((org_id, run_id, OUTPUT), found[0].output),
    )


async def list_reruns(con: Connection, org_id: int, run_id: uuid.UUID) -> list[uuid.UUID]:
    """Return the runs that repeat a run, newest first, at most 100."""
    return [row["run_id"] for row in await con.fetch(_SQL["reruns"], org_id, run_id)]


async def list_steps(con: Connection, org_id: int, run_id: uuid.UUID) -> list[StepView]:
    """Return the recorded steps of a run in the order in which they began."""
    return [StepView(**row) for row in await con.fetch(_SQL["steps"], org_id, run_id)]


async def get_kin(con: Connection, org_id: int, run_id: uuid.UUID) -> Kin:
    """Return the runs that one run comes from and goes on as; raises NotFound."""
    row = await con.fetchrow(_SQL["kin"], org_id, run_id)
    if row is None:
        raise NotFound(f"run {run_id} does not exist", param="run_id")
    return Kin(**row)


async def state_values(con: Connection, org_id: int, run_id: uuid.UUID) -> dict[str, str]:
    """Return what a run's flow shows by `set_state`: JSON text, the newest of each name."""
    rows = await con.fetch(_SQL["state_values"], org_id, run_id)
    return {row["name"]: row["output"] for row in rows}


async def event_position(con: Connection, org_id: int, run_id: uuid.UUID) -> EventPosition:
    """Return how far a run's events go; raises NotFound when the org has no such run."""
    row = await con.fetchrow(_SQL["event_position"], org_id, run_id)
    if row is None:
        raise NotFound(f"run {run_id} does not exist", param="run_id")
    return EventPosition(last_no=row["last_no"] or 0, is_over=row["is_over"])


async def list_requests(
    con: Connection,
    org_id: int,
    page: PageOf,
    *,
    state: str | None = None,
    role: str | None = None,
    run_id: uuid.UUID | None = None,
) -> tuple[list[RequestView], bool]:
    """Return one page of questions, newest first, and whether more follow."""
    ids = await _ids(con, "request_page", org_id, page, state, role, run_id, page.limit + 1)
    kept, has_more = _cut(ids, page)
    return await _requests(con, org_id, kept), has_more


async def get_request(con: Connection, org_id: int, request_id: uuid.UUID) -> RequestView:
    """Return one question; raises NotFound when the org has none with this id."""
    found = await _requests(con, org_id, [request_id])
    if not found:
        raise NotFound(f"input request {request_id} does not exist", param="request_id")
    return found[0]


async def list_flows(con: Connection) -> list[FlowView]:
    """Return every published flow version, by name and version."""
    return [_flow(row) for row in await con.fetch(_SQL["published_flows"])]


async def served_queues(con: Connection) -> dict[str, tuple[int, int]]:
    """Return queues that live workers serve, each with its number of workers and slots."""
    rows = await con.fetch(_SQL["served_queues"])
    return {row["queue"]: (row["workers"], row["slots"]) for row in rows}


async def _run_ids(
    con: Connection,
    statement: str,
    org_id: int,
    wanted: RunFilter,
    page: PageOf,
    states: Sequence[RunState] = (),
) -> set[uuid.UUID]:
    contains, begins = _patterns(wanted.search)
    return await _ids(
        con,
        statement,
        org_id,
        page,
        wanted.flow,
        wanted.queue,
        wanted.created_after,
        wanted.created_before,
        contains,
        begins,
        page.limit + 1,
        orjson.dumps(dict(wanted.labels)).decode() if wanted.labels else None,
        *([[str(state) for state in states]] if states else []),
    )


async def _ids(
    con: Connection, statement: str, org_id: int, page: PageOf, *arguments: object
) -> set[uuid.UUID]:
    below = page.after or _HIGHEST_ID
    rows = await con.fetch(_SQL[statement], org_id, below, page.before, *arguments)
    return {row[0] for row in rows}


def _cut(ids: Iterable[uuid.UUID], page: PageOf) -> tuple[list[uuid.UUID], bool]:
    """Keep the `limit` ids nearest to the cursor; one beyond them tells that more follow."""
    nearest = sorted(ids, reverse=page.before is None)
    return nearest[: page.limit], len(nearest) > page.limit


def _patterns(search: str | None) -> tuple[str | None, str | None]:
    if search is None:
        return None, None
    plain = search.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return f"%{plain}%", f"{plain.lower()}%"


async def show_runs(
    con: Connection, org_id: int, ids: Sequence[uuid.UUID], *, max_bytes: int = LISTED_BYTES
) -> list[RunView]:
    """Return runs by their ids, newest first, without values of more than `max_bytes`."""
    return await _fetch(con, "runs", org_id, ids, _run, max_bytes)


async def _requests(con: Connection, org_id: int, ids: Sequence[uuid.UUID]) -> list[RequestView]:
    return await _fetch(con, "requests", org_id, ids, lambda row: RequestView(**row))


async def _fetch(
    con: Connection,
    statement: str,
    org_id: int,
    ids: Sequence[uuid.UUID],
    view: Callable[[Record], _View],
    *more: object,
) -> list[_View]:
    if not ids:
        return []
    return [view(row) for row in await con.fetch(_SQL[statement], org_id, ids, *more)]


def _run(row: Record) -> RunView:
    return RunView(**{**row, "state": RunState(row["state"])})


def _flow(row: Record) -> FlowView:
    schemas = ("input_schema", "output_schema", "needs")
    parsed = {name: orjson.loads(row[name]) if row[name] else None for name in schemas}
    fields = {key: value for key, value in row.items() if key != "flow"}
    return FlowView(**{**fields, **parsed, "name": row["flow"]})
