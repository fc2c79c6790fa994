"""Values that replay the same: the time, randomness, the deadline, and state shown to the outside.

A part of `Context`. Invariant: what a flow was told once, every attempt is told again.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from random import Random

import orjson

from millpond.engine import waits
from millpond.engine.checkpoints import Checkpoints
from millpond.engine.encoding import dump
from millpond.errors import InvalidInput
from millpond.types import Json

MAX_STATE_BYTES = 64 * 1024


class Values(Checkpoints):
    """The calls that give or take a value."""

    @property
    def deadline(self) -> datetime | None:
        """When this run has to be over, in UTC; None when it has no deadline."""
        return self._claimed.deadline_at

    async def now(self) -> datetime:
        """Return the database's time in UTC; recorded, so that every attempt gets the same."""
        key = self._branches.here().key("now")
        recorded = self._lookup(key, "value")
        if recorded is not None:
            return datetime.fromisoformat(orjson.loads(recorded.output or "null"))
        now = await self._performer.persist(lambda: waits.now(self._scope.database))
        data = {"name": "now", "value": now.isoformat()}
        await self._performer.record(
            key, "now", "value.recorded", data, kind="value", state="done", output=dump(None, now)
        )
        return now

    def random(self) -> Random:
        """Return a source of random numbers; the n-th one of a branch is the same in every attempt.

        It is seeded by the run's id and the place of the call, so nothing is recorded. Not for secrets.
        """
        place = self._branches.here().place("random")
        seed = hashlib.sha256(f"{self.org_id}:{self.run_id}:{place}".encode()).digest()
        return Random(int.from_bytes(seed, "big"))

    async def set_state(self, name: str, value: Json) -> None:
        """Show a value to the outside under a name, until it is set again; at most 64 KiB of JSON.

        `GET /v1/runs/{id}` shows the newest of each name as `state_values`. A replay does not set again.
        """
        key = self._branches.here().key(f"state {name}")
        if self._lookup(key, "state") is not None:
            return
        text = dump(None, value)
        if len(text.encode()) > MAX_STATE_BYTES:
            raise InvalidInput(
                f"the state {name} has more than {MAX_STATE_BYTES} bytes of JSON",
                param="value",
                code="too_large",
            )
        data = {"name": name, "value": orjson.loads(text)}
        await self._performer.record(
            key, name, "state.set", data, kind="state", state="done", output=text
        )
