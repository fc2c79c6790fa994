"""Easing: brakes as people see them, and take them off.

Called by the API in a transaction of the caller, and by `ceilings`; the caller commits, then hints the queues.
Invariants: an org sees its own brakes and everybody's, and takes off its own alone; reading takes no lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.engine.brakes import Brake, BrakeState
from millpond.engine.keying import PAIR
from millpond.engine.rules import Rule
from millpond.errors import NotFound
from millpond.types import NO_ORG

_SQL = queries("easing")
_COLUMNS = (
    "owner",
    "key",
    "until_us",
    "factor",
    "in_use",
    "hits",
    "opened_us",
    "step",
    "reason",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Braked:
    """A brake at a time; `until` is when the next may go, `recovers_at` None while a breaker is open."""

    brake: Brake
    now_us: int

    @property
    def state(self) -> BrakeState:
        """How it holds back work now."""
        return self.brake.state_at(self.now_us)

    @property
    def factor(self) -> float:
        """Which part of what is allowed on the key may go now."""
        if self.state in (BrakeState.COOLING, BrakeState.OPEN):
            return 0.0
        return self.brake.factor_at(self.now_us)

    @property
    def until(self) -> datetime:
        """Until when nothing goes."""
        return at_us(self.brake.until_us)

    @property
    def opened_at(self) -> datetime | None:
        """Since when its breaker is open."""
        return at_us(self.brake.opened_us) if self.brake.opened_us else None

    @property
    def recovers_at(self) -> datetime | None:
        """When all is allowed again, unless the key is throttled once more."""
        return None if self.brake.opened_us else at_us(self.brake.over_us)


async def list_brakes(con: Connection) -> list[Braked]:
    """Return what holds back work of the org that asks, and everybody's; without an org only the latter."""
    return [
        Braked(brake=Brake(**{name: row[name] for name in _COLUMNS}), now_us=row["now_us"])
        for row in await con.fetch(_SQL["brakes"])
    ]


async def release(con: Connection, key: str) -> None:
    """Take off the brake that the asking org has on a key, without an org everybody's; raises NotFound."""
    if not await con.fetchval(_SQL["release"], key):
        raise NotFound(f"there is no brake on {key[:200]}", code="brake_not_found", param="key")


def part_of(rule: Rule, braked: Iterable[Braked]) -> float:
    """Return which part of a limit is allowed now: of one on a pattern all of it, since its names differ."""
    keys: Sequence[str] = rule.key.split(PAIR)
    found = [
        one.factor
        for one in braked
        if one.brake.key in keys and one.brake.owner in (NO_ORG, rule.owner, rule.of_org)
    ]
    return min(found, default=1.0)


def at_us(us: int) -> datetime:
    """Return a time that is kept in microseconds."""
    return datetime.fromtimestamp(us / 1e6, UTC)
