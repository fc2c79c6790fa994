"""The installation's keys, as the settings name them: in variables, or in a 0600 file of the data folder.

Called by whatever seals or opens. Invariants: a file is made only for a database that has sealed nothing yet, so that a
host without its database's key is refused and left as it was; no key is part of a message.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from millpond.cli.config import plain_text
from millpond.db.pool import Database
from millpond.db.queries import queries
from millpond.errors import Conflict, InvalidInput, Permanent
from millpond.identity import key_file
from millpond.identity.ring import KeyRing
from millpond.identity.seal import Seal
from millpond.settings import Settings

_SQL = queries("seal_keys")
KEY_FILE = "secret.key"


def key_path(settings: Settings) -> Path | None:
    """Return the file of the keys; None where variables hold them."""
    return None if plain_text(settings.secret_key) else settings.data_dir / KEY_FILE


def read_ring(settings: Settings) -> KeyRing:
    """Return the keys that this host has; raises InvalidInput or Permanent where it has none."""
    path = key_path(settings)
    if path is None:
        return KeyRing(*_of_variables(settings))
    return KeyRing(*_of_file(settings, path), read=lambda: _of_file(settings, path))


async def open_ring(settings: Settings, db: Database) -> KeyRing:
    """Return the keys of this host, once it is known that they open what the database holds.

    Raises Permanent where they do not. A file is made where the database has sealed nothing yet.
    """
    path = key_path(settings)
    if path is not None and not path.exists():
        async with db.globals() as con:
            known = await con.fetchval(_SQL["current"])
        if known is None:
            await asyncio.to_thread(key_file.make, path)
        elif not path.exists():  # else a neighbour that started with us made both, the file first
            raise _missing(path, known)
    ring = read_ring(settings)
    await ring.check(db)
    return ring


async def new_key(
    ring: KeyRing, db: Database, path: Path | None, *, others_have_it: bool = False
) -> bool:
    """Make a key to rotate to, unless one is there or an older rotation is to be ended first; tells whether it did.

    Raises InvalidInput where variables hold the keys: whoever sets them makes the key; and Conflict where other hosts
    are at work that nobody gave it to.
    """
    async with db.globals() as con:
        rows = await con.fetch(_SQL["keys"])
    others = [row["key_id"] for row in rows if not row["is_current"] and row["emptied_at"] is None]
    is_behind = not any(row["is_current"] and row["key_id"] == ring.newest.key_id for row in rows)
    if others:
        return False
    if is_behind and path is not None:  # made by `--prepare`
        return False
    if is_behind or path is not None:
        await _look_for_others(db, others_have_it=others_have_it)
    if is_behind:
        return False
    if path is None:
        raise InvalidInput(
            f"key {ring.newest.key_id} of MILLPOND_SECRET_KEY seals here already",
            param="MILLPOND_SECRET_KEY",
            advice="give every host a new key there and the present one in MILLPOND_OLD_SECRET_KEYS, "
            "start them anew, then run this",
        )
    await asyncio.to_thread(key_file.add, path)
    ring.reread()
    return True


async def _look_for_others(db: Database, *, others_have_it: bool) -> None:
    """Raise Conflict where other hosts work with the database: without the new key, they would stand still."""
    if others_have_it:
        return
    async with db.globals() as con:
        rows = await con.fetch(_SQL["other_hosts"], socket.gethostname())
    if rows:
        raise Conflict(
            f"other hosts work with this database: {', '.join(row['host'] for row in rows)}",
            code="other_hosts",
            advice="give them the new key first (`rotate-key --prepare`, or MILLPOND_SECRET_KEY), then say so by "
            "--other-hosts-have-it",
        )


def _of_variables(settings: Settings) -> list[Seal]:
    """Return the keys that variables name, the newest first."""
    newest = plain_text(settings.secret_key)
    return [*([Seal.from_text(newest)] if newest else []), *_older(settings)]


def _of_file(settings: Settings, path: Path) -> list[Seal]:
    try:
        return [*key_file.read(path), *_older(settings)]
    except FileNotFoundError as error:
        raise _missing(path, None) from error


def _older(settings: Settings) -> list[Seal]:
    texts = (plain_text(settings.old_secret_keys) or "").split(",")
    try:
        return [Seal.from_text(text) for text in texts if text.strip()]
    except InvalidInput as error:
        raise InvalidInput(
            error.message, param="MILLPOND_OLD_SECRET_KEYS", advice=error.advice
        ) from error


def _missing(path: Path, key_id: str | None) -> Permanent:
    sealed = "" if key_id is None else f"; the database holds what installation key {key_id} sealed"
    return Permanent(
        f"this host has no installation key{sealed}",
        code="seal_key_missing",
        advice=f"copy {KEY_FILE} of another host to {path} (mode 0600), or set MILLPOND_SECRET_KEY",
    )
