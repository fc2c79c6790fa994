"""Shapes of organizations and what belongs to them, as the JSON that clients see.

Called by their routes. Invariant: as in `shapes`; no secret has a place here but a new key's.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from millpond.identity.api_keys import ApiKey
from millpond.identity.grants import Grant
from millpond.identity.invitations import Invitation
from millpond.identity.members import Member
from millpond.identity.organizations import Organization, Policy
from millpond.identity.platform import Operator
from millpond.identity.roles import Role
from millpond.identity.services import Service


def org_json(org: Organization, policy: Policy) -> dict[str, Any]:
    """Return the caller's org."""
    return {
        "id": org.org_id,
        "object": "organization",
        "slug": org.slug,
        "name": org.name,
        "created_at": org.created_at,
        "policy": asdict(policy),
    }


def member_json(member: Member) -> dict[str, Any]:
    """Return a member."""
    return {
        "id": member.user_id,
        "object": "member",
        "email": member.email,
        "name": member.name,
        "role": member.role,
        "added_by": member.added_by,
        "is_disabled": member.disabled_at is not None,
        "created_at": member.created_at,
    }


def role_json(role: Role) -> dict[str, Any]:
    """Return a role."""
    return {
        "id": role.name,
        "object": "role",
        "name": role.name,
        "is_built_in": role.is_built_in,
        "description": role.description,
        "permissions": sorted(role.permissions),
        "created_at": role.created_at,
    }


def invitation_json(invitation: Invitation) -> dict[str, Any]:
    """Return an invitation."""
    fields = asdict(invitation)
    del fields["is_of_platform"]
    return {"id": fields.pop("invitation_id"), "object": "invitation", **fields}


def service_json(service: Service) -> dict[str, Any]:
    """Return a service principal."""
    fields = asdict(service)
    service_id = fields.pop("service_id")
    return {
        "id": service_id,
        "object": "service_principal",
        "subject": f"service:{service_id}",
        "is_disabled": service.disabled_at is not None,
        **fields,
    }


def key_json(key: ApiKey) -> dict[str, Any]:
    """Return an API key without its secret."""
    fields = asdict(key)
    return {"id": fields.pop("key_id"), "object": "api_key", **fields}


def grant_json(grant: Grant) -> dict[str, Any]:
    """Return an access grant."""
    fields = asdict(grant)
    grant_id, read_only = fields.pop("grant_id"), fields.pop("is_read_only")
    return {"id": grant_id, "object": "grant", "read_only": read_only, **fields}


def platform_org_json(org: Organization) -> dict[str, Any]:
    """Return an org as operators see it."""
    return {
        "id": org.org_id,
        "object": "platform_organization",
        "slug": org.slug,
        "name": org.name,
        "is_suspended": org.suspended_at is not None,
        "suspended_at": org.suspended_at,
        "suspended_reason": org.suspended_reason,
        "created_at": org.created_at,
    }


def operator_json(operator: Operator) -> dict[str, Any]:
    """Return an operator."""
    return {
        "id": operator.user_id,
        "object": "operator",
        "email": operator.email,
        "name": operator.name,
        "is_disabled": operator.disabled_at is not None,
        "created_at": operator.created_at,
    }
