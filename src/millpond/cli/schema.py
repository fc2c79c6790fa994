"""`millpond migrate`: brings a database up to this code.

Called by `main`. Invariant: it is the only command that uses the owner's address.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from millpond.cli.options import AsJson, DataDir
from millpond.cli.output import out, plain, print_json

if TYPE_CHECKING:
    from millpond.settings import Settings


def migrate(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Bring the database up to this code: MILLPOND_OWNER_DATABASE_URL, or the embedded one."""
    from millpond.cli.config import read_settings

    applied = asyncio.run(_migrate(read_settings(data_dir=data_dir)))
    if as_json:
        print_json({"object": "migration", "applied": applied})
    elif applied:
        out().print(plain(f"migrated: {', '.join(applied)}"))
    else:
        out().print("nothing to do: the database is up to date")


async def _migrate(settings: Settings) -> list[str]:
    from millpond.cli.config import external_databases
    from millpond.db import migrate as migrations
    from millpond.db.embedded import EmbeddedPostgres

    external = external_databases(settings)
    if external is not None:
        return await migrations.migrate(
            external.need_owner(), app_url=external.app, engine_url=external.need_engine()
        )
    server = EmbeddedPostgres(settings.data_dir, owner_note="millpond migrate")
    urls = await server.start()
    try:
        return await migrations.migrate(urls.owner, app_url=urls.app, engine_url=urls.engine)
    finally:
        await server.stop()
