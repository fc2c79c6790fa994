"""Replayed: reads what other limits are to be, and replays recorded runs with the limits before and after. Pure.

Called by `limit_replay`. Invariant: both sides are simulated alike, through the admission that claims use, with the
same arrivals and durations.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any

from millpond.cli.options import read_pairs
from millpond.cli.spills import SpillTexts, read_spill
from millpond.engine.keying import parse_key
from millpond.engine.loads import Load, Outcome, Work
from millpond.engine.rules import Kind, Rule, Rules
from millpond.engine.simulated import waits
from millpond.engine.simulating import simulate
from millpond.engine.spilling import Spill
from millpond.engine.tokens import Used, key_of
from millpond.engine.urgency import LEAD_S
from millpond.errors import InvalidInput
from millpond.types import NO_ORG, Json

# The caller's org, as replays count it; of all orgs the first.
OWN = 1
_SINCE = re.compile(r"(\d{1,6})([mhdw])")
_UNITS_S = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_CHANGE = re.compile(
    r"(?P<key>.+?)\s+(?P<kind>concurrency|rate|tokens)(?P<value>\s*=.*)?", re.DOTALL
)
_RATE = re.compile(r"(\d{1,9})/(\d{1,9}(?:\.\d+)?)(?:\s+burst\s*=\s*(\d{1,9}))?")
_MOST = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What was fetched: runs as the server tells of them, slots of each worker, limits before and after.

    `spills` says of each worker, in their order, what is said of its slots beyond their number; empty: nothing of any.
    Interactive runs go by `lead_s` before their turn.
    """

    runs: Sequence[Json]
    is_cut: bool
    workers: Sequence[Mapping[str, int]]
    before: Sequence[Rule]
    after: Sequence[Rule]
    orgs: Mapping[str | None, int]
    spills: Sequence[Spill] = field(default=())
    lead_s: float = LEAD_S

    @property
    def is_of_all(self) -> bool:
        """Whether it is of all orgs."""
        return None not in self.orgs


def read_since(text: str) -> timedelta:
    """Read a span such as 24h; raises InvalidInput."""
    match = _SINCE.fullmatch(text.strip())
    if match is None or not 0 < int(match[1]) * _UNITS_S[match[2]] <= 3660 * _UNITS_S["d"]:
        raise InvalidInput(f"{text!r} is no span: write 30m, 24h, 7d or 2w", param="--since")
    return timedelta(seconds=int(match[1]) * _UNITS_S[match[2]])


def read_set(text: str, owner: int = OWN) -> Rule:
    """Read a limit of `--set`; raises InvalidInput."""
    match = _CHANGE.fullmatch(text.strip())
    value = match and (match["value"] or "").strip().removeprefix("=").strip()
    if match and value:
        key = parse_key(match["key"])
        if match["kind"] == "concurrency" and value.isdecimal() and int(value) <= _MOST:
            return Rule(owner=owner, key=key, kind="concurrency", maximum=int(value))
        rate = _RATE.fullmatch(value)
        kind: Kind = "rate" if match["kind"] == "rate" else "tokens"
        if match["kind"] == kind and rate and float(rate[2]) > 0:
            return Rule(
                owner=owner,
                key=key,
                kind=kind,
                maximum=int(rate[1]),
                period_s=float(rate[2]),
                burst=max(1, int(rate[3] or (1 if kind == "rate" else rate[1]))),
            )
    raise InvalidInput(
        f"{text!r} is no limit",
        param="--set",
        advice="write 'provider:openai concurrency=10', 'provider:openai rate=600/60 burst=10', or "
        "'provider:openai tokens=90000/60'",
    )


def read_remove(text: str) -> tuple[str, str]:
    """Read key and kind of `--remove`; raises InvalidInput."""
    match = _CHANGE.fullmatch(text.strip())
    if match is None or match["value"]:
        raise InvalidInput(
            f"{text!r}: write the key and the kind, such as 'provider:openai rate'",
            param="--remove",
        )
    return parse_key(match["key"], is_old=True), match["kind"]


def read_slots(pairs: list[str]) -> list[dict[str, int]]:
    """Read QUEUE=N pairs as one worker; raises InvalidInput."""
    slots: dict[str, int] = {}
    for queue, count in read_pairs(pairs, param="--slots").items():
        if not count.isdecimal() or not 0 < int(count) <= 1_000_000:
            raise InvalidInput(f"{count!r} is no number of slots", param="--slots")
        slots[queue] = int(count)
    return [slots]


def spills_of(
    texts: SpillTexts, workers: Sequence[Mapping[str, int]], told: Sequence[Json] = ()
) -> list[Spill]:
    """Return what is said of each worker's slots: what was written, else what live workers told of themselves.

    Raises InvalidInput for what cannot be with the most slots that any of them has.
    """
    if told and not texts:
        return [Spill(helps=one["helps"], keep=one["keep"], reserve=one["reserve"]) for one in told]
    most: dict[str, int] = {}
    for worker in workers:
        most |= {queue: max(count, most.get(queue, 0)) for queue, count in worker.items() if count}
    return [read_spill(texts, most)] * len(workers)


def changed(
    limits: Sequence[Rule],
    sets: Sequence[Rule],
    removes: Sequence[tuple[str, str]],
    owner: int = OWN,
) -> list[Rule]:
    """Return limits after those of one owner were removed and set; raises InvalidInput for what is not there."""
    own = {(one.key, str(one.kind)): one for one in limits if one.owner == owner}
    for key, kind in removes:
        if own.pop((key, kind), None) is None:
            raise InvalidInput(f"there is no {kind} limit on {key} to remove", param="--remove")
    own |= {(one.key, str(one.kind)): one for one in sets}
    return [*(one for one in limits if one.owner != owner), *own.values()]


def compare(found: Recording) -> dict[str, Any]:
    """Replay runs with the limits before and after; returns what `--json` prints. Raises InvalidInput."""
    ordered = sorted(found.runs, key=_ready_at)
    load = load_of(ordered, found.orgs)
    _check_queues(load, found.workers, found.spills)
    sides = {"before": found.before, "after": found.after}
    outcomes = {
        name: simulate(
            load,
            found.workers,
            rules=Rules.of(limits),
            spills=found.spills,
            lead_s=found.lead_s,
        )
        for name, limits in sides.items()
    }
    waits_s: dict[str, list[float]] = {"recorded": [_wait_s(run) for run in ordered]}
    for name, outcome in outcomes.items():
        waits_s[name] = [
            start_s - at_s for start_s, at_s in zip(outcome.starts_s, load.at_s, strict=True)
        ]
    names = {org_id: name for name, org_id in found.orgs.items()}
    groups: list[dict[str, Any]] = [
        {"org": names[one.org_id]}
        if found.is_of_all
        else {"flow": one.capability.rsplit("@", 1)[0]}
        for one in load.works
    ]
    return {
        "object": "limit_replay",
        "runs": len(load),
        "is_cut": found.is_cut,
        "slots": _slots(found.workers),
        "spills": sorted({text for spill in found.spills for text in _told(spill)}),
        "waits": _by_group(load, groups, waits_s),
        "limits": _rooms(outcomes, names),
    }


def load_of(ordered: Sequence[Json], orgs: Mapping[str | None, int]) -> Load:
    """Return recorded runs, in the order of their arrival, as a load; time begins with the first."""
    load = Load()
    numbers: dict[Work, int] = {}
    began = _ready_at(ordered[0])
    for run in ordered:
        work = Work(
            org_id=orgs[run["org"]],
            queue=run["queue"],
            capability=f"{run['flow']}@{run['version']}",
            keys=(*run["keys"], *(() if run["tokens"] is None else (key_of(run["tokens"]),))),
            priority=run["priority"],
            urgency=run["urgency"],
        )
        number = numbers.setdefault(work, len(numbers))
        if number == len(load.works):
            load.works.append(work)
        load.add((_ready_at(run) - began).total_seconds(), run["worked_s"], number, _used(run))
    return load


def _used(run: Json) -> tuple[Used, ...] | None:
    if run["used"] is None:
        return None
    return tuple(Used(tuple(one["keys"]), one["tokens"], one["is_lost"]) for one in run["used"])


def _told(spill: Spill) -> list[str]:
    """Say as a sentence's part what each queue does beyond serving itself."""
    return [
        *(f"{queue} helps {', '.join(helped)}" for queue, helped in spill.helps.items()),
        *(f"{queue} keeps {count} when it helps" for queue, count in spill.keep.items()),
        *(f"{queue} reserves {count}" for queue, count in spill.reserve.items()),
    ]


def _check_queues(
    load: Load, workers: Sequence[Mapping[str, int]], spills: Sequence[Spill]
) -> None:
    served = {queue for worker in workers for queue, count in worker.items() if count > 0}
    served |= {queue for spill in spills for queue in spill.helped}
    missing = sorted({one.queue for one in load.works} - served)
    if missing:
        raise InvalidInput(
            f"no live worker has slots for the queue {missing[0]}",
            param="--slots",
            advice="say what slots there are to be: "
            + " ".join(f"--slots {queue}=10" for queue in sorted({*served, *missing})),
        )


def _ready_at(run: Json) -> datetime:
    return datetime.fromisoformat(run["ready_at"])


def _wait_s(run: Json) -> float:
    return max(0.0, (datetime.fromisoformat(run["started_at"]) - _ready_at(run)).total_seconds())


def _by_group(
    load: Load, groups: Sequence[Mapping[str, Any]], waits_s: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    """Sum up the waits of all runs, then of each group; nan is a run that never began."""
    (noun,) = {noun for group in groups for noun in group}
    found: dict[str, dict[str | None, dict[str, float]]] = {}
    for side, all_s in waits_s.items():
        parts: defaultdict[str | None, list[float]] = defaultdict(list)
        parts[None] = list(all_s)
        for wait_s, work in zip(all_s, load.work, strict=True):
            parts[groups[work][noun]].append(wait_s)
        found[side] = {name: _summed(part) for name, part in parts.items()}
    names = sorted({group[noun] for group in groups})
    return [{noun: name} | {side: found[side][name] for side in waits_s} for name in [None, *names]]


def _summed(found_s: Sequence[float]) -> dict[str, float]:
    began = sorted(one for one in found_s if one == one)
    return asdict(waits(began, len(found_s) - len(began)))


def _rooms(
    outcomes: Mapping[str, Outcome], names: Mapping[int, str | None]
) -> list[dict[str, Any]]:
    """Return how full concurrency limits were on each side, by owner and key; `org` is whose work is counted."""
    rooms = sorted({room for outcome in outcomes.values() for room in outcome.most_in_use})
    return [
        {"key": room.key, "org": names.get(room.org_id), "is_of_platform": room.owner == NO_ORG}
        | {
            side: {
                "most_in_use": outcome.most_in_use[room],
                "full_share": outcome.full_s.get(room, 0.0) / max(outcome.until_s, 1e-9),
            }
            if room in outcome.most_in_use
            else None
            for side, outcome in outcomes.items()
        }
        for room in rooms
    ]


def _slots(workers: Sequence[Mapping[str, int]]) -> dict[str, int]:
    slots: defaultdict[str, int] = defaultdict(int)
    for worker in workers:
        for queue, count in worker.items():
            slots[queue] += count
    return dict(slots)
