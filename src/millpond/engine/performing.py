"""Performing a step: tried until there is a result, a failure, or a wait; each outcome recorded.

Called by `context`, one Performer per attempt. Invariants: a step is begun only after the results before it are
durable; a result is returned after its record is, or held for the run's end (`recording`); a failure that is raised is
recorded first; a step with effect `once` is tried only under a durable marker (`once`); a lost lease ends the attempt
silently.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, NoReturn, TypeVar

import orjson

from millpond.engine import once, waits
from millpond.engine.branches import Branch, Branches, Unwind
from millpond.engine.commit import StepWrite
from millpond.engine.duties import Duty
from millpond.engine.encoding import dump, dump_error, read_back
from millpond.engine.history import Recorded
from millpond.engine.leases import Lease, Seat
from millpond.engine.metering import Spent
from millpond.engine.payloads import SMALL
from millpond.engine.plans import Plan, StepFailed, failure
from millpond.engine.recording import Held, Recorder
from millpond.engine.rights import Right
from millpond.engine.scope import ANNOUNCE_S, Scope
from millpond.engine.seating import Seating
from millpond.engine.strays import raise_stray
from millpond.errors import (
    Forbidden,
    InvalidInput,
    LeaseLost,
    MillpondError,
    NotDone,
    Permanent,
    Transient,
)
from millpond.retry import backoff_s, classify, retry_after_s
from millpond.types import Json

R = TypeVar("R")

# A backoff or sleep above this is a wait: recorded, and the slot is given back.
HOLD_S = 1.0


class Performer(Recorder):
    """Performs and records the steps of one attempt."""

    # Made for the first step that needs room of its own: most need none.
    _made_seating: Seating | None = None
    # What tries used that were ended from outside; the attempt's end tells of it.
    _unrecorded: Sequence[Spent] = ()

    def __init__(
        self,
        lease: Lease,
        scope: Scope,
        branches: Branches,
        *,
        flow: tuple[str, int],
        is_obliged: bool = False,
        right: Right | None = None,
        seats: Sequence[Seat] = (),
        begin_by: float | None = None,
    ) -> None:
        super().__init__(lease, scope, branches, flow=flow, is_obliged=is_obliged)
        self._right = right
        self._under_way = scope.under_way
        self._throttling = scope.throttling
        self._leasehold = scope.leasehold
        if seats:
            self._made_seating = Seating(
                lease, scope.riding, branches, seats=seats, begin_by=begin_by
            )

    @property
    def _seating(self) -> Seating:
        if self._made_seating is None:
            self._made_seating = Seating(self._lease, self._scope.riding, self._branches)
        return self._made_seating

    async def perform(
        self,
        branch: Branch,
        plan: Plan,
        call: Callable[[], Awaitable[Any]],
        recorded: Recorded | None,
    ) -> Any:
        """Try until there is a result, waiting between tries; raises StepFailed.

        This is what each step of each run goes through: what few need is asked for by one look, and called only then.
        """
        if self._held is not None:
            await self.catch_up()
        how = plan.how
        if recorded is not None and recorded.state in once.IN_DOUBT:
            recorded = await self._doubt(
                branch, plan, recorded.tries, None, is_asked=recorded.state == "unknown"
            )
        if how.is_once:
            await self.oblige()
        now = self._loop.time
        tries, began = 0, now()
        if recorded is not None:
            tries, began = recorded.tries, began - recorded.age_s
        try:
            while recorded is None or recorded.state not in ("done", "failed"):
                if how.keys:
                    if not self._leasehold.is_sure:
                        await self.own(self._leasehold.until_sure())
                    try:
                        began += await self._seating.take(branch, plan, self.own)
                    except InvalidInput as error:  # it needs more than there ever is
                        await self._failed_try(plan, error, tries + 1, now() - began)
                tries += 1
                try_began = now()
                if self._right is not None and how.acts:
                    refused = await self.refusal(plan.key, plan.name, how.permission)
                    if refused is not None:
                        if plan.is_seated:
                            self._seating.leave(plan)  # it never began
                        await self._failed_try(plan, refused, tries, now() - began)
                if not self._leasehold.is_sure:
                    await self.own(self._leasehold.until_sure())
                if how.is_once:  # whose commit shows as well that the lease stands
                    await self._mark(plan, tries, now() - began)
                spent: Sequence[Spent] = ()
                try:
                    if how.is_once:
                        result = await self._kept(self._try(branch, plan, call, tries))
                    elif how.timeout_s is not None:
                        result = await self._try(branch, plan, call, tries)
                    else:  # as `_try` does it
                        self._under_way[plan] = now(), self.tell_started
                        plan.current_try = tries
                        branch.is_in_step = True
                        try:
                            result = await call()
                        except (asyncio.CancelledError, SystemExit) as error:
                            self._cut_short(plan, error)
                        finally:
                            branch.is_in_step = False
                            plan.current_try = 0
                            self._under_way.pop(plan, None)
                    if plan.text is not None:
                        await self._shown(plan)
                    if plan.told is not None and not how.is_once:  # as mostly not: a call less
                        await self._told(plan)
                    text = dump(how.output, result)
                    # What the flow gets is what a replay will give it, or the step fails now.
                    value = read_back(how.output, text)
                    ended = now()
                    took_s = ended - try_began
                    if plan.spent is not None:
                        spent = plan.take_spent()
                    write = StepWrite(
                        lease=self._lease,
                        step_key=plan.key,
                        name=plan.name,
                        # Step names need no escaping in JSON.
                        event_kind="step.succeeded",
                        event_data=f'{{"name":"{plan.name}","tries":{tries},"duration_s":{took_s:.6f}}}',
                        state="done",
                        output=text,
                        tries=tries,
                        duration_s=ended - began,
                        seq=branch.places.get(plan.key),
                        spent=spent,
                        is_new=recorded is None and tries == 1 and not how.is_once,
                        has_room=plan.is_seated,
                    )
                    if plan.key not in self._passed and self._may_hold(branch, plan, write, took_s):
                        self.hold(plan, write)
                        return value
                    if how.is_once:
                        await self._kept(self.own(self._store(write)))
                        await self._told(plan)
                    else:  # as `own` does it
                        try:
                            await self._store(write)
                        except (LeaseLost, asyncio.CancelledError) as error:
                            self._unwind(error)
                            raise
                    if plan.is_seated:
                        self._seating.recorded(plan)
                except Exception as error:
                    plan.keep_spent(spent)
                    told = self._throttling.failed(
                        self._lease, plan.name, error, how.keys, how.declared
                    )
                    await self.own(told)
                    if plan.text is not None:
                        await self._shown(plan)
                    if not how.is_once:
                        await self._told(plan)
                    if how.is_once and not isinstance(error, NotDone):
                        recorded = await self._doubt(branch, plan, tries, error)
                        continue
                    delay_s = await self._failed_try(plan, error, tries, now() - began)
                else:
                    if self._throttling.is_watched(self._lease.org_id, plan.name):
                        told = self._throttling.succeeded(
                            self._lease, plan.name, how.keys, how.declared
                        )
                        await self.own(told)
                    return value
                if delay_s > HOLD_S:
                    await self._back_off(plan, delay_s)
                    recorded = await self._branches.park(branch, plan.key, is_human=False)
                else:
                    await self.own(asyncio.sleep(delay_s))
        finally:
            if plan.is_seated:
                self._seating.leave(plan)
            if plan.spent is not None:
                # Whatever cut it short, such as a time limit of the flow's own: no record tells of this.
                self._unrecorded = [*self._unrecorded, *plan.take_spent()]
        return plan.result_of(recorded)

    async def refusal(self, key: str, name: str, permission: str | None = None) -> Forbidden | None:
        """Return why the run may not act for its subject any more, which is audited then; None where it may.

        Waits while that cannot be known.
        """
        right = self._right
        if right is None:
            return None
        refused = await self.persist(lambda: right.refusal(permission))
        if refused is not None:
            tell = partial(right.tell, self._scope.database, key, name, refused)
            await self.persist(tell)
        return refused

    async def _try(
        self,
        branch: Branch,
        plan: Plan,
        call: Callable[[], Awaitable[Any]],
        tries: int,
    ) -> Any:
        """Execute a step's function once, within its time limit. `perform` has this text, too, where there is none."""
        began = self._loop.time()
        if not plan.how.is_once:  # the marker has told of it
            self._under_way[plan] = began, self.tell_started
        plan.current_try = tries
        branch.is_in_step = True
        limit = timed = None
        try:
            if plan.how.timeout_s is None:
                return await call()
            timed = self._scope.timed.add(time.monotonic() + plan.how.timeout_s)
            async with asyncio.timeout(plan.how.timeout_s) as limit:
                value = await call()
            if limit.expired():  # a thread went on beyond it: what it returned does not count
                raise TimeoutError
            return value
        except (asyncio.CancelledError, SystemExit) as error:
            self._cut_short(plan, error)
        except TimeoutError as error:
            if limit is None or not limit.expired():
                raise
            raise Transient(
                f"step {plan.name} took longer than {plan.how.timeout_s} s", code="timeout"
            ) from error
        finally:
            branch.is_in_step = False
            if timed is not None:
                self._scope.timed.end(timed)
            plan.current_try = 0
            self._under_way.pop(plan, None)

    def _cut_short(self, plan: Plan, error: BaseException) -> NoReturn:
        """Raise what a cancellation or exit of a step's function means."""
        if self._branches.closed is not None:
            raise Unwind(self._branches.closed) from error
        raise_stray(error, f"step {plan.name}")

    def _kept(self, work: Awaitable[R]) -> Awaitable[R]:
        """Keep what a `once` step does from being cut short by a time limit of the flow's own."""
        return once.undisturbed(self._branches, work)

    async def _mark(self, plan: Plan, tries: int, elapsed_s: float) -> None:
        """Commit the marker of a `once` step's try."""
        write = once.marker(
            self._lease,
            step_key=plan.key,
            name=plan.name,
            tries=tries,
            duration_s=elapsed_s,
            seq=self._branches.place(plan.key),
        )
        await self._kept(self.own(self._store(write)))

    async def _doubt(
        self,
        branch: Branch,
        plan: Plan,
        tries: int,
        error: Exception | None,
        *,
        is_asked: bool = False,
    ) -> Recorded:
        """Ask what became of a `once` step, unless that was asked before; returns the answer's record."""
        doubt = once.Doubt(
            step_key=plan.key,
            name=plan.name,
            tries=tries,
            role=plan.how.ask_role,
            output=plan.how.output,
            error=None if error is None else dump_error(error, plan.name),
        )
        if not is_asked:
            asked = self.persist(lambda: once.ask(self._scope.database, self._lease, doubt))
            await once.undisturbed(self._branches, asked)
        if plan.is_seated:
            self._seating.leave(plan)
        return await self._branches.park(branch, plan.key, is_human=True)

    async def oblige(self) -> None:
        """Set durably, once, that the run has something to do before it may fail or be cancelled."""
        if not self.is_obliged:
            await self.persist(lambda: waits.oblige(self._scope.database, self._lease, Duty.ENDING))
            self.is_obliged = True

    def given(self, plan: Plan, recorded: Recorded, value: Any) -> None:
        """Take note of a recorded result that the flow gets on replay."""

    def _may_hold(self, branch: Branch, plan: Plan, write: StepWrite, took_s: float) -> bool:
        """Whether a result may go with the run's end: nothing stands beside it that would have to be stored first.

        That a longer step is under way may have been told just now, and is to be stored before the run's end.
        """
        return (
            write.is_new
            and took_s < ANNOUNCE_S
            and branch.parent is None
            and self._branches.closed is None
            and not (plan.how.keys or write.spent or self.is_obliged)
            and len(write.output or "") <= SMALL
            and not self._throttling.is_watched(self._lease.org_id, plan.name)
        )

    async def renounce(self, held: Held, error: Exception) -> NoReturn:
        """See Recorder. Where that cannot be recorded either, the run is to fail by that."""
        write = held.write
        self._is_renouncing = True
        try:
            with contextlib.suppress(StepFailed):
                await self._failed_try(held.plan, error, write.tries, write.duration_s, write.seq)
        except Exception as again:
            known = again if isinstance(again, MillpondError) else None
            self.unstorable = known or Permanent(f"not stored: {type(again).__name__}")
            self._branches.close("unstorable")
            raise Unwind(self._branches.closed or "unstorable") from again
        except asyncio.CancelledError:  # a time limit of the flow's own, which shall not go on
            self._branches.close("refused")
            raise
        self._branches.close("refused")
        raise Unwind(self._branches.closed or "refused") from error

    async def _failed_try(
        self, plan: Plan, error: Exception, tries: int, elapsed_s: float, seq: int | None = None
    ) -> float:
        """Record a failed try; returns the delay before the next one or raises StepFailed. For `seq` see `record`."""
        delay_s = backoff_s(
            plan.how.retry,
            tries=tries,
            verdict=classify(error),
            elapsed_s=elapsed_s,
            wish_s=retry_after_s(error),
            random=random.random,
        )
        described = dump_error(error, plan.name)
        data: dict[str, Json] = {"name": plan.name, "tries": tries, "error": described}
        if delay_s is not None:
            data["delay_s"] = round(delay_s, 3)
        spent = plan.take_spent()
        try:
            await self.record(
                plan.key,
                plan.name,
                "step.failed" if delay_s is None else "step.retrying",
                data,
                state="failed" if delay_s is None else "retrying",
                error=orjson.dumps(described).decode(),
                tries=tries,
                duration_s=elapsed_s,
                seq=seq,
                spent=spent,
                has_room=plan.is_seated,
            )
        except Exception:
            plan.keep_spent(spent)
            raise
        if plan.is_seated:
            self._seating.recorded(plan)
        if delay_s is None:
            raise failure(plan.name, described) from error
        return delay_s

    async def refuse(self, plan: Plan, error: Exception) -> None:
        """Record that a step failed which could never begin; raises StepFailed."""
        await self._failed_try(plan, error, 1, 0.0)

    async def _back_off(self, plan: Plan, delay_s: float) -> None:
        await self.persist(
            lambda: waits.record_backoff(
                self._scope.database, self._lease, step_key=plan.key, delay_s=delay_s
            )
        )

    def take_unrecorded(self) -> Sequence[Spent]:
        """Hand out what tries used that no record will tell of, and forget it."""
        taken, self._unrecorded = self._unrecorded, ()
        return taken
