"""Rates: how many requests an org, and each API key, may make per second, whichever API process it asks.

Called for every authenticated request. Invariants: what is let through was taken from a bucket in the database,
which fills by the second and holds a second's worth; a process takes some ahead, so that most requests ask nobody;
requests that have to wait for it ask together.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from millpond.db.pool import Connection, Database
from millpond.db.queries import queries
from millpond.errors import Transient
from millpond.types import NO_ORG, Principal

_SQL = queries("rates")
# What was taken ahead is good for so long.
_GOOD_S = 1.0
_SWEEP_S = 600.0
_LEAST_S = 0.02
Headers = Sequence[tuple[bytes, bytes]]


@dataclass(eq=False)
class _Bucket:
    """What a process has in hand of one bucket; times are on the monotonic clock."""

    name: str
    policy: str
    per_s: float
    most: float
    left: int = 0
    until: float = 0.0
    empty_until: float = 0.0
    shared: float = 0.0
    used: int = 0
    taken_at: float = 0.0
    waiting: list[asyncio.Future[bool]] = field(default_factory=list)

    def take(self, now: float) -> bool | None:
        """Take one: True when it was in hand, False when there is none, None when nobody knows."""
        if self.left >= 1 and now < self.until:
            self.left -= 1
            self.used += 1
            return True
        return False if now < self.empty_until else None

    def wanted(self, now: float) -> int:
        """Return how many to take: who waits, and as many as half a second used, but never much of the whole."""
        lasted_s = max(now - self.taken_at, 0.05)
        ahead = min(self.used / lasted_s / 2, self.most / 4)
        return max(len(self.waiting), math.floor(ahead), 1)

    def remaining(self) -> int:
        """Return how many requests are left as far as this process knows."""
        return max(0, self.left + math.floor(self.shared))

    def retry_s(self, now: float) -> float:
        """Return in how many seconds the next request may be let through."""
        return max(self.empty_until - now, _LEAST_S)

    @property
    def window(self) -> tuple[int, int]:
        """Return quota and window in seconds, as the policy names them."""
        return (max(1, math.floor(self.most)), max(1, math.ceil(self.most / self.per_s)))


class Rates:
    """Lets requests through for one API process."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._buckets: dict[str, _Bucket] = {}
        self._asking: asyncio.Task[None] | None = None
        self._swept_at = time.monotonic()

    async def admit(self, principal: Principal, limits: Mapping[str, float]) -> Headers:
        """Let a request through and return the headers that tell how many are left; none where nothing is limited.

        Raises RateLimited, with the same headers, when it comes too early.
        """
        buckets = list(self._of(principal, limits))
        for nth, bucket in enumerate(buckets):
            if not await self._take(bucket):
                for taken in buckets[:nth]:
                    taken.left += 1
                raise RateLimited(bucket, _headers(buckets))
        return _headers(buckets) if buckets else ()

    def _of(self, principal: Principal, limits: Mapping[str, float]) -> Sequence[_Bucket]:
        if principal.org_id == NO_ORG:
            return ()
        found = []
        if (per_s := limits.get("key_requests_per_s")) and principal.subject.startswith("key:"):
            found.append(self._bucket(principal.subject, "key", per_s))
        if per_s := limits.get("requests_per_s"):
            found.append(self._bucket(f"org:{principal.org_id}", "org", per_s))
        return found

    def _bucket(self, name: str, policy: str, per_s: float) -> _Bucket:
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = _Bucket(name, policy, per_s, max(1.0, per_s))
        if bucket.per_s != per_s:
            # What was known of it was at the former rate: the next request asks.
            bucket.per_s, bucket.most = per_s, max(1.0, per_s)
            bucket.left, bucket.empty_until = 0, 0.0
        return bucket

    async def _take(self, bucket: _Bucket) -> bool:
        taken = bucket.take(time.monotonic())
        if taken is not None:
            return taken
        bucket = self._buckets.setdefault(bucket.name, bucket)  # it may have been swept meanwhile
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        bucket.waiting.append(future)
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask(), name="rates")
        return await future

    async def _ask(self) -> None:
        """Take for everybody who waits, as often as somebody does; nobody is left waiting."""
        waiting: dict[str, list[asyncio.Future[bool]]] = {}
        try:
            while asked := [one for one in self._buckets.values() if one.waiting]:
                wanted = [one.wanted(time.monotonic()) for one in asked]
                waiting = {one.name: one.waiting for one in asked}
                for one in asked:
                    one.waiting = []
                try:
                    async with self._db.globals() as con:
                        granted = await _take_all(con, asked, wanted)
                        if self._sweeps():
                            await con.execute(_SQL["sweep"])
                except Exception as error:  # noqa: BLE001 - whoever waits raises it
                    _fail(waiting, error)
                    continue
                for one in asked:
                    _give(one, waiting[one.name], *granted.get(one.name, (0, 0.0)))
        except BaseException as error:
            for one in self._buckets.values():
                waiting.setdefault(one.name, []).extend(one.waiting)
                one.waiting = []
            _fail(waiting, error)
            raise
        finally:
            self._asking = None

    def _sweeps(self) -> bool:
        """Forget, now and then, buckets that nobody asks for any more; tells whether it was time for that."""
        now = time.monotonic()
        if now - self._swept_at < _SWEEP_S:
            return False
        self._swept_at = now
        for name, one in list(self._buckets.items()):
            if now - one.taken_at > _SWEEP_S and not one.waiting:
                del self._buckets[name]
        return True


class RateLimited(Transient):
    """A request that came too early."""

    code = "rate_limited"

    def __init__(self, bucket: _Bucket, headers: Headers) -> None:
        whose = "organization" if bucket.policy == "org" else "API key"
        super().__init__(
            f"This {whose} may make {bucket.per_s:g} requests per second, and has.",
            retry_after_s=bucket.retry_s(time.monotonic()),
        )
        self.headers = headers


async def _take_all(
    con: Connection, buckets: Sequence[_Bucket], wanted: Sequence[int]
) -> dict[str, tuple[int, float]]:
    """Return by name what was granted, and what is left for all processes."""
    columns = (
        [one.name for one in buckets],
        [float(many) for many in wanted],
        [one.per_s for one in buckets],
        [one.most for one in buckets],
    )
    rows = await con.fetch(_SQL["take"], *columns)
    if len(rows) < len(buckets):
        known = {row["bucket"] for row in rows}
        left = [nth for nth, one in enumerate(buckets) if one.name not in known]
        new = [[column[nth] for nth in left] for column in columns]
        await con.execute(_SQL["open"], new[0], new[3])
        rows += await con.fetch(_SQL["take"], *new)
    return {row["bucket"]: (row["granted"], row["tokens"]) for row in rows}


def _fail(waiting: Mapping[str, Sequence[asyncio.Future[bool]]], error: BaseException) -> None:
    """Let everybody who waits raise an error, or be cancelled where the asking was."""
    for future in (one for held in waiting.values() for one in held):
        if future.done():
            continue
        if isinstance(error, Exception):
            future.set_exception(error)
        else:
            future.cancel()


def _give(
    bucket: _Bucket, waiting: Sequence[asyncio.Future[bool]], granted: int, shared: float
) -> None:
    """Tell those who waited, in their order, and keep what is over."""
    now = time.monotonic()
    if now >= bucket.until:
        bucket.left = 0
    bucket.used, bucket.taken_at, bucket.shared = 0, now, shared
    left = bucket.left + granted
    for future in waiting:
        if future.done():
            continue
        future.set_result(left >= 1)
        if left >= 1:
            left -= 1
            bucket.used += 1
        else:
            bucket.empty_until = now + max((1 - shared) / bucket.per_s, _LEAST_S)
    bucket.left, bucket.until = left, now + _GOOD_S


def _headers(buckets: Sequence[_Bucket]) -> Headers:
    """Return `RateLimit-Policy` and `RateLimit` as draft-ietf-httpapi-ratelimit-headers-10 writes them."""
    policies, states = [], []
    for one in buckets:
        most, window_s = one.window
        left = min(one.remaining(), most)
        policies.append(f'"{one.policy}";q={most};w={window_s}')
        states.append(f'"{one.policy}";r={left};t={max(1, math.ceil((most - left) / one.per_s))}')
    return (
        (b"ratelimit-policy", ", ".join(policies).encode()),
        (b"ratelimit", ", ".join(states).encode()),
    )
