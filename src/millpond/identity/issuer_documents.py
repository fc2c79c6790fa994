"""What an issuer publishes: its discovery document, and from there its keys, as far as they are usable here.

Called by `issuer_keys`. Invariants: an issuer is asked at its own registered address alone, and its document has to
name that address; of a published key nothing private and no address is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jwt
import orjson
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from millpond.errors import MillpondError, Transient, Unavailable
from millpond.identity.outside_tokens import ALGORITHMS
from millpond.types import Json

WELL_KNOWN = "/.well-known/openid-configuration"
_MAX_DOCUMENT_BYTES = 256 * 1024
_MAX_KEYS = 100
_TIMEOUT_S = 5.0
_RSA_BITS = range(2048, 8193)
_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}

# What of a published key is read: no addresses, no certificates, nothing private.
_PUBLIC = ("kty", "crv", "n", "e", "x", "y")

# The keys of one issuer by id and algorithm.
Keys = Mapping[tuple[str, str], Any]


class Web(Protocol):
    """Asks addresses that tenants name; the egress guard."""

    def check(self, url: str, *, param: str) -> None:
        """Raise InvalidInput for an address that could never be asked."""
        ...

    async def get(self, url: str, *, max_bytes: int, timeout_s: float, payer: str) -> bytes:
        """Return the body of a good answer, asked for on behalf of `payer`; raises Permanent or Transient."""
        ...


async def read_keys(web: Web, url: str, *, payer: str) -> Keys:
    """Follow discovery from an issuer's address to its keys; raises Unavailable saying what is wrong."""
    document = await _document(web, url, url.removesuffix("/") + WELL_KNOWN, payer)
    if document.get("issuer") != url:
        raise _broken(url, "its discovery document names another issuer")
    address = document.get("jwks_uri")
    if not isinstance(address, str):
        raise _broken(url, "its discovery document names no keys")
    listed = (await _document(web, url, address, payer)).get("keys")
    if not isinstance(listed, list):
        raise _broken(url, "its set of keys has the wrong form")
    keys = {name: key for one in listed[:_MAX_KEYS] for name, key in _usable_for(one)}
    if not keys:
        raise _broken(url, "it has no key that could be used")
    return keys


async def _document(web: Web, issuer: str, address: str, payer: str) -> Mapping[str, Json]:
    try:
        body = await web.get(
            address, max_bytes=_MAX_DOCUMENT_BYTES, timeout_s=_TIMEOUT_S, payer=payer
        )
        document = orjson.loads(body)
    except Transient as error:
        raise unreachable(issuer) from error
    except MillpondError as error:
        why = "its address is refused" if error.code == "egress_refused" else error.message
        raise _broken(issuer, why) from error
    except orjson.JSONDecodeError as error:
        raise _broken(issuer, "it did not answer with JSON") from error
    if not isinstance(document, dict):
        raise _broken(issuer, "its document has the wrong form")
    return document


def _usable_for(jwk: Json) -> Iterator[tuple[tuple[str, str], Any]]:
    """Yield a published key under its id for each algorithm that it may be used with; none for what is no such key."""
    if not isinstance(jwk, dict) or jwk.get("use", "sig") != "sig":
        return
    kid, operations = jwk.get("kid"), jwk.get("key_ops", ["verify"])
    if not isinstance(kid, str) or not isinstance(operations, list) or "verify" not in operations:
        return
    if jwk.get("kty") not in ("RSA", "EC", "OKP"):
        return
    try:
        key = jwt.PyJWK({name: jwk[name] for name in _PUBLIC if name in jwk}).key
    except (jwt.PyJWTError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError):
        return
    said = jwk.get("alg")
    for one in _algorithms_of(key):
        if said is None or said == one:
            yield (kid, one), key


def _algorithms_of(key: Any) -> list[str]:
    match key:
        case rsa.RSAPublicKey() if key.key_size in _RSA_BITS:
            return [one for one in ALGORITHMS if one[:2] in ("RS", "PS")]
        case ec.EllipticCurvePublicKey() if key.curve.name in _CURVES:
            return [_CURVES[key.curve.name]]
        case ed25519.Ed25519PublicKey():
            return ["EdDSA"]
        case _:
            return []


def unreachable(issuer: str) -> Unavailable:
    """Say that an issuer does not answer."""
    return Unavailable(
        f"The issuer {issuer} cannot be asked for its keys now.",
        code="issuer_unavailable",
        retry_after_s=10.0,
    )


def _broken(issuer: str, why: str) -> Unavailable:
    return Unavailable(
        f"The keys of the issuer {issuer} cannot be known: {why}.",
        code="issuer_invalid",
        retry_after_s=60.0,
        advice="see docs/outside-issuers.md",
    )
