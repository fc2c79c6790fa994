"""Group commit: steps and finishes of independent runs share fenced, durable commits.

Called by `context` (steps) and `executor` (finishes) of one worker process. Invariants: every write
names work item and token, and locks the live row that holds the token in its own statement; a write
whose lease is gone raises LeaseLost and stores nothing; one guilty write never fails its neighbours; after a commit of
unknown outcome the batch is sent again, and finding one's own record is success.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import structlog

from millpond.db.pool import Connection, EngineDatabase
from millpond.db.queries import queries
from millpond.engine.claim import Lease
from millpond.engine.duties import Duty
from millpond.engine.endings import Ended, apart, see_to
from millpond.engine.hints import Hints
from millpond.engine.payloads import OUTPUT, Payload, inline, is_big, keep, slot_of_step
from millpond.engine.waits import Readied
from millpond.errors import LeaseLost, Transient

_SQL = queries("commit")
_log = structlog.get_logger("millpond.commit")
# Small enough that the disk works on one batch while the event loop makes the next.
_MAX_BATCH = 64
_CHUNK = 25
# Fewer writes than this are sent at once: nothing to gather, and somebody waits.
_FEW = 8
_MAX_BYTES = 4 * 1024 * 1024


@dataclass(kw_only=True, slots=True)
class StepWrite:
    """A step's record and its event; without `state` the event alone. JSON fields are text.

    `duration_s` counts from the start of the step's first try, `seq` is the step's place in its branch.
    """

    lease: Lease
    step_key: str
    name: str
    event_kind: str
    event_data: str
    kind: str = "step"
    state: str | None = None
    output: str | None = None
    error: str | None = None
    tries: int = 1
    duration_s: float = 0.0
    seq: int | None = None


@dataclass(kw_only=True, slots=True)
class FinishWrite:
    """A run's end: `outcome` is succeeded, failed or cancelled."""

    lease: Lease
    outcome: str
    event_data: str
    output: str | None = None
    error: str | None = None


W = TypeVar("W", StepWrite, FinishWrite)
_Result = tuple[asyncio.Future[None], Exception | None]


@dataclass(slots=True)
class _Pending(Generic[W]):
    write: W
    done: asyncio.Future[None]


@dataclass
class _Batch:
    steps: list[_Pending[StepWrite]] = field(default_factory=list)
    ends: list[_Pending[FinishWrite]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.steps) + len(self.ends)

    @property
    def is_plain(self) -> bool:
        """Whether one statement of each kind stores it: no value needs a row of its own."""
        outputs = [one.write.output for one in self.steps] + [one.write.output for one in self.ends]
        return not any(map(is_big, outputs))

    def fail(self, error: Exception) -> None:
        for done in [*(one.done for one in self.steps), *(one.done for one in self.ends)]:
            _settle(done, error)

    def split(self) -> tuple[_Batch, _Batch]:
        """Take the first writes off, steps before ends; returns them and the rest."""
        steps, weight = _fitting(self.steps, _MAX_BATCH, 0)
        ends, _ = _fitting(self.ends, _MAX_BATCH - steps, weight)
        return (
            _Batch(self.steps[:steps], self.ends[:ends]),
            _Batch(self.steps[steps:], self.ends[ends:]),
        )

    def halves(self) -> tuple[_Batch, _Batch]:
        """Split so that the writes of one run stay in order: steps go before ends."""
        steps, ends = len(self.steps), len(self.ends)
        if steps and ends:
            return _Batch(steps=self.steps), _Batch(ends=self.ends)
        middle_s, middle_e = (steps + 1) // 2, (ends + 1) // 2
        return (
            _Batch(self.steps[:middle_s], self.ends[:middle_e]),
            _Batch(self.steps[middle_s:], self.ends[middle_e:]),
        )


def _fitting(pending: Sequence[_Pending[W]], most: int, weight: int) -> tuple[int, int]:
    """Count the first writes that fit in `most` and `_MAX_BYTES`, at least one of a batch."""
    for nth, one in enumerate(pending):
        weight += len(one.write.output or "") + len(one.write.event_data)
        if nth >= most or (weight > _MAX_BYTES and nth > 0):
            return nth, weight
    return len(pending), weight


class Committer:
    """Gathers writes for a moment and commits them together, batch after batch."""

    def __init__(
        self,
        database: EngineDatabase,
        hints: Hints,
        *,
        on_cancel_requested: Callable[[Lease], None],
        gather_s: float = 0.001,
        retry_s: float = 30.0,
    ) -> None:
        self._database = database
        self._hints = hints
        self._on_cancel_requested = on_cancel_requested
        self._gather_s = gather_s
        self._retry_s = retry_s
        self._batch = _Batch()
        self._kick = asyncio.Event()
        self._is_closed = False
        self._loop = asyncio.get_running_loop()
        self.tasks: list[asyncio.Task[None]] = []

    def start(self, lanes: int = 2) -> None:
        """Start `lanes` committing tasks: while one waits for the disk, the next gathers."""
        self.tasks = [
            asyncio.create_task(self._commit_all(), name=f"commit-{n}") for n in range(lanes)
        ]

    async def close(self) -> None:
        """Stop committing; whoever still waits gets LeaseLost, since nothing more is written."""
        self._is_closed = True
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self._batch.fail(LeaseLost("this worker has stopped"))

    def record(self, write: StepWrite) -> asyncio.Future[None]:
        """Store a step or an event; the future ends when it is durable, or with LeaseLost."""
        done: asyncio.Future[None] = self._loop.create_future()
        self._batch.steps.append(_Pending(write, done))
        return self._pended(done)

    def finish(self, write: FinishWrite) -> asyncio.Future[None]:
        """End a run; the future ends when that is durable, or with LeaseLost."""
        done: asyncio.Future[None] = self._loop.create_future()
        self._batch.ends.append(_Pending(write, done))
        return self._pended(done)

    def _pended(self, done: asyncio.Future[None]) -> asyncio.Future[None]:
        if self._is_closed:
            self._batch.fail(LeaseLost("this worker has stopped"))
        self._kick.set()
        return done

    async def _commit_all(self) -> None:
        while True:
            await self._kick.wait()
            if len(self._batch) == 0:
                self._kick.clear()
                continue
            if _FEW <= len(self._batch) < _MAX_BATCH:
                await asyncio.sleep(self._gather_s)
            batch, self._batch = self._batch.split()
            if len(self._batch) == 0:
                self._kick.clear()
            if len(batch) == 0:
                continue
            try:
                await self._commit(batch)
            except asyncio.CancelledError:
                batch.fail(LeaseLost("this worker has stopped"))
                raise

    async def _commit(self, batch: _Batch) -> None:
        _sort(batch)
        await self._insist(batch, self._write)

    async def _insist(
        self, batch: _Batch, write: Callable[[_Batch, bool], Awaitable[None]]
    ) -> None:
        """Write a batch, again after a lost connection, in parts after a refusal."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + self._retry_s
        is_repeat = False
        while True:
            try:
                await write(batch, is_repeat)
            except Transient as error:
                if loop.time() >= give_up:
                    batch.fail(LeaseLost("the database stayed out of reach"))
                    _log.error("commit.given_up", writes=len(batch), error=error.code)
                    return
                is_repeat = True
                await asyncio.sleep(0.2)
                continue
            except Exception as error:  # noqa: BLE001 - whatever it is, it ends in the guilty write
                if len(batch) == 1:
                    _log.error("commit.refused", error=type(error).__name__)
                    batch.fail(error)
                    return
                for half in batch.halves():
                    await self._insist(half, write)
            return

    async def _write(self, batch: _Batch, is_repeat: bool) -> None:
        """Store steps and plain ends and tell of them; then the ends that take further locks.

        What a refusal of the latter sends again does not hold what is stored.
        """
        steps, ends = await self._store_plain(batch, is_repeat=is_repeat)
        stored = [one for nth, one in enumerate(batch.ends, 1) if nth in ends]
        left = [one for nth, one in enumerate(batch.ends, 1) if nth not in ends]
        gone = LeaseLost("the lease is gone")
        results: list[_Result] = []
        for nth, step in enumerate(batch.steps, 1):
            results.append((step.done, None if nth in steps else gone))
            if steps.get(nth):
                self._on_cancel_requested(step.write.lease)
        results += [(end.done, None) for end in stored]
        await self._tell([*batch.steps, *stored], results)
        if left:
            await self._insist(_Batch(ends=left), self._write_apart)

    async def _write_apart(self, batch: _Batch, _: bool) -> None:
        """End runs with duties, parted so that transactions never wait for each other in a circle."""
        ends = batch.ends
        if len(ends) < 2:
            return await self._insist(batch, self._write_ends)
        async with self._database.statement("apart") as con:
            runs = [(one.write.lease.org_id, one.write.lease.run_id) for one in ends]
            parts = await apart(con, runs)
        for part in parts:
            if part:
                await self._insist(_Batch(ends=[ends[nth] for nth in part]), self._write_ends)
        return None

    async def _write_ends(self, batch: _Batch, is_repeat: bool) -> None:
        """End runs with duties in one transaction, and tell of them and of those that go on by it."""
        async with self._database.duty("end") as con:
            ends = (await _find_own(con, batch))[1] if is_repeat else set()
            left = [(nth, one.write) for nth, one in enumerate(batch.ends, 1) if nth not in ends]
            more, readied = await finish_with_duties(con, left)
        ends |= more
        if readied:
            self._hints.wake({one.queue for one in readied})
            self._hints.changed(one.run_id for one in readied)
        gone = LeaseLost("the lease is gone")
        results: list[_Result] = [
            (one.done, None if nth in ends else gone) for nth, one in enumerate(batch.ends, 1)
        ]
        await self._tell(batch.ends, results)

    async def _tell(
        self,
        pending: Sequence[_Pending[StepWrite] | _Pending[FinishWrite]],
        results: Sequence[_Result],
    ) -> None:
        self._hints.changed({one.write.lease.run_id for one in pending})
        await _settle_all(results)

    async def _store_plain(
        self, batch: _Batch, *, is_repeat: bool
    ) -> tuple[dict[int, bool], set[int]]:
        """Store steps, and ends of runs without duties, in one transaction."""
        layers = _layers(batch.steps, {})
        numbered = [(nth, one.write) for nth, one in enumerate(batch.ends, 1)]
        if not is_repeat and len(layers) + bool(numbered) == 1 and batch.is_plain:
            # One statement is a transaction by itself: two round trips less.
            async with self._database.statement("record" if layers else "finish") as con:
                if layers:
                    return await _record(con, layers[0]), set()
                return {}, await _finish(con, numbered)
        async with self._database.duty("commit") as con:
            steps, ends = await _find_own(con, batch) if is_repeat else ({}, set())
            for layer in _layers(batch.steps, steps):
                steps.update(await _record(con, layer))
            left = [(nth, write) for nth, write in numbered if nth not in ends]
            if left:
                ends.update(await _finish(con, left))
        return steps, ends


def _sort(batch: _Batch) -> None:
    """Order writes by lease, which is the order in which their rows are locked."""
    batch.steps.sort(key=_order)
    batch.ends.sort(key=_order)


def _order(one: _Pending[StepWrite] | _Pending[FinishWrite]) -> bytes:
    return one.write.lease.item_id.bytes


def _layers(
    pending: Sequence[_Pending[StepWrite]], stored: Mapping[int, bool]
) -> list[list[tuple[int, StepWrite]]]:
    """Part writes, with their ordinals, so that each part has at most one of each run, in order."""
    layers: list[list[tuple[int, StepWrite]]] = []
    depth: dict[tuple[int, uuid.UUID], int] = {}
    for nth, one in enumerate(pending, 1):
        if nth in stored:
            continue
        item = one.write.lease[:2]
        level = depth.get(item, 0)
        depth[item] = level + 1
        if level == len(layers):
            layers.append([])
        layers[level].append((nth, one.write))
    return layers


async def _record(con: Connection, layer: Sequence[tuple[int, StepWrite]]) -> dict[int, bool]:
    """Store steps; returns the ordinals stored, with whether the run was asked to cancel."""
    writes = [write for _, write in layer]
    rows = await con.fetch(
        _SQL["record"],
        [write.lease.org_id for write in writes],
        [write.lease.item_id for write in writes],
        [write.lease.token for write in writes],
        [write.step_key for write in writes],
        [write.name for write in writes],
        [write.kind for write in writes],
        [write.state for write in writes],
        [inline(write.output) for write in writes],
        [write.error for write in writes],
        [write.tries for write in writes],
        [write.duration_s for write in writes],
        [write.event_kind for write in writes],
        [write.event_data for write in writes],
        [write.seq for write in writes],
    )
    stored = [writes[row[0] - 1] for row in rows]
    await _keep(con, [(write, slot_of_step(write.step_key)) for write in stored])
    return {layer[row[0] - 1][0]: row[1] for row in rows}


async def _finish(con: Connection, ends: Sequence[tuple[int, FinishWrite]]) -> set[int]:
    """End runs without duties; returns the ordinals stored."""
    rows = await con.fetch(_SQL["finish"], *_finish_columns(ends))
    await _keep(con, [(ends[row[0] - 1][1], OUTPUT) for row in rows])
    return {ends[row[0] - 1][0] for row in rows}


async def finish_with_duties(
    con: Connection, ends: Sequence[tuple[int, FinishWrite]]
) -> tuple[set[int], list[Readied]]:
    """End runs and see to their duties; returns the ordinals stored and runs that may go on."""
    rows = await con.fetch(_SQL["finish_with_duties"], *_finish_columns(ends))
    await _keep(con, [(ends[row[0] - 1][1], OUTPUT) for row in rows])
    ended = [
        Ended(org_id=org_id, run_id=run_id, duties=Duty(duties), outcome=outcome)
        for _, org_id, run_id, duties, outcome in rows
    ]
    return {ends[row[0] - 1][0] for row in rows}, await see_to(con, ended)


async def _keep(
    con: Connection, stored: Sequence[tuple[StepWrite, str] | tuple[FinishWrite, str]]
) -> None:
    """Store the big values of writes that took effect in this transaction, each in its slot."""
    big = [(write, slot) for write, slot in stored if is_big(write.output)]
    await keep(
        con,
        [
            Payload(write.lease.org_id, write.lease.run_id, slot, write.output or "")
            for write, slot in big
        ],
    )


def _finish_columns(ends: Sequence[tuple[int, FinishWrite]]) -> list[list[object]]:
    writes = [write for _, write in ends]
    return [
        [write.lease.org_id for write in writes],
        [write.lease.item_id for write in writes],
        [write.lease.token for write in writes],
        [write.outcome for write in writes],
        [inline(write.output) for write in writes],
        [write.error for write in writes],
        [write.event_data for write in writes],
    ]


async def _find_own(con: Connection, batch: _Batch) -> tuple[dict[int, bool], set[int]]:
    """Find what this attempt had stored before the connection broke: it counts as stored.

    The live rows are locked first, since the first commit may still be under way. An event without
    a step leaves nothing to find and may be stored twice.
    """
    leases = [*(step.write.lease for step in batch.steps), *(end.write.lease for end in batch.ends)]
    leases.sort(key=lambda lease: lease.item_id.bytes)
    await con.fetch(
        _SQL["lock_live"], [lease.org_id for lease in leases], [lease.item_id for lease in leases]
    )
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


async def _settle_all(results: Sequence[_Result]) -> None:
    """Tell whoever waits, some at a time: their next writes go off while others still compute."""
    try:
        for nth, (done, error) in enumerate(results, 1):
            _settle(done, error)
            if nth % _CHUNK == 0:
                await asyncio.sleep(0)
    except asyncio.CancelledError:
        for done, error in results:
            _settle(done, error)
        raise


def _settle(done: asyncio.Future[None], error: Exception | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
        done.exception()  # read here, so that a write nobody waits for is not reported as forgotten
