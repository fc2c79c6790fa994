"""Models of the platform: organizations as operators see them, and the operators.

Called by the platform's routes. Invariant: nothing of what an organization holds has a place here.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, Field

from millpond.api.models_orgs import LEFT_OUT, Email, InvitationOut, OrgWish, Why
from millpond.api.texts import Word


class CreateOrg(OrgWish):
    """A wish for an organization."""

    slug: Word = Field(description="Stands for it for ever: lower-case letters, digits, dashes.")
    name: Word = Field(description="What people see.")
    owner_email: Email | None = Field(
        None, description="Who is asked by mail to join as its first owner."
    )


class ChangePlatformOrg(OrgWish):
    """What to change of an organization; members left out stay as they are."""

    name: Word = Field(LEFT_OUT, description="What people see.")
    is_suspended: bool = Field(
        LEFT_OUT, description="Suspended, it refuses all its members, keys and service principals."
    )
    reason: Why = Field(LEFT_OUT, description="Why it is suspended; needed for that.")


class PlatformOrgOut(BaseModel):
    """An organization, without anything that it holds."""

    id: int
    object: Literal["platform_organization"]
    slug: str
    name: str
    is_suspended: bool
    suspended_at: datetime | None
    suspended_reason: str | None
    created_at: datetime


class CreatedOrg(PlatformOrgOut):
    """An organization as it was made."""

    invitation: InvitationOut | None = Field(description="Of its first owner, if one was named.")


class AddOperator(OrgWish):
    """A wish to make somebody an operator of the platform."""

    email: Email = Field(description="The address of an account.")


class OperatorOut(BaseModel):
    """Who works on the platform itself."""

    id: uuid.UUID
    object: Literal["operator"]
    email: str
    name: str
    is_disabled: bool
    created_at: datetime = Field(description="Of the account.")
