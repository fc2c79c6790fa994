"""Models of outside issuers of tokens and of whom they vouch for.

Called by their routes. Invariant: as in `models_orgs`.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from millpond.api.models_orgs import LEFT_OUT, OrgWish, RoleName
from millpond.api.texts import PLAIN, Word
from millpond.identity.outside_tokens import ALGORITHMS

Address = Annotated[str, Field(min_length=8, max_length=500, pattern=PLAIN)]
ClaimName = Annotated[str, Field(min_length=1, max_length=200, pattern=PLAIN)]
Values = Annotated[list[Word], Field(min_length=1, max_length=100)]
Audiences = Annotated[list[Word], Field(min_length=1, max_length=10)]
Algorithms = Annotated[list[Word], Field(min_length=1, max_length=10)]
_NAME = "What people call it."
_AUDIENCES = "Tokens have to be meant for one of these (`aud`)."
_ALGORITHMS = f"Which signatures are accepted, of {', '.join(ALGORITHMS)}."
_RULES = "The first that fits gives the role; where none fits there is no role, and so no way in."
_ORG_CLAIM = (
    "For an issuer of several organizations: the claim that tells which one a token is of, such as a tenant's id. "
    "Null: every token is of yours."
)
_ORG_VALUES = "Which values of that claim are your organization."
_TRUST_DAYS = "So many days after somebody's last token, their runs may nothing more."


class RuleIn(OrgWish):
    """Values of a claim that give a role."""

    claim: ClaimName = Field(
        description="Its name, or where it is deeper, a JSON pointer such as `/realm_access/roles`."
    )
    values: Values = Field(description="One of them has to stand there, exactly so.")
    role: RoleName = Field(
        description="A built-in or custom role; it may not exceed your own rights."
    )


Rules = Annotated[list[RuleIn], Field(max_length=50)]


class CreateIssuer(OrgWish):
    """A wish to accept the tokens of an issuer."""

    name: Word = Field(description=_NAME)
    url: Address = Field(
        description="The issuer exactly as its tokens name it (`iss`); its discovery document is below it. For ever."
    )
    audiences: Audiences = Field(description=_AUDIENCES)
    rules: Rules = Field(description=_RULES)
    algorithms: Algorithms = Field(["RS256", "ES256", "EdDSA"], description=_ALGORITHMS)
    org_claim: ClaimName | None = Field(None, description=_ORG_CLAIM)
    org_values: Annotated[list[Word], Field(max_length=100)] = Field([], description=_ORG_VALUES)
    trust_days: int = Field(30, ge=1, le=365, description=_TRUST_DAYS)


class ChangeIssuer(OrgWish):
    """What to change of an issuer; members left out stay as they are."""

    name: Word = Field(LEFT_OUT, description=_NAME)
    audiences: Audiences = Field(LEFT_OUT, description=_AUDIENCES)
    rules: Rules = Field(LEFT_OUT, description=_RULES)
    algorithms: Algorithms = Field(LEFT_OUT, description=_ALGORITHMS)
    org_claim: ClaimName | None = Field(LEFT_OUT, description=_ORG_CLAIM)
    org_values: Annotated[list[Word], Field(max_length=100)] = Field(
        LEFT_OUT, description=_ORG_VALUES
    )
    trust_days: int = Field(LEFT_OUT, ge=1, le=365, description=_TRUST_DAYS)
    is_disabled: bool = Field(LEFT_OUT, description="Disabled, its tokens are refused at once.")


class RuleOut(BaseModel):
    """Values of a claim that give a role."""

    claim: str
    values: list[str]
    role: str


class IssuerOut(BaseModel):
    """An outside issuer whose tokens the organization accepts."""

    id: uuid.UUID
    object: Literal["issuer"]
    name: str
    url: str
    audiences: list[str]
    algorithms: list[str]
    rules: list[RuleOut]
    org_claim: str | None
    org_values: list[str]
    trust_days: int
    is_disabled: bool
    created_by: str
    created_at: datetime
    disabled_at: datetime | None


class IssuerKey(BaseModel):
    """A key that an issuer publishes."""

    kid: str
    algorithms: list[str]


class IssuerTest(BaseModel):
    """What came of asking an issuer for its keys."""

    object: Literal["issuer_test"]
    is_good: bool
    code: str | None = Field(description="`issuer_unavailable` or `issuer_invalid`; null if good.")
    message: str | None = Field(description="What is wrong; null if good.")
    keys: list[IssuerKey]


class ChangeIdentity(OrgWish):
    """What to change of an outside identity."""

    is_disabled: bool = Field(description="Disabled, it may nothing more, whatever token it has.")


class OutsideIdentityOut(BaseModel):
    """Somebody whom an issuer vouches for."""

    id: uuid.UUID
    object: Literal["outside_identity"]
    subject: str = Field(description="As runs and the audit log name it: `outside:…`.")
    issuer: str = Field(description="The issuer's address.")
    outside_subject: str = Field(description="`sub` of its tokens.")
    label: str = Field(description="What the issuer called it at first sight; it decides nothing.")
    role: str | None = Field(description="What its newest token gave; null: nothing any more.")
    is_disabled: bool
    first_seen_at: datetime
    seen_at: datetime = Field(description="To the hour.")
    disabled_at: datetime | None
