"""An OpenID Connect issuer on a real socket: discovery, rotating keys, and a token endpoint.

Made for tests of whoever accepts its tokens; what it answers can be bent, and what it was asked is counted.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jwt
import orjson
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tests.api.conftest import bind

AUDIENCE = "https://millpond.example/api"


@cache
def rsa_key(nth: int = 0, bits: int = 2048) -> rsa.RSAPrivateKey:
    """Return the nth RSA key of this test process; making one takes a moment."""
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


def make_key(algorithm: str, nth: int = 0) -> Any:
    """Make a private key for an algorithm."""
    match algorithm[:2]:
        case "ES":
            curve = {"ES256": ec.SECP256R1, "ES384": ec.SECP384R1, "ES512": ec.SECP521R1}[algorithm]
            return ec.generate_private_key(curve())
        case "Ed":
            return Ed25519PrivateKey.generate()
        case _:
            return rsa_key(nth)


def public_jwk(key: Any, algorithm: str, kid: str, **more: Any) -> dict[str, Any]:
    """Return what is published of a private key."""
    of = jwt.get_algorithm_by_name(algorithm)
    found: dict[str, Any] = of.to_jwk(key.public_key(), as_dict=True)
    return {**found, "kid": kid, "alg": algorithm, "use": "sig", **more}


@dataclass
class SigningKey:
    """A key that the issuer signs with."""

    kid: str
    algorithm: str
    private: Any

    @classmethod
    def make(cls, algorithm: str = "RS256", nth: int = 0) -> SigningKey:
        return cls(uuid.uuid4().hex[:8], algorithm, make_key(algorithm, nth))


@dataclass
class Issuer:
    """The issuer as a test sees it: it signs with the last key, and publishes all."""

    url: str
    keys: list[SigningKey] = field(default_factory=lambda: [SigningKey.make()])
    named: str | None = None
    asked: Counter[str] = field(default_factory=Counter)
    more_jwks: list[Any] = field(default_factory=list)
    is_down: bool = False
    bent: dict[str, Response] = field(default_factory=dict)
    held: asyncio.Event | None = None
    clients: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def rotate(self, algorithm: str = "RS256", *, keep: bool = True) -> SigningKey:
        """Sign with another key from now on; without `keep` the former ones are published no more."""
        made = SigningKey.make(algorithm, nth=len(self.keys))
        self.keys = [*self.keys, made] if keep else [made]
        return made

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Return claims of a good access token; None leaves one out."""
        now = int(time.time())
        claims = {
            "iss": self.url,
            "aud": AUDIENCE,
            "sub": "ann",
            "iat": now,
            "exp": now + 600,
            "jti": uuid.uuid4().hex,
            "roles": ["pond-users"],
        }
        return {k: v for k, v in {**claims, **changes}.items() if v is not None}

    def token(self, header: Mapping[str, Any] | None = None, /, **changes: Any) -> str:
        """Sign claims with the newest key."""
        key = self.keys[-1]
        headers = {"kid": key.kid, "typ": "at+jwt", **(header or {})}
        headers = {k: v for k, v in headers.items() if v is not None}
        return jwt.encode(
            self.claims(**changes), key.private, algorithm=key.algorithm, headers=headers
        )

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/.well-known/openid-configuration", self._discovery),
                Route("/keys", self._keys),
                Route("/token", self._token, methods=["POST"]),
                Route("/{rest:path}", self._anything),
            ]
        )

    async def _answer(self, request: Request, document: Any) -> Response:
        path = request.url.path
        self.asked[path] += 1
        if self.held is not None:
            await self.held.wait()
        if self.is_down:
            return Response(status_code=503)
        return self.bent.get(path) or JSONResponse(document)

    async def _discovery(self, request: Request) -> Response:
        document = {
            "issuer": self.named or self.url,
            "jwks_uri": f"{self.url}/keys",
            "token_endpoint": f"{self.url}/token",
        }
        return await self._answer(request, document)

    async def _keys(self, request: Request) -> Response:
        published = [public_jwk(one.private, one.algorithm, one.kid) for one in self.keys]
        return await self._answer(request, {"keys": [*self.more_jwks, *published]})

    async def _token(self, request: Request) -> Response:
        """Give a client its token (RFC 6749, section 4.4)."""
        form = dict(pair.split("=", 1) for pair in (await request.body()).decode().split("&"))
        client = self.clients.get(form.get("client_id", ""))
        if client is None or form.get("client_secret") != client["secret"]:
            return JSONResponse({"error": "invalid_client"}, status_code=401)
        token = self.token(**client["claims"])
        return await self._answer(request, {"access_token": token, "token_type": "Bearer"})

    async def _anything(self, request: Request) -> Response:
        return await self._answer(request, orjson.loads(b"{}"))


class _Server(uvicorn.Server):
    """Uvicorn that leaves the process's signals alone."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def an_issuer() -> AsyncIterator[Issuer]:
    """Serve an issuer on a free port of this machine until the block ends."""
    listener = bind()
    issuer = Issuer(f"http://127.0.0.1:{listener.getsockname()[1]}")
    config = uvicorn.Config(
        issuer.app(), lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield issuer
    finally:
        if issuer.held is not None:
            issuer.held.set()
        server.should_exit = True
        await serving
