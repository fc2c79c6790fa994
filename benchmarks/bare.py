"""The yardstick of `accept`: bare FastAPI endpoints that check a token and commit one row, and no more.

Run by the suite `accept` as `python -m benchmarks.bare`. Standard input: one JSON line with the database's address,
the key set and the descriptor of a bound socket. Invariant: everything around the endpoints is what the product has:
uvicorn's settings, the loop, the driver, the library that checks tokens. One of them checks every token's signature,
as such endpoints are usually written, the other remembers the tokens that were good, as the product does.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from typing import Annotated, Any

import asyncpg
import jwt
import orjson
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response

from benchmarks.ground import quiet
from millpond.cli.loop import run_loop

_POOL = 16


async def _leave_as_it_is(_: object) -> None:
    """Spare the driver's clean-up after each use, as the product does."""


async def connect(url: str) -> asyncpg.Pool[asyncpg.Record]:
    """Open the pool and make the table."""
    pool = await asyncpg.create_pool(url, max_size=_POOL, reset=_leave_as_it_is)
    await pool.execute(
        "create table if not exists public.bare "
        "(id bigint generated always as identity primary key, data text)"
    )
    return pool


async def check(request: Request) -> dict[str, Any]:
    """Return the claims of the bearer's token; raises HTTPException (401)."""
    return _claims(request, _token(request))


async def remember(request: Request) -> dict[str, Any]:
    """Return the claims as `check` does, of a token that was good before without its signature."""
    token = _token(request)
    known: dict[str, dict[str, Any]] = request.app.state.known
    if token not in known:
        known[token] = _claims(request, token)
    if known[token]["exp"] < time.time():
        raise HTTPException(401)
    return known[token]


def _token(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        raise HTTPException(401)
    return token


def _claims(request: Request, token: str) -> dict[str, Any]:
    try:
        key = request.app.state.keys[jwt.get_unverified_header(token)["kid"]].key
        claims: dict[str, Any] = jwt.decode(
            token, key, algorithms=["EdDSA"], issuer="millpond", audience="millpond"
        )
    except (jwt.PyJWTError, KeyError) as error:
        raise HTTPException(401) from error
    return claims


async def accept(request: Request, claims: Annotated[dict[str, Any], Depends(check)]) -> Response:
    """Commit the body as one row."""
    return await _commit(request)


async def accept_remembered(
    request: Request, claims: Annotated[dict[str, Any], Depends(remember)]
) -> Response:
    """Commit the body as one row."""
    return await _commit(request)


async def _commit(request: Request) -> Response:
    data = (await request.body()).decode()
    number = await request.app.state.pool.fetchval(
        "insert into public.bare (data) values ($1) returning id", data
    )
    return Response(orjson.dumps({"id": number}), 202, media_type="application/json")


def app_of(pool: asyncpg.Pool[asyncpg.Record], keys: jwt.PyJWKSet) -> FastAPI:
    """Return the app with its two endpoints."""
    app = FastAPI(
        telemetry={"auto_configure": False, "tracing": False, "metrics": False, "logs": False}
    )
    app.state.pool, app.state.keys, app.state.known = pool, keys, {}
    app.post("/accept", status_code=202)(accept)
    app.post("/accept-remembered", status_code=202)(accept_remembered)
    return app


async def serve() -> None:
    """Serve until SIGTERM."""
    setup = orjson.loads(sys.stdin.readline())
    pool = await connect(setup["url"])
    config = uvicorn.Config(
        app_of(pool, jwt.PyJWKSet.from_dict(setup["jwks"])),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_keep_alive=15,
    )
    server = uvicorn.Server(config)

    def stop() -> None:
        server.should_exit = True

    serving = asyncio.create_task(server.serve(sockets=[socket.socket(fileno=setup["fd"])]))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    await serving
    await pool.close()


if __name__ == "__main__":
    quiet()
    run_loop(serve())
