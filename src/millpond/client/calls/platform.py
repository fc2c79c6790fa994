"""Calls of operators: organizations of the platform, and who operates it."""

from __future__ import annotations

from millpond.client.call import (
    UNSET,
    Call,
    Id,
    Unset,
    get,
    given,
    path_of,
    post,
    read_nothing,
    reader,
    set_of,
)
from millpond.client.models import Page
from millpond.client.models_orgs import CreatedOrganization, Operator, PlatformOrganization


def list_orgs(
    *,
    slug: str | None = None,
    is_suspended: bool | None = None,
    limit: int | None = None,
    after: int | None = None,
    before: int | None = None,
) -> Call[Page[PlatformOrganization]]:
    """Organizations, newest first, without their content."""
    return get(
        path_of("platform", "orgs"),
        Page[PlatformOrganization],
        slug=slug,
        is_suspended=is_suspended,
        limit=limit,
        after=after,
        before=before,
    )


def create_org(
    slug: str, name: str, *, owner_email: str | None = None
) -> Call[CreatedOrganization]:
    """Make an organization, and invite its first owner."""
    body = given({"slug": slug, "name": name, "owner_email": owner_email})
    return post(path_of("platform", "orgs"), CreatedOrganization, body)


def get_platform_org(org_id: int) -> Call[PlatformOrganization]:
    """Return one organization as operators see it."""
    return get(path_of("platform", "orgs", org_id), PlatformOrganization)


def change_platform_org(
    org_id: int,
    *,
    name: str | Unset = UNSET,
    is_suspended: bool | Unset = UNSET,
    reason: str | Unset = UNSET,
) -> Call[PlatformOrganization]:
    """Rename an organization, suspend it with a reason, or end that."""
    body = set_of({"name": name, "is_suspended": is_suspended, "reason": reason})
    path = path_of("platform", "orgs", org_id)
    return Call(method="PATCH", path=path, read=reader(PlatformOrganization), body=body)


def list_operators() -> Call[Page[Operator]]:
    """Who operates the platform."""
    return get(path_of("platform", "operators"), Page[Operator])


def add_operator(email: str) -> Call[Operator]:
    """Make somebody with an account an operator."""
    return post(path_of("platform", "operators"), Operator, {"email": email})


def remove_operator(user_id: Id) -> Call[None]:
    """Take the operator's right from somebody; the last one stays."""
    path = path_of("platform", "operators", user_id)
    return Call(method="DELETE", path=path, read=read_nothing)
