"""Fitting: refuses work that needs more tokens than a limit ever has at once, so that none of it waits for ever.

Called by the API as it accepts runs, by `children` and, for steps in other queues, by `remote`, in their transactions.
Invariant: for work that declares no need the database is asked nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.engine.registry import capability
from millpond.engine.rules import Place, Rule, Rules
from millpond.engine.tokens import above_limit, need_of
from millpond.errors import InvalidInput
from millpond.types import Intent

_SQL = queries("ceilings")


def has_need(intent: Intent) -> bool:
    """Whether a run declares how many tokens it needs."""
    return need_of(intent.keys) is not None


async def check_fits(con: Connection, org_id: int, intents: Iterable[Intent]) -> None:
    """Raise InvalidInput for the first run that could never go by the limits on tokens of now."""
    for _, error in await misfits(con, org_id, list(intents)):
        raise error


async def misfits(
    con: Connection, org_id: int, intents: list[Intent]
) -> list[tuple[int, InvalidInput]]:
    """Return the positions of runs that could never go, each with the reason."""
    needing = [(nth, one) for nth, one in enumerate(intents) if has_need(one)]
    if not needing:
        return []
    rules = await _rules(con, org_id)
    found = []
    for nth, one in needing:
        able, need = capability(one.flow, one.version), need_of(one.keys) or 0
        rule = _too_small(rules.places(org_id, one.queue, able, tuple(one.keys)), need)
        if rule is not None:
            found.append((nth, above_limit(one.flow, need, rule.key, rule.at_once)))
    return found


async def check_step_fits(
    con: Connection, org_id: int, name: str, queue: str, able: str, keys: Sequence[str]
) -> None:
    """Raise InvalidInput for a step in another queue that could never go there; `keys` are all that it has there."""
    need, rules = need_of(keys) or 0, await _rules(con, org_id)
    rule = _too_small(rules.places(org_id, queue, able, keys), need)
    if rule is not None:
        raise above_limit(f"step {name}", need, rule.key, rule.at_once)


async def _rules(con: Connection, org_id: int) -> Rules:
    """Return the limits on tokens that hold for an org."""
    rows = await con.fetch(_SQL["of_tokens"], org_id)
    return Rules.of(
        Rule(
            owner=row["owner"],
            key=row["key"],
            kind="tokens",
            maximum=row["maximum"],
            period_s=row["period_s"],
            burst=row["burst"],
            of_org=row["of_org"],
        )
        for row in rows
    )


def _too_small(places: Iterable[Place], need: int) -> Rule | None:
    return next((place.rule for place in places if place.rule.at_once < need), None)
