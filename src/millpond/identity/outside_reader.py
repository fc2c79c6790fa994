"""The reader of outside tokens: what another issuer signed becomes a principal of the one org that trusts it.

Called by the gate. Invariants: the org is named by the request and its own registration of the issuer decides all;
no transaction stays open while an issuer is asked; a token whose signature was good once is checked against its
issuer's present keys, its expiry and the org's present terms every time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from millpond.db.pool import Database
from millpond.db.queries import queries
from millpond.engine import features
from millpond.errors import Forbidden, Unauthenticated
from millpond.identity import issuers, outside_identities, outside_tokens
from millpond.identity.gate import Wish
from millpond.identity.issuer_keys import IssuerKeys
from millpond.identity.issuers import Issuer
from millpond.identity.outside_tokens import LEEWAY_S, Unverified
from millpond.identity.passport import ORG_HEADER
from millpond.identity.tokens import expired, expiry_of
from millpond.types import Json, Principal

_SQL = queries("grants")
_MAX_REMEMBERED = 1024


class _Good(NamedTuple):
    """A token whose signature was good: by which key, and what it says."""

    key: Any
    claims: Mapping[str, Json]
    expires_at: float


class OutsideReader:
    """Reads tokens of every issuer but this installation, `own`."""

    def __init__(self, db: Database, keys: IssuerKeys, own: str) -> None:
        self._db = db
        self.keys = keys
        self.own = own
        self._good: dict[str, _Good] = {}
        self._orgs: dict[str, int] = {}

    def reads(self, text: str) -> bool:
        """Whether the text claims to be signed by somebody else."""
        return text in self._good or outside_tokens.issuer_of(text) not in (None, self.own)

    def expires_at(self, text: str) -> float | None:
        """Return when a token that was admitted ends, in seconds since the epoch; remembered or not."""
        good = self._good.get(text)
        return expiry_of(text) if good is None else good.expires_at

    async def admit(self, text: str, wish: Wish) -> Principal:
        """Return the principal that a token makes in the org wanted; raises Unauthenticated, Forbidden, Unavailable."""
        seen = outside_tokens.read(text)
        org_id, issuer = await self._trusted(wish.org, seen.issuer)
        if seen.algorithm not in issuer.terms.algorithms:
            raise outside_tokens.wrong_algorithm()
        key = await self.keys.key(seen.issuer, seen.kid, seen.algorithm, org_id=org_id)
        claims = self._claims(text, seen, key)
        outside_tokens.check_audience(claims, issuer.terms.audiences)
        async with self._db.org(org_id) as con:
            admitted = await outside_identities.admit(con, org_id, issuer, claims)
        if admitted.principal is None:
            raise _not_admitted(admitted.refused)
        return admitted.principal

    async def close(self) -> None:
        """End questions to issuers that are under way."""
        await self.keys.close()

    async def _trusted(self, wanted: str | None, url: str) -> tuple[int, Issuer]:
        if wanted is None:
            raise Unauthenticated(
                "The token is from another issuer, and the request does not say which organization trusts it.",
                code="token_issuer",
                param=ORG_HEADER,
                advice=f"send the header `{ORG_HEADER}` with the id or slug of the organization",
            )
        org_id = await self._org_id(wanted)
        if org_id is not None:
            async with self._db.org(org_id) as con:
                issuer = await issuers.trusted_at(con, org_id, url)
                is_off = bool(await features.without(con, [org_id], "outside_issuers"))
            if issuer is not None and not is_off:
                return org_id, issuer
        raise _untrusted()

    async def _org_id(self, wanted: str) -> int | None:
        known = self._orgs.get(wanted)
        if known is not None:
            return known
        async with self._db.globals() as con:
            org_id: int | None = await con.fetchval(_SQL["find_org"], wanted)
        if org_id is not None:
            if len(self._orgs) >= _MAX_REMEMBERED:
                self._orgs.clear()
            self._orgs[wanted] = org_id
        return org_id

    def _claims(self, text: str, seen: Unverified, key: Any) -> Mapping[str, Json]:
        good = self._good.get(text)
        if good is None or good.key is not key:
            claims = outside_tokens.verify(text, seen, key)
            good = _Good(key, claims, float(claims["exp"]))
            if len(self._good) >= _MAX_REMEMBERED:
                self._good.clear()
            self._good[text] = good
        if time.time() >= good.expires_at + LEEWAY_S:
            del self._good[text]
            raise expired(good.expires_at)
        return good.claims


def _untrusted() -> Unauthenticated:
    return Unauthenticated(
        "The token is from an issuer that this organization does not trust.", code="token_issuer"
    )


def _not_admitted(why: str) -> Unauthenticated | Forbidden:
    if why == "untrusted":
        return _untrusted()
    if why == "disabled":
        return Forbidden("This identity is disabled in the organization.", code="identity_disabled")
    if why == "superseded":
        return Unauthenticated(
            "A newer token of the same identity gives another role than this one.",
            code="token_superseded",
            advice="get a new token",
        )
    return Forbidden(
        "What this token says gives no role in the organization.",
        code="role_unmapped",
        advice="ask who registered the issuer which claims give a role",
    )
