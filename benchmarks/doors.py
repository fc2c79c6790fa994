"""The doors that `accept` compares: the product's own API process, and bare endpoints, on one database.

Called by the suite `accept` and by `sealing`. Invariants: the API is `millpond api`, started as `millpond up` starts
it, on loopback; who calls has signed in over HTTP; the org has quotas of runs and rates, far above what is sent, so
that each request is counted as a paying customer's is.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import orjson

from benchmarks.ground import Ground
from millpond.identity.accounts import create_account
from millpond.identity.passwords import Passwords

_PASSWORD = "a-password-for-the-benchmark"
_READY_S = 60.0
_END_S = 20.0
_A_DAY_S = 86_400
# Every kind of limit that is looked at where a run is accepted; none is ever reached.
LIMITS = {
    "runs_per_day": 10**12,
    "runs_per_month": 10**12,
    "requests_per_s": 10**6,
    "key_requests_per_s": 10**6,
}


@dataclass(frozen=True, kw_only=True)
class Door:
    """A way in: its port, the path to post to, and the bearer's text that it takes."""

    port: int
    path: str
    token: str


@dataclass(frozen=True, kw_only=True)
class Doors:
    """The API by a signed-in person's token and by an API key; the bare endpoints."""

    api: Door
    api_by_key: Door
    bare: Door
    bare_remembering: Door


@asynccontextmanager
async def doors(at: Ground, org_id: int, folder: Path) -> AsyncIterator[Doors]:
    """Run both processes, with somebody of the org signed in."""
    email = f"bench-{org_id}@bench.example"
    await _seat(at, org_id, email)
    await limit(at, org_id)
    async with api(at, folder) as port:
        async with httpx2.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", trust_env=False
        ) as client:
            await _until_ready(client)
            token = await _sign_in(client, email)
            key = await _make_key(client, token)
            jwks = (await client.get("/.well-known/jwks.json")).raise_for_status().json()
        async with _bare(at, jwks) as bare_port:
            yield Doors(
                api=Door(port=port, path="/v1/runs", token=token),
                api_by_key=Door(port=port, path="/v1/runs", token=key),
                bare=Door(port=bare_port, path="/accept", token=token),
                bare_remembering=Door(port=bare_port, path="/accept-remembered", token=token),
            )


async def limit(at: Ground, org_id: int) -> None:
    """Give the org limits of its own; a process that starts later has heard of them."""
    async with at.db.globals() as con:
        await con.execute(
            "update org set overrides = $2, plan_changed_at = clock_timestamp() where org_id = $1",
            org_id,
            orjson.dumps(LIMITS).decode(),
        )


async def check_limited(at: Ground, org_id: int, door: Door, body: bytes) -> None:
    """Raise RuntimeError unless the door counts runs and requests: its answers tell rates, and runs were paid for."""
    async with httpx2.AsyncClient(trust_env=False) as client:
        answer = await client.post(
            f"http://127.0.0.1:{door.port}{door.path}",
            content=body,
            headers={"Authorization": f"Bearer {door.token}", "Content-Type": "application/json"},
        )
    policies = answer.raise_for_status().headers.get("RateLimit-Policy", "")
    wanted = ['"org";q=', *(['"key";q='] if door.token.startswith("mpk_") else [])]
    if missing := [one for one in wanted if one not in policies]:
        raise RuntimeError(f"{door.path}: no rate {missing} in {policies!r}")
    paid = await at.count("quota_spend", f"org_id = {org_id}")
    counted = await at.count(
        "quota_count", f"org_id = {org_id} and quota in ('runs_per_day', 'runs_per_month')"
    )
    if not paid or counted != 2:
        raise RuntimeError(f"{door.path}: runs were not paid for ({paid} spends, {counted} counts)")


async def _seat(at: Ground, org_id: int, email: str) -> None:
    """Make an account with a password and a place in the org."""
    passwords = Passwords()
    try:
        hashed = await passwords.hash(_PASSWORD)
    finally:
        passwords.close()
    async with at.db.globals() as con:
        user_id = await create_account(con, email, "Bench", hashed)
    async with at.db.org(org_id) as con:
        await con.execute(
            "insert into membership (org_id, user_id, role, added_by) values ($1, $2, 'owner', $3)",
            org_id,
            user_id,
            f"user:{user_id}",
        )


@asynccontextmanager
async def api(at: Ground, folder: Path) -> AsyncIterator[int]:
    """Run the API process; gives its port, which answers once it is ready."""
    environment = {
        **{name: value for name, value in os.environ.items() if "MILLPOND_" not in name},
        "MILLPOND_DATABASE_URL": at.urls.app,
        "MILLPOND_DATA_DIR": str(folder),
        "MILLPOND_ACCESS_TOKEN_S": str(_A_DAY_S),
        "MILLPOND_LOG_LEVEL": "warning",
    }
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        words = ["-m", "millpond.cli", "api", "--socket-fd", str(listener.fileno())]
        async with _process(words, [listener.fileno()], environment):
            yield listener.getsockname()[1]


@asynccontextmanager
async def _bare(at: Ground, jwks: Mapping[str, Any]) -> AsyncIterator[int]:
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        words = ["-m", "benchmarks.bare"]
        async with _process(words, [listener.fileno()], dict(os.environ)) as process:
            setup = {"url": at.urls.owner, "jwks": jwks, "fd": listener.fileno()}
            assert process.stdin is not None
            process.stdin.write(orjson.dumps(setup) + b"\n")
            await process.stdin.drain()
            port: int = listener.getsockname()[1]
            async with httpx2.AsyncClient(trust_env=False) as client:
                await client.get(f"http://127.0.0.1:{port}/", timeout=_READY_S)  # waits for it
            yield port


@asynccontextmanager
async def _process(
    words: Sequence[str], descriptors: Sequence[int], environment: Mapping[str, str]
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a Python process until the block ends."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *words, stdin=subprocess.PIPE, pass_fds=descriptors, env=environment
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(_END_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def _until_ready(client: httpx2.AsyncClient) -> None:
    async with asyncio.timeout(_READY_S):
        while (await client.get("/readyz", timeout=_READY_S)).status_code != 200:
            await asyncio.sleep(0.05)


async def _sign_in(client: httpx2.AsyncClient, email: str) -> str:
    answer = await client.post("/v1/auth/sign-in", json={"email": email, "password": _PASSWORD})
    token: str = answer.raise_for_status().json()["access_token"]
    return token


async def _make_key(client: httpx2.AsyncClient, token: str) -> str:
    answer = await client.post(
        "/v1/api-keys",
        json={"name": "bench", "scopes": ["runs:start"]},
        headers={"Authorization": f"Bearer {token}"},
    )
    key: str = answer.raise_for_status().json()["key"]
    return key
