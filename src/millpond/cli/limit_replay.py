"""`millpond limits simulate`: what other limits would have made of the waits of runs that were recorded.

Called by `limits`, which adds it to its commands. Invariants: nothing is changed, and the server only reads pages: the
replay runs in this process, so that it takes no slot from the work whose waits it is about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from millpond.cli.call import call
from millpond.cli.options import DEFAULT_URL, AsJson, Token, Url
from millpond.cli.output import err, out, plain, print_json, print_table, progress
from millpond.errors import InvalidInput
from millpond.types import NO_ORG, Json

if TYPE_CHECKING:
    from millpond.cli.remote import Remote
    from millpond.cli.replayed import Recording
    from millpond.cli.spills import SpillTexts
    from millpond.engine.rules import Rule

MAX_RUNS = 200_000
_PAGE = 2000
_ALL = "all"

Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="LIMIT",
        help="'KEY concurrency=N' or 'KEY rate=N/SECONDS burst=N'; may stand several times.",
    ),
]
Removes = Annotated[
    list[str] | None,
    typer.Option(
        "--remove",
        metavar="LIMIT",
        help="'KEY concurrency' or 'KEY rate'; may stand several times.",
    ),
]
Slots = Annotated[
    list[str] | None,
    typer.Option(
        metavar="QUEUE=N",
        help="Slots of a queue; may stand several times. Unset: those of the live workers.",
    ),
]
SpillTo = Annotated[
    str,
    typer.Option(
        "--spill",
        metavar="TEXT",
        help="Whom idle slots help, in order: queue:helped+helped,… Unset: as the live workers do, of --slots nobody.",
    ),
]
SpillKeep = Annotated[
    str, typer.Option(metavar="TEXT", help="Slots that stay free when a queue helps: queue:slots,…")
]
Reserve = Annotated[
    str, typer.Option(metavar="TEXT", help="Slots for orgs not above their share: queue:slots,…")
]
Lead = Annotated[
    float | None,
    typer.Option(
        "--interactive-lead",
        metavar="SECONDS",
        min=0.0,
        max=3600.0,
        help="By how many worker-seconds interactive runs go before their turn. Unset: as workers by default.",
    ),
]
Everyone = Annotated[
    bool,
    typer.Option(
        "--everyone", help="All orgs and the platform's limits; needs an operator's right."
    ),
]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked for: which runs, whose limits, and what these shall be."""

    since: datetime
    queue: str | None
    workers: Sequence[Mapping[str, int]] | None
    spills: SpillTexts
    owner: int
    sets: Sequence[Rule]
    removes: Sequence[tuple[str, str]]
    lead_s: float

    @property
    def keys(self) -> list[str]:
        """The keys of all limits that shall be others."""
        return [*(one.key for one in self.sets), *(key for key, _ in self.removes)]


def add_to(app: typer.Typer) -> None:
    """Add the command to a group."""
    app.command("simulate")(simulate_limits)


def simulate_limits(
    sets: Sets = None,
    removes: Removes = None,
    since: Annotated[str, typer.Option(help="How far back: 30m, 24h, 7d, 2w.")] = "24h",
    queue: Annotated[str | None, typer.Option(help="Only runs of this queue.")] = None,
    slots: Slots = None,
    spill: SpillTo = "",
    spill_keep: SpillKeep = "",
    reserve: Reserve = "",
    lead_s: Lead = None,
    everyone: Everyone = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Replay ended runs with other limits and show their waits before and after; changes nothing.

    Runs arrive when they did, take as long and use as many tokens as they did, whatever the limits; at most the newest
    200,000.
    """
    from millpond.cli.replayed import OWN, compare, read_remove, read_set, read_since, read_slots
    from millpond.cli.spills import SpillTexts
    from millpond.engine.urgency import LEAD_S

    owner = NO_ORG if everyone else OWN
    asked = Asked(
        since=datetime.now(UTC) - read_since(since),
        queue=queue,
        workers=read_slots(slots) if slots else None,
        spills=SpillTexts(spill=spill, keep=spill_keep, reserve=reserve),
        owner=owner,
        sets=[read_set(one, owner) for one in sets or ()],
        removes=[read_remove(one) for one in removes or ()],
        lead_s=LEAD_S if lead_s is None else lead_s,
    )
    found = call(url, token, lambda remote: _fetch(remote, asked))
    if not found.runs:
        raise InvalidInput(f"no run that was made in the last {since} has ended", param="--since")
    progress(f"replaying {len(found.runs):,} runs twice")
    report = compare(found)
    if as_json:
        print_json(report)
    else:
        _print(report)


async def _fetch(remote: Remote, asked: Asked) -> Recording:
    from millpond.cli.replayed import OWN, Recording, changed, spills_of

    is_of_all = asked.owner == NO_ORG
    path = "/v1/platform/limits" if is_of_all else "/v1/limits"
    if not is_of_all:
        await _check_orgs(remote, asked.keys)
    limits = (await remote.get(path))["data"]
    before = [_rule(one, asked.owner) for one in limits]
    after = changed(before, asked.sets, asked.removes, asked.owner)
    workers, told = asked.workers, list[Json]()
    if workers is None:
        live = (await remote.get("/v1/workers"))["data"]
        there = [one for one in live if not one["is_draining"]]
        workers, told = [one["queues"] for one in there], [one["spill"] for one in there]
    spills = spills_of(asked.spills, workers, told)
    runs, is_cut = await _read(remote, f"{path}/recorded-runs", asked)
    if is_cut and is_of_all:
        raise InvalidInput(
            f"more than {MAX_RUNS:,} runs of all organizations ended in that time",
            param="--since",
            advice="give a shorter time, or one queue",
        )
    orgs: dict[str | None, int] = {None: OWN}
    if is_of_all:
        orgs = {slug: nth for nth, slug in enumerate(sorted({run["org"] for run in runs}), OWN)}
    return Recording(
        runs=runs,
        is_cut=is_cut,
        workers=workers,
        spills=spills,
        before=[_of_org(one, orgs) for one in before],
        after=[_of_org(one, orgs) for one in after],
        orgs=orgs,
        lead_s=asked.lead_s,
    )


async def _read(remote: Remote, path: str, asked: Asked) -> tuple[list[Json], bool]:
    """Read recorded runs page by page; returns them, and whether there are more."""
    runs: list[Json] = []
    page: Json = {"has_more": True, "last_id": None}
    while page["has_more"] and len(runs) < MAX_RUNS:
        query = {"since": asked.since.isoformat(), "queue": asked.queue, "limit": _PAGE}
        page = await remote.get(path, query | {"after": page["last_id"]})
        runs += page["data"]
        progress(f"read {len(runs):,} runs")
    return runs, page["has_more"]


async def _check_orgs(remote: Remote, keys: Sequence[str]) -> None:
    """Raise InvalidInput for a key by which the server would not let an org limit itself."""
    named = [key for key in keys if key.startswith("org:")]
    if not named:
        return
    own = f"org:{(await remote.get('/v1/org'))['slug']}"
    for key in named:
        if key != own:
            raise InvalidInput(
                f"{key}: an organization limits its own work",
                param="--set",
                advice=f"write {own} for all of it, or leave the org out",
            )


def _rule(limit: Json, owner: int) -> Rule:
    from millpond.engine.rules import Rule

    return Rule(
        owner=NO_ORG if limit["is_of_platform"] else owner,
        key=limit["key"],
        kind=limit["kind"],
        maximum=limit["maximum"],
        period_s=limit["period_s"],
        burst=limit["burst"],
    )


def _of_org(rule: Rule, orgs: Mapping[str | None, int]) -> Rule:
    """Return a limit with the org that it names; of others' limits an org is shown none."""
    org = rule.key.split("×")[0]
    if rule.owner != NO_ORG or not org.startswith("org:") or org == "org:*":
        return rule
    return replace(rule, of_org=orgs.get(None) or orgs.get(org.removeprefix("org:"), -1))


def _print(report: Mapping[str, Any]) -> None:
    shown = ", ".join(f"{queue} {count}" for queue, count in sorted(report["slots"].items()))
    out().print(plain(f"{report['runs']:,} runs, replayed with slots: {shown}"))
    if report["spills"]:
        out().print(plain("; ".join(report["spills"])))
    if report["is_cut"]:
        more = f"There are more: only the newest {MAX_RUNS:,} are replayed."
        err().print(plain(more), style="dim")
    noun = "org" if "org" in report["waits"][0] else "flow"
    rows = [
        [one[noun] or _ALL, one["recorded"]["runs"], *(_wait(one[side]) for side in _SIDES)]
        for one in report["waits"]
    ]
    title = "waits to begin: p50 / p95 / max, in seconds"
    print_table([noun, "runs", *_SIDES], rows, empty="", title=title)
    limits = [
        [_key(one), "platform" if one["is_of_platform"] else "own"]
        + [_full(one[side]) for side in _SIDES[1:]]
        for one in report["limits"]
    ]
    if limits:
        print_table(["limit on", "of", *_SIDES[1:]], limits, empty="", title="how full limits were")


_SIDES = ("recorded", "before", "after")


def _key(room: Mapping[str, Any]) -> str:
    parts = [f"org:{room['org']}" if room["org"] else "", room["key"]]
    return " × ".join(part for part in parts if part) or "all work"


def _wait(waits: Mapping[str, Any]) -> str:
    never = f", {waits['never']:,} never" if waits["never"] else ""
    return f"{waits['p50_s']:.2f} / {waits['p95_s']:.2f} / {waits['max_s']:.2f}{never}"


def _full(room: Mapping[str, Any] | None) -> str:
    return "" if room is None else f"{room['most_in_use']} at most, full {room['full_share']:.1%}"
