"""Models of organizations, their members and roles, and of the platform.

Called by their routes. Invariant: request models are strict and refuse fields that they do not know; in a
change, what is left out stays as it is.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from millpond.api.models import Listing
from millpond.api.texts import PLAIN, Reason, Word

Email = Annotated[str, Field(min_length=3, max_length=254, pattern=PLAIN)]
RoleName = Annotated[str, Field(min_length=1, max_length=63, pattern=PLAIN)]
Permissions = Annotated[list[Word], Field(max_length=200)]
Why = Annotated[str, Field(min_length=1, max_length=500, pattern=PLAIN)]
LEFT_OUT: Any = None
_ROLE = "A built-in or custom role; it may not exceed your own rights."
_SUBJECT = "Who did it: `user:…`, `service:…`, `key:…`."


class OrgWish(BaseModel):
    """The base of requests: strict, and closed."""

    model_config = ConfigDict(extra="forbid", strict=True)


class PolicyChange(OrgWish):
    """What to change of an organization's policy; members left out stay as they are."""

    may_resolve_own: bool = Field(
        LEFT_OUT, description="Whether somebody may answer questions of runs that they started."
    )
    invitation_days: int = Field(
        LEFT_OUT, ge=1, le=30, description="How long an invitation is good, in days."
    )
    email_domains: Annotated[list[Word], Field(max_length=100)] = Field(
        LEFT_OUT, description="Only addresses of these domains may join; empty: all may."
    )


class ChangeOrg(OrgWish):
    """What to change of the organization; members left out stay as they are."""

    name: Word = Field(LEFT_OUT, description="What people see.")
    policy: PolicyChange = Field(LEFT_OUT, description="What the organization decides for itself.")


class PolicyOut(BaseModel):
    """What an organization decides for itself."""

    may_resolve_own: bool
    invitation_days: int
    email_domains: list[str]


class OrgOut(BaseModel):
    """The caller's organization."""

    id: int
    object: Literal["organization"]
    slug: str
    name: str
    created_at: datetime
    policy: PolicyOut


class ChangeMember(OrgWish):
    """A wish to give a member another role."""

    role: RoleName = Field(description=_ROLE)


class MemberOut(BaseModel):
    """A person in the organization."""

    id: uuid.UUID
    object: Literal["member"]
    email: str
    name: str
    role: str
    added_by: str = Field(description=_SUBJECT)
    is_disabled: bool = Field(description="Whether the account was disabled on the platform.")
    created_at: datetime


class PutRole(OrgWish):
    """A custom role as it shall be."""

    description: Reason = Field("", description="What it is for.")
    permissions: Permissions = Field(description="None beyond your own rights.")


class RoleOut(BaseModel):
    """A role: a named set of permissions."""

    id: str
    object: Literal["role"]
    name: str
    is_built_in: bool
    description: str
    permissions: list[str]
    created_at: datetime | None = Field(description="Null for built-in roles.")


class RoleListing(Listing[RoleOut]):
    """All roles, built-in ones first, from the most to the least powerful; and all permissions."""

    permissions: dict[str, str] = Field(description="What each permission allows.")


class CreateInvitation(OrgWish):
    """A wish to ask somebody to join."""

    email: Email = Field(description="Who may accept it, signed in with this address.")
    role: RoleName = Field(description=_ROLE)


InvitationState = Literal["open", "accepted", "revoked", "expired"]


class InvitationOut(BaseModel):
    """An invitation; its token is only in the mail."""

    id: uuid.UUID
    object: Literal["invitation"]
    email: str
    role: str
    state: InvitationState
    invited_by: str = Field(description=_SUBJECT)
    created_at: datetime
    sent_at: datetime
    expires_at: datetime
    accepted_at: datetime | None
    accepted_by: str | None
    revoked_at: datetime | None


class AcceptInvitation(OrgWish):
    """The token of a mail."""

    token: Word = Field(description="What the link in the mail ends with.")


class AcceptedInvitation(BaseModel):
    """The place that was given."""

    object: Literal["accepted_invitation"]
    organization_id: int
    slug: str
    name: str
    role: str


class CreateServicePrincipal(OrgWish):
    """A wish for a service principal."""

    name: Word = Field(description="Unique in the organization.")
    role: RoleName = Field(description=_ROLE)


class ChangeServicePrincipal(OrgWish):
    """What to change of a service principal; members left out stay as they are."""

    name: Word = Field(LEFT_OUT, description="Unique in the organization.")
    role: RoleName = Field(LEFT_OUT, description=_ROLE)
    is_disabled: bool = Field(LEFT_OUT, description="Disabled, its keys are refused at once.")


class ServicePrincipalOut(BaseModel):
    """A program that acts in the organization as itself."""

    id: uuid.UUID
    object: Literal["service_principal"]
    subject: str = Field(description="As the owner of keys names it.")
    name: str
    role: str
    is_disabled: bool
    created_by: str = Field(description=_SUBJECT)
    created_at: datetime
    disabled_at: datetime | None


class CreateApiKey(OrgWish):
    """A wish for an API key."""

    name: Word = Field(description="What it is for.")
    scopes: Annotated[list[Word], Field(min_length=1, max_length=200)] = Field(
        description="Permissions that it has at most; none beyond your own."
    )
    expires_in_days: int | None = Field(
        90, ge=1, le=3650, description="Days until it ends; null: never."
    )
    owner: Word | None = Field(
        None, description="A service principal as `service:<id>`; left out: you."
    )


class ApiKeyOut(BaseModel):
    """An API key, without its secret."""

    id: uuid.UUID
    object: Literal["api_key"]
    name: str
    prefix: str = Field(description="Stands in the key, to tell keys apart.")
    owner: str = Field(description="Whose rights it has at most, as they are at each request.")
    scopes: list[str]
    created_by: str = Field(description=_SUBJECT)
    created_at: datetime
    expires_at: datetime | None
    used_at: datetime | None = Field(description="To the minute.")
    revoked_at: datetime | None


class NewApiKey(ApiKeyOut):
    """An API key as it was made: the only time that its text is shown."""

    key: str = Field(description="Send it as a bearer token. It is shown once.")


class CreateGrant(OrgWish):
    """A wish to let an operator of the platform in."""

    operator_email: Email = Field(description="The operator's address.")
    reason: Why = Field(description="Why; it stands in the audit log.")
    hours: int = Field(ge=1, le=72, description="It ends by itself after so many hours.")
    read_only: bool = Field(default=True, description="False: they may do what builders do.")


class GrantOut(BaseModel):
    """An operator's way into the organization."""

    id: uuid.UUID
    object: Literal["grant"]
    operator_id: uuid.UUID
    operator_email: str
    granted_by: str = Field(description=_SUBJECT)
    reason: str
    read_only: bool
    is_open: bool
    created_at: datetime
    expires_at: datetime
    ended_at: datetime | None
