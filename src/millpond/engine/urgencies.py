"""Urgencies: what one claimer knows of interactive work: which heads are, and whose turn the next slots are.

Called by `claim`; what is decided by it is decided by `urgency`. Invariant: without interactive lanes nothing is kept.
"""

from __future__ import annotations

from millpond.db.pool import Record
from millpond.engine.urgency import Urgency

# So many orgs' turns are remembered.
_MAX_OWING = 10_000


class Urgencies:
    """What one claimer remembers of urgency: each worker gives out its own slots in turn."""

    def __init__(self, lead_s: float) -> None:
        self._lead_s = lead_s
        self._owed: set[str] = set()
        self._owing: set[tuple[str, int]] = set()

    def of(self, rows: list[Record]) -> tuple[list[Record], Urgency | None]:
        """Return the heads that a claim read, each lane once, and what is to be kept to of them.

        The last row tells the time where some are interactive; None where none is, or where the class is switched off.
        """
        if not rows or rows[-1]["queue"]:
            return rows, None
        now_us = rows[-1]["lane_id"]
        lanes = {(row["org_id"], row["lane_id"]): row for row in rows[:-1]}
        if self._lead_s <= 0:
            return list(lanes.values()), None
        if len(self._owing) > _MAX_OWING:
            self._owing.clear()
        urgency = Urgency(lead_s=self._lead_s, now_us=now_us, owed=self._owed, owing=self._owing)
        return list(lanes.values()), urgency
