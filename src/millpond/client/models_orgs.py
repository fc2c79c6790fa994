"""What the server answers about organizations: members, roles, invitations, programs, keys, grants.

Made by `calls` from JSON. Invariant: as in `models`; the text of a new key stands in no `repr`.
"""

from __future__ import annotations

import uuid
from datetime import datetime

from pydantic import Field

from millpond.client.models import Answer, Page


class Policy(Answer):
    """What an organization decides for itself."""

    may_resolve_own: bool = False
    invitation_days: int = 7
    email_domains: list[str] = Field(default_factory=list)


class Organization(Answer):
    """The caller's organization."""

    id: int
    slug: str
    name: str
    created_at: datetime
    policy: Policy


class Member(Answer):
    """Somebody in the organization."""

    id: uuid.UUID
    email: str
    name: str = ""
    role: str
    added_by: str
    is_disabled: bool = False
    created_at: datetime


class Role(Answer):
    """A named set of permissions."""

    id: str
    name: str
    is_built_in: bool
    description: str = ""
    permissions: list[str]
    created_at: datetime | None = None


class Roles(Page[Role]):
    """All roles, and what each permission allows."""

    permissions: dict[str, str] = Field(default_factory=dict)


class Invitation(Answer):
    """An invitation, without what its mail holds."""

    id: uuid.UUID
    email: str
    role: str
    state: str
    invited_by: str
    created_at: datetime
    sent_at: datetime
    expires_at: datetime
    accepted_at: datetime | None = None
    accepted_by: str | None = None
    revoked_at: datetime | None = None


class Joined(Answer):
    """Where somebody is a member now."""

    organization_id: int
    slug: str
    name: str
    role: str


class ServicePrincipal(Answer):
    """A program that acts in the organization as itself."""

    id: uuid.UUID
    subject: str
    name: str
    role: str
    is_disabled: bool = False
    created_by: str
    created_at: datetime
    disabled_at: datetime | None = None


class ApiKey(Answer):
    """An API key, without its text."""

    id: uuid.UUID
    name: str
    prefix: str
    owner: str
    scopes: list[str]
    created_by: str
    created_at: datetime
    expires_at: datetime | None = None
    used_at: datetime | None = None
    revoked_at: datetime | None = None


class NewApiKey(ApiKey):
    """An API key as it was made: the only time that its text is shown."""

    key: str = Field(repr=False)


class Grant(Answer):
    """An operator who was let in."""

    id: uuid.UUID
    operator_id: uuid.UUID
    operator_email: str
    granted_by: str
    reason: str
    read_only: bool
    is_open: bool
    created_at: datetime
    expires_at: datetime
    ended_at: datetime | None = None


class PlatformOrganization(Answer):
    """An organization as operators see it."""

    id: int
    slug: str
    name: str
    is_suspended: bool = False
    suspended_at: datetime | None = None
    suspended_reason: str | None = None
    created_at: datetime


class CreatedOrganization(PlatformOrganization):
    """A new organization, with the invitation of its first owner, if one was named."""

    invitation: Invitation | None = None


class Operator(Answer):
    """Somebody who runs the platform."""

    id: uuid.UUID
    email: str
    name: str = ""
    is_disabled: bool = False
    created_at: datetime
