"""Limits: what each org is limited to, as one process last heard of it.

Refreshed by `reserving`, asked for every request. Invariant: it holds what was committed when it was read, for every
org that an operator ever gave a plan or limits of its own; all others have the default plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import orjson

from millpond.db.pool import Connection
from millpond.db.queries import queries

_SQL = queries("quotas")
# A change may be committed that much later than it was made.
_OVERLAP = timedelta(minutes=2)


class Plans:
    """Which limits orgs have, as this process last heard; asked for every request, so kept in memory."""

    def __init__(self) -> None:
        self._plans: dict[str, Mapping[str, float]] = {}
        self._default: Mapping[str, float] = {}
        self._orgs: dict[int, Mapping[str, float]] = {}
        self._raw: dict[int, tuple[str | None, Mapping[str, float | None]]] = {}
        self._since = datetime(2000, 1, 1, tzinfo=UTC)

    def of(self, org_id: int) -> Mapping[str, float]:
        """Return the limits of an org by name."""
        return self._orgs.get(org_id, self._default)

    async def refresh(self, con: Connection) -> None:
        """Read plans, and which orgs were given another since the last time."""
        plans = await con.fetch(_SQL["plans"])
        changed = await con.fetch(_SQL["orgs_changed"], self._since - _OVERLAP)
        for row in changed:
            self._raw[row["org_id"]] = row["plan"], orjson.loads(row["overrides"])
            self._since = max(self._since, row["plan_changed_at"])
        self._plans = {row["plan"]: orjson.loads(row["limits"]) for row in plans}
        default = next((row["plan"] for row in plans if row["is_default"]), None)
        self._default = self._plans.get(default or "", {})
        self._orgs = {
            org_id: {
                name: most
                for name, most in {
                    **self._plans.get(plan or default or "", {}),
                    **overrides,
                }.items()
                if most is not None
            }
            for org_id, (plan, overrides) in self._raw.items()
        }
