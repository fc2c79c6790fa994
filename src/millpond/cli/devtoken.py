"""The development token: full rights in the org `dev`, for 8 hours, on this machine only.

Called by `up`, `token` and `demo`. Invariant: it exists only for embedded Postgres behind a loopback
address, and is written to a 0600 file or a terminal, nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from millpond.cli.config import Databases
from millpond.cli.key_ring import open_ring
from millpond.cli.remote import DEV_FILE
from millpond.cli.running import write_private
from millpond.db.pool import Database
from millpond.identity import permissions
from millpond.identity.orgs import ensure_org
from millpond.identity.tokens import Keyring
from millpond.settings import Settings
from millpond.types import Principal

LIFETIME_S = 8 * 3600
ORG_SLUG = "dev"
SUBJECT = "user:developer"
# An owner of the org `dev` who is an operator besides.
ROLES = frozenset(permissions.ROLES) | {"operator"}


@dataclass(frozen=True, kw_only=True, slots=True)
class DevToken:
    """A minted token, the org it is for, and the file that holds it."""

    text: str
    org_id: int
    path: Path


async def mint_dev_token(settings: Settings, databases: Databases) -> DevToken:
    """Make the development org and the keys if they are missing; mint a token and write its file."""
    db = await Database.connect(databases.app, name="millpond-token", max_size=2)
    try:
        org_id = await ensure_org(db, ORG_SLUG, "Development")
        keyring = await Keyring.open(
            db,
            await open_ring(settings, db),
            issuer=settings.token_issuer,
            audience=settings.token_audience,
        )
    finally:
        await db.close()
    principal = Principal(
        org_id=org_id, subject=SUBJECT, permissions=frozenset(permissions.PERMISSIONS), roles=ROLES
    )
    text = keyring.mint(principal, ORG_SLUG, LIFETIME_S)
    path = settings.data_dir / DEV_FILE
    write_private(path, text + "\n")
    return DevToken(text=text, org_id=org_id, path=path)
