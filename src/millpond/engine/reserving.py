"""Reserving: the blocks of quotas that one process holds, taken ahead and given back unused.

Called by the API's accept path: a run costs no round trip while a block lasts. Invariants: a block is taken and
given back in short transactions of their own; what a process thinks is left is never more than the database does;
an org is refused only after the database said that nothing is left, also in blocks of others.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import structlog

from millpond.db.pool import Database
from millpond.engine import quotas
from millpond.engine.quota_plans import Plans
from millpond.engine.quotas import RUNS, SPENT, QuotaBusy, Ticket, TooFew
from millpond.errors import BlockGone, MillpondError, OverQuota, Transient

R = TypeVar("R")
_log = structlog.get_logger("millpond.quotas")
# How soon a process hears of changed plans, and looks at what an org has spent on models.
REFRESH_S = 5.0
# An org that was refused is refused from memory for a moment.
_REFUSED_S = 0.5
_IDLE_S = 60.0
# Nobody is let through on plans that were heard longer ago.
_STALE_S = 3 * REFRESH_S
_FIRST, _LEAST, _MOST = 16, 8, 8192
# A block is to last a few seconds.
_SHORT_S, _LONG_S = 2.0, 20.0
_TRIES = 20
# How long to let others commit who spend the last of a quota, at most, before the next try.
_BUSY_S = 0.1
_MARGIN_S = 0.05


@dataclass(eq=False, slots=True)
class _Block:
    """A block in hand; without an id there is no such quota. Times are on the monotonic clock."""

    block_id: uuid.UUID | None
    left: int
    until: float
    taken_at: float


@dataclass(eq=False)
class _Held:
    """What is held for one org."""

    blocks: dict[str, _Block] = field(default_factory=dict)
    retired: dict[str, set[uuid.UUID]] = field(default_factory=dict)
    wanted: dict[str, int] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    looked_at: float = -REFRESH_S
    used_at: float = 0.0
    refusal: OverQuota | None = None
    refused_until: float = 0.0

    def take(self, names: frozenset[str], amount: int, now: float) -> Ticket | None:
        """Take up to `amount` of what is in hand, at least one; None where something has to be asked first."""
        if names & _LOOKED_AT and now - self.looked_at >= REFRESH_S:
            return None
        paying: list[_Block] = []
        for name in names & _COUNTED:
            block = self.blocks.get(name)
            if block is None or block.left < 1 or now >= block.until:
                return None
            paying.append(block)
        amount = min([amount, *(block.left for block in paying)])
        for block in paying:
            block.left -= amount
        self.used_at = now
        ids = [block.block_id for block in paying if block.block_id is not None]
        return Ticket(amount, ids or None)

    def give(self, ticket: Ticket, amount: int) -> None:
        """Put back what was not spent of a ticket."""
        for block in self.blocks.values():
            if ticket.blocks is not None and block.block_id in ticket.blocks:
                block.left += amount

    def retire(self, name: str) -> None:
        """Use a block no more; the next transaction ends it."""
        block = self.blocks.pop(name, None)
        if block is not None and block.block_id is not None:
            self.retired.setdefault(name, set()).add(block.block_id)


_COUNTED = frozenset(RUNS)
_LOOKED_AT = frozenset(SPENT)
_NAMES = _COUNTED | _LOOKED_AT


class Reserver:
    """Holds blocks of orgs' quotas for one process."""

    def __init__(self, db: Database, plans: Plans, *, idle_s: float = _IDLE_S) -> None:
        self._db = db
        self._plans = plans
        self._idle_s = idle_s
        self._held: dict[int, _Held] = {}
        self._heard_at = -math.inf
        self._hearing = asyncio.Lock()

    async def spending(self, org_id: int, amount: int, work: Callable[[Ticket], Awaitable[R]]) -> R:
        """Do `work`, a transaction that submits at most `amount` runs, with a ticket for all of them.

        Done again when its blocks were taken back meanwhile. Raises OverQuota when fewer are left.
        """
        return await self._spending(org_id, amount, self._take_all, work)

    async def spending_some(
        self, org_id: int, amount: int, work: Callable[[Ticket], Awaitable[R]]
    ) -> R:
        """Do `work`, a transaction that submits about `amount` runs, with a ticket for as many as are left of that.

        Done again, with one for more, when it raises TooFew.
        """
        return await self._spending(org_id, amount, self._take_some, work)

    async def _spending(
        self,
        org_id: int,
        amount: int,
        take: Callable[[int, int], Awaitable[Ticket]],
        work: Callable[[Ticket], Awaitable[R]],
    ) -> R:
        for _ in range(_TRIES):
            ticket = await take(org_id, amount)
            try:
                result = await work(ticket)
            except BlockGone:
                self.drop(org_id, ticket)
            except TooFew as error:
                self.settle(org_id, ticket, error)
                amount = error.wanted
            except BaseException as error:
                self.settle(org_id, ticket, error)
                raise
            else:
                self.settle(org_id, ticket)
                return result
        raise QuotaBusy

    async def take(self, org_id: int, amount: int, *, is_patient: bool = False) -> Ticket:
        """Return a ticket for `amount` runs, or for fewer; raises OverQuota when nothing is left.

        One that `is_patient` gets fewer only when no more are left. Raises QuotaBusy when others spend for long.
        Whoever takes it settles or drops it after the transaction.
        """
        names = await self._names(org_id)
        if not names:
            return Ticket(amount)
        held = self._held.setdefault(org_id, _Held())
        for _ in range(_TRIES):
            now = time.monotonic()
            if held.refusal is not None and now < held.refused_until:
                raise held.refusal
            if (ticket := held.take(names, amount, now)) is not None:
                return ticket
            async with held.lock:
                if (ticket := held.take(names, amount, time.monotonic())) is not None:
                    return ticket
                is_known = await self._ask(org_id, held, names, amount, is_patient=is_patient)
            if not is_known:
                await asyncio.sleep(random.uniform(0, _BUSY_S))
        raise QuotaBusy

    def settle(self, org_id: int, ticket: Ticket, error: BaseException | None = None) -> None:
        """Put back what a transaction did not spend; after an unknown outcome the database alone knows."""
        held = self._held.get(org_id)
        if held is None or ticket.blocks is None:
            return
        if error is None:
            held.give(ticket, ticket.amount - ticket.spent)
        elif isinstance(error, MillpondError) and not isinstance(error, Transient):
            held.give(ticket, ticket.amount)

    def drop(self, org_id: int, ticket: Ticket) -> None:
        """Use the blocks of a ticket no more: one of them was taken back."""
        held = self._held.get(org_id)
        if held is None or ticket.blocks is None:
            return
        for name in [
            name for name, block in held.blocks.items() if block.block_id in ticket.blocks
        ]:
            held.retire(name)

    async def keep(self) -> None:
        """Hear of changed plans and give back what is not used; runs until it is cancelled."""
        while True:
            await asyncio.sleep(REFRESH_S)
            for chore in (self.refresh, self._give_back_idle):
                try:
                    await chore()
                except MillpondError as error:
                    _log.warning("quotas.failed", error=error.code)
                except Exception:  # noqa: BLE001 - a top-level loop; the log tells
                    _log.exception("quotas.failed")

    async def refresh(self) -> None:
        """Read plans now; blocks that were taken by other limits than an org has now are used no more."""
        now = time.monotonic()
        before = {org_id: self._plans.of(org_id) for org_id in self._held}
        async with self._db.globals() as con:
            await self._plans.refresh(con)
        self._heard_at = now
        for org_id, held in self._held.items():
            held.refusal = None
            if self._plans.of(org_id) != before.get(org_id):
                for name in list(held.blocks):
                    held.retire(name)

    async def close(self) -> None:
        """Give everything back; what the database does not hear of, others take when they need it."""
        for org_id, held in list(self._held.items()):
            await self._try_give_back(org_id, held)

    async def limits(self, org_id: int) -> Mapping[str, float]:
        """Return what an org is limited to, by name, as this process last heard."""
        if time.monotonic() - self._heard_at > _STALE_S:
            async with self._hearing:
                if time.monotonic() - self._heard_at > _STALE_S:
                    await self.refresh()
        return self._plans.of(org_id)

    async def limits_if_any(self, org_id: int) -> Mapping[str, float]:
        """Return the same, but without waiting for the database where no limits were heard of."""
        if self._heard_at > -math.inf and not self._plans.of(org_id):
            return {}
        return await self.limits(org_id)

    async def _names(self, org_id: int) -> frozenset[str]:
        """Return by which quotas of runs an org is limited."""
        return _NAMES & (await self.limits(org_id)).keys()

    async def _take_all(self, org_id: int, amount: int) -> Ticket:
        """Take a ticket for all of `amount`; raises OverQuota when fewer are left."""
        for _ in range(_TRIES):
            ticket = await self.take(org_id, amount)
            if ticket.amount >= amount:
                return ticket
            self.settle(org_id, ticket)
            again = await self._take_whole(org_id, amount)
            if again is None:
                await asyncio.sleep(random.uniform(0, _BUSY_S))
                continue
            if again.amount >= amount:
                return again
            self.settle(org_id, again)
            await self._check_left(org_id, amount)
        raise QuotaBusy

    async def _take_whole(self, org_id: int, amount: int) -> Ticket | None:
        """Take a ticket by blocks that are large enough, or by what is left; None while that is not known."""
        names = await self._names(org_id)
        held = self._held.setdefault(org_id, _Held())
        async with held.lock:
            for name in names & _COUNTED:
                held.retire(name)
            if not await self._ask(org_id, held, names, amount, is_patient=True):
                return None
            return held.take(names, amount, time.monotonic())

    async def _check_left(self, org_id: int, amount: int) -> None:
        """Raise OverQuota for the quota that has the least left, if less than `amount`."""
        async with self._db.org(org_id) as con:
            limits = await quotas.limits_of(con, org_id)
            counted = {name: most for name, most in limits.items() if name in RUNS}
            used = await quotas.read_used(con, org_id, counted)
        least = min(used, key=lambda one: one.maximum - one.used, default=None)
        if least is not None and least.maximum - least.used < amount:
            raise quotas.over(
                least.quota, least.used, least.maximum, least.renews_at, wanted=amount
            )

    async def _take_some(self, org_id: int, amount: int) -> Ticket:
        """Take a ticket for all of `amount`, or for what is left of it."""
        try:
            return await self._take_all(org_id, amount)
        except OverQuota:
            pass
        try:
            ticket = await self.take(org_id, amount, is_patient=True)
        except OverQuota:
            ticket = Ticket(0, [])
        ticket.is_last = True
        return ticket

    async def _ask(
        self,
        org_id: int,
        held: _Held,
        names: frozenset[str],
        amount: int,
        *,
        is_patient: bool,
    ) -> bool:
        """Ask for what is not in hand; raises OverQuota, which is remembered for a moment.

        Returns False where others spend the last at this moment.
        """
        try:
            if names & _LOOKED_AT and time.monotonic() - held.looked_at >= REFRESH_S:
                async with self._db.org(org_id) as con:
                    await quotas.check_spent(con, org_id)
                held.looked_at = time.monotonic()
            for name in sorted(names & _COUNTED):
                block = held.blocks.get(name)
                if block is None or block.left < 1 or time.monotonic() >= block.until:
                    await self._refill(org_id, held, name, amount, is_patient=is_patient)
        except QuotaBusy:
            return False
        except OverQuota as error:
            held.refusal = error
            held.refused_until = time.monotonic() + _REFUSED_S
            raise
        return True

    async def _refill(
        self, org_id: int, held: _Held, name: str, amount: int, *, is_patient: bool
    ) -> None:
        old = held.blocks.get(name)
        wanted = held.wanted.get(name, _FIRST)
        now = time.monotonic()
        if old is not None and old.left < 1:
            lasted_s = now - old.taken_at
            wanted = (
                wanted * 4 if lasted_s < _SHORT_S else wanted // 2 if lasted_s > _LONG_S else wanted
            )
        held.wanted[name] = min(max(wanted, _LEAST), _MOST)
        held.retire(name)
        retired = held.retired.get(name, set())
        async with self._db.org(org_id) as con:
            taken, ended = await quotas.take_block(
                con,
                org_id,
                name,
                needed=amount,
                wanted=held.wanted[name],
                retired=list(retired),
                is_patient=is_patient,
            )
        retired -= ended
        if taken is None:
            held.blocks[name] = _Block(None, 2**62, now + REFRESH_S, now)
        else:
            until = now + taken.left_s - _MARGIN_S
            held.blocks[name] = _Block(taken.block_id, taken.size, until, now)

    async def _give_back_idle(self) -> None:
        now = time.monotonic()
        for org_id, held in list(self._held.items()):
            if now - held.used_at > self._idle_s and not held.lock.locked():
                await self._try_give_back(org_id, held)
                if not held.blocks and not any(held.retired.values()) and not held.lock.locked():
                    self._held.pop(org_id, None)

    async def _try_give_back(self, org_id: int, held: _Held) -> None:
        """Give back; where that fails others go on, and it is tried again."""
        try:
            await self._give_back(org_id, held)
        except MillpondError as error:
            _log.warning("quotas.not_given_back", org_id=org_id, error=error.code)
        except Exception:  # noqa: BLE001 - of one org; the log tells
            _log.exception("quotas.not_given_back", org_id=org_id)

    async def _give_back(self, org_id: int, held: _Held) -> None:
        async with held.lock:
            for name in list(held.blocks):
                held.retire(name)
            for ids in held.retired.values():
                if ids:
                    async with self._db.org(org_id) as con:
                        ids -= await quotas.give_back(con, org_id, list(ids))


@asynccontextmanager
async def keeping(reserver: Reserver) -> AsyncIterator[None]:
    """Keep a reserver's plans fresh and its idle blocks given back until the block ends."""
    task = asyncio.create_task(reserver.keep(), name="quotas")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
