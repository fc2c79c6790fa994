"""Following: what both clients know while they follow events, of a run or of all. Pure.

Invariant: no event is given twice and none is left out, however often the stream breaks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from millpond.client.call import many
from millpond.client.models import Delta, Event, OrgEvent

_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 2.0


@dataclass
class Pausing:
    """How long to wait until a stream is opened again; `patience_s` is how long the server may stay away."""

    patience_s: float = 60.0
    pause_s: float = _FIRST_PAUSE_S
    away_s: float = 0.0
    may_renew: bool = True

    def next_pause_s(self) -> float | None:
        """Return how long to wait before the stream is opened again, None when it is to be given up."""
        if self.away_s >= self.patience_s:
            return None
        pause = self.pause_s
        self.away_s += pause
        self.pause_s = min(pause * 2, _LONGEST_PAUSE_S)
        return pause

    def heard(self) -> None:
        """Take note that the server is there."""
        self.pause_s, self.away_s = _FIRST_PAUSE_S, 0.0


@dataclass
class Following(Pausing):
    """How far a run's events were given."""

    after: int = 0
    shown: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def take(self, message: httpx2.ServerSentEvent) -> Event | Delta | None:
        """Return what a message tells, None for what was given already and for what is neither event nor text."""
        document = json.loads(message.data) if message.data else None
        if isinstance(document, dict) and document.get("object") == "delta":
            return self._delta(Delta.model_validate(document))
        if not isinstance(document, dict) or "kind" not in document:
            return None
        event = Event.model_validate(document)
        if event.id <= self.after:
            return None
        self.after = event.id
        self.heard()
        return event

    def _delta(self, delta: Delta) -> Delta | None:
        """Return text that was not given yet: a stream that is opened again begins with all of a try's text."""
        place = delta.attempt, delta.tries, delta.n
        if place <= self.shown.get(delta.step, (0, 0, 0)):
            return None
        self.shown[delta.step] = place
        return delta

    @property
    def headers(self) -> dict[str, str]:
        """The headers that open the stream where it was left."""
        return {"Accept": "text/event-stream", "Last-Event-ID": str(self.after)}


@dataclass
class FollowingAll(Pausing):
    """How far the events of all runs were given, and which are wanted."""

    after: str = ""
    kind: str | Sequence[str] | None = None
    flow: str | None = None

    def take(self, message: httpx2.ServerSentEvent) -> OrgEvent | None:
        """Return the event of a message, None for one that is none."""
        document = json.loads(message.data) if message.data else None
        if not isinstance(document, dict) or "kind" not in document:
            return None
        event = OrgEvent.model_validate(document)
        self.after = event.id
        self.heard()
        return event

    @property
    def params(self) -> dict[str, Any]:
        """Which events the stream is asked for."""
        wanted = {"kind": many(self.kind), "flow": self.flow}
        return {name: value for name, value in wanted.items() if value is not None}

    @property
    def headers(self) -> dict[str, str]:
        """The headers that open the stream where it was left."""
        return {"Accept": "text/event-stream", "Last-Event-ID": self.after}
