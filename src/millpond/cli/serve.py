"""`millpond api`: one API process.

Called by `main`, and started by `millpond up`. Invariants: it starts only on a schema that is this
code's; it ends by itself when the process that started it is gone.
"""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Annotated

import typer

from millpond.cli.options import DataDir

if TYPE_CHECKING:
    from fastapi import FastAPI

    from millpond.cli.config import Databases
    from millpond.settings import Settings

# Streams that are still open get so long to close; their clients come back with Last-Event-ID.
_CLOSE_S = 3
_POOL = 16

ParentFd = Annotated[int | None, typer.Option("--parent-fd", hidden=True)]


def api(
    host: Annotated[
        str | None, typer.Option(help="Address to listen on (MILLPOND_HOST).", show_default=False)
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port (MILLPOND_PORT).", show_default=False, max=65535)
    ] = None,
    data_dir: DataDir = None,
    socket_fd: Annotated[int | None, typer.Option("--socket-fd", hidden=True)] = None,
    parent_fd: ParentFd = None,
    show_links: Annotated[bool, typer.Option("--show-links", hidden=True)] = False,
) -> None:
    """Run the HTTP API alone, on MILLPOND_DATABASE_URL."""
    from millpond.cli.config import read_settings
    from millpond.cli.logs import configure_logging
    from millpond.cli.loop import run_loop
    from millpond.cli.signals import end_with_parent

    settings = read_settings(host=host, port=port, data_dir=data_dir)
    configure_logging(settings.log_level, process="api")
    end_with_parent(parent_fd, grace_s=_CLOSE_S + 2)
    run_loop(_serve(settings, socket_fd, show_links=show_links))


async def _serve(settings: Settings, socket_fd: int | None, *, show_links: bool) -> None:
    """Open what the API works with, serve until told to stop, close everything."""
    from millpond.api.server import ApiServer
    from millpond.cli.running import find_databases
    from millpond.cli.signals import stop_event
    from millpond.db.migrate import check_schema

    databases = find_databases(settings)
    async with contextlib.AsyncExitStack() as stack:
        stop = stack.enter_context(stop_event())
        await check_schema(databases.app)
        app = await _compose(settings, databases, stack, show_links=show_links)
        listener = stack.enter_context(await _listen(settings, socket_fd))
        proxies = [one.strip() for one in settings.trusted_proxies.split(",") if one.strip()]
        server = ApiServer(app, grace_s=_CLOSE_S, trusted_proxies=proxies)
        await server.run_until(stop, [listener])


async def _compose(
    settings: Settings,
    databases: Databases,
    stack: contextlib.AsyncExitStack,
    *,
    show_links: bool,
) -> FastAPI:
    """Connect and return the app; `stack` closes the connections again."""
    from millpond.api.app import create_app
    from millpond.cli.config import audit_heads_dir
    from millpond.cli.key_ring import open_ring
    from millpond.cli.limit_settings import declare_settings, read_limits
    from millpond.cli.people import open_invitations, open_mailer, open_people
    from millpond.cli.resources import open_egress, open_knowledge
    from millpond.db.migrate import check_schema
    from millpond.db.pool import Database
    from millpond.engine.events import Feed
    from millpond.engine.hints import Hints
    from millpond.engine.quota_plans import Plans
    from millpond.engine.reserving import Reserver, keeping
    from millpond.identity.audit_check import Auditor
    from millpond.identity.audit_heads import Heads
    from millpond.identity.audit_sealer import Sealer, sealing
    from millpond.identity.gate import Gate
    from millpond.identity.issuer_keys import IssuerKeys
    from millpond.identity.key_reader import KeyReader
    from millpond.identity.lending import Lending
    from millpond.identity.mailing import Postman, delivering
    from millpond.identity.outside_reader import OutsideReader
    from millpond.identity.seating import Seating
    from millpond.identity.tokens import Keyring

    limits = read_limits(settings)
    db = await Database.connect(databases.app, name="millpond-api", max_size=_POOL)
    stack.push_async_callback(db.close)
    hints = await Hints.connect(databases.app_listen, near=True)
    stack.push_async_callback(hints.close)
    await declare_settings(db, hints, limits)
    feed = await Feed.connect(databases.app_listen)
    stack.push_async_callback(feed.close)
    ring = await open_ring(settings, db)
    keyring = await Keyring.open(
        db, ring, issuer=settings.token_issuer, audience=settings.token_audience
    )
    people = open_people(settings, db, keyring, ring)
    stack.callback(people.passwords.close)
    postman = Postman(db, ring, open_mailer(settings, show_links=show_links))
    await stack.enter_async_context(delivering(postman))
    heads = Heads(audit_heads_dir(settings))
    await stack.enter_async_context(sealing(Sealer(db, ring, heads)))
    reserver = Reserver(db, Plans())
    stack.push_async_callback(reserver.close)
    await stack.enter_async_context(keeping(reserver))
    reader = KeyReader(db)
    stack.push_async_callback(reader.close)
    outside = OutsideReader(db, IssuerKeys(open_egress(settings, stack)), keyring.issuer)
    stack.push_async_callback(outside.close)
    return create_app(
        db=db,
        gate=Gate(keyring, readers=[reader, outside], lending=Lending(db), seating=Seating(db)),
        hints=hints,
        feed=feed,
        people=people,
        auditor=Auditor(ring, heads),
        outside=outside,
        reserver=reserver,
        mail=open_invitations(settings, ring),
        check_schema=lambda: check_schema(databases.app),
        knowledge=open_knowledge(settings, db, stack),
    )


async def _listen(settings: Settings, socket_fd: int | None) -> socket.socket:
    """Return the socket handed over by `millpond up`, or a new one on the settings' host and port."""
    from millpond.cli.listening import listen

    if socket_fd is not None:
        return socket.socket(fileno=socket_fd)
    return await listen(settings.host, settings.port)
