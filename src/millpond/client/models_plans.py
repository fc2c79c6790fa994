"""Plans, prices, quotas and usage as the API gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, datetime

from millpond.client.models import Answer


class Plan(Answer):
    """Limits under a name."""

    id: str
    name: str
    title: str = ""
    limits: Mapping[str, float]
    features: Mapping[str, bool] = {}
    is_default: bool = False
    orgs: int = 0
    changed_at: datetime


class Quota(Answer):
    """What is used of a quota."""

    quota: str
    used: int
    maximum: int
    renews_at: datetime | None = None


class Quotas(Answer):
    """What an organization is limited to, and what it has used of that."""

    plan: str
    is_default_plan: bool
    overrides: Mapping[str, float | None]
    quotas: Sequence[Quota]
    features: Mapping[str, bool] = {}
    feature_overrides: Mapping[str, bool] = {}
    requests_per_s: float | None = None
    key_requests_per_s: float | None = None


class Price(Answer):
    """What a model costs per million tokens, in millionths of the currency."""

    id: str
    model: str
    input_micros: int
    output_micros: int
    changed_at: datetime


class UsageSum(Answer):
    """What was used; the cost is in millionths of the currency."""

    runs: int
    worker_s: float
    input_tokens: int
    output_tokens: int
    cost_micros: int


class UsageRow(UsageSum):
    """What was used on a day, by a flow, on a model; None where it is not parted by it."""

    day: date | None = None
    flow: str | None = None
    model: str | None = None


class Usage(Answer):
    """An organization's usage, newest day first."""

    since: date
    until: date
    total: UsageSum
    data: Sequence[UsageRow]
    has_more: bool = False
