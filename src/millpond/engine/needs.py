"""Needs: what a try of a step counts on beside its run. Pure: no I/O, no clock.

Called by `boarding` (the claim), `riding` (the worker) and whoever tells what is in use. Invariant: a room that its
run holds is not counted again, but for rates, which count each try.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from millpond.engine.bounds import Bounds
from millpond.engine.charges import Toll
from millpond.engine.rules import Place, Rules
from millpond.errors import InvalidInput

# Between the keys of a run and those of its step, where a lane has both: no key is empty.
APART = ""


@dataclass(kw_only=True, slots=True, eq=False)
class Ask:
    """A step that asks for room for its next try, under the lease (`item_id`, `token`) of its run.

    `since_us` is its place in line: the database's time of the first claim that had no room for it; None before that.
    While branches of its run work `beside` it, it stands in line under its run's lease, else its run goes to wait.
    `bounds` are those in which its branch needs a place to go on: a claim takes places of them as it lets steps begin.
    """

    org_id: int
    item_id: uuid.UUID
    token: uuid.UUID
    step_key: str
    keys: tuple[str, ...]
    since_us: int | None = None
    is_beside: bool = False
    bounds: Bounds = ()


class Answer(NamedTuple):
    """What a claim made of an ask: whether the try may begin, by when (of the process's clock), and its place in line.

    `has_row` tells whether its room, or its place, is to be given back, `refusal` why there will never be room;
    `toll` is what its org is charged where several queues need that room. One that `is_beyond` its bound could have
    begun and got nothing, since others have the places there.
    """

    is_seated: bool
    has_row: bool = False
    begin_by: float | None = None
    since_us: int | None = None
    refusal: InvalidInput | None = None
    toll: Toll | None = None
    is_beyond: bool = False


def joined(run_keys: Iterable[str], step_keys: Iterable[str]) -> list[str]:
    """Return the keys of the lane in which a step of a waiting run stands for room."""
    return [*run_keys, APART, *step_keys]


def parted(keys: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Return the keys of the run and those of its step; a lane of whole work items has no step."""
    if APART not in keys:
        return keys, ()
    at = keys.index(APART)
    return keys[:at], keys[at + 1 :]


def needed(
    rules: Rules, org_id: int, queue: str, able: str, run_keys: Sequence[str], keys: Sequence[str]
) -> tuple[Place, ...]:
    """Return the rooms in which a try of a step with `keys` takes a place while its run is under a lease.

    Those are the rooms that there are for the keys of both and not for the run's without the step's, but those that
    the run holds; a rate that both have counts the claim of the run and each try of the step. Tokens that both count on
    are those that the run has reserved.
    """
    if not rules or not keys:
        return ()
    rest = [key for key in run_keys if key not in keys]
    others = {place.room for place in rules.places(org_id, queue, able, rest)}
    held = {place.room for place in rules.places(org_id, queue, able, run_keys)}
    return tuple(
        place
        for place in rules.places(org_id, queue, able, [*rest, *keys])
        if place.room not in others and (place.rule.kind == "rate" or place.room not in held)
    )


def of_step(
    rules: Rules, org_id: int, queue: str, able: str, keys: Sequence[str]
) -> tuple[Place, ...]:
    """Return in which limits on tokens a step that stands in line in a lane takes what it needs itself, not its run."""
    run_keys, step_keys = parted(keys)
    places = needed(rules, org_id, queue, able, run_keys, step_keys)
    return tuple(place for place in places if place.rule.is_of_tokens)


def concerns(rules: Rules, org_id: int, keys: Sequence[str]) -> bool:
    """Whether limits or brakes may hold for a step's keys, whatever its run counts on."""
    return bool(needed(rules, org_id, "", "step:", (), keys)) or rules.may_pair(org_id, keys)


def name_of(step_key: str) -> str:
    """Return the name of a step by its key: `branch path`, `name:occurrence`."""
    return step_key.rpartition("/")[2].rpartition(":")[0]


def need_id(org_id: int, run_id: uuid.UUID, step_key: str) -> uuid.UUID:
    """Return as what a step of a waiting run stands in its line: the same each time."""
    return uuid.uuid5(run_id, f"need:{org_id}:{step_key}")
