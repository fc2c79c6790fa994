"""What the server answers about people: who is signed in, and where.

Made by `calls` from JSON. Invariant: as in `models`; tokens stand in no `repr`.
"""

from __future__ import annotations

import uuid
from datetime import datetime

from pydantic import Field

from millpond.client.models import Answer


class User(Answer):
    """Somebody with an account."""

    id: uuid.UUID
    email: str
    name: str = ""
    is_operator: bool = False


class SeatInOrg(Answer):
    """A place in an organization; `id` is the organization's."""

    id: int
    slug: str
    name: str
    role: str
    is_suspended: bool = False


class SignedIn(Answer):
    """Tokens of somebody who is signed in; the refresh token works once."""

    access_token: str = Field(repr=False)
    token_type: str
    expires_in: int
    refresh_token: str = Field(repr=False)
    session_id: uuid.UUID
    user: User
    organizations: list[SeatInOrg] = Field(default_factory=list)


class CreatedUser(Answer):
    """An account that was made."""

    id: uuid.UUID


class Mailed(Answer):
    """A wish was taken; what comes of it is told by mail alone."""

    detail: str


class Me(Answer):
    """Who calls, and what they may in one organization."""

    subject: str
    user: User | None = None
    session_id: uuid.UUID | None = None
    organization: int | None = None
    role: str | None = None
    permissions: list[str] = Field(default_factory=list)
    organizations: list[SeatInOrg] = Field(default_factory=list)


class MySession(Answer):
    """A signed-in device."""

    id: uuid.UUID
    address: str | None = None
    agent: str | None = None
    created_at: datetime
    used_at: datetime
    expires_at: datetime
    is_current: bool = False
