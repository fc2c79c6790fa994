"""Models of people: signing in, accounts, sessions.

Called by the routes of `/v1/auth` and `/v1/me`. Invariant: request models are strict and refuse fields that they do not
know; a password or token stands in an answer only where its owner gets it for the first time.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from millpond.api.texts import PLAIN

Email = Annotated[str, StringConstraints(min_length=3, max_length=254, pattern=PLAIN)]
Name = Annotated[str, StringConstraints(max_length=200, pattern=PLAIN)]
Password = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Secret = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=PLAIN)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SignIn(_Request):
    """Who signs in."""

    email: Email
    password: Password


class Refresh(_Request):
    """What a session is renewed or ended with."""

    refresh_token: Secret


class Register(_Request):
    """A wish for an account."""

    email: Email
    name: Name = ""


class ConfirmRegistration(_Request):
    """A mailed link's token, and the password that the account gets."""

    token: Secret
    password: Password = Field(description="12 to 1024 characters.")


class RequestReset(_Request):
    """Whose password is not known any more."""

    email: Email


class ConfirmReset(_Request):
    """A mailed link's token, and the new password."""

    token: Secret
    password: Password = Field(description="12 to 1024 characters.")


class ClaimOperator(_Request):
    """An operator link's token, and the account that becomes the operator's."""

    token: Secret = Field(description="Of the link that `millpond operator link` printed.")
    email: Email
    name: Name = ""
    password: Password = Field(description="12 to 1024 characters.")


class ChangeMe(_Request):
    """What somebody changes about themselves."""

    name: Name


class ChangePassword(_Request):
    """The password that was, and the one that shall be."""

    old_password: Password
    new_password: Password = Field(description="12 to 1024 characters.")


class UserOut(BaseModel):
    """Somebody with an account."""

    id: uuid.UUID
    object: Literal["user"]
    email: str
    name: str
    is_operator: bool


class SeatOut(BaseModel):
    """A place in an org."""

    id: int = Field(description="Of the organization.")
    object: Literal["seat"]
    slug: str
    name: str
    role: str
    is_suspended: bool


class SignedInOut(BaseModel):
    """What somebody gets who is signed in; the tokens are shown this once."""

    object: Literal["signed_in"]
    access_token: str
    token_type: Literal["Bearer"]
    expires_in: int = Field(description="Seconds until the access token ends.")
    refresh_token: str = Field(description="Works once; gives the next one.")
    session_id: uuid.UUID
    user: UserOut
    organizations: list[SeatOut]


class MailedOut(BaseModel):
    """A wish was taken; what comes of it is told by mail alone."""

    object: Literal["mailed"]
    detail: str


class CreatedUser(BaseModel):
    """An account that was made."""

    id: uuid.UUID
    object: Literal["created_user"]


class MeOut(BaseModel):
    """Who calls, and what they may in the org that the request names or the token is of."""

    object: Literal["me"]
    subject: str
    user: UserOut | None = Field(description="Null for a token that is not a person's.")
    session_id: uuid.UUID | None
    organization: int | None = Field(description="Null when none is named and there are several.")
    role: str | None
    permissions: list[str] = Field(description="In that organization, and on the platform.")
    organizations: list[SeatOut]


class SessionOut(BaseModel):
    """A signed-in device."""

    id: uuid.UUID
    object: Literal["session"]
    address: str | None
    agent: str | None
    created_at: datetime
    used_at: datetime = Field(description="When it was renewed last.")
    expires_at: datetime
    is_current: bool
