"""What routes work with: the pool, the keys, the hints, the feed, handed in by `cli`.

Reached by routes through their `Caller`, by public ones through `Wired`. Invariant: routes hold no
state of their own.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from millpond.api.batches import Batches
from millpond.api.catalog import Catalog
from millpond.api.rates import Rates
from millpond.api.readiness import Readiness
from millpond.db.pool import Database
from millpond.engine.events import Feed
from millpond.engine.hints import Hints
from millpond.engine.reserving import Reserver
from millpond.identity.audit_check import Auditor
from millpond.identity.gate import Gate
from millpond.identity.invitations import Mail
from millpond.identity.outside_reader import OutsideReader
from millpond.identity.people import People
from millpond.knowledge.store import KnowledgeStore


@dataclass(frozen=True, kw_only=True)
class Ports:
    """The app's connections to the rest; `stopping` is set when open streams shall end."""

    db: Database
    gate: Gate
    hints: Hints
    feed: Feed
    catalog: Catalog
    batches: Batches
    readiness: Readiness
    people: People
    auditor: Auditor
    outside: OutsideReader
    reserver: Reserver
    rates: Rates
    knowledge: KnowledgeStore | None = None
    mail: Mail | None = None
    stopping: asyncio.Event = field(default_factory=asyncio.Event)


async def _wired(request: Request) -> Ports:
    ports: Ports = request.app.state.ports
    return ports


Wired = Annotated[Ports, Depends(_wired)]
