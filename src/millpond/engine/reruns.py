"""Reruns: a new run that repeats one that was, from its start, from a step on, or from all it recorded.

Called by the API and by bulk flows in an org transaction; the caller commits, then hints. Invariants: a
run that ended stays as it ended; a repeat names the run that it repeats; what was poison is executed
alone from its first attempt on.
"""

from __future__ import annotations

import difflib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import orjson

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.engine import dedup, poison
from millpond.engine.events import Fact, append
from millpond.engine.lanes import SUSPECT_DEATHS
from millpond.engine.rights import backing_of
from millpond.engine.submit import submit
from millpond.engine.views import FlowView
from millpond.errors import Conflict, InvalidInput, NotFound
from millpond.types import STANDARD, Backing, Intent, Origin, Urgency, new_id

_SQL = queries("reruns")
# A suspect's way to its lane is that of a delayed start: it must not be ready before it is marked.
_MOMENT_S = 0.001
_NEAR = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A run to repeat; `input` is JSON text, `outcome` None while it is live.

    One that `is_poison` took its workers down itself, or failed by a step in another queue (`failed_step` is its name)
    or a child that did.
    """

    org_id: int
    run_id: uuid.UUID
    flow: str
    version: int
    queue: str
    subject: str
    priority: int
    keys: Sequence[str]
    labels: Mapping[str, str]
    input: str
    outcome: str | None
    is_poison: bool
    failed_step: str | None
    poisoned_child: uuid.UUID | None
    deadline_s: float | None
    dedup_key: str | None
    backing: Backing | None = None
    urgency: Urgency = STANDARD


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeat:
    """How to repeat a run: by which code, for whom, with which input (JSON text), from where.

    With `from_step`, what had ended before that step began is kept; with `keeps_all`, everything.
    """

    version: int
    timeout_s: float | None
    subject: str
    input: str
    from_step: str | None = None
    keeps_all: bool = False
    traceparent: str | None = None
    run_id: uuid.UUID | None = None
    backing: Backing | None = None


async def read(con: Connection, org_id: int, run_id: uuid.UUID) -> Source:
    """Return a run as far as a repeat needs it; raises NotFound."""
    row = await con.fetchrow(_SQL["source"], org_id, run_id)
    if row is None:
        raise NotFound(f"run {run_id} does not exist", param="run_id")
    return Source(
        org_id=org_id,
        run_id=run_id,
        flow=row["flow"],
        version=row["version"],
        queue=row["queue"],
        subject=row["subject"],
        priority=row["priority"],
        keys=row["keys"],
        labels=orjson.loads(row["labels"]),
        input=row["input"],
        outcome=row["outcome"],
        is_poison=row["outcome"] == "failed" and row["error_code"] == poison.CODE,
        failed_step=row["failed_step"],
        poisoned_child=row["poisoned_child"],
        deadline_s=row["deadline_s"],
        dedup_key=row["dedup_key"],
        backing=backing_of(row),
        urgency=row["urgency"],
    )


async def check_step(con: Connection, source: Source, step_key: str) -> None:
    """Raise Conflict for a live run, InvalidInput for a step that it has not recorded."""
    if source.outcome is None:
        raise Conflict(
            f"run {source.run_id} has not ended: only then it can be repeated from a step",
            code="not_finished",
            advice="cancel it first, or rerun it from the start",
        )
    rows = await con.fetch(_SQL["step_keys"], source.org_id, source.run_id)
    keys = [row["step_key"] for row in rows]
    if step_key in keys:
        return
    near = difflib.get_close_matches(step_key, keys, _NEAR, 0.5) or keys[:_NEAR]
    raise InvalidInput(
        f"run {source.run_id} has recorded no step {step_key!r}",
        param="from_step",
        code="step_unknown",
        advice=f"near it: {', '.join(near)}" if near else "it has recorded no step: rerun it whole",
    )


def pick(versions: Sequence[FlowView], version: int) -> FlowView:
    """Choose the code of a repeat: the same version while workers have it, else the newest."""
    newest = versions[-1]
    same = next((one for one in versions if one.version == version), None)
    return same if same is not None and (same.is_served or not newest.is_served) else newest


def check_poison(source: Source) -> None:
    """Raise Conflict unless the run was failed as poison, by itself or by a step of its own."""
    if not source.is_poison:
        raise Conflict(
            f"run {source.run_id} was not failed as poison",
            code="not_poison",
            advice="rerun it instead",
        )
    if (child := source.poisoned_child) is not None:
        raise Conflict(
            f"run {source.run_id} failed because its child run {child} is poison",
            code="poisoned_child",
            advice=f"release {child}; to have its result here, rerun this run from the step that starts it",
            details={"run_id": str(child)},
        )


def intent_of(source: Source, repeat: Repeat) -> Intent:
    """Return the intent of a repeat: as the first one, but for what the repeat names."""
    return Intent(
        org_id=source.org_id,
        flow=source.flow,
        version=repeat.version,
        queue=source.queue,
        input=repeat.input.encode(),
        subject=repeat.subject,
        priority=source.priority,
        delay_s=_MOMENT_S if source.is_poison else 0.0,
        keys=tuple(source.keys),
        timeout_s=repeat.timeout_s,
        traceparent=repeat.traceparent,
        labels=source.labels,
        run_id=repeat.run_id or new_id(),
        deadline_s=source.deadline_s,
        dedup_key=source.dedup_key,
        origin=Origin(run_id=source.run_id, kind="rerun", from_step=repeat.from_step),
        backing=repeat.backing,
        urgency=source.urgency,
    )


async def copy(con: Connection, source: Source, repeat: Repeat, run_id: uuid.UUID) -> int:
    """Copy to the new run what it keeps; returns how many steps that were.

    Steps of the name that failed the run are tried again if they were poison. Raises NotFound when
    retention deleted the run meanwhile: its effects must not happen again.
    """
    if repeat.from_step is None and not repeat.keeps_all:
        return 0
    if await con.fetchrow(_SQL["hold"], source.org_id, source.run_id) is None:
        raise NotFound(f"run {source.run_id} does not exist any more", param="run_id")
    count: int = await con.fetchval(
        _SQL["copy_steps"],
        source.org_id,
        source.run_id,
        run_id,
        repeat.from_step,
        source.failed_step,
    )
    return count


async def mark(con: Connection, source: Source, intent: Intent) -> None:
    """Give a submitted repeat the key that the first run had, and let one of poison be executed alone.

    Raises Conflict (`duplicate_run`) while another run with the key is live: it may be the first run.
    """
    if intent.dedup_key is not None:
        await dedup.settle(con, intent, "reject")
    if source.is_poison:
        await con.execute(_SQL["suspect"], intent.org_id, intent.run_id, SUSPECT_DEATHS)


async def note_release(con: Connection, intent: Intent, subject: str, reason: str) -> None:
    """Store who let a poisoned run be tried again."""
    fact = Fact("run.released", None, {"by": subject, "reason": reason or "poison"})
    await append(con, intent.org_id, intent.run_id, [fact])


async def rerun(con: Connection, source: Source, repeat: Repeat) -> Intent:
    """Store a repeat of a run and return what was submitted."""
    intent = intent_of(source, repeat)
    await copy(con, source, repeat, intent.run_id)
    await submit(con, [intent])
    await mark(con, source, intent)
    return intent
