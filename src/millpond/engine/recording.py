"""Recording: what an attempt's steps leave behind: records, events, and what they show while they go on.

The base of `performing`'s Performer. Invariants: what is awaited here is durable once it returns; a result that is held
for the run's end is on its way as soon as the flow's code waits for anything, and nothing is begun or stored before it
is durable; a lost lease, and whatever else ends the attempt from outside, comes back as Unwind.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from millpond.engine.branches import Branches, Unwind
from millpond.engine.commit import StepWrite
from millpond.engine.encoding import dump
from millpond.engine.leases import Lease
from millpond.engine.metering import Spent
from millpond.engine.plans import Plan
from millpond.engine.scope import Scope
from millpond.errors import LeaseLost, MillpondError, Transient, Unavailable
from millpond.types import Json
from millpond.veil import Veil

R = TypeVar("R")

# What is out of reach is tried again after this time.
AGAIN_S = 0.3


@dataclass(slots=True)
class Held:
    """A result that the flow has, of which the record is held for the run's end; `stored` once it goes by itself."""

    plan: Plan
    write: StepWrite
    stored: asyncio.Future[None] | None = None


class Recorder(ABC):
    """Stores what the steps of one attempt come to, and waits for it."""

    # What most attempts never have stands here once for all of them.
    _in_flight: set[asyncio.Future[Any]] | None = None
    _is_renouncing = False
    # What refused to store a result, and its failure as well.
    unstorable: MillpondError | None = None

    def __init__(
        self,
        lease: Lease,
        scope: Scope,
        branches: Branches,
        *,
        flow: tuple[str, int],
        is_obliged: bool = False,
    ) -> None:
        self._lease = lease
        self._scope = scope
        self._passed = scope.passed.of(flow)
        self._committer = scope.committer
        self._loop = scope.loop
        self._branches = branches
        self.is_obliged = is_obliged
        self._held: Held | None = None

    def tell_started(self, plan: Plan) -> None:
        """Tell that a step is under way; nobody waits for this."""
        self._committer.record(
            StepWrite(
                lease=self._lease,
                step_key=plan.key,
                name=plan.name,
                event_kind="step.started",
                event_data=f'{{"name":"{plan.name}","tries":{plan.current_try}}}',
            )
        )

    async def tell(self, key: str, name: str, body: str) -> None:
        """Store a progress event of a step under way; `body` is JSON text."""
        if self._branches.closed is not None:
            raise Unwind(self._branches.closed)
        await self.own(self._tell(key, name, body))

    def tell_soon(self, key: str, name: str, body: str) -> asyncio.Future[None] | None:
        """As `tell`, without waiting for it; gives None once the attempt was ended."""
        return self._tell(key, name, body) if self._branches.closed is None else None

    def show(self, plan: Plan, tries: int, text: str, veil: Veil | None) -> None:
        """Show text of a try that is under way to whoever follows the run."""
        if plan.current_try != tries or self._branches.closed is not None:
            return  # a thread that went on beyond its time
        if plan.text is None:
            plan.text = self._scope.deltas.open(self._lease, plan.key, tries, veil)
        plan.text.feed(text)

    async def _shown(self, plan: Plan) -> None:
        """Wait until what the try showed is stored, so that nothing of it comes after its record.

        The outcome of a `once` step waits for nothing: known and not recorded, it would be lost with whatever comes.
        """
        text, plan.text = plan.text, None
        if text is None:
            return
        if plan.how.is_once:
            text.cut()
        else:
            await self.own(text.end())

    async def _told(self, plan: Plan) -> None:
        """Wait until what the try told without waiting is stored, which it gave to the loop's next turn.

        Not before the outcome of a `once` step, which waits for nothing.
        """
        if plan.told is not None:
            await self.own(asyncio.sleep(0))
            await self.own(plan.told())

    def _tell(self, key: str, name: str, body: str) -> asyncio.Future[None]:
        return self._committer.record(
            StepWrite(
                lease=self._lease,
                step_key=key,
                name=name,
                event_kind="progress",
                event_data=body,
            )
        )

    async def record(
        self,
        key: str,
        name: str,
        event_kind: str,
        data: Mapping[str, Json],
        *,
        kind: str = "step",
        state: str,
        output: str | None = None,
        error: str | None = None,
        tries: int = 1,
        duration_s: float = 0.0,
        seq: int | None = None,
        spent: Sequence[Spent] = (),
        has_room: bool = False,
    ) -> None:
        """Store a checkpoint and its event, durably; `output` and `error` are JSON text.

        `seq` is its place in its branch, where that is not the current strand.
        """
        await self.catch_up()
        write = StepWrite(
            lease=self._lease,
            step_key=key,
            name=name,
            kind=kind,
            state=state,
            output=output,
            error=error,
            tries=tries,
            duration_s=duration_s,
            seq=self._branches.place(key) if seq is None else seq,
            spent=spent,
            has_room=has_room,
            event_kind=event_kind,
            event_data=dump(None, data),
        )
        await self.own(self._store(write))

    def _store(self, write: StepWrite) -> Awaitable[None]:
        """Give a record to the group commit; endings wait for it, whatever ends the flow's code."""
        return self.asked(self._committer.record(write))

    def asked(self, stored: asyncio.Future[R]) -> Awaitable[R]:
        """Return what a write comes to that goes on by itself; endings wait for it, too."""
        if not (self.is_obliged or self._is_renouncing):
            return stored
        if self._in_flight is None:
            self._in_flight = set()
        self._in_flight.add(stored)
        stored.add_done_callback(self._in_flight.discard)
        return asyncio.shield(stored)

    def hold(self, plan: Plan, write: StepWrite) -> None:
        """Hold the record of a result which the flow gets now, up to the first moment in which its code waits.

        If the flow returns before that, the record goes with the run's end.
        """
        self._held = Held(plan, write)
        self._loop.call_soon(self._let_go)

    def _let_go(self) -> None:
        held = self._held
        if held is not None and held.stored is None:
            held.stored = self._committer.record(held.write)
            self._passed.add(held.plan.key)

    @property
    def is_behind(self) -> bool:
        """Whether the record of a result that the flow has is on its way by itself."""
        return self._held is not None and self._held.stored is not None

    def take_held(self) -> Held | None:
        """Hand out what is held, to be stored with the run's end."""
        held, self._held = self._held, None
        return held

    async def catch_up(self, held: Held | None = None) -> None:
        """Wait until what is held, or was handed out, is durable; raises Unwind where it cannot be stored.

        Then the failure of its step is recorded, and the next attempt of the run meets that where it has to.
        """
        held = self._held = held or self._held
        if held is None:
            return
        self._let_go()
        stored = held.stored
        assert stored is not None
        # A time limit of the flow's own may end this wait, and another one begin; so it is not the record's own future.
        over: asyncio.Future[None] = self._loop.create_future()
        stored.add_done_callback(lambda _: None if over.done() else over.set_result(None))
        try:
            await self.own(over)
            await self.own(stored)
        except Exception as error:  # noqa: BLE001 - whatever it is that refuses a record
            self._held = None
            await self.renounce(held, error)
        if self._held is held:
            self._held = None

    @abstractmethod
    async def renounce(self, held: Held, error: Exception) -> NoReturn:
        """Record that a step whose result was refused has failed; raises Unwind."""

    async def settled(self) -> None:
        """Wait until every record of this attempt is stored or refused."""
        while self._in_flight:
            await asyncio.wait(self._in_flight)

    async def persist(self, write: Callable[[], Awaitable[R]]) -> R:
        """Make a write of its own, again while the database is out of reach; returns its result.

        Where the database is there and something else is not, the run is left to another worker in the end.
        """
        await self.catch_up()
        reason = ""
        for _ in range(100):
            try:
                return await self.own(write())
            except Transient as error:
                reason = "away" if is_away(error) else "lost"
                await self.own(asyncio.sleep(AGAIN_S))
        self._branches.close(reason)
        raise Unwind(reason)

    async def own(self, awaitable: Awaitable[R]) -> R:
        """Await something of the engine's; an attempt ended meanwhile gets Unwind. `perform` has this text too."""
        try:
            return await awaitable
        except (LeaseLost, asyncio.CancelledError) as error:
            self._unwind(error)
            raise

    def _unwind(self, error: BaseException) -> None:
        """Raise Unwind if the lease is lost or the attempt was ended; else return: the caller raises what it caught."""
        if isinstance(error, LeaseLost):
            self._branches.close("lost")
            raise Unwind("lost") from error
        if self._branches.closed is not None:
            raise Unwind(self._branches.closed) from error


def is_away(error: BaseException | None) -> bool:
    """Whether the database is there, and something else that is needed is not."""
    return isinstance(error, Transient) and not isinstance(error, Unavailable)
