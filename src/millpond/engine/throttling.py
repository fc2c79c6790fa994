"""Throttling: what workers tell of providers that are asked too much, or fail too often in a row.

Called by whoever performs steps, one Throttling per worker. Invariants: everybody's work on a key is braked only by a
run whose flow or step declares it; what else a run counts on, or its code names, only for its own org; what tries do
that neither fail nor follow a failure is written nowhere; the lock of those who change brakes is taken by nobody whose
own brakes, or everybody's, are not concerned; what cannot be told here changes nothing for the step.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import structlog

from millpond.db.pool import Connection, EngineDatabase, Record
from millpond.db.queries import queries
from millpond.engine import brakes
from millpond.engine.brakes import MOST_S, ROW_S, Brake
from millpond.engine.failures import Failures, Target
from millpond.engine.keying import is_key, noun_of
from millpond.engine.leases import Lease
from millpond.errors import MillpondError
from millpond.retry import Trouble, is_answer, retry_after_s, trouble_of
from millpond.types import NO_ORG

_SQL = queries("throttling")
# What a step's error is about where it names no key: the run's only key of these.
OF_OTHERS = frozenset({"provider", "integration"})
MAX_BRAKES = 100
_MAX_KNOWN = 1000
# A worker stopped in the middle of it would keep others from telling.
_LIMIT_S = 3.0
# What one moment's answers say again is told once in so long.
_TOLD_S = 0.25
_log = structlog.get_logger("millpond.throttling")


class _Told(NamedTuple):
    """When a cooldown was told of last, and until when it is; by this process's clock."""

    at: float
    until: float


class Throttling:
    """Tells claims of throttled and broken providers; lets failures in a row open breakers."""

    def __init__(self, database: EngineDatabase) -> None:
        self._database = database
        self._failures = Failures(database)
        self._open: Mapping[str, set[Target]] = {}
        self._known: dict[tuple[int, bytes], list[Target]] = {}
        self._told: dict[Target, _Told] = {}

    def watch(self, opened: Iterable[Brake]) -> None:
        """Note which breakers are open: a success of the step that opened one closes it."""
        found: dict[str, set[Target]] = {}
        for one in opened:
            found.setdefault(one.step, set()).add(Target(one.owner, one.key))
        self._open = found

    def is_watched(self, org_id: int, step: str) -> bool:
        """Whether a success of this step is to be told, in work of an org."""
        if not self._open and not self._failures:
            return False
        targets = (*self._open.get(step, ()), *self._failures.of(step))
        return any(target.owner in (NO_ORG, org_id) for target in targets)

    async def failed(
        self,
        lease: Lease,
        step: str,
        error: Exception,
        keys: Sequence[str] = (),
        declared: Sequence[str] = (),
    ) -> None:
        """Tell of a failed try: that the other side is asked too much or is down, or that it answers.

        `keys` are what the step counts on beside its run, `declared` those of them that it declares itself.
        """
        trouble = trouble_of(error)
        if trouble is None:
            if is_answer(error) and self.is_watched(lease.org_id, step):
                await self.succeeded(lease, step, keys, declared)
            return
        named = [key for key in getattr(error, "limit_keys", ()) if is_key(key)]
        try:
            for target in await self._targets(lease, named, keys, declared):
                if trouble is Trouble.THROTTLED:
                    await self._throttle(lease, target, step, error)
                elif noun_of(target.key) in OF_OTHERS and (
                    target in self._open.get(step, ())
                    or await self._failures.add(lease, step, target, is_named=bool(named))
                ):
                    await self._trip(lease, target, step, error)
        except MillpondError as away:
            _log.warning("throttling.untold", step=step, error=away.code)

    async def succeeded(
        self, lease: Lease, step: str, keys: Sequence[str] = (), declared: Sequence[str] = ()
    ) -> None:
        """End rows of failures, and close breakers that this step had opened.

        Which key it is about, only errors name; so a success ends all rows that the step's code named itself.
        """
        try:
            if self._failures.of(step):
                targets = await self._targets(lease, (), keys, declared)
                await self._failures.end(lease, step, targets)
            if any(target.owner in (NO_ORG, lease.org_id) for target in self._open.get(step, ())):
                await self._close(lease, step, keys, declared)
        except MillpondError as away:
            _log.warning("throttling.untold", step=step, error=away.code)

    async def _targets(
        self, lease: Lease, named: Sequence[str], keys: Sequence[str], declared: Sequence[str]
    ) -> Sequence[Target]:
        """Return the keys that a step's error is about; none where that cannot be told."""
        if not named and (own := [key for key in keys if noun_of(key) in OF_OTHERS]):
            owner = NO_ORG if own[0] in declared else lease.org_id
            return [Target(owner, own[0])] if len(own) == 1 else ()
        known = (lease.org_id, lease.token.bytes + lease.item_id.bytes)
        if not named and known in self._known:
            return self._known[known]
        async with self._database.statement("keys_of") as con:
            row = await con.fetchrow(_SQL["carried"], lease.org_id, lease.item_id, lease.token)
        if row is None:
            return ()
        found = _chosen(named, row["declared"], row["keys"])
        everybodys = {*row["declared"], *declared}
        targets = [Target(NO_ORG if key in everybodys else lease.org_id, key) for key in found]
        if not named:
            while len(self._known) >= _MAX_KNOWN:
                del self._known[next(iter(self._known))]
            self._known[known] = targets
        return targets

    async def _throttle(self, lease: Lease, target: Target, step: str, error: Exception) -> None:
        wish_s = retry_after_s(error)
        if self._is_told(target, wish_s):
            return
        async with self._database.duty("throttle", limit_s=_LIMIT_S) as con:
            held, now_us, under_way = await self._held(con, lease, target)
            if not now_us:
                return
            new = brakes.throttled(
                held,
                owner=target.owner,
                key=target.key,
                now_us=now_us,
                wish_s=wish_s,
                in_use=under_way,
            )
            await _put(con, held, new, step, error)
        now = time.monotonic()
        self._told.pop(target, None)
        while len(self._told) >= _MAX_KNOWN:
            del self._told[next(iter(self._told))]
        self._told[target] = _Told(now, now + (new.until_us - now_us) / 1e6)

    def _is_told(self, target: Target, wish_s: float | None) -> bool:
        """Whether this worker told of it a moment ago: each of a moment's many answers would wait for the lock."""
        told, now = self._told.get(target), time.monotonic()
        if told is None or now - told.at >= _TOLD_S:
            return False
        return wish_s is None or now + min(MOST_S, wish_s) <= told.until

    async def _trip(self, lease: Lease, target: Target, step: str, error: Exception) -> None:
        async with self._database.duty("trip", limit_s=_LIMIT_S) as con:
            held, now_us, under_way = await self._held(con, lease, target)
            is_open = held is not None and held.opened_us is not None
            if not now_us or not (is_open or self._failures.is_enough(step, target)):
                return
            new = brakes.tripped(
                held, owner=target.owner, key=target.key, now_us=now_us, in_use=under_way
            )
            await _put(con, held, new, step, error)
            await con.execute(_SQL["counted"], target.owner, target.key, step)
        self._failures.forget(step, target)

    async def _held(
        self, con: Connection, lease: Lease, target: Target
    ) -> tuple[Brake | None, int, int]:
        """Lock brakes; return the one on a key, the time (0: nothing is to be told), how much is under way."""
        await con.execute(_SQL["lock"])
        if not await con.fetchval(_SQL["holds"], lease.org_id, lease.item_id, lease.token):
            return None, 0, 0
        row = await con.fetchrow(_SQL["now"], target.owner, target.key)
        assert row is not None
        if row["key"] is None:
            is_full = target.owner != NO_ORG and row["brakes"] >= MAX_BRAKES
            return None, 0 if is_full else row["now_us"], row["under_way"]
        held = Brake(
            owner=target.owner,
            **{name: row[name] for name in _COLUMNS},
        )
        return held, row["now_us"], row["under_way"]

    async def _close(
        self, lease: Lease, step: str, keys: Sequence[str], declared: Sequence[str]
    ) -> None:
        """Close the breakers that a success tells of; looks first, since most successes are of others than a probe."""
        own = (lease.org_id, lease.item_id, lease.token)
        opened = (*own, step, list(keys), list(declared))
        async with self._database.statement("opened_by") as con:
            if not _answered(await con.fetch(_SQL["opened"], *opened)):
                return
        async with self._database.duty("reached", limit_s=_LIMIT_S) as con:
            await con.execute(_SQL["lock"])
            for new in _answered(await con.fetch(_SQL["opened"], *opened)):
                await _store(con, new)


def _answered(rows: Sequence[Record]) -> list[Brake]:
    """Return the brakes that are others now that the other side answered, as they are then."""
    held = [
        (Brake(owner=row["owner"], **{name: row[name] for name in _COLUMNS}), row["now_us"])
        for row in rows
    ]
    return [new for one, now_us in held if (new := brakes.reached(one, now_us)) != one]


_COLUMNS = ("key", "until_us", "factor", "in_use", "hits", "opened_us", "step", "reason")


def _chosen(named: Sequence[str], declared: Iterable[str], carried: Iterable[str]) -> list[str]:
    """Return the keys that an error names, else the only one of others that the flow declares, or the run has."""
    if named:
        return list(dict.fromkeys(named))
    for keys in (declared, carried):
        others = [key for key in keys if noun_of(key) in OF_OTHERS]
        if others:
            return others if len(others) == 1 else []
    return []


async def _put(
    con: Connection, held: Brake | None, new: Brake, step: str, error: Exception
) -> None:
    """Store what has changed of a brake, with what it was for."""
    if held is not None and new == held:
        return
    reason = error.code if isinstance(error, MillpondError) else type(error).__name__
    if new.opened_us is None or held is None or held.opened_us is None:
        new = replace(new, step=step, reason=reason[:200])
    await _store(con, new)


async def _store(con: Connection, new: Brake) -> None:
    await con.execute(
        _SQL["put"],
        new.owner,
        new.key,
        new.until_us,
        new.factor,
        new.in_use,
        new.hits,
        new.opened_us,
        new.over_us,
        new.step,
        new.reason,
    )
    await con.execute(_SQL["changed"], new.owner, new.key)


async def drop_over(database: EngineDatabase) -> int:
    """Delete brakes that have worn off; called by upkeep."""
    async with database.duty("drop_over") as con:
        gone: int = await con.fetchval(_SQL["drop_over"], round(ROW_S * 1e6))
    return gone
