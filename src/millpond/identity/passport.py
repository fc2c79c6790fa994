"""Passports: what a good token says of its bearer, and which principal that makes in which org.

Made by `tokens` from verified claims, read by `gate`. Pure. Invariant: a principal has the rights of one org
alone, as they were signed; its standing lets the database refuse them when they changed.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from millpond.errors import Forbidden, InvalidInput
from millpond.identity.permissions import PLATFORM, permissions_of
from millpond.types import NO_ORG, Json, Principal, Standing

ORG_HEADER = "X-Organization-Id"


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """Somebody's place in an org: the role, the version of it, and what a custom role may."""

    org_id: int
    slug: str
    role: str
    stamp: int
    custom: frozenset[str] | None = None

    @property
    def permissions(self) -> frozenset[str]:
        """What this seat may."""
        return permissions_of(self.role, self.custom)

    def claim(self) -> dict[str, Json]:
        """Return it as it stands in a token."""
        named = {"id": self.org_id, "slug": self.slug, "role": self.role, "v": self.stamp}
        return named if self.custom is None else {**named, "permissions": sorted(self.custom)}

    @classmethod
    def of_claim(cls, claim: Mapping[str, Json]) -> Seat:
        """Read it from a token of ours; raises KeyError, TypeError or ValueError for what is none."""
        custom = claim.get("permissions")
        return cls(
            org_id=int(claim["id"]),
            slug=str(claim["slug"]),
            role=str(claim["role"]),
            stamp=int(claim["v"]),
            custom=None if custom is None else frozenset(map(str, custom)),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Passport:
    """A verified bearer: a signed-in person with seats in orgs, or a `fixed` principal without a session.

    `stamp` is the version of the account; `is_operator` opens the platform's own routes. Who `is_in_many` orgs has more
    seats than a token carries: `seating` finds the one that is wanted.
    """

    subject: str
    session_id: uuid.UUID | None = None
    stamp: int = 0
    seats: Sequence[Seat] = ()
    is_operator: bool = False
    is_in_many: bool = False
    fixed: Principal | None = None

    def seat(self, wanted: str | None) -> Seat | None:
        """Return the seat in the org wanted by id or slug, or the only one; None when there is none.

        Raises InvalidInput when the org has to be named.
        """
        if wanted is not None:
            return next((one for one in self.seats if wanted in (str(one.org_id), one.slug)), None)
        if len(self.seats) > 1 or self.is_in_many:
            names = ", ".join(one.slug for one in self.seats[:5])
            shown = f" ({names})" if names else ""
            raise InvalidInput(
                f"This token spans several organizations{shown}: say which.",
                code="org_needed",
                param=ORG_HEADER,
                advice=f"send the header `{ORG_HEADER}` with the id or slug of one",
            )
        return self.seats[0] if self.seats else None

    def is_guest(self, wanted: str | None) -> bool:
        """Whether an operator wants into an org without a place in it: only a grant lets them in."""
        return self.is_operator and wanted is not None and self.seat(wanted) is None

    def in_org(self, wanted: str | None = None) -> Principal:
        """Return the principal in the org wanted; raises Forbidden when the bearer has no place there."""
        if self.fixed is not None:
            return self._fixed(self.fixed, wanted)
        seat = self.seat(wanted)
        if seat is None:
            raise not_in_org()
        return seated(self.subject, seat, self.session_id)

    def on_platform(self) -> Principal:
        """Return the principal for the platform's own routes; one without rights there may nothing."""
        if self.fixed is not None:
            return self.fixed
        return Principal(
            org_id=NO_ORG,
            subject=self.subject,
            permissions=PLATFORM if self.is_operator else frozenset(),
            roles=frozenset({"operator"}) if self.is_operator else frozenset(),
            standing=Standing(stamp=self.stamp, session_id=self.session_id),
        )

    def _fixed(self, principal: Principal, wanted: str | None) -> Principal:
        if wanted is not None and wanted != str(principal.org_id):
            raise not_in_org()
        return principal


def seated(subject: str, seat: Seat, session_id: uuid.UUID | None = None) -> Principal:
    """Return the principal that a seat makes of a subject."""
    return Principal(
        org_id=seat.org_id,
        subject=subject,
        permissions=seat.permissions,
        roles=frozenset({seat.role}),
        standing=Standing(stamp=seat.stamp, session_id=session_id),
    )


def not_in_org() -> Forbidden:
    """Make the refusal for an org in which the bearer has no place, or which does not exist."""
    return Forbidden(
        "This token has no place in that organization.", code="org_forbidden", param=ORG_HEADER
    )


def seats_of(rows: Iterable[Mapping[str, Json]]) -> list[Seat]:
    """Make seats of rows of `orgs_of_user`; suspended orgs are left in, since the database refuses those."""
    return [
        Seat(
            org_id=row["org_id"],
            slug=row["slug"],
            role=row["role"],
            stamp=row["version"],
            custom=None if row["permissions"] is None else frozenset(row["permissions"]),
        )
        for row in rows
    ]
