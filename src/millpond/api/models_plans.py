"""Plans, prices and usage as the API takes and gives them.

Used by the routes and the OpenAPI document. Invariant: what a request may carry is listed; more is refused.
"""

from __future__ import annotations

from datetime import date, datetime
from typing import Annotated, Literal

from pydantic import BaseModel, Field, StringConstraints

from millpond.api.models_orgs import OrgWish
from millpond.engine.features import FEATURES
from millpond.identity.plans import LIMITS

_LIMITS = " ".join(f"`{name}`: {what}" for name, what in LIMITS.items())
_FEATURES = " ".join(f"`{name}`: {what}" for name, what in FEATURES.items())
PlanName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]


class PutPlan(OrgWish):
    """A plan as it shall be."""

    title: str = Field("", max_length=200, description="What people call it.")
    limits: dict[str, float] = Field(
        default_factory=dict,
        description=f"Limits by name; what is absent is not limited. {_LIMITS}",
    )
    features: dict[str, bool] = Field(
        default_factory=dict,
        description=f"Features by name, on or off; what is absent is on. {_FEATURES}",
    )
    is_default: bool = Field(
        default=False, description="Make it the plan of every organization that was given none."
    )


class PlanOut(BaseModel):
    """A plan."""

    id: str
    object: Literal["plan"]
    name: str
    title: str
    limits: dict[str, float]
    features: dict[str, bool]
    is_default: bool
    orgs: int = Field(description="How many organizations were given it.")
    changed_at: datetime


class SetOrgPlan(OrgWish):
    """An organization's plan as it shall be."""

    plan: PlanName | None = Field(None, description="Which plan; null is the default one.")
    overrides: dict[str, float | None] = Field(
        default_factory=dict,
        description="Limits instead of the plan's, by name; null lifts a limit.",
    )
    features: dict[str, bool] = Field(
        default_factory=dict, description="Features instead of the plan's, by name, on or off."
    )


class QuotaOut(BaseModel):
    """What is used of a quota."""

    quota: str
    used: int
    maximum: int
    renews_at: datetime | None = Field(
        description="When its next period begins; null for what stands until it is deleted."
    )


class QuotasOut(BaseModel):
    """What an organization is limited to, and what it has used of that."""

    object: Literal["quotas"]
    plan: str
    is_default_plan: bool
    overrides: dict[str, float | None]
    quotas: list[QuotaOut]
    features: dict[str, bool] = Field(description="Every feature, on or off.")
    feature_overrides: dict[str, bool]
    requests_per_s: float | None
    key_requests_per_s: float | None


class SetPrice(OrgWish):
    """What a model costs from now on."""

    input_micros: int = Field(
        ge=0, le=10**12, description="Per million input tokens, in millionths of the currency."
    )
    output_micros: int = Field(
        ge=0, le=10**12, description="Per million output tokens, in millionths of the currency."
    )


class PriceOut(BaseModel):
    """What a model costs."""

    id: str
    object: Literal["price"]
    model: str
    input_micros: int
    output_micros: int
    changed_at: datetime


class UsageSum(BaseModel):
    """What was used."""

    runs: int = Field(description="Runs whose first attempt is over, child runs included.")
    worker_s: float = Field(description="Seconds for which runs held workers.")
    input_tokens: int
    output_tokens: int
    cost_micros: int = Field(description="What models cost, in millionths of the currency.")


class UsageOut(UsageSum):
    """What was used on a day, by a flow, on a model; null where the sum is not parted by it."""

    day: date | None
    flow: str | None
    model: str | None = Field(description="Empty for the work of the runs themselves.")


class UsageListing(BaseModel):
    """An organization's usage, newest day first."""

    object: Literal["usage"]
    since: date
    until: date
    total: UsageSum
    data: list[UsageOut]
    has_more: bool = Field(description="Whether there are more rows than are given: ask for less.")
