"""Health: whether this process lives, and whether it can do its work.

Called by supervisors and load balancers; public. Invariant: neither tells anything about tenants.
"""

from __future__ import annotations

from fastapi import APIRouter, Response

from millpond.api.documented import failures
from millpond.api.models import Status
from millpond.api.ports import Wired
from millpond.api.reply import reply
from millpond.errors import Unavailable

router = APIRouter(tags=["health"])


@router.get("/healthz", operation_id="get_health", responses={200: {"model": Status}})
async def get_health() -> Response:
    """Tell that this process lives; it does not look at the database."""
    return reply({"status": "ok"})


@router.get(
    "/readyz",
    operation_id="get_readiness",
    responses={200: {"model": Status}, **failures(503)},
)
async def get_readiness(ports: Wired) -> Response:
    """Tell whether requests can be served: the database answers and its schema fits this code."""
    if ports.stopping.is_set():
        raise Unavailable("This process is stopping.", code="stopping")
    await ports.readiness.check()
    return reply({"status": "ok"})
