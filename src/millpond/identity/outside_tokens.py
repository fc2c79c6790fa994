"""Tokens of outside issuers taken apart and verified, once the issuer and its key are known. Pure but for the clock.

Called by `outside_reader`. Invariants: nothing of an unverified token decides but which key is looked up; the
algorithm is one that the org accepts and that the key is for; keys, certificates and addresses in a header are never
followed.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jwt
import orjson
from jwt.types import Options

from millpond.errors import Unauthenticated
from millpond.identity.tokens import malformed, refusal
from millpond.types import Json

# Asymmetric ones alone: with a secret shared with the issuer, whoever can check a token could make one.
ALGORITHMS = (
    "RS256",
    "RS384",
    "RS512",
    "PS256",
    "PS384",
    "PS512",
    "ES256",
    "ES384",
    "ES512",
    "EdDSA",
)
LEEWAY_S = 30.0  # clocks of other organizations may differ by this much
_MAX_CHARS = 16_384
_MAX_ISSUER_CHARS = 500
_MAX_SUBJECT_CHARS = 255  # OpenID Connect Core 1.0, section 2
_LAST_MOMENT = 253_402_300_799  # of the year 9999
_REQUIRED = ("iss", "aud", "sub", "exp", "iat")
# An access token, or a JWT of no said kind. Anything else (`logout+jwt`, `dpop+jwt`, `secevent+jwt`) was signed for
# another purpose (RFC 8725, section 3.11).
_TYPES = frozenset({"", "jwt", "at+jwt", "application/at+jwt"})
_OPTIONS: Options = {"require": list(_REQUIRED), "verify_aud": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class Unverified:
    """What an outside token says of itself before anything is known of it."""

    issuer: str
    kid: str
    algorithm: str


def issuer_of(text: str) -> str | None:
    """Return whom a text claims to be signed by, None when it has not the form of a token."""
    if len(text) > _MAX_CHARS or text.count(".") != 2:
        return None
    try:
        claims = orjson.loads(_bytes(text.split(".")[1]))
    except (ValueError, binascii.Error):
        return None
    issuer = claims.get("iss") if isinstance(claims, dict) else None
    if not isinstance(issuer, str) or len(issuer) > _MAX_ISSUER_CHARS or not issuer.isprintable():
        return None
    return issuer


def read(text: str) -> Unverified:
    """Take a token apart; raises Unauthenticated for one that no key could make good."""
    issuer = issuer_of(text)
    try:
        header = jwt.get_unverified_header(text)
    except (jwt.PyJWTError, ValueError) as error:
        raise malformed("it is not a signed JSON Web Token") from error
    if issuer is None:
        raise malformed("it names no issuer")
    kid, algorithm, kind = header.get("kid"), header.get("alg"), header.get("typ", "")
    if algorithm not in ALGORITHMS:
        raise wrong_algorithm()
    if not isinstance(kind, str) or kind.lower() not in _TYPES:
        raise Unauthenticated("The token is no access token by its type.", code="token_type")
    if "crit" in header or "b64" in header:
        raise malformed("it needs an extension that is not known here")
    if not isinstance(kid, str) or not kid:
        raise malformed("it does not name its key")
    return Unverified(issuer=issuer, kid=kid, algorithm=algorithm)


def verify(text: str, seen: Unverified, key: Any) -> Mapping[str, Json]:
    """Return the claims of a token but for its audience; raises Unauthenticated saying what is wrong with it."""
    try:
        claims = jwt.decode(
            text,
            key,
            algorithms=[seen.algorithm],
            issuer=seen.issuer,
            leeway=LEEWAY_S,
            options=_OPTIONS,
        )
    except (jwt.PyJWTError, TypeError, ValueError, ArithmeticError) as error:
        known = error if isinstance(error, jwt.PyJWTError) else jwt.InvalidTokenError()
        raise refusal(known, text) from error
    _check_form(claims)
    return claims


def _check_form(claims: Mapping[str, Json]) -> None:
    """Raise where what is stored of a token could not be."""
    subject = claims["sub"]
    if not isinstance(subject, str) or not 0 < len(subject) <= _MAX_SUBJECT_CHARS:
        raise malformed("claim sub names nobody")
    if not subject.isprintable():
        raise malformed("claim sub has a character that no name has")
    if not all(0 <= float(claims[name]) <= _LAST_MOMENT for name in ("iat", "exp")):
        raise malformed("a time in it is none")


def check_audience(claims: Mapping[str, Json], audiences: Collection[str]) -> None:
    """Raise Unauthenticated unless a token is meant for one of these."""
    named = claims["aud"]
    listed = named if isinstance(named, list) else [named]
    if not any(isinstance(one, str) and one in audiences for one in listed):
        raise Unauthenticated("The token is meant for another audience.", code="token_audience")


def wrong_algorithm() -> Unauthenticated:
    """Make the refusal of a token that is signed by an algorithm that is not accepted of its issuer."""
    return Unauthenticated(
        "The token is not signed with an algorithm that is accepted here.", code="token_algorithm"
    )


def _bytes(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
