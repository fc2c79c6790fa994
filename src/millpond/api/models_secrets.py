"""Models of secrets.

Called by their routes. Invariant: a value comes in and has a place in no answer.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, Field, SecretStr, StringConstraints

from millpond.api.models_orgs import LEFT_OUT, OrgWish
from millpond.api.texts import Reason

MAX_VALUE = 65_536
SecretName = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", max_length=63)
]
Value = Annotated[SecretStr, Field(min_length=1, max_length=MAX_VALUE)]
_VALUE = (
    "Sealed at once and never given out again. Values of 8 characters and more are hidden in all that runs "
    "which open them leave behind."
)
_SUBJECT = "Who did it: `user:…`, `service:…`, `key:…`."


class CreateSecret(OrgWish):
    """A wish to store a secret under a new name."""

    name: SecretName = Field(
        description="By which flows open it: lower-case letters, digits and `.`, `_`, `-`."
    )
    value: Value = Field(description=_VALUE)
    description: Reason = Field("", description="What it is for.")


class PutSecret(OrgWish):
    """A wish to store or replace the value of a secret."""

    value: Value = Field(description=_VALUE)
    description: Reason = Field(LEFT_OUT, description="What it is for; left out, as it was.")


class SecretOut(BaseModel):
    """A secret, without anything of its value."""

    id: uuid.UUID
    object: Literal["secret"]
    name: str
    description: str
    version: int = Field(description="How many values it has had.")
    created_by: str = Field(description=_SUBJECT)
    created_at: datetime
    changed_by: str = Field(description=_SUBJECT)
    changed_at: datetime = Field(description="When it got its present value.")
    used_at: datetime | None = Field(description="When a run last opened it, right to a minute.")
