"""Storing: the statements of a group commit, each for many runs at once.

Called by `commit` and `continuing`, in their transactions. Invariant: a statement stores what its lease
still allows, and tells which writes those were by their ordinals.
"""

from __future__ import annotations

from collections.abc import Sequence

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine import metering
from millpond.engine.batches import Batch, Ends, FinishWrite, Steps, StepWrite, W, columns
from millpond.engine.columns import optional, plain, texts
from millpond.engine.duties import Duty
from millpond.engine.endings import Ended, see_to
from millpond.engine.leases import Lease
from millpond.engine.payloads import OUTPUT, SMALL, Payload, inline, is_big, keep, slot_of_step
from millpond.engine.waits import Readied

_SQL = queries("commit")
_NEEDS = queries("needs")


async def record(con: Connection, layer: Steps, *, has_more: bool = True) -> dict[int, bool]:
    """Store steps; returns the ordinals stored, with whether the run was asked to cancel.

    It need not be looked for what has rows of its own where nothing `has_more` than its record.
    """
    writes = [write for _, write in layer]
    if all(write.is_new for write in writes):
        rows = await con.fetch(_SQL["record_done"], *_results(writes))
    else:
        rows = await con.fetch(_SQL["record"], *_records(writes))
    if has_more:
        await _keep(con, [(write, slot_of_step(write.step_key)) for write in _big(writes, rows)])
        await _meter(con, writes, rows)
        # A write that was refused gives nothing back: where its lease is gone, what it had reserved stands.
        await _leave(con, [one for row in rows if (one := writes[row[0] - 1]).has_room])
    return {layer[nth - 1][0]: is_cancelled for nth, is_cancelled in rows}


async def record_together(con: Connection, steps: Steps) -> dict[int, bool]:
    """Store results of first tries, of runs that may have several each, in one statement; returns as `record`."""
    rows = await con.fetch(_SQL["record_done_together"], *_results([write for _, write in steps]))
    return {steps[nth - 1][0]: is_cancelled for nth, is_cancelled in rows}


def _results(writes: Sequence[StepWrite]) -> list[str]:
    """Return the columns of results of first tries."""
    of = columns(writes)
    return [
        *_leases(of["lease"]),
        texts(of["step_key"]),
        texts(of["name"]),
        optional(_outputs(of["output"])),
        plain([f"{duration_s:.6f}" for duration_s in of["duration_s"]]),
        texts(of["event_data"]),
        plain(["" if seq is None else seq for seq in of["seq"]]),
    ]


def _records(writes: Sequence[StepWrite]) -> list[str]:
    """Return the columns of whatever is recorded of steps."""
    of = columns(writes)
    return [
        *_leases(of["lease"]),
        texts(of["step_key"]),
        texts(of["name"]),
        texts(of["kind"]),
        optional(of["state"]),
        optional(_outputs(of["output"])),
        optional(of["error"]),
        plain(of["tries"]),
        plain([f"{duration_s:.6f}" for duration_s in of["duration_s"]]),
        texts(of["event_kind"]),
        texts(of["event_data"]),
        plain(["" if seq is None else seq for seq in of["seq"]]),
        plain(["t" if is_new else "f" for is_new in of["is_new"]]),
    ]


async def finish(con: Connection, ends: Ends, *, has_more: bool = True) -> set[int]:
    """End runs without duties; returns the ordinals stored. For `has_more` see `record`."""
    lasts = [write.last for _, write in ends]
    if any(lasts):
        rows = await con.fetch(_SQL["finish_with_last"], *_columns(ends), *_lasts(lasts))
    else:
        rows = await con.fetch(_SQL["finish"], *_columns(ends))
    if has_more:
        writes = [write for _, write in ends]
        await _keep(con, [(write, OUTPUT) for write in _big(writes, rows)])
        await _meter(con, writes, rows)
    return {ends[row[0] - 1][0] for row in rows}


async def finish_with_duties(con: Connection, ends: Ends) -> tuple[set[int], list[Readied]]:
    """End runs and see to their duties; returns the ordinals stored and runs that may go on.

    There may be none: what is sent again after an answer was lost may all have been stored.
    """
    if lasts := [(nth, write.last) for nth, write in ends if write.last is not None]:
        leases = sorted((write.lease for _, write in ends), key=lambda lease: lease.item_id.bytes)
        await _lock(con, leases)
        await record(con, lasts, has_more=False)
    rows = await con.fetch(_SQL["finish_with_duties"], *_columns(ends))
    writes = [write for _, write in ends]
    await _keep(con, [(write, OUTPUT) for write in _big(writes, rows)])
    await _meter(con, writes, rows)
    ended = [
        Ended(org_id=org_id, run_id=run_id, duties=Duty(duties), outcome=outcome)
        for _, org_id, run_id, duties, outcome in rows
    ]
    return {ends[row[0] - 1][0] for row in rows}, await see_to(con, ended)


def _leases(leases: Sequence[Lease]) -> list[str]:
    """Return the columns of the leases that allow writes."""
    org_ids, item_ids, _, _, tokens = zip(*leases, strict=True)
    return [plain(org_ids), plain(item_ids), plain(tokens)]


def _outputs(outputs: Sequence[str | None]) -> Sequence[str | None]:
    """Return what rows themselves hold of results: most are short, and no more is asked of these."""
    if max(map(len, filter(None, outputs)), default=0) <= SMALL:
        return outputs
    return [text if text is None or len(text) <= SMALL else inline(text) for text in outputs]


def _columns(ends: Ends) -> list[str]:
    """Return the columns of runs' ends; there may be none."""
    if not ends:
        return [""] * 7
    of = columns([write for _, write in ends])
    return [
        *_leases(of["lease"]),
        texts(of["outcome"]),
        optional(_outputs(of["output"])),
        optional(of["error"]),
        texts(of["event_data"]),
    ]


def _lasts(lasts: Sequence[StepWrite | None]) -> list[str]:
    """Return the columns of results that go with ends; those of ends without one are empty."""
    return [
        optional([last.step_key if last else None for last in lasts]),
        optional([last.name if last else None for last in lasts]),
        optional([last.output if last else None for last in lasts]),
        plain([f"{last.duration_s:.6f}" if last else "" for last in lasts]),
        optional([last.event_data if last else None for last in lasts]),
        plain(["" if last is None or last.seq is None else last.seq for last in lasts]),
    ]


def _big(writes: Sequence[W], rows: Sequence[Record]) -> list[W]:
    """Return the writes that were stored and whose values need rows of their own."""
    if not any(is_big(write.output) for write in writes):
        return []
    return [write for row in rows if is_big((write := writes[row[0] - 1]).output)]


async def _meter(con: Connection, writes: Sequence[W], rows: Sequence[Record]) -> None:
    """Store what the writes that were stored tell of models."""
    if any(write.spent for write in writes):
        stored = [writes[row[0] - 1] for row in rows]
        spent = [(write.lease, one) for write in stored for one in write.spent]
        await metering.store(con, spent)


async def _leave(con: Connection, writes: Sequence[StepWrite]) -> None:
    """Give back the room of recorded tries."""
    if writes:
        await con.execute(
            _NEEDS["leave"],
            [write.lease.org_id for write in writes],
            [write.lease.item_id for write in writes],
            [write.lease.token for write in writes],
            [write.step_key for write in writes],
        )


async def _keep(
    con: Connection, big: Sequence[tuple[StepWrite, str] | tuple[FinishWrite, str]]
) -> None:
    """Store big values of writes that took effect in this transaction, each in its slot."""
    if big:
        await keep(
            con,
            [
                Payload(write.lease.org_id, write.lease.run_id, slot, write.output or "")
                for write, slot in big
            ],
        )


async def _lock(con: Connection, leases: Sequence[Lease]) -> None:
    """Lock live rows in the order given."""
    await con.fetch(
        _SQL["lock_live"], [lease.org_id for lease in leases], [lease.item_id for lease in leases]
    )


async def find_own(con: Connection, batch: Batch) -> tuple[dict[int, bool], set[int]]:
    """Find what this attempt had stored before the connection broke: it counts as stored.

    The live rows are locked first, since the first commit may still be under way. An event without
    a step leaves nothing to find and may be stored twice.
    """
    leases = [*(step.write.lease for step in batch.steps), *(end.write.lease for end in batch.ends)]
    leases.sort(key=lambda lease: lease.item_id.bytes)
    await _lock(con, leases)
    steps = [(nth, one.write) for nth, one in enumerate(batch.steps, 1) if one.write.state]
    step_rows = await con.fetch(
        _SQL["own_steps"],
        [write.lease.org_id for _, write in steps],
        [write.lease.run_id for _, write in steps],
        [write.step_key for _, write in steps],
        [write.lease.attempt for _, write in steps],
        [write.tries for _, write in steps],
        [write.state for _, write in steps],
    )
    ends = [one.write.lease for one in batch.ends]
    end_rows = await con.fetch(
        _SQL["own_ends"],
        [lease.org_id for lease in ends],
        [lease.run_id for lease in ends],
        [lease.attempt for lease in ends],
    )
    return {steps[row[0] - 1][0]: False for row in step_rows}, {row[0] for row in end_rows}
