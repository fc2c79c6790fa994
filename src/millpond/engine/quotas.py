"""Quotas: what an org may take of something in a period, counted by the database, as blocks and at once.

Called by `reserving` (blocks, in short transactions of their own) and by whoever starts runs in a transaction of
the engine's or of a bulk step (at once). Invariants: what was spent and what blocks hold is never more than the
quota; a block pays only for what commits while it stands; counts are locked before blocks, in the order of quota and
period. A block that somebody spends of at this moment is passed over: what it has left is not known then, so that
nobody is refused for it, but asked to come again.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import orjson

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.errors import MillpondError, OverQuota, Transient
from millpond.types import new_id

_SQL = queries("quotas")

# What is counted at accept, with its period.
RUNS: Mapping[str, str] = {"runs_per_day": "day", "runs_per_month": "month"}
# What runs spend as they go: no further run is accepted once it is reached.
SPENT = ("tokens_per_month", "cost_micros_per_month")
Limits = Mapping[str, float]
# What is noted on a schedule or trigger whose run was not paid for.
USED_UP = "quota_exceeded: a quota of the organization is used up"


class QuotaBusy(Transient):
    """Others spend of the last blocks at this moment: what is left is known when their transactions are over."""

    code = "quota_busy"

    def __init__(self) -> None:
        super().__init__("others spend the last of the quota at this moment", retry_after_s=1.0)


class TooFew(MillpondError):
    """A ticket pays for fewer runs than are to be started: nothing is stored, take one for `wanted`."""

    code = "quota_ticket_too_small"

    def __init__(self, wanted: int) -> None:
        super().__init__(f"{wanted} runs are to be paid for")
        self.wanted = wanted


@dataclass(slots=True)
class Ticket:
    """The right to submit up to `amount` runs in one transaction, paid by blocks; None where nothing is limited.

    `spent` is set by the submit. With a `refusal` it pays for nothing: the submit raises that. One that `is_last` has
    what was left.
    """

    amount: int
    blocks: list[uuid.UUID] | None = None
    spent: int = 0
    refusal: OverQuota | None = None
    is_last: bool = False

    def allowed(self, wanted: int) -> int:
        """Return how many of so many runs it pays for; raises TooFew where a larger one can be had."""
        if self.blocks is None or wanted <= self.amount:
            return wanted
        if not self.is_last:
            raise TooFew(wanted)
        return self.amount


@dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    """What is taken of a quota in the period under way, of which `left_s` are left; its row is locked."""

    quota: str
    starts_at: datetime
    ends_at: datetime
    left_s: float
    taken: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """A block that was taken, for `left_s`; `room` is what the quota had left before it."""

    block_id: uuid.UUID
    size: int
    left_s: float


async def limits_of(con: Connection, org_id: int) -> dict[str, float]:
    """Return what an org is limited to now, by name."""
    row = await con.fetchrow(_SQL["limits"], org_id)
    return {} if row is None else orjson.loads(row["limits"])


async def take_block(
    con: Connection,
    org_id: int,
    quota: str,
    *,
    needed: int,
    wanted: int,
    retired: Sequence[uuid.UUID],
    is_patient: bool = False,
) -> tuple[Taken | None, set[uuid.UUID]]:
    """Take a block of at most `wanted`, fewer than `needed` where no more is left; ends `retired` blocks first.

    Returns None where the org has no such quota any more, and the retired blocks that are ended. Raises OverQuota when
    nothing is left, nor in blocks of others, and QuotaBusy when that is not known; one that `is_patient` also when
    fewer than `needed` may be left.
    """
    maximum = (await limits_of(con, org_id)).get(quota)
    if maximum is None:
        return None, set(retired)
    if retired:
        await con.execute(_SQL["lock_counts_of"], org_id, list(retired))
    count = await _open(con, org_id, quota)
    ended: set[uuid.UUID] = set()
    taken = count.taken
    if retired:
        taken = await _fold(con, org_id, count, await _lock(con, org_id, count, retired), taken)
        ended = set(retired) - await _standing(con, org_id, retired)
    room = int(maximum) - taken
    if room < needed:
        taken = await _fold(con, org_id, count, await _lock(con, org_id, count, None), taken)
        room = int(maximum) - taken
    if room <= 0 or (is_patient and room < needed):
        await _check_known(con, org_id, count)
    if room <= 0:
        raise over(quota, taken, int(maximum), count.ends_at)
    # Near the maximum blocks are small: what one process holds, others have to fetch back.
    size = min(room, max(needed, min(wanted, room // 8)))
    block_id = new_id()
    await con.execute(
        _SQL["take_block"], org_id, block_id, quota, count.starts_at, count.ends_at, size
    )
    return Taken(block_id=block_id, size=size, left_s=count.left_s), ended


async def take_now(con: Connection, org_id: int, amount: int) -> int:
    """Spend of an org's quotas of runs in this transaction; returns how many runs that allows, `amount` at most.

    The counts stay locked until the transaction ends. Several orgs are taken in the order of their ids. Raises
    QuotaBusy where it is not known whether it allows them all.
    """
    limits = await limits_of(con, org_id)
    allowed = amount if await _spent_all(con, org_id, limits) is None else 0
    counts: list[Count] = []
    for quota in sorted(RUNS.keys() & limits.keys()):
        count = await _open(con, org_id, quota)
        taken, most = count.taken, int(limits[quota])
        if most - taken < allowed:
            taken = await _fold(con, org_id, count, await _lock(con, org_id, count, None), taken)
        if most - taken < allowed:
            await _check_known(con, org_id, count)
        allowed = max(0, min(allowed, most - taken))
        counts.append(count)
    for count in counts if allowed else ():
        await con.execute(_SQL["take_now"], org_id, count.quota, count.starts_at, allowed)
    return allowed


async def spend_one(con: Connection, org_id: int) -> None:
    """Spend one run of an org's quotas in this transaction; raises OverQuota."""
    if await take_now(con, org_id, 1) < 1:
        await refuse(con, org_id)


async def refuse(con: Connection, org_id: int) -> None:
    """Raise OverQuota for the quota of which an org has nothing left."""
    limits = await limits_of(con, org_id)
    if (error := await _spent_all(con, org_id, limits)) is not None:
        raise error
    for used in await read_used(con, org_id, limits):
        if used.used >= used.maximum:
            raise over(used.quota, used.used, used.maximum, used.renews_at)
    raise QuotaBusy


async def check_spent(con: Connection, org_id: int) -> None:
    """Raise OverQuota when an org has spent its tokens or its cost of this month."""
    limits = await limits_of(con, org_id)
    if (error := await _spent_all(con, org_id, limits)) is not None:
        raise error


async def give_back(con: Connection, org_id: int, blocks: Sequence[uuid.UUID]) -> set[uuid.UUID]:
    """End blocks, and what was not spent of them goes back; returns those that do not stand any more.

    Those that somebody spends of at this moment go on standing.
    """
    await con.execute(_SQL["lock_counts_of"], org_id, list(blocks))
    rows = await con.fetch(_SQL["lock_blocks"], org_id, list(blocks), None, None)
    await con.execute(_SQL["fold"], org_id, [row["block_id"] for row in rows])
    return set(blocks) - await _standing(con, org_id, blocks)


async def give_back_all(con: Connection, org_id: int) -> None:
    """End all blocks of an org, so that changed limits hold at once for whoever takes the next.

    Waits for the transactions that spend of them, which wait for no count.
    """
    await con.execute(_SQL["lock_counts"], org_id)
    rows = await con.fetch(_SQL["lock_all_blocks"], org_id)
    await con.execute(_SQL["fold"], org_id, [row["block_id"] for row in rows])


async def recount(con: Connection, org_id: int, names: Iterable[str]) -> None:
    """Let quotas of runs that were not counted for a while go on from the runs of their periods under way."""
    for quota in sorted(RUNS.keys() & set(names)):
        count = await _open(con, org_id, quota)
        missed = max(0, await _runs_since(con, org_id, count.starts_at) - count.taken)
        await con.execute(_SQL["take_now"], org_id, quota, count.starts_at, missed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Used:
    """What an org has used of one quota; what stands until it is deleted renews never."""

    quota: str
    used: int
    maximum: int
    renews_at: datetime | None = None


async def read_used(con: Connection, org_id: int, limits: Limits) -> list[Used]:
    """Return what an org has used of each of its quotas, in the order of their names."""
    counts = {row["quota"]: row for row in await con.fetch(_SQL["used"], org_id)}
    found: list[Used] = []
    if set(SPENT) & limits.keys():
        spent = await _spent(con, org_id)
        found += [
            Used(
                quota=quota,
                used=spent[quota],
                maximum=int(limits[quota]),
                renews_at=spent["ends_at"],
            )
            for quota in SPENT
            if quota in limits
        ]
    for quota in RUNS.keys() & limits.keys():
        row = counts.get(quota)
        if row is None:
            used, ends_at = 0, await con.fetchval(_SQL["period"], RUNS[quota])
        else:
            used, ends_at = row["used"], row["ends_at"]
        found.append(Used(quota=quota, used=used, maximum=int(limits[quota]), renews_at=ends_at))
    return sorted(found, key=lambda one: one.quota)


def over(
    quota: str, used: int, maximum: int, renews_at: datetime | None, *, wanted: int = 1
) -> OverQuota:
    """Return the error of a quota that has not enough left."""
    when = "" if renews_at is None else f"; it renews at {renews_at:%Y-%m-%dT%H:%M:%SZ}"
    asked = "" if wanted == 1 else f", and this asks for {wanted}"
    return OverQuota(
        f"The organization has used {used} of {maximum} of its quota {quota}{asked}{when}.",
        param=quota,
        advice="wait until it renews, or ask the operator of the platform for a larger plan"
        if renews_at is not None
        else "delete what is not needed, or ask the operator of the platform for a larger plan",
        details={"quota": quota, "used": used, "maximum": maximum, "renews_at": renews_at},
    )


async def _spent_all(con: Connection, org_id: int, limits: Limits) -> OverQuota | None:
    if not set(SPENT) & limits.keys():
        return None
    spent = await _spent(con, org_id)
    for quota in SPENT:
        if quota in limits and spent[quota] >= limits[quota]:
            return over(quota, spent[quota], int(limits[quota]), spent["ends_at"])
    return None


async def _spent(con: Connection, org_id: int) -> Record:
    row = await con.fetchrow(_SQL["spent_month"], org_id)
    assert row is not None
    return row


async def _open(con: Connection, org_id: int, quota: str) -> Count:
    """Lock the count of the period under way; a new one begins with the runs that the period had before."""
    row = await con.fetchrow(_SQL["open_count"], org_id, quota, RUNS[quota])
    assert row is not None
    taken = row["taken"]
    if row["is_new"]:
        taken = await _runs_since(con, org_id, row["starts_at"])
        await con.execute(_SQL["take_now"], org_id, quota, row["starts_at"], taken)
    return Count(
        quota=quota,
        starts_at=row["starts_at"],
        ends_at=row["ends_at"],
        left_s=row["left_s"],
        taken=taken,
    )


async def _runs_since(con: Connection, org_id: int, starts_at: datetime) -> int:
    floor = _id_at(starts_at - timedelta(days=2))
    runs: int = await con.fetchval(_SQL["runs_since"], org_id, starts_at, floor)
    return runs


async def _lock(
    con: Connection, org_id: int, count: Count, blocks: Sequence[uuid.UUID] | None
) -> set[uuid.UUID]:
    named = None if blocks is None else list(blocks)
    rows = await con.fetch(_SQL["lock_blocks"], org_id, named, count.quota, count.starts_at)
    return {row["block_id"] for row in rows}


async def _check_known(con: Connection, org_id: int, count: Count) -> None:
    """Raise QuotaBusy where blocks that could not be ended may give something back."""
    if await con.fetchval(_SQL["held"], org_id, count.quota, count.starts_at):
        raise QuotaBusy


async def _standing(con: Connection, org_id: int, blocks: Sequence[uuid.UUID]) -> set[uuid.UUID]:
    """Return which blocks stand, as far as this transaction sees."""
    rows = await con.fetch(_SQL["standing"], org_id, list(blocks))
    return {row["block_id"] for row in rows}


async def _fold(
    con: Connection, org_id: int, count: Count, blocks: set[uuid.UUID], taken: int
) -> int:
    """End locked blocks; returns what is taken in the period then."""
    for row in await con.fetch(_SQL["fold"], org_id, list(blocks)) if blocks else ():
        if (row["quota"], row["starts_at"]) == (count.quota, count.starts_at):
            taken = row["taken"]
    return taken


def _id_at(at: datetime) -> uuid.UUID:
    """Return the lowest id of a run made at a time."""
    return uuid.UUID(int=int(at.timestamp() * 1000) << 80)
