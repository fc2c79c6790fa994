"""The API served on a real socket in this process, clients of several callers, and a worker.

Every response that a client gets is held against the published OpenAPI document.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import orjson
import pytest
from fastapi import FastAPI
from tests.pooler import direct

from millpond.api.app import create_app
from millpond.api.server import ApiServer
from millpond.db.embedded import Urls
from millpond.db.migrate import check_schema
from millpond.db.pool import Database, EngineDatabase
from millpond.db.queries import queries
from millpond.engine.events import Feed
from millpond.engine.hints import Hints
from millpond.engine.registry import Flow, Registry
from millpond.engine.worker import Worker
from millpond.identity.audit_check import Auditor
from millpond.identity.audit_heads import Heads
from millpond.identity.current_rights import CurrentRights
from millpond.identity.gate import Gate
from millpond.identity.invitations import Mail
from millpond.identity.issuer_keys import IssuerKeys
from millpond.identity.key_reader import KeyReader
from millpond.identity.lending import Lending
from millpond.identity.mailing import Outbox
from millpond.identity.outside_reader import OutsideReader
from millpond.identity.passwords import Passwords
from millpond.identity.people import People
from millpond.identity.permissions import PERMISSIONS
from millpond.identity.ring import KeyRing
from millpond.identity.seal import KEY_BYTES, Seal
from millpond.identity.seating import Seating
from millpond.identity.tokens import Keyring
from millpond.integrations.egress import Egress
from millpond.integrations.egress_rules import Rules
from millpond.knowledge.store import KnowledgeStore
from millpond.models import Embedder, open_embedder
from millpond.types import FINAL_STATES, Principal

from .conformity import Conformity

DEADLINE_S = 20.0
ALL = frozenset(PERMISSIONS)
Client = httpx2.AsyncClient


# The document of an app takes a second to make, and apps with as many routes have the same.
_CONFORMITIES: dict[int, Conformity] = {}


def conformity_of(app: FastAPI) -> Conformity:
    """Return what holds responses of an app against its document."""
    routes = len(app.routes)
    if routes not in _CONFORMITIES:
        _CONFORMITIES[routes] = Conformity(app.openapi())
    return _CONFORMITIES[routes]


@dataclass
class Front:
    """One API process, as its callers and a test see it."""

    url: str
    urls: Urls
    db: Database
    engine_db: EngineDatabase
    org_id: int
    keyring: Keyring
    app: FastAPI
    closing: AsyncExitStack
    registry: Registry = field(default_factory=Registry)

    def token(
        self,
        *,
        org_id: int | None = None,
        subject: str = "user:ann",
        permissions: frozenset[str] = ALL,
        roles: Sequence[str] = ("support",),
        ttl_s: float = 600,
    ) -> str:
        """Mint a token of this installation."""
        principal = Principal(
            org_id=org_id or self.org_id,
            subject=subject,
            permissions=permissions,
            roles=frozenset(roles),
        )
        return self.keyring.mint(principal, "pond", ttl_s)

    async def client(self, token: str | None = None, **who: Any) -> Client:
        """Open a client of a caller; without a token and a description, ann with all permissions."""
        held = self.token(**who) if token is None else token
        conformity = conformity_of(self.app)
        client = httpx2.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {held}"} if held else {},
            timeout=DEADLINE_S,
            trust_env=False,
            event_hooks={"response": [conformity.check]},
        )
        return await self.closing.enter_async_context(client)

    async def publish(
        self,
        name: str = "echo",
        *,
        version: int = 1,
        queue: str = "default",
        permission: str | None = "runs:start",
        schema: Any = None,
        timeout_s: float | None = None,
        deadline_s: float | None = None,
        urgency: str = "standard",
    ) -> None:
        """Publish a flow as a worker would, without anybody to run it."""
        async with self.engine_db.duty("publish") as con:
            await con.execute(
                queries("maintenance")["publish_flow"],
                name,
                version,
                queue,
                permission,
                "Says it again.",
                orjson.dumps({} if schema is None else schema).decode(),
                None,
                timeout_s,
                deadline_s,
                "{}",
                [],
                urgency,
            )

    def flow(self, function: Callable[..., Any], **options: Any) -> Flow:
        """Register a flow under its function's name, startable by `runs:start`."""
        from millpond.engine.registry import flow

        options.setdefault("permission", "runs:start")
        name = options.pop("name", function.__name__)
        return flow(name, registry=self.registry, **options)(function)

    @asynccontextmanager
    async def worker(
        self, resources: Mapping[type, object] | None = None, **slots: int
    ) -> AsyncIterator[Worker]:
        """Run a worker with all registered flows until the block ends; begins once it is known."""
        worker = Worker(
            database=self.engine_db,
            engine_url=self.urls.engine,
            listen_url=direct(self.urls).engine,
            flows=list(self.registry.flows.values()),
            steps=list(self.registry.steps.values()),
            slots=slots or {"default": 10},
            resources=resources,
            lease_s=6.0,  # a shorter one is lost where a heartbeat's process is slow to start
            drain_s=5.0,
            rights=CurrentRights(self.engine_db),
        )
        stop = asyncio.Event()
        running = asyncio.create_task(worker.run(stop))
        try:
            await self._until_known(worker, running)
            yield worker
        finally:
            stop.set()
            await running

    async def _until_known(self, worker: Worker, running: asyncio.Task[None]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not running.done():
                async with self.engine_db.duty("test") as con:
                    known = "select exists (select from worker where worker_id = $1)"
                    if await con.fetchval(known, worker.worker_id):
                        return
                await asyncio.sleep(0.01)

    async def ended(self, client: Client, run_id: str) -> dict[str, Any]:
        """Follow a run to its end and return it."""
        async with asyncio.timeout(DEADLINE_S):
            async for _ in stream(client, run_id):
                pass
        run: dict[str, Any] = (await client.get(f"/v1/runs/{run_id}")).json()
        assert run["state"] in FINAL_STATES
        return run


async def stream(
    client: Client, run_id: str, *, after: int | None = None, resume: str | None = None
) -> AsyncIterator[httpx2.ServerSentEvent]:
    """Follow a run's events."""
    params = {} if after is None else {"after": after}
    headers = {} if resume is None else {"Last-Event-ID": resume}
    async with client.sse(f"/v1/runs/{run_id}/events", params=params, headers=headers) as source:
        async for message in source:
            yield message


async def until(client: Client, run_id: str, kind: str) -> dict[str, Any]:
    """Wait for an event of a kind and return it."""
    async with asyncio.timeout(DEADLINE_S):
        async for message in stream(client, run_id):
            if message.event == kind:
                event: dict[str, Any] = orjson.loads(message.data)
                return event
    raise AssertionError(f"the run ended without {kind}")


def bind() -> socket.socket:
    """Bind a free port of this machine."""
    return socket.create_server(("127.0.0.1", 0), backlog=256)


@asynccontextmanager
async def served(app: FastAPI, *, grace_s: float = 5.0) -> AsyncIterator[str]:
    """Serve an app on a free port until the block ends; yields its address."""
    listener = bind()
    server = ApiServer(app, grace_s=grace_s)
    stop = asyncio.Event()
    serving = asyncio.create_task(server.run_until(stop, [listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop.set()
        await serving


# Apps that no test uses at the moment, with and without knowledge: a route takes 20 ms when it is first asked.
_IDLE: dict[bool, list[FastAPI]] = {True: [], False: []}


@contextmanager
def warmed(fresh: FastAPI) -> Iterator[FastAPI]:
    """Lend an app whose routes were asked before, if there is one, with the ports of a fresh one.

    What a test added routes to is not lent again. All that an app knows of its connections is its ports.
    """
    idle, routes = _IDLE[fresh.state.ports.knowledge is not None], len(fresh.routes)
    app = idle.pop() if idle else fresh
    app.state.ports = fresh.state.ports
    yield app
    if len(app.routes) == routes:
        idle.append(app)


@cache
def quick_passwords() -> Passwords:
    """Passwords whose hashes take a millisecond, for tests that do not ask how strong they are."""
    return Passwords(memory_kib=64, rounds=1)


@asynccontextmanager
async def opened(
    urls: Urls,
    db: Database,
    knowledge: KnowledgeStore | None = None,
    heads_dir: Path | None = None,
) -> AsyncIterator[FastAPI]:
    """Make an app with everything it needs."""
    hints = await Hints.connect(urls.app)
    feed = await Feed.connect(direct(urls).app)
    ring = KeyRing(Seal(bytes(KEY_BYTES)))
    keyring = await Keyring.open(db, ring)
    reader = KeyReader(db)
    egress = Egress(Rules.of_text("http://127.0.0.1:*"))
    outside = OutsideReader(db, IssuerKeys(egress), keyring.issuer)
    people = People(db=db, keyring=keyring, ring=ring, passwords=quick_passwords())
    try:
        fresh = create_app(
            db=db,
            gate=Gate(keyring, readers=[reader, outside], lending=Lending(db), seating=Seating(db)),
            hints=hints,
            feed=feed,
            people=people,
            auditor=Auditor(ring, Heads(heads_dir or Path("/nonexistent"))),
            outside=outside,
            mail=Mail(outbox=Outbox(ring, ttl_s=3600)),
            check_schema=lambda: check_schema(urls.app),
            knowledge=knowledge,
        )
        with warmed(fresh) as app:
            yield app
    finally:
        await outside.close()
        await egress.close()
        await reader.close()
        await feed.close()
        await hints.close()


@pytest.fixture(scope="session")
def embedder() -> Embedder:
    """The bundled embedder, loaded once."""
    return open_embedder("local")


@pytest.fixture
async def front(
    urls: Urls,
    db: Database,
    engine_db: EngineDatabase,
    org: int,
    embedder: Embedder,
    tmp_path: Path,
) -> AsyncIterator[Front]:
    """An API on a fresh database, with no flow published and no worker."""
    store = KnowledgeStore(db, embedder)
    async with (
        opened(urls, db, store, tmp_path / "heads") as app,
        served(app) as url,
        AsyncExitStack() as closing,
    ):
        yield Front(url, urls, db, engine_db, org, app.state.ports.gate.keyring, app, closing)


@pytest.fixture
async def ann(front: Front) -> Client:
    """A caller with all permissions and the role `support`."""
    return await front.client()
