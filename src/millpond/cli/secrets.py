"""`millpond secrets`: store, list and remove secrets by the API; rotate the key that seals them, on the machine.

Called by `main`. Invariants: a value comes from standard input or a prompt, never from an argument, where every process
of the machine could read it; it is printed nowhere.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from millpond.cli.call import call
from millpond.cli.options import DEFAULT_URL, AsJson, DataDir, Limit, Token, Url
from millpond.cli.output import err, out, plain, print_json, print_table, progress
from millpond.errors import InvalidInput, Permanent
from millpond.types import Json

if TYPE_CHECKING:
    from millpond.identity.resealing import Resealed

app = typer.Typer(
    no_args_is_help=True, help="Secrets that flows open, and the key that seals them."
)
Name = Annotated[str, typer.Argument(help="By which flows open it.", show_default=False)]


@app.command(name="list")
def list_secrets(
    limit: Limit = 50,
    after: Annotated[str | None, typer.Option(help="Go on after this id (`last_id`).")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """List secrets without their values."""
    params = {"limit": limit, "after": after}
    page = call(url, token, lambda remote: remote.get("/v1/secrets", params))
    if as_json:
        print_json(page)
        return
    columns = ["name", "version", "changed_at", "changed_by", "used_at", "description"]
    rows = [[one.get(column) for column in columns] for one in page["data"]]
    print_table(
        [column.replace("_", " ") for column in columns],
        rows,
        empty="No secrets.",
        whole=("name",),
    )
    if page.get("has_more"):
        err().print(f"more: --after {page['last_id']}", style="dim")


@app.command(name="set")
def set_secret(
    name: Name,
    description: Annotated[
        str | None, typer.Option(help="What it is for.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Store a secret or replace its value: asked for, or read whole from standard input."""
    body: dict[str, Json] = {"value": _value()}
    if description is not None:
        body["description"] = description
    made = call(url, token, lambda remote: remote.put(f"/v1/secrets/{name}", body))
    if as_json:
        print_json(made)
    else:
        out().print(plain(f"{made['name']} has its value number {made['version']}"))


@app.command()
def remove(name: Name, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """Remove a secret with its value."""
    call(url, token, lambda remote: remote.delete(f"/v1/secrets/{name}"))


@app.command(name="rotate-key")
def rotate_key(
    prepare: Annotated[
        bool,
        typer.Option(
            "--prepare",
            help="Only put a new key into this host's key file, to copy it to the other hosts first.",
        ),
    ] = False,
    other_hosts_have_it: Annotated[
        bool,
        typer.Option(
            "--other-hosts-have-it",
            help="Go on although other hosts are at work: they were given the new key.",
        ),
    ] = False,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Seal everything anew with another installation key; goes on where a killed one stopped."""
    if prepare:
        key_id, path = _prepare(data_dir)
        if as_json:
            print_json({"object": "seal_key", "id": key_id, "file": path})
        else:
            out().print(
                plain(f"{path} begins with key {key_id} now; nothing is sealed with it yet.")
            )
            out().print(plain("Copy the file to every host, then run this without --prepare."))
        return
    done = asyncio.run(_rotate(data_dir, others_have_it=other_hosts_have_it))
    if as_json:
        print_json(
            {
                "object": "seal_key",
                "id": done.key_id,
                "resealed": done.counts,
                "broken": done.broken,
                "old": done.old_key_ids,
            }
        )
    else:
        _print(done)
    if done.broken:
        raise Permanent(
            f"{len(done.broken)} values do not open and stay as they are: {', '.join(done.broken[:5])}",
            code="seal_broken",
            advice=_advice(done.broken),
        )


def _print(done: Resealed) -> None:
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(done.counts.items()))
    out().print(plain(f"key {done.key_id} seals here now; sealed anew: {told or 'nothing'}"))
    for key_id in done.old_key_ids:
        text = (
            f"key {key_id} opens nothing of this database any more: take it off every host once no "
            "backup of before is to be restored"
        )
        out().print(plain(text), soft_wrap=True)


def _advice(broken: Sequence[str]) -> str:
    """Say what to do about values that do not open, which are named by their kind first."""
    ways = {
        "secret": "set or remove the secrets",
        "signing_key": "sign with another key (`millpond keys rotate`), and delete the row of signing_key once the "
        "tokens of the broken one have expired",
        "mail_outbox": "mails are dropped by themselves",
    }
    kinds = {one.split(":", 1)[0] for one in broken}
    told = [way for kind, way in ways.items() if kind in kinds]
    return f"{'; '.join(told)}; then rotate again: until then the older key is not given up"


def _value() -> str:
    """Return a value from a prompt, or all of standard input without its last line break."""
    if sys.stdin.isatty():
        value: str = typer.prompt("value", hide_input=True, confirmation_prompt=True)
        return value
    text = sys.stdin.read()
    value = text.removesuffix("\n").removesuffix("\r")
    if not value:
        raise InvalidInput("standard input holds no value", param="value")
    return value


def _prepare(data_dir: DataDir) -> tuple[str, str]:
    from millpond.cli.config import read_settings
    from millpond.cli.key_ring import key_path
    from millpond.identity import key_file

    path = key_path(read_settings(data_dir=data_dir))
    if path is None or not path.exists():
        raise InvalidInput(
            "there is no key file on this host",
            param="MILLPOND_SECRET_KEY",
            advice="give every host the new key as MILLPOND_SECRET_KEY and the present one in "
            "MILLPOND_OLD_SECRET_KEYS, start them anew, then run this without --prepare",
        )
    return key_file.add(path).key_id, str(path)


async def _rotate(data_dir: DataDir, *, others_have_it: bool) -> Resealed:
    from millpond.cli.config import read_settings
    from millpond.cli.key_ring import key_path, new_key, open_ring
    from millpond.cli.running import find_databases
    from millpond.db.migrate import check_schema
    from millpond.db.pool import Database
    from millpond.identity.resealing import rotate

    settings = read_settings(data_dir=data_dir)
    url = find_databases(settings).app
    await check_schema(url)
    db = await Database.connect(url, name="millpond-rotate", max_size=2)
    try:
        ring = await open_ring(settings, db)
        if await new_key(ring, db, key_path(settings), others_have_it=others_have_it):
            progress(f"made key {ring.newest.key_id}")
        return await rotate(
            db, ring, told=lambda kind, count: progress(f"{count} {kind} sealed anew")
        )
    finally:
        await db.close()
