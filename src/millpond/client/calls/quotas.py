"""Calls about plans, prices, quotas and usage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Literal

from millpond.client.call import Call, get, path_of, read_nothing, reader
from millpond.client.models import Page
from millpond.client.models_plans import Plan, Price, Quotas, Usage


def list_plans() -> Call[Page[Plan]]:
    """All plans, by name."""
    return get(path_of("platform", "plans"), Page[Plan])


def put_plan(
    name: str,
    limits: Mapping[str, float],
    *,
    features: Mapping[str, bool] | None = None,
    title: str = "",
    is_default: bool = False,
) -> Call[Plan]:
    """Make or replace a plan; a feature that is not named is on."""
    body = {
        "title": title,
        "limits": dict(limits),
        "features": dict(features or {}),
        "is_default": is_default,
    }
    path = path_of("platform", "plans", name)
    return Call(method="PUT", path=path, read=reader(Plan), body=body)


def delete_plan(name: str) -> Call[None]:
    """Remove a plan that no organization was given."""
    return Call(method="DELETE", path=path_of("platform", "plans", name), read=read_nothing)


def get_org_quotas(org_id: int) -> Call[Quotas]:
    """An organization's plan, and what it has used of each quota."""
    return get(path_of("platform", "orgs", org_id, "quotas"), Quotas)


def set_org_plan(
    org_id: int,
    plan: str | None,
    overrides: Mapping[str, float | None] | None = None,
    features: Mapping[str, bool] | None = None,
) -> Call[Quotas]:
    """Give an organization a plan (None: the default one), and limits and features that are its own."""
    body = {"plan": plan, "overrides": dict(overrides or {}), "features": dict(features or {})}
    path = path_of("platform", "orgs", org_id, "plan")
    return Call(method="PUT", path=path, read=reader(Quotas), body=body)


def list_prices() -> Call[Page[Price]]:
    """What models cost, by model."""
    return get(path_of("platform", "prices"), Page[Price])


def put_price(model: str, input_micros: int, output_micros: int) -> Call[Price]:
    """Set what a model costs from now on, per million tokens."""
    body = {"input_micros": input_micros, "output_micros": output_micros}
    path = path_of("platform", "prices", model)
    return Call(method="PUT", path=path, read=reader(Price), body=body)


def delete_price(model: str) -> Call[None]:
    """Let a model cost nothing from now on."""
    return Call(method="DELETE", path=path_of("platform", "prices", model), read=read_nothing)


def get_usage(
    *,
    since: date | None = None,
    until: date | None = None,
    flow: str | None = None,
    model: str | None = None,
    by: Sequence[Literal["day", "flow", "model"]] | None = None,
) -> Call[Usage]:
    """What the organization used, from one day to another, parted by days, flows or models."""
    return get(
        path_of("usage"),
        Usage,
        since=None if since is None else since.isoformat(),
        until=None if until is None else until.isoformat(),
        flow=flow,
        model=model,
        by=None if by is None else list(by),
    )


def get_quotas() -> Call[Quotas]:
    """The organization's plan, and what it has used of each quota."""
    return get(path_of("quotas"), Quotas)
