"""Plans, prices and usage as JSON.

Called by the routes; pure. Invariant: each shape is that of its model in `models_plans`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from millpond.identity.plans import QUOTAS, RATES, OrgPlan, Plan, Price, UsageRow, UsageWish

_SUMS = ("runs", "worker_s", "input_tokens", "output_tokens", "cost_micros")


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return a plan."""
    return {"id": plan.name, "object": "plan", **asdict(plan)}


def quotas_json(plan: OrgPlan) -> dict[str, Any]:
    """Return what an org is limited to, and what it has used."""
    order = {name: nth for nth, name in enumerate(QUOTAS)}
    return {
        "object": "quotas",
        "plan": plan.plan,
        "is_default_plan": plan.is_default,
        "overrides": dict(plan.overrides),
        "quotas": [asdict(one) for one in sorted(plan.used, key=lambda one: order[one.quota])],
        "features": dict(plan.features),
        "feature_overrides": dict(plan.feature_overrides),
        **{name: plan.limits.get(name) for name in RATES},
    }


def price_json(price: Price) -> dict[str, Any]:
    """Return what a model costs."""
    return {"id": price.model, "object": "price", **asdict(price)}


def usage_json(wish: UsageWish, rows: Sequence[UsageRow], *, has_more: bool) -> dict[str, Any]:
    """Return usage with its sum."""
    return {
        "object": "usage",
        "since": wish.since,
        "until": wish.until,
        "total": {name: sum(getattr(row, name) for row in rows) for name in _SUMS},
        "data": [asdict(row) for row in rows],
        "has_more": has_more,
    }
