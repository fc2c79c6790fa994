"""Fitting: refuses runs that need more tokens than a limit ever has at once, so that none of them waits for ever.

Called by the API as it accepts runs and by `children`, in a transaction of the org. Invariant: for runs that declare no
need the database is asked nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.engine.registry import capability
from millpond.engine.rules import Rule, Rules
from millpond.engine.tokens import need_of
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
    rows = await con.fetch(_SQL["of_tokens"], org_id)
    rules = Rules.of(
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
    found = []
    for nth, one in needing:
        rule = _too_small(rules, org_id, one)
        if rule is not None:
            found.append((nth, _refusal(rule, one)))
    return found


def _too_small(rules: Rules, org_id: int, intent: Intent) -> Rule | None:
    able, need = capability(intent.flow, intent.version), need_of(intent.keys) or 0
    places = rules.places(org_id, intent.queue, able, tuple(intent.keys))
    return next((place.rule for place in places if place.rule.at_once < need), None)


def _refusal(rule: Rule, intent: Intent) -> InvalidInput:
    need = need_of(intent.keys) or 0
    return InvalidInput(
        f"{intent.flow} needs {need:,} tokens, and {rule.key} never has more than {rule.at_once:,} at once",
        code="tokens_above_limit",
        param="tokens",
        advice="let it need fewer tokens, or have the limit raised",
        details={"key": rule.key, "tokens": need, "at_once": rule.at_once},
    )
