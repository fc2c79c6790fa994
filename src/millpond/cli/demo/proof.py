"""What must be true at the end of the demo, checked on what the API tells. Pure.

Called by `play`. Invariant: every claim that the demo makes on the terminal is a `Finding` here, and
the demo ends with 0 only if all of them hold.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from millpond.types import Json


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One claim and whether it is true; `detail` says what was seen."""

    claim: str
    is_true: bool
    detail: str = ""


def recorded(run: Json) -> dict[str, Json]:
    """Return the steps of a run that are recorded for good, by their keys."""
    return {step["key"]: step for step in run["steps"] if step["state"] in ("done", "failed")}


def numbers_have_no_gap(events: Sequence[Json]) -> bool:
    """Whether events are numbered 1, 2, 3 … in the order in which they came."""
    return [event["id"] for event in events] == list(range(1, len(events) + 1))


def ran_twice(events: Iterable[Json]) -> list[str]:
    """Return the keys of steps that were recorded as done more than once."""
    done = Counter(event["step"] for event in events if event["kind"] == "step.succeeded")
    return sorted(key for key, count in done.items() if count > 1)


def changed_since(before: Json, after: Json) -> list[str]:
    """Return the keys of steps recorded `before` that are not the very same records `after`."""
    later = recorded(after)
    return sorted(key for key, step in recorded(before).items() if later.get(key) != step)


def touched_after_rescue(before: Json, events: Sequence[Json]) -> list[str]:
    """Return the keys recorded `before` of which anything is told after the run was rescued."""
    numbers = [event["id"] for event in events if event["kind"] == "run.rescued"]
    first = min(numbers, default=0)
    later = {event["step"] for event in events if event["id"] > first and event["step"]}
    return sorted(later & set(recorded(before)))


def uncited(citations: Sequence[Json], texts: Mapping[str, str]) -> list[str]:
    """Return the citations whose quoted words do not stand in the document that they name."""
    wrong = []
    for citation in citations:
        text = texts.get(citation["document"], "")
        if _words(citation["quote"]) not in _words(text):
            wrong.append(f"{citation['document']}: {citation['quote'][:40]}")
    return wrong


def _words(text: str) -> str:
    """Return the letters and digits of a text: layout and markup do not count."""
    return re.sub(r"[\W_]+", "", text).lower()
