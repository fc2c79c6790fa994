"""What the server answers about outside issuers of tokens, and whom they vouch for.

Made by `calls` from JSON. Invariant: as in `models`.
"""

from __future__ import annotations

import uuid
from datetime import datetime

from pydantic import Field

from millpond.client.models import Answer


class IssuerRule(Answer):
    """Values of a claim that give a role."""

    claim: str
    values: list[str]
    role: str


class Issuer(Answer):
    """An issuer whose tokens the organization accepts."""

    id: uuid.UUID
    name: str
    url: str
    audiences: list[str]
    algorithms: list[str]
    rules: list[IssuerRule]
    org_claim: str | None = None
    org_values: list[str] = Field(default_factory=list)
    trust_days: int = 30
    is_disabled: bool = False
    created_by: str
    created_at: datetime
    disabled_at: datetime | None = None


class IssuerKey(Answer):
    """A key that an issuer publishes."""

    kid: str
    algorithms: list[str]


class IssuerTest(Answer):
    """What came of asking an issuer for its keys."""

    is_good: bool
    code: str | None = None
    message: str | None = None
    keys: list[IssuerKey] = Field(default_factory=list)


class OutsideIdentity(Answer):
    """Somebody whom an issuer vouches for; without a role they may nothing."""

    id: uuid.UUID
    subject: str
    issuer: str
    outside_subject: str
    label: str = ""
    role: str | None = None
    is_disabled: bool = False
    first_seen_at: datetime
    seen_at: datetime
    disabled_at: datetime | None = None
