"""Plans: what orgs are limited to, what models cost, and what an org has used.

Called by the API: for operators in a transaction without an org, for members in their org's. Invariants: one plan is
the default, that of every org that was given none; each deed of an operator stands in the platform's log; changed
limits of an org hold for every block of a quota that is taken after the change, and none taken before it outlives it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime

import orjson

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.engine import quotas
from millpond.engine.features import FEATURES
from millpond.engine.quotas import RUNS, SPENT, Used
from millpond.errors import Conflict, InvalidInput, NotFound
from millpond.identity import audit, holdings, organizations
from millpond.identity.holdings import HOLDINGS
from millpond.identity.rights import enter_org
from millpond.types import Principal

_SQL = queries("plans")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_MOST = 2**53
RATES = ("requests_per_s", "key_requests_per_s")
QUOTAS = (*sorted(RUNS), *SPENT, *HOLDINGS)
# Every limit, with its sentence for whoever sets it.
LIMITS: Mapping[str, str] = {
    "runs_per_day": "Runs accepted per day (UTC).",
    "runs_per_month": "Runs accepted per month (UTC).",
    "tokens_per_month": "Tokens that runs use on models per month (UTC); no run is accepted beyond.",
    "cost_micros_per_month": "What models cost per month (UTC), in millionths; no run is accepted beyond.",
    **HOLDINGS,
    "requests_per_s": "Requests per second to the API.",
    "key_requests_per_s": "Requests per second to the API with one API key.",
}
MAX_ROWS = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Limits and features under a name; a feature that is absent is on. `orgs` counts those that were given it."""

    name: str
    title: str
    limits: Mapping[str, float]
    features: Mapping[str, bool]
    is_default: bool
    changed_at: datetime
    orgs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class OrgPlan:
    """What an org is limited to: its plan's limits but for the overrides, and what it has used.

    `features` tells of every feature whether it is on.
    """

    plan: str
    is_default: bool
    overrides: Mapping[str, float | None]
    limits: Mapping[str, float]
    feature_overrides: Mapping[str, bool]
    features: Mapping[str, bool]
    used: list[Used]


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """What a model costs per million tokens, in millionths of the currency."""

    model: str
    input_micros: int
    output_micros: int
    changed_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class UsageRow:
    """What was used; None for what the sum was not parted by. Model "" is the work of the runs themselves."""

    day: date | None
    flow: str | None
    model: str | None
    runs: int
    worker_s: float
    input_tokens: int
    output_tokens: int
    cost_micros: int


@dataclass(frozen=True, kw_only=True, slots=True)
class UsageWish:
    """Which usage: from `since` to `until`, both included, of one flow or model, parted by what."""

    since: date
    until: date
    flow: str | None = None
    model: str | None = None
    by: frozenset[str] = frozenset({"day"})


def check_limits(limits: Mapping[str, float | None], *, param: str) -> None:
    """Raise InvalidInput for a limit that nobody knows or that is out of range."""
    for name, most in limits.items():
        if name not in LIMITS:
            raise InvalidInput(
                f"there is no limit {name!r}",
                param=f"{param}.{name}",
                advice=f"known are {', '.join(LIMITS)}",
            )
        if most is None:
            continue
        least = 0.01 if name in RATES else 0
        if not least <= most <= _MOST or (name not in RATES and most != int(most)):
            raise InvalidInput(
                f"{name} is a {'number from 0.01' if name in RATES else 'whole number from 0'}",
                param=f"{param}.{name}",
            )


def check_features(wanted: Mapping[str, bool], *, param: str) -> None:
    """Raise InvalidInput for a feature that nobody knows."""
    for name in wanted:
        if name not in FEATURES:
            raise InvalidInput(
                f"there is no feature {name!r}",
                param=f"{param}.{name}",
                advice=f"known are {', '.join(FEATURES)}",
            )


def _whole(limits: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return limits with whole numbers written as such."""
    return {
        name: int(most) if most is not None and most == int(most) else most
        for name, most in limits.items()
    }


async def list_plans(con: Connection) -> list[Plan]:
    """Return all plans by name."""
    return [
        Plan(
            name=row["plan"],
            title=row["title"],
            limits=orjson.loads(row["limits"]),
            features=orjson.loads(row["features"]),
            is_default=row["is_default"],
            changed_at=row["changed_at"],
            orgs=row["orgs"],
        )
        for row in await con.fetch(_SQL["list"])
    ]


async def put_plan(
    con: Connection,
    operator: Principal,
    name: str,
    title: str,
    limits: Mapping[str, float],
    *,
    features: Mapping[str, bool] | None = None,
    is_default: bool = False,
    address: str | None = None,
) -> Plan:
    """Make or replace a plan; raises InvalidInput. A default plan stays that until another is made it."""
    if not _NAME.fullmatch(name):
        raise InvalidInput("a plan's name is 1 to 63 of a-z, 0-9, - and _", param="name")
    check_limits(limits, param="limits")
    switches = dict(features or {})
    check_features(switches, param="features")
    limits = {name: most for name, most in _whole(limits).items() if most is not None}
    await con.execute(_SQL["lock"])
    if is_default:
        await con.execute(_SQL["no_default"], name)
    is_new = await con.fetchval(
        _SQL["put"],
        name,
        title,
        orjson.dumps(dict(limits)).decode(),
        is_default,
        orjson.dumps(switches).decode(),
    )
    await audit.record(
        con,
        operator,
        "plan.created" if is_new else "plan.changed",
        f"plan:{name}",
        details={"limits": dict(limits), "features": switches, "is_default": is_default},
        address=address,
    )
    return next(one for one in await list_plans(con) if one.name == name)


async def delete_plan(
    con: Connection, operator: Principal, name: str, *, address: str | None = None
) -> None:
    """Remove a plan; raises NotFound, and Conflict for the default one or one that an org has."""
    await con.execute(_SQL["lock"])
    if not await con.fetchval(_SQL["exists"], name):
        raise NotFound(f"there is no plan {name}", param="name")
    if await con.fetchval(_SQL["delete"], name) is None:
        raise Conflict(
            f"the plan {name} is the default one, or organizations have it",
            code="plan_in_use",
            param="name",
            advice="give them another one first",
        )
    await audit.record(con, operator, "plan.deleted", f"plan:{name}", address=address)


async def set_org_plan(
    con: Connection,
    operator: Principal,
    org_id: int,
    plan: str | None,
    overrides: Mapping[str, float | None],
    *,
    features: Mapping[str, bool] | None = None,
    address: str | None = None,
) -> OrgPlan:
    """Give an org a plan, overrides and features instead of its plan's; raises NotFound, InvalidInput."""
    check_limits(overrides, param="overrides")
    switches = dict(features or {})
    check_features(switches, param="features")
    overrides = _whole(overrides)
    await organizations.get(con, org_id)
    await con.execute(_SQL["lock"])
    if plan is not None and not await con.fetchval(_SQL["exists"], plan):
        raise InvalidInput(f"there is no plan {plan}", param="plan")
    before = await quotas.limits_of(con, org_id)
    texts = [orjson.dumps(one).decode() for one in (dict(overrides), switches)]
    await con.execute(_SQL["set_of_org"], org_id, plan, *texts)
    details = {"plan": plan, "overrides": dict(overrides), "features": switches}
    await audit.record(
        con, operator, "org.plan_changed", f"org:{org_id}", details=details, address=address
    )
    await enter_org(con, org_id)
    await quotas.give_back_all(con, org_id)
    await quotas.recount(con, org_id, (await quotas.limits_of(con, org_id)).keys() - before.keys())
    return await read_org_plan(con, org_id)


async def show_org_plan(con: Connection, org_id: int) -> OrgPlan:
    """Return an org's plan for an operator; raises NotFound."""
    await organizations.get(con, org_id)
    await enter_org(con, org_id)
    return await read_org_plan(con, org_id)


async def read_org_plan(con: Connection, org_id: int) -> OrgPlan:
    """Return an org's plan with what is used of it, in a transaction of that org."""
    row = await con.fetchrow(_SQL["of_org"], org_id)
    if row is None:
        raise NotFound(f"there is no organization {org_id}", param="org_id")
    limits = orjson.loads(row["limits"])
    used = [
        *await quotas.read_used(con, org_id, limits),
        *await holdings.read(con, org_id, limits),
    ]
    return OrgPlan(
        plan=row["plan"],
        is_default=row["is_default"],
        overrides=orjson.loads(row["overrides"]),
        limits=limits,
        feature_overrides=orjson.loads(row["feature_overrides"]),
        features={**dict.fromkeys(FEATURES, True), **orjson.loads(row["features"])},
        used=used,
    )


async def list_prices(con: Connection) -> list[Price]:
    """Return what models cost, by model."""
    return [Price(**row) for row in await con.fetch(_SQL["prices"])]


async def put_price(
    con: Connection,
    operator: Principal,
    model: str,
    input_micros: int,
    output_micros: int,
    *,
    address: str | None = None,
) -> Price:
    """Set what a model costs from now on."""
    row = await con.fetchrow(_SQL["put_price"], model, input_micros, output_micros)
    assert row is not None
    details = {"input_micros": input_micros, "output_micros": output_micros}
    await audit.record(
        con, operator, "price.changed", f"model:{model}", details=details, address=address
    )
    return Price(**row)


async def delete_price(
    con: Connection, operator: Principal, model: str, *, address: str | None = None
) -> None:
    """Let a model cost nothing from now on; raises NotFound."""
    if await con.fetchval(_SQL["delete_price"], model) is None:
        raise NotFound(f"there is no price of {model}", param="model")
    await audit.record(con, operator, "price.deleted", f"model:{model}", address=address)


async def today(con: Connection) -> date:
    """Return the day that it is, in UTC."""
    day: date = await con.fetchval(_SQL["today"])
    return day


async def read_usage(con: Connection, org_id: int, wish: UsageWish) -> tuple[list[UsageRow], bool]:
    """Return an org's usage, newest day first, and whether there is more than `MAX_ROWS`."""
    rows = await con.fetch(
        _SQL["usage"],
        org_id,
        wish.since,
        wish.until,
        wish.flow,
        wish.model,
        "day" in wish.by,
        "flow" in wish.by,
        "model" in wish.by,
        MAX_ROWS + 1,
    )
    return [UsageRow(**row) for row in rows[:MAX_ROWS]], len(rows) > MAX_ROWS
