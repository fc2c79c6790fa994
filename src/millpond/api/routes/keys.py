"""Keys: the public halves of the keys that sign tokens.

Called by whoever verifies Millpond's tokens elsewhere; public. Invariant: no private half passes.
"""

from __future__ import annotations

from fastapi import APIRouter, Response

from millpond.api.documented import failures
from millpond.api.models import KeySet
from millpond.api.ports import Wired
from millpond.api.reply import reply

router = APIRouter(tags=["keys"])
# Another process may sign with a new key already; whoever checks its tokens asks here for it.
_FOR_S = 5.0


@router.get(
    "/.well-known/jwks.json",
    operation_id="get_jwks",
    responses={200: {"model": KeySet}, **failures(503)},
)
async def get_jwks(ports: Wired) -> Response:
    """Show the public keys (RFC 7517); right to some seconds, and to be kept for a minute."""
    keyring = ports.gate.keyring
    await keyring.freshen(within_s=_FOR_S)
    return reply(keyring.jwks(), headers={"Cache-Control": "public, max-age=60"})
