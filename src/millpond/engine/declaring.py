"""Declaring: limits of the platform that settings and the code of flows say, stored as they are said at a start.

Called by `cli` as the API and workers start, in a transaction without an org; the caller audits, commits, then hints
the queues. Invariants: what one origin says replaces what it said before, and nothing of others; what is stored already
writes nothing; a limit that an operator set stands above whatever is said here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import structlog

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine.ceilings import check_rule, lock_platform, named_org, settle
from millpond.engine.registry import Flow
from millpond.engine.rules import Rule
from millpond.errors import InvalidInput, NotFound
from millpond.types import NO_ORG

_SQL = queries("declaring")
_log = structlog.get_logger("millpond.limits")
Declaring = Literal["settings", "code"]
# Where settings say it: they are one origin, whichever host has them.
SETTINGS = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """All that one origin says: the settings, or a flow by its name. `subject` is told of as who said it."""

    origin: str
    subject: str
    rules: Sequence[Rule]


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What a wish has changed: a limit that is said now, or is said no more. `overridden_by` stands above it."""

    rule: Rule
    subject: str
    is_gone: bool
    overridden_by: str | None = None


def wishes_of(flows: Iterable[Flow]) -> list[Wish]:
    """Return what flows declare, each by its newest version; raises InvalidInput where two say different things.

    Flows that declare nothing are part of it: what they declared before is to go.
    """
    newest: dict[str, Flow] = {}
    for flow in sorted(flows, key=lambda flow: flow.version):
        newest[flow.name] = flow
    said: dict[tuple[str, str], tuple[Rule, str]] = {}
    wishes = []
    for name, flow in sorted(newest.items()):
        rules = [_checked(flow, rule) for limit in flow.limits for rule in limit.rules]
        for rule in rules:
            other, by = said.setdefault((rule.key, rule.kind), (rule, name))
            if other != rule:
                raise InvalidInput(
                    f"flows {by} and {name} declare different {rule.kind} limits on {rule.key}",
                    param="limits",
                    advice="say it once, at one flow, or the same at both",
                )
        wishes.append(Wish(origin=name, subject=f"code:{flow.capability}", rules=rules))
    return wishes


def _checked(flow: Flow, rule: Rule) -> Rule:
    try:
        return check_rule(rule)
    except InvalidInput as error:
        raise InvalidInput(
            f"flow {flow.name}, its {rule.kind} limit on {rule.key}: {error.message}",
            param="limits",
            advice=error.advice,
        ) from error


async def declare(con: Connection, source: Declaring, wishes: Sequence[Wish]) -> list[Change]:
    """Store what is said now in place of what these origins said before; returns what has changed.

    A limit that names an org that is not there is left out, which is logged.
    """
    wished = {
        (wish.origin, rule.key, rule.kind): (rule, wish.subject)
        for wish in wishes
        for rule in await _of_known_orgs(con, source, wish)
    }
    origins = {wish.origin: wish.subject for wish in wishes}
    stored = await _stored(con, source, origins)
    if stored == {at: rule for at, (rule, _) in wished.items()}:
        return []
    await lock_platform(con)
    stored = await _stored(con, source, origins)
    changes = []
    for at, rule in stored.items():
        if at not in wished:
            await con.execute(_SQL["take_back"], source, *at)
            changes.append(Change(rule=rule, subject=origins[at[0]], is_gone=True))
    for at, (rule, subject) in wished.items():
        if stored.get(at) != rule:
            values = (rule.maximum, rule.period_s, rule.burst, rule.of_org, subject)
            await con.execute(_SQL["declare"], source, *at, *values)
            changes.append(Change(rule=rule, subject=subject, is_gone=False))
    keys = [(one.rule.key, one.rule.kind) for one in changes]
    await settle(con, keys)
    return await _with_what_stands_above(con, source, changes)


async def _of_known_orgs(con: Connection, source: Declaring, wish: Wish) -> list[Rule]:
    found = []
    for rule in wish.rules:
        try:
            found.append(replace(rule, of_org=await named_org(con, rule.key)))
        except NotFound:
            _log.warning("limits.org_not_found", key=rule.key, source=source, by=wish.subject)
    return found


async def _stored(
    con: Connection, source: Declaring, origins: Iterable[str]
) -> dict[tuple[str, str, str], Rule]:
    rows = await con.fetch(_SQL["stored"], source, list(origins))
    return {(row["origin"], row["key"], row["kind"]): _rule(row) for row in rows}


async def _with_what_stands_above(
    con: Connection, source: Declaring, changes: Sequence[Change]
) -> list[Change]:
    keys, kinds = [one.rule.key for one in changes], [one.rule.kind for one in changes]
    rows = await con.fetch(_SQL["holding"], keys, kinds)
    above = {(row["key"], row["kind"]): row["source"] for row in rows}
    sources = [above.get((one.rule.key, one.rule.kind), source) for one in changes]
    return [
        replace(change, overridden_by=None if held in (source, "code") else held)
        for change, held in zip(changes, sources, strict=True)
    ]


def _rule(row: Record) -> Rule:
    return Rule(
        owner=NO_ORG,
        key=row["key"],
        kind=row["kind"],
        maximum=row["maximum"],
        period_s=row["period_s"],
        burst=row["burst"],
        of_org=row["of_org"],
    )
