"""Group commit: steps and finishes of independent runs share fenced, durable commits.

Called by `context` (steps) and `executor` (finishes) of one worker process. Invariants: every write
names work item and token, and locks the live row that holds the token in its own statement; a write
whose lease is gone raises LeaseLost and stores nothing; one guilty write never fails its neighbours; after a commit of
unknown outcome the batch is sent again, and finding one's own record is success.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence, Set

import structlog

from millpond.db.pool import EngineDatabase
from millpond.engine import storing
from millpond.engine.batches import (
    MAX_WRITES,
    Batch,
    FinishWrite,
    Pending,
    StepWrite,
    settle,
)
from millpond.engine.endings import apart
from millpond.engine.hints import Hints
from millpond.engine.leases import Lease
from millpond.errors import LeaseLost, Transient

__all__ = ["Committer", "FinishWrite", "StepWrite"]

_log = structlog.get_logger("millpond.commit")
# Fewer writes than this are sent at once: nothing to gather, and somebody waits.
_FEW = 8
# A batch that takes longer mostly waits for somebody, such as one who holds a row locked: others go past it then.
_STUCK_S = 0.1


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
        self._batch = Batch()
        self._kick = asyncio.Event()
        self._is_closed = False
        # Since when each of those that commit always has been at its batch.
        self._began: dict[int, float] = {}
        self._loop = asyncio.get_running_loop()
        self.tasks: list[asyncio.Task[None]] = []

    def start(self, lanes: int = 2) -> None:
        """Start `lanes` committing tasks: while one waits for the disk, the next gathers; and one that helps out."""
        loops = [*(self._commit_all(n) for n in range(lanes)), self._help_out()]
        self.tasks = [asyncio.create_task(loop, name=f"commit-{n}") for n, loop in enumerate(loops)]

    async def close(self) -> None:
        """Stop committing; whoever still waits gets LeaseLost, since nothing more is written."""
        self._is_closed = True
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self._refuse()

    def record(self, write: StepWrite) -> asyncio.Future[None]:
        """Store a step or an event; the future ends when it is durable, or with LeaseLost."""
        done: asyncio.Future[None] = self._loop.create_future()
        self._batch.steps.append(Pending(write, done))
        if self._is_closed:
            self._refuse()
        self._kick.set()
        return done

    def finish(self, write: FinishWrite) -> asyncio.Future[None]:
        """End a run; the future ends when that is durable, or with LeaseLost."""
        done: asyncio.Future[None] = self._loop.create_future()
        self._batch.ends.append(Pending(write, done))
        if self._is_closed:
            self._refuse()
        self._kick.set()
        return done

    def _refuse(self) -> None:
        """Tell whoever waits that nothing is written any more."""
        self._batch.fail(LeaseLost("this worker has stopped"))

    async def _commit_all(self, nth: int) -> None:
        while True:
            await self._kick.wait()
            if _FEW <= len(self._batch) < MAX_WRITES:
                await asyncio.sleep(self._gather_s)
            self._began[nth] = self._loop.time()
            try:
                await self._commit_next()
            finally:
                del self._began[nth]

    async def _help_out(self) -> None:
        """Stand in for one that is stuck."""
        while True:
            await self._kick.wait()
            now = self._loop.time()
            if now - min(self._began.values(), default=now) < _STUCK_S:
                await asyncio.sleep(_STUCK_S)
            else:
                await self._commit_next()

    async def _commit_next(self) -> None:
        """Commit the first of the writes that wait, if any do."""
        batch, self._batch = self._batch.split()
        if len(self._batch) == 0:
            self._kick.clear()
        if len(batch) == 0:
            return
        try:
            await self._commit(batch)
        except asyncio.CancelledError:
            batch.fail(LeaseLost("this worker has stopped"))
            raise

    async def _commit(self, batch: Batch) -> None:
        batch.sort()
        for part in batch.parts():
            await self._insist(part, self._write)

    async def _insist(
        self,
        batch: Batch,
        write: Callable[[Batch, bool], Awaitable[None]],
        *,
        is_repeat: bool = False,
    ) -> None:
        """Write a batch, again after a lost connection, in parts after a refusal.

        It `is_repeat` when it may have been stored by a commit whose answer was lost.
        """
        loop = asyncio.get_running_loop()
        give_up = loop.time() + self._retry_s
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
                    await self._insist(half, write, is_repeat=is_repeat)
            return

    async def _write(self, batch: Batch, is_repeat: bool) -> None:
        """Store steps and plain ends and tell of them; then the ends that take further locks.

        What a refusal of the latter sends again does not hold what is stored.
        """
        steps, ends = await self._store_plain(batch, is_repeat=is_repeat)
        for nth, is_cancelled in steps.items():
            if is_cancelled:
                self._on_cancel_requested(batch.steps[nth - 1].write.lease)
        stored = batch.ends
        left: list[Pending[FinishWrite]] = []
        if len(ends) < len(stored):
            left = [one for nth, one in enumerate(stored, 1) if nth not in ends]
            stored = [one for nth, one in enumerate(stored, 1) if nth in ends]
        refused: set[asyncio.Future[None]] = set()
        if len(steps) < len(batch.steps):
            refused = {one.done for nth, one in enumerate(batch.steps, 1) if nth not in steps}
        self._tell([*batch.steps, *stored], refused)
        if left:
            await self._insist(Batch(ends=left), self._write_apart)

    async def _write_apart(self, batch: Batch, _: bool) -> None:
        """End runs with duties, parted so that transactions never wait for each other in a circle."""
        ends = batch.ends
        if len(ends) < 2:
            return await self._insist(batch, self._write_ends)
        async with self._database.statement("apart") as con:
            runs = [(one.write.lease.org_id, one.write.lease.run_id) for one in ends]
            parts = await apart(con, runs)
        for part in parts:
            if part:
                await self._insist(Batch(ends=[ends[nth] for nth in part]), self._write_ends)
        return None

    async def _write_ends(self, batch: Batch, is_repeat: bool) -> None:
        """End runs with duties in one transaction, and tell of them and of those that go on by it."""
        async with self._database.duty("end") as con:
            ends = (await storing.find_own(con, batch))[1] if is_repeat else set()
            left = [(nth, write) for nth, write in batch.numbered_ends if nth not in ends]
            more, readied = await storing.finish_with_duties(con, left)
        ends |= more
        if readied:
            self._hints.wake({one.queue for one in readied})
            self._hints.changed(one.run_id for one in readied)
        refused = {one.done for nth, one in enumerate(batch.ends, 1) if nth not in ends}
        self._tell(batch.ends, refused)

    def _tell(
        self,
        pending: Sequence[Pending[StepWrite] | Pending[FinishWrite]],
        refused: Set[asyncio.Future[None]],
    ) -> None:
        """Tell whoever waits, all in one turn of the loop: so their next writes go together, too."""
        self._hints.changed([one.write.lease.run_id for one in pending])
        if refused:
            gone = LeaseLost("the lease is gone")
            for one in pending:
                settle(one.done, gone if one.done in refused else None)
            return
        for one in pending:
            if not one.done.done():
                one.done.set_result(None)

    async def _store_plain(
        self, batch: Batch, *, is_repeat: bool
    ) -> tuple[dict[int, bool], set[int]]:
        """Store steps, and ends of runs without duties, in one transaction."""
        layers, ends_left = batch.layers({}), batch.numbered_ends
        is_one = len(layers) + bool(ends_left) == 1 and not batch.has_more
        if not is_repeat and (is_one or batch.are_results):
            # One statement is a transaction by itself: two round trips less.
            async with self._database.statement("record" if layers else "finish") as con:
                if len(layers) > 1:
                    return await storing.record_together(con, batch.numbered_steps), set()
                if layers:
                    return await storing.record(con, layers[0], has_more=False), set()
                return {}, await storing.finish(con, ends_left, has_more=False)
        async with self._database.duty("commit") as con:
            steps, ends = await storing.find_own(con, batch) if is_repeat else ({}, set())
            for layer in batch.layers(steps):
                steps.update(await storing.record(con, layer))
            left = [(nth, write) for nth, write in ends_left if nth not in ends]
            if left:
                ends.update(await storing.finish(con, left))
        return steps, ends
