"""Tokens: signed statements of who calls, in which org, with which permissions.

Minted by the CLI, verified by the API on every request. Invariants: the algorithm is fixed here and
never read from a token; a key id is looked up only among the keys of this installation; `iss`,
`aud` and `exp` are always checked.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import jwt

from millpond.db.pool import Database
from millpond.errors import Transient, Unauthenticated, Unavailable
from millpond.identity.passport import Passport, Seat
from millpond.identity.ring import KeyRing
from millpond.identity.signing import ALGORITHM, Signer, SigningKey, load, reload
from millpond.types import Json, Principal, new_id

_LEEWAY_S = 5.0  # clocks of two hosts may differ by this much
_REFRESH_S = 5.0  # tokens with unknown keys cause at most one look into the database in this time
# A key that was taken away is refused after a minute; through an outage, after ten.
_KEYS_FOR_S = 60.0
_KEYS_AT_MOST_S = 600.0
_MAX_TOKEN_CHARS = 8192
_MAX_SEATED_CHARS = 6144
_MAX_REMEMBERED = 4096
_LAST_MOMENT = 253_402_300_799  # of the year 9999
_REQUIRED = ("iss", "aud", "sub", "exp", "iat", "jti")
# RFC 9068: what is signed for another purpose is no access token.
TYPE = "at+jwt"


class Keyring:
    """Mints and verifies the tokens of one installation."""

    def __init__(
        self,
        db: Database,
        ring: KeyRing,
        signer: Signer,
        known: Iterable[SigningKey],
        issuer: str,
        audience: str,
    ) -> None:
        self._db = db
        self._ring = ring
        self._signer = signer
        self._known = {key.kid: key for key in known}
        self._issuer = issuer
        self._audience = audience
        self._verified: dict[str, tuple[Passport, float]] = {}
        self._refreshed_at = time.monotonic()
        self._reading = asyncio.Lock()
        # What the last reading failed by, and when; None after one that went well.
        self._failure: Transient | None = None
        self._failed_at = float("-inf")

    @classmethod
    async def open(
        cls,
        db: Database,
        ring: KeyRing,
        *,
        issuer: str = "millpond",
        audience: str = "millpond",
    ) -> Keyring:
        """Load the installation's keys, making the first at the first start."""
        signer, known = await load(db, ring)
        return cls(db, ring, signer, known, issuer, audience)

    @property
    def age_s(self) -> float:
        """How long ago the known keys were read."""
        return time.monotonic() - self._refreshed_at

    async def refresh(self) -> None:
        """Read the keys again, that to sign with too, at most every 5 s; those who ask meanwhile wait for it.

        Raises Unavailable while they cannot be read, without asking more often than that.
        """
        async with self._reading:
            if self.age_s < _REFRESH_S:
                return
            self._check_failure()
            try:
                self._signer, known = await reload(self._db, self._ring, self._signer)
            except Transient as error:
                self._failure, self._failed_at = error, time.monotonic()
                raise
            self._failure = None
            self._refreshed_at = time.monotonic()
            self._known = {key.kid: key for key in known}
            self._verified.clear()

    def _check_failure(self) -> None:
        rested_s = time.monotonic() - self._failed_at
        if self._failure is not None and rested_s < _REFRESH_S:
            raise Unavailable(
                "The keys that tokens are signed with cannot be read at this moment.",
                code=self._failure.code,
                retry_after_s=max(1.0, _REFRESH_S - rested_s),
            ) from self._failure

    async def freshen(self, *, within_s: float = _KEYS_FOR_S) -> None:
        """Read the keys again when they are older than `within_s`; while the database is away, ten minutes will do.

        Then nobody waits for a reading that somebody else tries.
        """
        if self.age_s <= within_s:
            return
        is_away = self._failure is not None and self._reading.locked()
        if is_away and self.age_s <= _KEYS_AT_MOST_S:
            return
        try:
            await self.refresh()
        except Transient:
            if self.age_s > _KEYS_AT_MOST_S:
                raise

    def jwks(self) -> dict[str, list[dict[str, str]]]:
        """Return the public keys as a JSON Web Key Set (RFC 7517)."""
        return {"keys": [dict(key.jwk) for key in self._known.values()]}

    @property
    def issuer(self) -> str:
        """Who signs here: `iss` of every token made here."""
        return self._issuer

    def mint(self, principal: Principal, org_slug: str, ttl_s: float) -> str:
        """Return a token for a fixed principal, without a session, that expires in `ttl_s` seconds."""
        return self._sign(
            principal.subject,
            {
                "org": principal.org_id,
                "org_slug": org_slug,
                "permissions": sorted(principal.permissions),
                "roles": sorted(principal.roles),
            },
            ttl_s,
        )

    def mint_access(self, passport: Passport, ttl_s: float) -> str:
        """Return a token for a signed-in person, who has a session, that expires in `ttl_s` seconds.

        Where their seats would make it longer than proxies let a header be, it says so in their place.
        """
        assert passport.session_id is not None
        claims: dict[str, Json] = {
            "sid": str(passport.session_id),
            "v": passport.stamp,
            "orgs": [seat.claim() for seat in passport.seats],
        }
        if passport.is_operator:
            claims["operator"] = True
        token = self._sign(passport.subject, claims, ttl_s)
        if len(token) <= _MAX_SEATED_CHARS:
            return token
        return self._sign(passport.subject, {**claims, "orgs": [], "many": True}, ttl_s)

    def _sign(self, subject: str, more: Mapping[str, Json], ttl_s: float) -> str:
        now = int(time.time())
        claims = {
            "iss": self._issuer,
            "aud": self._audience,
            "sub": subject,
            **more,
            "iat": now,
            "exp": now + int(ttl_s),
            "jti": new_id().hex,
        }
        headers = {"kid": self._signer.kid, "typ": TYPE}
        return jwt.encode(claims, self._signer.private, algorithm=ALGORITHM, headers=headers)

    def verify(self, token: str) -> Principal:
        """Return the principal of a token that speaks for one org; raises as `read` and `Passport.in_org`."""
        return self.read(token).in_org()

    def expires_at(self, token: str) -> float:
        """Return when a token that was read ends, in seconds since the epoch; remembered or not."""
        remembered = self._verified.get(token)
        return expiry_of(token) if remembered is None else remembered[1]

    def knows(self, token: str) -> bool:
        """Whether a token was read and is remembered."""
        return token in self._verified

    def read(self, token: str) -> Passport:
        """Return who a token speaks for; raises Unauthenticated saying what is wrong with it.

        A token that was good is remembered, so that its signature is computed once; its expiry is
        checked every time.
        """
        remembered = self._verified.get(token)
        if remembered is not None:
            passport, expires_at = remembered
            if time.time() < expires_at + _LEEWAY_S:
                return passport
            del self._verified[token]
            raise expired(expires_at)
        claims = self._claims(token)
        passport = _passport(claims)
        if len(self._verified) >= _MAX_REMEMBERED:
            self._verified.clear()
        self._verified[token] = passport, float(claims["exp"])
        return passport

    def _claims(self, token: str) -> dict[str, Any]:
        key = self._key_of(token)
        try:
            return jwt.decode(
                token,
                key.public,
                algorithms=[ALGORITHM],
                issuer=self._issuer,
                audience=self._audience,
                leeway=_LEEWAY_S,
                options={"require": list(_REQUIRED)},
            )
        except jwt.PyJWTError as error:
            raise refusal(error, token) from error

    def _key_of(self, token: str) -> SigningKey:
        if len(token) > _MAX_TOKEN_CHARS:
            raise malformed("it is too long")
        try:
            header = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, ValueError) as error:
            raise malformed("it is not a signed JSON Web Token") from error
        if header.get("alg") != ALGORITHM:
            raise Unauthenticated(
                f"The token is not signed with {ALGORITHM}.", code="token_algorithm"
            )
        if str(header.get("typ", "")).lower() != TYPE:
            raise Unauthenticated(f"The token is not of type {TYPE}.", code="token_type")
        key = self._known.get(str(header.get("kid")))
        if key is None:
            raise Unauthenticated(
                "The token is signed with a key that this installation does not know.",
                code="token_unknown_key",
                advice="get a new token from this installation",
            )
        return key


def malformed(why: str) -> Unauthenticated:
    """Make the refusal of a token that has not the form of one."""
    return Unauthenticated(f"The token cannot be read: {why}.", code="token_malformed")


def refusal(error: jwt.PyJWTError, token: str) -> Unauthenticated:
    """Say what is wrong with a token that could not be verified."""
    match error:
        case jwt.ExpiredSignatureError():
            return expired(expiry_of(token))
        case jwt.InvalidIssuerError():
            return Unauthenticated("The token is from another issuer.", code="token_issuer")
        case jwt.InvalidAudienceError():
            return Unauthenticated(
                "The token is meant for another audience.", code="token_audience"
            )
        case jwt.MissingRequiredClaimError():
            return malformed(f"claim {error.claim} is missing")
        case jwt.ImmatureSignatureError():
            return Unauthenticated("The token is not valid yet.", code="token_too_early")
        case jwt.InvalidSignatureError():
            return Unauthenticated("The token's signature is wrong.", code="token_signature")
        case _:
            return malformed("a part of it has the wrong form")


def expiry_of(token: str) -> float:
    """Return when a token ends, in seconds since the epoch; asked only of one whose signature was found good."""
    return float(jwt.decode(token, options={"verify_signature": False})["exp"])


def expired(at: float) -> Unauthenticated:
    """Make the refusal of a token that ended, in seconds since the epoch; any number is shown as a moment."""
    moment = datetime.fromtimestamp(min(max(at, 0), _LAST_MOMENT), UTC)
    return Unauthenticated(
        f"The token expired at {moment:%Y-%m-%d %H:%M:%S} UTC.",
        code="token_expired",
        advice="get a new token",
    )


def _passport(claims: dict[str, Any]) -> Passport:
    subject = claims["sub"]
    if not isinstance(subject, str) or not subject:
        raise malformed("claim sub names nobody")
    if "sid" not in claims:
        return Passport(subject=subject, fixed=_principal(claims, subject))
    try:
        return Passport(
            subject=subject,
            session_id=uuid.UUID(claims["sid"]),
            stamp=int(claims["v"]),
            seats=[Seat.of_claim(claim) for claim in claims["orgs"]],
            is_operator=claims.get("operator") is True,
            is_in_many=claims.get("many") is True,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise malformed("the claims of its session have the wrong form") from error


def _principal(claims: dict[str, Any], subject: str) -> Principal:
    org_id = claims.get("org")
    if not isinstance(org_id, int) or isinstance(org_id, bool) or not 0 < org_id < 2**63:
        raise malformed("claim org is not the id of an org")
    return Principal(
        org_id=org_id,
        subject=subject,
        permissions=_words(claims, "permissions"),
        roles=_words(claims, "roles"),
    )


def _words(claims: dict[str, Any], claim: str) -> frozenset[str]:
    words = claims.get(claim, [])
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise malformed(f"claim {claim} is not a list of words")
    return frozenset(words)
