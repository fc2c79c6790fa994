"""History: the recorded steps of a run, by step key and by place, as replay meets them.

Called by the worker for claimed runs that have been claimed before or repeat others, and by `context`. Invariants: a
key is made of branch path, name and occurrence alone, so the order of finishing never decides which
record a step gets; a record is given out only at the place in its branch where it was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from millpond.db.pool import EngineDatabase, Record
from millpond.db.queries import queries
from millpond.engine.leases import Lease
from millpond.types import Json

_SQL = queries("waits")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """One recorded step; `output` and `error` are JSON text, `age_s` counts from its first try.

    `is_due` is false while a timer of this step still runs. `seq` is its place in its branch, None where
    none was recorded.
    """

    kind: str
    state: str
    output: str | None
    error: str | None
    tries: int
    age_s: float
    is_due: bool
    name: str = ""
    seq: int | None = None
    finished_at: datetime | None = None


History = dict[str, Recorded]


def just(kind: str, state: str, output: str | None, error: str | None) -> Recorded:
    """Return what was recorded a moment ago."""
    return Recorded(
        kind=kind, state=state, output=output, error=error, tries=1, age_s=0.0, is_due=True
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """What is recorded where the code asks for something else, by step keys and kinds of steps.

    `place` is where in its `branch` the code asks, `recorded_place` where the record stands. `asked` is
    empty where the code came to its end without asking for the record.
    """

    branch: str
    place: int | None
    asked: str
    asked_kind: str
    recorded: str
    recorded_kind: str
    recorded_place: int | None

    def __str__(self) -> str:
        if not self.asked:
            return f"the code ends without asking for {self.recorded}, which the history has"
        return (
            f"the code asks for {self.asked} ({self.asked_kind}) at place {self.place}, the history has "
            f"{self.recorded} ({self.recorded_kind}) at place {self.recorded_place}"
        )

    def described(self) -> dict[str, Json]:
        """Return what is stored of a run that stands still for it."""
        return {
            "code": "history_mismatch",
            "message": str(self),
            "recorded": self.recorded,
            "recorded_kind": self.recorded_kind,
            "recorded_place": self.recorded_place,
            "asked": self.asked,
            "asked_kind": self.asked_kind,
            "branch": self.branch,
            "place": self.place,
        }


@dataclass
class Places:
    """The records of a history by branch and place; those without a place are not among them."""

    history: History
    keys: dict[tuple[str, int], str] = field(default_factory=dict, init=False)
    last: dict[str, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for key, recorded in self.history.items():
            if recorded.seq is not None:
                branch = branch_of(key)
                self.keys[branch, recorded.seq] = key
                self.last[branch] = max(recorded.seq, self.last.get(branch, 0))

    def goes_on(self, branch: str, place: int) -> bool:
        """Whether the branch recorded something at this place or after it."""
        return self.last.get(branch, -1) >= place

    def mismatch(self, key: str, kind: str, place: int | None) -> Mismatch | None:
        """Return what speaks against giving out the record of `key` to code that asks at `place`.

        A call without a place is compared by its kind alone.
        """
        branch = branch_of(key)
        found = key if place is None else self.keys.get((branch, place), key)
        recorded = self.history.get(found)
        if recorded is None or (
            found == key
            and recorded.kind == kind
            and (place is None or recorded.seq in (None, place))
        ):
            return None
        return Mismatch(
            branch=branch,
            place=place,
            asked=key,
            asked_kind=kind,
            recorded=found,
            recorded_kind=recorded.kind,
            recorded_place=recorded.seq,
        )


def unmet(key: str, recorded: Recorded) -> Mismatch:
    """Return the mismatch of a record that the code never asked for."""
    return Mismatch(
        branch=branch_of(key),
        place=recorded.seq,
        asked="",
        asked_kind="end",
        recorded=key,
        recorded_kind=recorded.kind,
        recorded_place=recorded.seq,
    )


def branch_of(key: str) -> str:
    """Return the path of the branch that a step key stands in."""
    return key[: key.rfind("/") + 1]


async def load(database: EngineDatabase, leases: Sequence[Lease]) -> dict[Lease, History]:
    """Read what is recorded of the leased runs, one query for all."""
    histories: dict[Lease, History] = {lease: {} for lease in leases}
    by_run = {(lease.org_id, lease.run_id): histories[lease] for lease in leases}
    if not leases:
        return histories
    async with database.duty("history") as con:
        rows = await con.fetch(
            _SQL["history"], [one.org_id for one in leases], [one.run_id for one in leases]
        )
    for row in rows:
        by_run[row["org_id"], row["run_id"]][row["step_key"]] = read(row)
    return histories


def read(row: Record) -> Recorded:
    """Return the step of a row that has a step's columns, `age_s` and `has_timer`."""
    return Recorded(
        kind=row["kind"],
        state=row["state"],
        output=row["output"],
        error=row["error"],
        tries=row["tries"],
        age_s=row["age_s"],
        is_due=not row["has_timer"],
        name=row["name"],
        seq=row["seq"],
        finished_at=row["finished_at"],
    )
