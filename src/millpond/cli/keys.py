"""`millpond keys`: the keys that sign tokens; needs the database and the installation's secret key.

Called by `main`. Invariant: nothing of a key but its id, state and times is ever shown.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from millpond.cli.options import AsJson, DataDir
from millpond.cli.output import out, print_json, print_table

if TYPE_CHECKING:
    from millpond.identity.signing import KeyFacts

app = typer.Typer(no_args_is_help=True, help="Rotate and list the keys that sign tokens.")


@app.command()
def rotate(
    now: Annotated[
        bool,
        typer.Option(
            "--now",
            help="Refuse tokens of the older keys within a minute, instead of letting them expire.",
        ),
    ] = False,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Sign with a new key; tokens of the older ones stay good until they expire."""
    kid = asyncio.run(_rotate(data_dir, at_once=now))
    if as_json:
        print_json({"object": "signing_key", "id": kid, "state": "current"})
        return
    overlap = "refused within a minute" if now else "good until they expire"
    out().print(f"Tokens are signed with {kid} now; those of older keys are {overlap}.")


@app.command(name="list")
def list_keys(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """List the keys that signed tokens here, the newest first."""
    found = asyncio.run(_list(data_dir))
    if as_json:
        rows = [
            {
                "id": one.kid,
                "state": one.state,
                "created_at": one.created_at.isoformat(),
                "retired_at": one.retired_at.isoformat() if one.retired_at else None,
            }
            for one in found
        ]
        print_json({"object": "list", "data": rows})
        return
    print_table(
        ["key", "state", "created", "retired"],
        [[one.kid, one.state, f"{one.created_at:%Y-%m-%d %H:%M}", _day(one)] for one in found],
        empty="No key has signed anything yet.",
    )


def _day(key: KeyFacts) -> str:
    return f"{key.retired_at:%Y-%m-%d %H:%M}" if key.retired_at else ""


async def _rotate(data_dir: DataDir, *, at_once: bool) -> str:
    from millpond.cli.config import read_settings
    from millpond.cli.key_ring import open_ring
    from millpond.cli.running import find_databases
    from millpond.db.pool import Database
    from millpond.identity.signing import rotate

    settings = read_settings(data_dir=data_dir)
    db = await Database.connect(find_databases(settings).app, name="millpond-keys", max_size=1)
    try:
        return await rotate(db, await open_ring(settings, db), at_once=at_once)
    finally:
        await db.close()


async def _list(data_dir: DataDir) -> list[KeyFacts]:
    from millpond.cli.config import read_settings
    from millpond.cli.running import find_databases
    from millpond.db.pool import Database
    from millpond.identity.signing import listed

    settings = read_settings(data_dir=data_dir)
    db = await Database.connect(find_databases(settings).app, name="millpond-keys", max_size=1)
    try:
        return await listed(db)
    finally:
        await db.close()
