"""Step tries: a step of a run elsewhere is tried until there is a result, a failure, or a wait.

Called by `step_executor`. Invariant: each outcome is recorded, in one fenced write.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import orjson

from millpond.engine import remote
from millpond.engine.arguments import arguments_of
from millpond.engine.branches import Unwind
from millpond.engine.deltas import Growing
from millpond.engine.encoding import dump, dump_error, read_back
from millpond.engine.metering import Spent
from millpond.engine.opening import Opening
from millpond.engine.performing import HOLD_S
from millpond.engine.recording import AGAIN_S, is_away
from millpond.engine.registry import Step
from millpond.engine.remote import Order, RemoteWrite
from millpond.engine.rights import ENDINGS, right_of
from millpond.engine.scope import ANNOUNCE_S, Scope
from millpond.engine.step_attempt import StepAttempt
from millpond.engine.step_context import StepContext, StepFacts, Teller
from millpond.engine.strays import raise_stray
from millpond.errors import Forbidden, LeaseLost, NotFound, Transient
from millpond.retry import DEFAULT_RETRY, Retry, backoff_s, classify, retry_after_s
from millpond.types import Json
from millpond.veil import Veil

R = TypeVar("R")


class _Try(NamedTuple):
    """One execution of the step's function; `began` is on the loop's clock."""

    number: int
    began: float


class StepTries:
    """Tries a step until there is a result, a failure, or a wait; each outcome recorded."""

    def __init__(self, attempt: StepAttempt, scope: Scope, order: Order) -> None:
        self._attempt = attempt
        self._scope = scope
        self._settler = scope.settler
        self._order = order
        self._lease = attempt.claimed.lease
        self._spent = attempt.spent
        self._text: Growing | None = None
        self._trying = 0
        self._keys = attempt.step.keys if attempt.step else ()
        self._retry: Retry = attempt.step.retry if attempt.step else DEFAULT_RETRY

    async def run(self) -> None:
        """Try, record, and try again while the policy says so."""
        now = asyncio.get_running_loop().time
        tries = self._attempt.claimed.tries
        began = now() - self._order.age_s
        self._attempt.begin()
        while True:
            one = _Try(tries := tries + 1, now())
            self._attempt.tries = tries
            spent: Sequence[Spent] = ()
            try:
                await self._permit()
                text = await self._result(one)
                await self._shown()
                await self._told_success()
                spent = self._take_spent()
                await self._own(self._done(one, text, now() - one.began, spent))
            except LeaseLost:
                raise
            except Exception as error:
                self._spent[:0] = spent
                await self._shown()
                delay_s = await self._own(self._failed(one, error, now() - began))
            else:
                return
            if delay_s is None:
                return
            await self._own(asyncio.sleep(delay_s))

    async def _permit(self) -> None:
        """Raise Forbidden, audited, where the run may not act for its subject any more."""
        step = self._attempt.step
        if step is not None and not step.acts:
            return
        key = self._attempt.claimed.step_key or ""
        permission = None if step is None else step.permission
        refused = await self.refusal(key, self._order.name, permission)
        if refused is not None:
            raise refused

    async def refusal(self, key: str, name: str, permission: str | None = None) -> Forbidden | None:
        """Return why the run may not act for its subject any more, audited; None where it may."""
        claimed, database = self._attempt.claimed, self._scope.database
        if (claimed.step_key or "").startswith(ENDINGS):
            return None  # endings undo what was done: they need no right
        right = right_of(self._scope.asking, claimed)
        if right is None:
            return None
        refused = await self.persist(lambda: right.refusal(permission))
        if refused is not None:
            await self.persist(lambda: right.tell(database, key, name, refused))
        return refused

    async def persist(self, write: Callable[[], Awaitable[R]]) -> R:
        """Do what needs the database, again while that is out of reach.

        Where the database is there and something else is not, the step is left to another worker in the end.
        """
        try:
            return await self._own(insist(write))
        except LeaseLost as error:
            if is_away(error.__cause__):
                self._attempt.closed = self._attempt.closed or "away"
                raise Unwind(self._attempt.closed) from error
            raise

    async def _result(self, one: _Try) -> str:
        """Execute the function once; returns its result as JSON text that reads back as declared."""
        step = self._attempt.step
        if step is None:
            raise NotFound(f"this worker has no step {self._order.name}", code="step_not_found")
        args, kwargs = arguments_of(step.name, step.function).read(self._order.arguments)
        announcing = asyncio.get_running_loop().call_later(ANNOUNCE_S, self._tell_started, one)
        try:
            text = dump(step.output, await self._try(step, one, args, kwargs))
        finally:
            announcing.cancel()
        read_back(step.output, text)
        return text

    async def _try(
        self, step: Step[Any, Any], one: _Try, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        attempt, limit, timed = self._attempt, None, None
        attempt.check()
        if not self._scope.leasehold.is_sure:
            await self._own(self._scope.leasehold.until_sure())
        self._trying = one.number
        if step.timeout_s is not None:
            timed = self._scope.timed.add(time.monotonic() + step.timeout_s)
        try:
            async with asyncio.timeout(step.timeout_s) as limit:
                value = await self._call(step, one, args, kwargs)
            if not limit.expired():
                return value
        except (asyncio.CancelledError, SystemExit) as error:
            if attempt.closed is not None:
                raise Unwind(attempt.closed) from error
            raise_stray(error, f"step {step.name}")
        except TimeoutError:
            if limit is None or not limit.expired():
                raise
        finally:
            self._trying = 0
            if timed is not None:
                self._scope.timed.end(timed)
        # Also of a thread that went on: what it returned after its time does not count.
        raise Transient(f"step {step.name} took longer than {step.timeout_s} s", code="timeout")

    async def _call(
        self, step: Step[Any, Any], one: _Try, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        lease = self._lease
        facts = StepFacts(
            org_id=lease.org_id,
            run_id=lease.run_id,
            subject=self._attempt.claimed.subject,
            step_key=self._attempt.claimed.step_key or "",
            try_number=one.number,
        )
        if step.place == "process":
            return await self._scope.placing.call_apart(step.function, facts, args, kwargs)
        teller = Teller(self._tell, self._tell_soon, partial(self._show, one.number))
        opening = Opening(self._attempt.claimed, self._scope, self)
        first = StepContext(
            facts,
            resources=self._scope.resources,
            teller=teller,
            opens=opening.open,
            spend=self._spent.append,
        )
        return await self._scope.placing.call_step(
            step, first, args, kwargs, keeps=lambda: self._attempt.closed is not None
        )

    def _done(
        self, one: _Try, text: str, took_s: float, spent: Sequence[Spent]
    ) -> asyncio.Future[None]:
        data = self._data(one, duration_s=round(took_s, 6))
        return self._record(
            "step.succeeded",
            data,
            state="done",
            output=text,
            tries=one.number,
            spent=spent,
        )

    async def _told_success(self) -> None:
        """Tell that the other side answers; before the record, which ends the lease."""
        throttling, name = self._scope.throttling, self._order.name
        if throttling.is_watched(self._lease.org_id, name):
            await self._own(throttling.succeeded(self._lease, name, self._keys, self._keys))

    async def _failed(self, one: _Try, error: Exception, elapsed_s: float) -> float | None:
        """Record a failed try; returns the delay before the next one, None when this attempt is over.

        A long backoff is waited for without slot and lease.
        """
        delay_s = backoff_s(
            self._retry,
            tries=one.number,
            verdict=classify(error),
            elapsed_s=elapsed_s,
            wish_s=retry_after_s(error),
            random=random.random,
        )
        await self._scope.throttling.failed(
            self._lease, self._order.name, error, self._keys, self._keys
        )
        described = dump_error(error, self._order.name)
        more: dict[str, Json] = {"error": described}
        if delay_s is not None:
            more["delay_s"] = round(delay_s, 3)
        write = self._write(
            "step.failed" if delay_s is None else "step.retrying",
            self._data(one, **more),
            state="failed" if delay_s is None else "waiting",
            error=orjson.dumps(described).decode(),
            tries=one.number,
            spent=self._take_spent(),
        )
        try:
            if delay_s is not None and delay_s > HOLD_S:
                rest_s = delay_s
                await insist(lambda: remote.rest(self._scope.database, write, delay_s=rest_s))
                return None
            await self._settler.record(write)
        except Exception:
            # What a record would have told that was refused, the next one tells.
            self._spent[:0] = write.spent
            raise
        return delay_s

    def _take_spent(self) -> Sequence[Spent]:
        """Return what was used since the last record."""
        spent, self._spent[:] = list(self._spent), []
        return spent

    def _tell_started(self, one: _Try) -> None:
        worker = str(self._scope.worker_id)
        self._forget(self._record("step.started", self._data(one, worker=worker)))

    async def _tell(self, body: str) -> None:
        self._attempt.check()
        await self._own(self._record("progress", body))

    def _tell_soon(self, body: str) -> asyncio.Future[None] | None:
        if self._attempt.closed is not None:
            return None
        write = self._record("progress", body)
        self._forget(write)
        return write

    def _show(self, tries: int, text: str, veil: Veil | None) -> None:
        if self._trying != tries or self._attempt.closed is not None:
            return  # a thread that went on beyond its time
        if self._text is None:
            key = self._attempt.claimed.step_key or ""
            self._text = self._scope.deltas.open(self._lease, key, tries, veil)
        self._text.feed(text)

    async def _shown(self) -> None:
        """Wait until what the try showed is stored, so that nothing of it comes after its record."""
        text, self._text = self._text, None
        if text is not None:
            await self._own(text.end())

    def _forget(self, write: asyncio.Future[None]) -> None:
        """Wait for no write, but stop what nobody asks for any more when its lease is gone."""

        def heed(done: asyncio.Future[None]) -> None:
            if not done.cancelled() and isinstance(done.exception(), LeaseLost):
                self._attempt.unwind("lost")

        write.add_done_callback(heed)

    def _data(self, one: _Try, **more: Json) -> str:
        data = {
            "name": self._order.name,
            "tries": one.number,
            "queue": self._attempt.claimed.queue,
            **more,
        }
        return dump(None, data)

    def _record(self, kind: str, data: str, **more: Any) -> asyncio.Future[None]:
        return self._settler.record(self._write(kind, data, **more))

    def _write(self, kind: str, data: str, **more: Any) -> RemoteWrite:
        key = self._attempt.claimed.step_key or ""
        return RemoteWrite(
            lease=self._lease, step_key=key, event_kind=kind, event_data=data, **more
        )

    async def _own(self, awaitable: Awaitable[R]) -> R:
        """Await something of the engine's; an attempt ended meanwhile gets Unwind."""
        try:
            return await awaitable
        except asyncio.CancelledError as error:
            if self._attempt.closed is not None:
                raise Unwind(self._attempt.closed) from error
            raise


async def insist(write: Callable[[], Awaitable[R]]) -> R:
    """Make a write, again while the database is out of reach."""
    last: Transient | None = None
    for _ in range(100):
        try:
            return await write()
        except Transient as error:
            last = error
            await asyncio.sleep(AGAIN_S)
    raise LeaseLost("the database stayed out of reach") from last
