"""Keys: the public halves of the keys that sign tokens.

Called by whoever verifies Millpond's tokens elsewhere; public. Invariant: no private half passes.
"""

from __future__ import annotations

from fastapi import APIRouter, Response

from millpond.api.models import KeySet
from millpond.api.ports import Wired
from millpond.api.reply import reply

router = APIRouter(tags=["keys"])


@router.get("/.well-known/jwks.json", operation_id="get_jwks", responses={200: {"model": KeySet}})
async def get_jwks(ports: Wired) -> Response:
    """Show the public keys (RFC 7517)."""
    return reply(ports.gate.keyring.jwks(), headers={"Cache-Control": "public, max-age=300"})
