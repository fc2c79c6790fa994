"""The public keys of outside issuers: read by OpenID Connect Discovery, kept for a while, shared by all orgs.

Called by `outside_reader`. Invariants: an issuer is asked at its own registered address alone, and its document has to
name that address; at most one question to an issuer is under way in a process, and none is asked for a token with an
unknown key within `pause_s` of the last.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jwt
import orjson
import structlog
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from millpond.errors import MillpondError, Transient, Unauthenticated, Unavailable
from millpond.identity.outside_tokens import ALGORITHMS
from millpond.types import Json

_log = structlog.get_logger("millpond.issuers")
WELL_KNOWN = "/.well-known/openid-configuration"
_MAX_DOCUMENT_BYTES = 256 * 1024
_MAX_KEYS = 100
_TIMEOUT_S = 5.0
_MAX_ISSUERS = 1000
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

    async def get(self, url: str, *, max_bytes: int, timeout_s: float) -> bytes:
        """Return the body of a good answer; raises Permanent or Transient."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long keys are good without being read again, and how often an issuer may be asked, in seconds."""

    fresh_s: float = 300.0  # then they are read again beside requests
    good_s: float = 3600.0  # then, through an outage, they are good no more
    pause_s: float = 10.0  # between two questions, whatever tokens come


@dataclass(slots=True)
class _Entry:
    """What is known of one issuer; `read_at` is of the keys, `tried_at` of the last question."""

    url: str
    keys: Keys | None = None
    read_at: float = float("-inf")
    tried_at: float = float("-inf")
    failure: Unavailable | None = None
    reading: asyncio.Task[None] | None = field(default=None, repr=False)


class IssuerKeys:
    """Knows the keys of the issuers that it was asked about."""

    def __init__(
        self,
        web: Web,
        patience: Patience | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.web = web
        self._patience = patience or Patience()
        self._clock = clock
        self._entries: dict[str, _Entry] = {}

    async def close(self) -> None:
        """End questions that are under way."""
        tasks = [one.reading for one in self._entries.values() if one.reading is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def key(self, url: str, kid: str, algorithm: str) -> Any:
        """Return a key of an issuer; raises Unauthenticated for one that it does not have.

        Raises Unavailable while the issuer cannot be asked and what is known of it is too old, or too little.
        """
        entry = self._entry(url)
        found = (await self._usable(entry)).get((kid, algorithm))
        if found is None and self._may_ask(entry):
            await self._read(entry)
            found = (entry.keys or {}).get((kid, algorithm))
        if found is not None:
            return found
        if entry.failure is not None:
            raise entry.failure
        raise Unauthenticated(
            "The token is signed with a key that its issuer does not publish for this algorithm.",
            code="token_unknown_key",
            advice="get a new token; a key that was published just now is known within seconds",
        )

    async def test(self, url: str) -> Keys:
        """Ask an issuer now, unless it was asked just now; raises Unavailable saying what is wrong."""
        entry = self._entry(url)
        if self._may_ask(entry) or entry.reading is not None:
            await self._read(entry)
        if entry.failure is not None:
            raise entry.failure
        return entry.keys or {}

    def _entry(self, url: str) -> _Entry:
        entry = self._entries.get(url)
        if entry is None:
            if len(self._entries) >= _MAX_ISSUERS:
                idle = next((one for one in self._entries.values() if one.reading is None), None)
                if idle is not None:
                    del self._entries[idle.url]
            entry = self._entries[url] = _Entry(url=url)
        return entry

    async def _usable(self, entry: _Entry) -> Keys:
        age_s = self._clock() - entry.read_at
        if entry.keys is None or age_s > self._patience.good_s:
            if self._may_ask(entry) or entry.reading is not None:
                await self._read(entry)
            if entry.failure is not None:
                raise entry.failure
        elif age_s > self._patience.fresh_s and self._may_ask(entry):
            self._start(entry)
        return entry.keys or {}

    def _may_ask(self, entry: _Entry) -> bool:
        return self._clock() - entry.tried_at >= self._patience.pause_s

    async def _read(self, entry: _Entry) -> None:
        """Ask, or wait for the answer that somebody else waits for."""
        await asyncio.shield(self._start(entry))

    def _start(self, entry: _Entry) -> asyncio.Task[None]:
        if entry.reading is None:
            entry.tried_at = self._clock()
            entry.reading = asyncio.create_task(self._ask(entry), name="issuer keys")
        return entry.reading

    async def _ask(self, entry: _Entry) -> None:
        try:
            entry.keys = await _keys_of(self.web, entry.url)
            entry.read_at = self._clock()
            entry.failure = None
        except Unavailable as error:
            entry.failure = error
            _log.warning("issuer.unavailable", issuer=entry.url, code=error.code)
        finally:
            entry.reading = None


async def _keys_of(web: Web, url: str) -> Keys:
    """Follow discovery from an issuer's address to its keys; raises Unavailable saying what is wrong."""
    document = await _document(web, url, url.removesuffix("/") + WELL_KNOWN)
    if document.get("issuer") != url:
        raise _broken(url, "its discovery document names another issuer")
    address = document.get("jwks_uri")
    if not isinstance(address, str):
        raise _broken(url, "its discovery document names no keys")
    listed = (await _document(web, url, address)).get("keys")
    if not isinstance(listed, list):
        raise _broken(url, "its set of keys has the wrong form")
    keys = {name: key for one in listed[:_MAX_KEYS] for name, key in _usable_for(one)}
    if not keys:
        raise _broken(url, "it has no key that could be used")
    return keys


async def _document(web: Web, issuer: str, address: str) -> Mapping[str, Json]:
    try:
        body = await web.get(address, max_bytes=_MAX_DOCUMENT_BYTES, timeout_s=_TIMEOUT_S)
        document = orjson.loads(body)
    except Transient as error:
        raise Unavailable(
            f"The issuer {issuer} cannot be asked for its keys now.",
            code="issuer_unavailable",
            retry_after_s=10.0,
        ) from error
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


def _broken(issuer: str, why: str) -> Unavailable:
    return Unavailable(
        f"The keys of the issuer {issuer} cannot be known: {why}.",
        code="issuer_invalid",
        retry_after_s=60.0,
        advice="see docs/outside-issuers.md",
    )
