"""Growing: text of steps under way, as somebody who follows a run reads it between the run's events.

Called by `events`. Invariants: a piece is given once to a reader, in order within its try; a reader who comes later
gets what is there of tries that still go on, and nothing of others.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime

from millpond.db.pool import Connection
from millpond.db.queries import queries

_SQL = queries("deltas")
MOST = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """A piece of the text of one try: `n` counts within step, attempt and try, from 1."""

    run_id: uuid.UUID
    step_key: str
    attempt: int
    tries: int
    n: int
    text: str
    at: datetime


class Reader:
    """How far one reader has come in the texts of one run's steps."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int, int]] = {}
        self._is_late = True

    async def read(self, con: Connection, org_id: int, run_id: uuid.UUID) -> list[Delta]:
        """Return pieces that this reader has not had."""
        seen = self._seen
        rows = await con.fetch(
            _SQL["read"],
            org_id,
            run_id,
            list(seen),
            [attempt for attempt, _, _ in seen.values()],
            [tries for _, tries, _ in seen.values()],
            [n for _, _, n in seen.values()],
            MOST,
        )
        found = []
        for row in rows:
            seen[row["step_key"]] = row["attempt"], row["tries"], row["n"]
            if row["is_live"] or not self._is_late:
                found.append(
                    Delta(
                        run_id=run_id,
                        step_key=row["step_key"],
                        attempt=row["attempt"],
                        tries=row["tries"],
                        n=row["n"],
                        text=row["text"],
                        at=row["at"],
                    )
                )
        if len(rows) < MOST:
            self._is_late = False
        return found
