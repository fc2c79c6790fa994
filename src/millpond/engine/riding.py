"""Riding: the steps of one worker that ask for room ride in its next claim, and are told what became of that.

`seating` asks and `worker` claims, in one event loop. Invariants: a step whose keys no limit concerns asks nobody;
one that asks rides in every claim until it may begin or asks no more; room that was given to one that asks no more is
given back; a branch without a place in its bound takes no room, and stands in no line until it has one.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog

from millpond.db.pool import EngineDatabase
from millpond.db.queries import queries
from millpond.engine.bounds import Copies
from millpond.engine.branches import Branch, Branches
from millpond.engine.charges import Charges
from millpond.engine.claim import Claimer
from millpond.engine.history import just
from millpond.engine.needs import Answer, Ask, concerns
from millpond.engine.tolls import Tolls
from millpond.errors import LeaseLost, MillpondError

_SQL = queries("needs")
_log = structlog.get_logger("millpond.riding")
# So old is what a worker knows of limits at most; it is that old where no slot is free, so that nothing is claimed.
_FRESH_S = 1.5
_PAUSE_S = 0.1
_MAX_KNOWN = 10_000
# How often giving back is tried where the database does not answer: until then others wait for what nobody uses.
_LEAVES = 30
_LEAVE_AGAIN_S = 1.0
_GRANTED = just("room", "granted", None, None)


@dataclass(eq=False, slots=True)
class Rider:
    """A step that asks; `told` ends with the first answer, `answer` is the last one.

    `left` is the leaving of its line, or room, as there was room while its branch had no place in its bound: it is to
    ask anew.
    """

    ask: Ask
    branch: Branch
    branches: Branches
    told: asyncio.Future[Answer]
    answer: Answer | None = None
    left: asyncio.Task[None] | None = None


class Riding:
    """Who asks; `wake` lets the worker claim soon, `on_freed` tells that a step gave back its room.

    `summon` lets other workers claim soon, for whose steps room was left. `tolls` counts what charged tries use.
    """

    def __init__(
        self,
        database: EngineDatabase,
        *,
        wake: Callable[[], None] = lambda: None,
        on_freed: Callable[[], None] = lambda: None,
        summon: Callable[[Iterable[uuid.UUID]], None] = lambda _: None,
        tolls: Tolls | None = None,
    ) -> None:
        self.tolls = tolls or Tolls(Charges(), lambda _work, _used_s: None)
        self._database = database
        self._wake = wake
        self._on_freed = on_freed
        self._summon = summon
        self._claimer: Claimer | None = None
        self._riders: dict[Ask, Rider] = {}
        self._some = asyncio.Event()
        self._known: dict[tuple[int, tuple[str, ...]], bool] = {}
        self._version = 0
        self._leaving: set[asyncio.Task[None]] = set()
        self._is_closing = False

    def attach(self, claimer: Claimer) -> None:
        """Know what a claimer knows of limits from now on."""
        self._claimer = claimer
        self._known.clear()

    def concerns(self, org_id: int, keys: tuple[str, ...]) -> bool:
        """Whether a step with these keys has to ask: a limit may hold for them, or that is not known."""
        claimer = self._claimer
        if claimer is None or time.monotonic() - claimer.looked_at > _FRESH_S:
            return True
        if not claimer.limits.rules:
            return False
        if claimer.limits.version != self._version or len(self._known) > _MAX_KNOWN:
            self._version = claimer.limits.version
            self._known.clear()
        known = self._known.get((org_id, keys))
        if known is None:
            known = self._known[org_id, keys] = concerns(claimer.limits.rules, org_id, keys)
        return known

    def ask(self, ask: Ask, branch: Branch, branches: Branches) -> Rider:
        """Let a step of a branch of an attempt ride until it may begin."""
        rider = Rider(ask, branch, branches, asyncio.get_running_loop().create_future())
        self._riders[ask] = rider
        self._some.set()
        self._wake()
        return rider

    def forget(self, rider: Rider) -> None:
        """Let it ride no more."""
        self._riders.pop(rider.ask, None)
        if not self._riders:
            self._some.clear()

    def asks(self) -> list[Ask]:
        """Return what rides in the next claim, the longest wait first, with the places that there are in its bounds."""
        copies = Copies()
        for ask, rider in self._riders.items():
            ask.bounds = copies.of(rider.branch.bounds)
        return list(self._riders)

    async def some(self) -> None:
        """Wait until somebody rides."""
        await self._some.wait()

    def tell(self, claimer: Claimer) -> None:
        """Tell those that rode in a claim what became of it, and workers for whose steps it left room."""
        if claimer.summons:
            self._summon(claimer.summons)
        for ask, answer in claimer.answers.items():
            rider = self._riders.get(ask)
            if rider is None:
                if answer.has_row:
                    self.tolls.refund(ask.org_id, answer.toll)
                    self.leave(ask)
                continue
            rider.answer = answer
            if answer.is_seated:
                self.forget(rider)
            else:
                ask.since_us = answer.since_us
            if not rider.told.done():
                rider.told.set_result(answer)
            elif answer.is_beyond:
                self._put_off(rider, answer)
                _go_on(rider)
            elif answer.is_seated or answer.refusal is not None:
                _go_on(rider)
                if answer.is_seated and _is_parked(rider):
                    self._put_off(rider, answer)

    def _put_off(self, rider: Rider, answer: Answer) -> None:
        """Leave room, and a place in line, to others of a branch that cannot go on: others have those of its bound.

        It asks anew where it stood in line, as soon as it has a place there.
        """
        self.forget(rider)
        rider.answer = answer._replace(is_seated=False, has_row=False, toll=None)
        self.tolls.refund(rider.ask.org_id, answer.toll)
        rider.left = self.leave(rider.ask)

    def freed(self) -> None:
        """Tell that a step's record has given back its room."""
        if self._riders:
            self._wake()
        self._on_freed()

    def stood(self) -> None:
        """Tell that steps of a run stand in line now: there may be room for them by now."""
        self._wake()

    def leave(self, ask: Ask, *, is_told: bool = True) -> asyncio.Task[None]:
        """Give back the room of a try of which nothing was recorded.

        Where what it used of models is not told yet, the end of its attempt tells it, and settles it then.
        """
        task = asyncio.create_task(self._leave(ask, is_told), name="leave")
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        return task

    async def _leave(self, ask: Ask, is_told: bool) -> None:
        for nth in range(1, _LEAVES + 1):
            try:
                async with self._database.duty("step_leave") as con:
                    own = ask.org_id, ask.item_id, ask.token, ask.step_key
                    await con.execute(_SQL["give_up"], *own, not is_told)
                break
            except MillpondError as error:  # at last the end of the lease gives it back
                _log.warning("riding.not_left", error=error.code)
                if self._is_closing or nth == _LEAVES:
                    break
                await asyncio.sleep(_LEAVE_AGAIN_S)
        self.freed()

    async def serve(self) -> None:
        """Claim for those that ride alone: what the worker has goes on, and it takes no more work."""
        while self._claimer is not None:
            await self.some()
            try:
                await self._claimer.claim({}, asks=self.asks())
                self.tell(self._claimer)
            except LeaseLost:
                return  # the watch finds out
            except MillpondError as error:
                _log.warning("claim.failed", error=error.code)
            await asyncio.sleep(_PAUSE_S)

    async def close(self) -> None:
        """Wait for what is being given back."""
        self._is_closing = True
        if self._leaving:
            await asyncio.wait(self._leaving)


def _go_on(rider: Rider) -> None:
    """Wake the strand that waits for its room, while others of its attempt work."""
    for one in rider.branches.parked:
        if one.ask is rider.ask:
            rider.branches.wake(one, _GRANTED)


def _is_parked(rider: Rider) -> bool:
    """Whether the strand that has its room waits for a place in its bound."""
    return any(one.ask is rider.ask and not one.over.done() for one in rider.branches.parked)


async def sweep(database: EngineDatabase) -> None:
    """Delete room of leases that are gone, which counts no more, and lines of runs that are over. Called by upkeep."""
    async with database.duty("step_sweep") as con:
        await con.execute(_SQL["sweep"])
        await con.execute(_SQL["sweep_lines"])
