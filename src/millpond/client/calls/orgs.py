"""Calls about the caller's organization: itself, members, roles, invitations, programs, keys, grants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from millpond.client.call import (
    UNSET,
    Call,
    Id,
    Unset,
    get,
    given,
    id_text,
    path_of,
    post,
    read_nothing,
    reader,
    set_of,
)
from millpond.client.models import Page
from millpond.client.models_orgs import (
    ApiKey,
    Grant,
    Invitation,
    Joined,
    Member,
    NewApiKey,
    Organization,
    Role,
    Roles,
    ServicePrincipal,
)


def _delete(*parts: object) -> Call[None]:
    return Call(method="DELETE", path=path_of(*parts), read=read_nothing)


def _patch(kind: Any, *parts: object, body: Any) -> Call[Any]:
    return Call(method="PATCH", path=path_of(*parts), read=reader(kind), body=body)


def get_org() -> Call[Organization]:
    """Return the caller's organization with its policy."""
    return get(path_of("org"), Organization)


def change_org(*, name: str | Unset = UNSET, policy: Any = UNSET) -> Call[Organization]:
    """Change the name, or members of the policy such as `{"may_resolve_own": True}`."""
    return _patch(Organization, "org", body=set_of({"name": name, "policy": policy}))


def list_members(
    *,
    role: str | None = None,
    email: str | None = None,
    limit: int | None = None,
    after: Id | None = None,
    before: Id | None = None,
) -> Call[Page[Member]]:
    """Who is in the organization, newest first."""
    return get(
        path_of("members"),
        Page[Member],
        role=role,
        email=email,
        limit=limit,
        after=id_text(after),
        before=id_text(before),
    )


def get_member(user_id: Id) -> Call[Member]:
    """Return one member."""
    return get(path_of("members", user_id), Member)


def change_member(user_id: Id, role: str) -> Call[Member]:
    """Give a member another role."""
    return _patch(Member, "members", user_id, body={"role": role})


def remove_member(user_id: Id) -> Call[None]:
    """Take somebody out of the organization."""
    return _delete("members", user_id)


def list_roles() -> Call[Roles]:
    """Return all roles, built-in ones first, and what each permission allows."""
    return get(path_of("roles"), Roles)


def put_role(name: str, permissions: Sequence[str], *, description: str = "") -> Call[Role]:
    """Make or change a role of the organization's own."""
    body = {"permissions": list(permissions), "description": description}
    return Call(method="PUT", path=path_of("roles", name), read=reader(Role), body=body)


def delete_role(name: str) -> Call[None]:
    """Remove a role that nobody holds."""
    return _delete("roles", name)


def list_invitations(
    *,
    state: str | None = None,
    email: str | None = None,
    limit: int | None = None,
    after: Id | None = None,
    before: Id | None = None,
) -> Call[Page[Invitation]]:
    """Who was asked to join, newest first."""
    return get(
        path_of("invitations"),
        Page[Invitation],
        state=state,
        email=email,
        limit=limit,
        after=id_text(after),
        before=id_text(before),
    )


def create_invitation(email: str, role: str) -> Call[Invitation]:
    """Ask an address to join."""
    return post(path_of("invitations"), Invitation, {"email": email, "role": role})


def get_invitation(invitation_id: Id) -> Call[Invitation]:
    """Return one invitation."""
    return get(path_of("invitations", invitation_id), Invitation)


def resend_invitation(invitation_id: Id) -> Call[Invitation]:
    """Send an invitation again, with another token."""
    return post(path_of("invitations", invitation_id, "resend"), Invitation)


def revoke_invitation(invitation_id: Id) -> Call[None]:
    """Take an invitation back."""
    return _delete("invitations", invitation_id)


def accept_invitation(token: str) -> Call[Joined]:
    """Join an organization, signed in with the address that was invited."""
    return post(path_of("auth", "invitations", "accept"), Joined, {"token": token})


def list_service_principals(
    *,
    name: str | None = None,
    limit: int | None = None,
    after: Id | None = None,
    before: Id | None = None,
) -> Call[Page[ServicePrincipal]]:
    """Programs that act as themselves, newest first."""
    return get(
        path_of("service-principals"),
        Page[ServicePrincipal],
        name=name,
        limit=limit,
        after=id_text(after),
        before=id_text(before),
    )


def create_service_principal(name: str, role: str) -> Call[ServicePrincipal]:
    """Make a program's own principal."""
    return post(path_of("service-principals"), ServicePrincipal, {"name": name, "role": role})


def get_service_principal(service_id: Id) -> Call[ServicePrincipal]:
    """Return one service principal."""
    return get(path_of("service-principals", service_id), ServicePrincipal)


def change_service_principal(
    service_id: Id,
    *,
    name: str | Unset = UNSET,
    role: str | Unset = UNSET,
    is_disabled: bool | Unset = UNSET,
) -> Call[ServicePrincipal]:
    """Rename it, give it another role, disable or enable it."""
    body = set_of({"name": name, "role": role, "is_disabled": is_disabled})
    return _patch(ServicePrincipal, "service-principals", service_id, body=body)


def list_api_keys(
    *,
    owner: str | None = None,
    only_good: bool | None = None,
    limit: int | None = None,
    after: Id | None = None,
    before: Id | None = None,
) -> Call[Page[ApiKey]]:
    """API keys, newest first."""
    return get(
        path_of("api-keys"),
        Page[ApiKey],
        owner=owner,
        only_good=only_good,
        limit=limit,
        after=id_text(after),
        before=id_text(before),
    )


def create_api_key(
    name: str,
    scopes: Sequence[str],
    *,
    expires_in_days: int | Unset | None = UNSET,
    owner: str | None = None,
) -> Call[NewApiKey]:
    """Make an API key; its text is in this answer alone. `expires_in_days=None` never expires."""
    body = {
        "name": name,
        "scopes": list(scopes),
        **given({"owner": owner}),
        **set_of({"expires_in_days": expires_in_days}),
    }
    return post(path_of("api-keys"), NewApiKey, body)


def get_api_key(key_id: Id) -> Call[ApiKey]:
    """Return one API key, without its text."""
    return get(path_of("api-keys", key_id), ApiKey)


def revoke_api_key(key_id: Id) -> Call[None]:
    """End an API key."""
    return _delete("api-keys", key_id)


def list_grants(
    *,
    only_open: bool | None = None,
    limit: int | None = None,
    after: Id | None = None,
    before: Id | None = None,
) -> Call[Page[Grant]]:
    """Operators who were let in, newest first."""
    return get(
        path_of("grants"),
        Page[Grant],
        only_open=only_open,
        limit=limit,
        after=id_text(after),
        before=id_text(before),
    )


def create_grant(
    operator_email: str, reason: str, hours: int, *, read_only: bool = True
) -> Call[Grant]:
    """Let an operator of the platform in for some hours."""
    body = {
        "operator_email": operator_email,
        "reason": reason,
        "hours": hours,
        "read_only": read_only,
    }
    return post(path_of("grants"), Grant, body)


def get_grant(grant_id: Id) -> Call[Grant]:
    """Return one grant."""
    return get(path_of("grants", grant_id), Grant)


def end_grant(grant_id: Id) -> Call[None]:
    """End a grant before its time."""
    return _delete("grants", grant_id)
