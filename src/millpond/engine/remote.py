"""Remote: steps that execute in another queue than their run, as rows: sent, settled, waiting, given back.

Called by `context` (send), `step_executor` and `step_tries` (settle, rest, release, drop), `endings` (stop) and
`maintenance` (rescue). Invariants: every write of a worker is fenced by the token on the step's own live
row; that row is locked before the live row of its run, under which events are numbered, never after.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import orjson

from millpond.db.pool import Connection, EngineDatabase, Record
from millpond.db.queries import queries
from millpond.engine import metering, payloads
from millpond.engine.duties import Duty
from millpond.engine.events import Fact, append
from millpond.engine.fitting import check_step_fits
from millpond.engine.lanes import (
    ALONE,
    RESUME_LEAD_US,
    RESUMED,
    SUSPECT,
    SUSPECT_DEATHS,
    lane_id,
    offset_us,
)
from millpond.engine.leases import Lease
from millpond.engine.metering import Spent
from millpond.engine.payloads import Payload
from millpond.engine.tokens import need_of, without_need
from millpond.engine.waits import Readied, Wake, ready
from millpond.errors import LeaseLost

_SQL = queries("remote")
_WAITS = queries("waits")
_MAINTENANCE = queries("maintenance")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """A step of a run that shall execute in `queue`; `arguments` are JSON text, `keys` count beside the run's."""

    step_key: str
    name: str
    queue: str
    capability: str
    arguments: str
    seq: int | None = None
    keys: tuple[str, ...] = ()


class Order(NamedTuple):
    """What a claimed step shall do: its name and arguments; `age_s` counts from its first claim.

    `duties` are those of its run.
    """

    name: str
    arguments: str
    age_s: float
    duties: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteWrite:
    """What happened to a step: done, failed, or waiting for a next try; without `state` the event alone.

    JSON fields are text.
    """

    lease: Lease
    step_key: str
    event_kind: str
    event_data: str
    state: str | None = None
    output: str | None = None
    error: str | None = None
    tries: int = 0
    spent: Sequence[Spent] = ()

    @property
    def is_end(self) -> bool:
        """Whether nothing more is to be done for this step."""
        return self.state in ("done", "failed")


def item_id(org_id: int, run_id: uuid.UUID, step_key: str) -> uuid.UUID:
    """Return the id of a step's work item: the same whoever computes it, however often."""
    return uuid.uuid5(run_id, f"{org_id}:{step_key}")


async def send(database: EngineDatabase, lease: Lease, sent: Sent) -> None:
    """Record a step as waiting and queue its work item; a step that is recorded already is left."""
    org_id, run_id = lease.org_id, lease.run_id
    async with database.duty("step_send") as con:
        run = await con.fetchrow(_SQL["hold_run"], org_id, lease.item_id, lease.token)
        if run is None:
            raise LeaseLost("the lease is gone")
        keys = _keys_of(run["keys"], sent.keys)
        if need_of(sent.keys) is not None:
            await check_step_fits(con, org_id, sent.name, sent.queue, sent.capability, keys)
        # What was begun goes before what was not: the lane of resumed work from the start.
        lane = (
            (SUSPECT if run["is_careful"] else 0)
            | RESUMED
            | lane_id(
                queue=sent.queue,
                org_id=org_id,
                capability=sent.capability,
                keys=keys,
                priority=run["priority"],
                urgency=run["urgency"],
            )
        )
        is_sent = await con.fetchval(
            _SQL["send"],
            org_id,
            run_id,
            item_id(org_id, run_id, sent.step_key),
            sent.step_key,
            sent.name,
            payloads.inline(sent.arguments),
            lease.attempt,
            sent.queue,
            sent.capability,
            lane,
            keys,
            offset_us(run["priority"], run["urgency"]) - RESUME_LEAD_US,
            orjson.dumps({"name": sent.name, "queue": sent.queue}).decode(),
            int(Duty.CHILDREN),
            sent.seq,
            SUSPECT_DEATHS if run["is_careful"] else 0,
            ALONE if run["is_careful"] else "",
            keys if sent.keys else None,
        )
        if is_sent and payloads.is_big(sent.arguments):
            slot = payloads.slot_of_arguments(sent.step_key)
            await payloads.keep(con, [Payload(org_id, run_id, slot, sent.arguments)])


def _keys_of(run_keys: Sequence[str], keys: Sequence[str]) -> Sequence[str]:
    """Return what a step counts on in another queue: a need of its own takes the place of its run's."""
    if not keys:
        return run_keys
    return sorted({*(run_keys if need_of(keys) is None else without_need(run_keys)), *keys})


async def orders(database: EngineDatabase, leases: Sequence[Lease]) -> dict[Lease, Order]:
    """Read what is to be done under leases of steps; those whose runs have ended are left out."""
    if not leases:
        return {}
    async with database.statement("step_orders") as con:
        rows = await con.fetch(
            _SQL["orders"], [one.org_id for one in leases], [one.item_id for one in leases]
        )
    by_item = {(lease.org_id, lease.item_id): lease for lease in leases}
    return {
        by_item[row["org_id"], row["item_id"]]: Order(
            row["name"], row["input"], row["age_s"] or 0.0, row["duties"]
        )
        for row in rows
    }


async def settle(con: Connection, writes: Sequence[RemoteWrite]) -> tuple[set[int], list[Readied]]:
    """Store writes whose leases still hold; returns their positions, and runs that may go on.

    A step whose run has ended leaves nothing but its record as it was.
    """
    order = sorted(range(len(writes)), key=lambda nth: writes[nth].lease.item_id.bytes)
    leases = [writes[nth].lease for nth in order]
    rows = await con.fetch(_SQL["hold"], *_columns(leases))
    held = sorted(order[row["ord"] - 1] for row in rows)
    states = await _lock_runs(con, [writes[nth].lease for nth in held])
    live = [nth for nth in held if _run_of(writes[nth].lease) in states]
    dead = [writes[nth].lease for nth in held if _run_of(writes[nth].lease) not in states]
    await _drop(con, dead)
    if not live:
        return set(), []
    await _store(con, [writes[nth] for nth in live])
    ended = {_run_of(writes[nth].lease) for nth in live if writes[nth].is_end}
    wakes = [
        Wake(org_id=org_id, run_id=run_id)
        for org_id, run_id in sorted(ended)
        if states[org_id, run_id] in ("waiting", "awaiting_input")
    ]
    return set(live), await ready(con, wakes)


async def _store(con: Connection, writes: Sequence[RemoteWrite]) -> None:
    await con.execute(
        _SQL["settle"],
        [write.lease.org_id for write in writes],
        [write.lease.item_id for write in writes],
        [write.lease.run_id for write in writes],
        [write.step_key for write in writes],
        [write.state for write in writes],
        [payloads.inline(write.output) for write in writes],
        [write.error for write in writes],
        [write.tries for write in writes],
        [write.event_kind for write in writes],
        [write.event_data for write in writes],
        [write.lease.attempt for write in writes],
    )
    await metering.store(con, [(write.lease, one) for write in writes for one in write.spent])
    await payloads.keep(
        con,
        [
            Payload(*_run_of(write.lease), payloads.slot_of_step(write.step_key), write.output)
            for write in writes
            if write.output is not None and payloads.is_big(write.output)
        ],
    )


async def rest(database: EngineDatabase, write: RemoteWrite, *, delay_s: float) -> None:
    """Store a failed try and let the step wait for the next one, without slot and lease."""
    lease = write.lease
    async with database.duty("step_rest") as con:
        stored, _ = await settle(con, [write])
        if stored:
            await con.execute(_SQL["rest"], lease.org_id, lease.item_id)
            await con.fetchval(
                _WAITS["set_timer"], lease.org_id, lease.item_id, "", "retry", delay_s
            )


async def release(database: EngineDatabase, lease: Lease, *, reason: str) -> list[Readied]:
    """Hand a step back to its queue, no try counted: another worker executes it."""
    async with database.duty("step_release") as con:
        if not await con.fetch(_SQL["hold"], *_columns([lease])):
            raise LeaseLost("the lease is gone")
        if not await _lock_runs(con, [lease]):
            await _drop(con, [lease])
            return []
        await con.execute(_WAITS["unlease"], lease.org_id, lease.item_id, lease.token)
        return await _ready_again(con, [lease], "step.released", {"reason": reason})


async def drop(database: EngineDatabase, lease: Lease) -> None:
    """Remove a step whose run has ended or ends; nothing happens when the lease is gone."""
    async with database.duty("step_drop") as con:
        await _drop(con, [lease])


async def stop(con: Connection, org_ids: list[int], run_ids: list[uuid.UUID]) -> None:
    """Remove the steps of ended runs from their queues; those under way are asked to stop."""
    await con.execute(_SQL["stop"], org_ids, run_ids)


async def rescue(
    con: Connection,
    lost: Sequence[Record],
    *,
    deaths: AbstractSet[uuid.UUID],
    heard_at: Mapping[uuid.UUID, datetime],
) -> list[Readied]:
    """Give back steps whose worker is gone; their live rows are locked. A run that is held waits its turn.

    `deaths` are the tokens of leases under which a worker died.
    """
    leases = [
        Lease(row["org_id"], row["item_id"], row["run_id"], row["attempt"], row["token"])
        for row in lost
    ]
    if not leases:
        return []
    runs = sorted({_run_of(lease) for lease in leases}, key=lambda run: run[1].bytes)
    columns = [org_id for org_id, _ in runs], [run_id for _, run_id in runs]
    free = {tuple(row) for row in await con.fetch(_SQL["lock_free_runs"], *columns)}
    live = {tuple(row) for row in await con.fetch(_SQL["live_runs"], *columns)}
    over = [lease for lease in leases if _run_of(lease) not in live]
    suspects = {row["token"] for row in lost if row["deaths"] >= SUSPECT_DEATHS}
    deadly = suspects & deaths
    mine = [lease for lease in leases if _run_of(lease) in free]
    dead = [lease for lease in mine if lease.token in deadly]
    if over or dead:
        await con.execute(_SQL["tell_lost"], *_columns([*over, *dead]))
    await _drop(con, over)
    poisoned = await _fail_poisoned(con, dead)
    back = [lease for lease in mine if lease.token not in deadly]
    until = {row["token"]: heard_at.get(row["worker_id"]) for row in lost}
    await con.execute(
        _MAINTENANCE["unlease"], *_columns(back), [until[lease.token] for lease in back]
    )
    return poisoned + await _ready_again(con, back, "step.rescued", {}, deaths=deaths)


async def _fail_poisoned(con: Connection, leases: Sequence[Lease]) -> list[Readied]:
    """Fail steps that also took down the process that had them alone; their runs go on with that."""
    if not leases:
        return []
    writes = []
    for lease, place in zip(leases, await _places(con, leases), strict=True):
        error = {
            "class": "Poison",
            "code": "poison",
            "message": "its worker died each time, the last time with this step alone in the process",
            "step": place["name"],
        }
        data = {"name": place["name"], "queue": place["queue"], "tries": place["tries"]}
        writes.append(
            RemoteWrite(
                lease=lease,
                step_key=place["step_key"],
                state="failed",
                error=orjson.dumps(error).decode(),
                tries=place["tries"],
                event_kind="step.failed",
                event_data=orjson.dumps({**data, "error": error}).decode(),
            )
        )
    _, readied = await settle(con, writes)
    return readied


async def _ready_again(
    con: Connection,
    leases: Sequence[Lease],
    kind: str,
    data: dict[str, str],
    *,
    deaths: AbstractSet[uuid.UUID] = frozenset(),
) -> list[Readied]:
    """Queue steps again, telling of it on their runs, whose live rows are locked."""
    if not leases:
        return []
    for lease, row in zip(leases, await _places(con, leases), strict=True):
        facts = {"name": row["name"], "queue": row["queue"], "attempt": lease.attempt, **data}
        await append(con, lease.org_id, lease.run_id, [Fact(kind, row["step_key"], facts)])
    return await ready(
        con,
        [
            Wake(org_id=one.org_id, run_id=one.item_id, is_death=one.token in deaths)
            for one in leases
        ],
    )


async def _places(con: Connection, leases: Sequence[Lease]) -> list[Record]:
    """Read which steps are under leases, in their order."""
    org_ids, item_ids, _ = _columns(leases)
    rows = await con.fetch(_SQL["places"], org_ids, item_ids)
    places = {(row["org_id"], row["item_id"]): row for row in rows}
    return [places[lease.org_id, lease.item_id] for lease in leases]


async def _lock_runs(con: Connection, leases: Sequence[Lease]) -> dict[tuple[int, uuid.UUID], str]:
    """Lock the live rows of the steps' runs; returns the states of those that have not ended."""
    runs = sorted({_run_of(lease) for lease in leases}, key=lambda run: run[1].bytes)
    rows = await con.fetch(
        _SQL["lock_runs"], [org_id for org_id, _ in runs], [run_id for _, run_id in runs]
    )
    return {(row["org_id"], row["run_id"]): row["state"] for row in rows}


async def _drop(con: Connection, leases: Sequence[Lease]) -> None:
    if leases:
        await con.execute(_SQL["drop"], *_columns(leases))


def _run_of(lease: Lease) -> tuple[int, uuid.UUID]:
    return lease.org_id, lease.run_id


def _columns(leases: Sequence[Lease]) -> tuple[list[int], list[uuid.UUID], list[uuid.UUID]]:
    return (
        [lease.org_id for lease in leases],
        [lease.item_id for lease in leases],
        [lease.token for lease in leases],
    )
