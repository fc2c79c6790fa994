"""`millpond token`: mints a development token for the `millpond up` of this machine.

Called by `main`. Invariant: with an external database there is no development token.
"""

from __future__ import annotations

import asyncio
import sys

from millpond.cli.options import AsJson, DataDir
from millpond.cli.output import out, plain, print_json
from millpond.errors import Forbidden, Unavailable


def token(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Mint a development token (8 h): to a terminal it is printed, otherwise only written to its file."""
    from millpond.cli.config import external_databases, is_loopback, read_settings
    from millpond.cli.devtoken import LIFETIME_S, mint_dev_token
    from millpond.cli.running import find_running

    settings = read_settings(data_dir=data_dir)
    if external_databases(settings) is not None:
        raise Forbidden(
            "A development token is only for embedded Postgres on this machine.",
            advice="Unset MILLPOND_DATABASE_URL if you mean the database of `millpond up`.",
        )
    running = find_running(settings.data_dir)
    if running is None:
        raise Unavailable(
            f"No `millpond up` runs on {settings.data_dir}.", advice="Start `millpond up` first."
        )
    if not is_loopback(running.host):
        raise Forbidden(f"The API at {running.url} can be reached from other machines.")
    minted = asyncio.run(mint_dev_token(settings, running.databases))
    is_terminal = sys.stdout.isatty()
    if as_json:
        document = {"object": "token", "file": str(minted.path), "expires_in_s": LIFETIME_S}
        print_json({**document, "token": minted.text} if is_terminal else document)
        return
    out().print(plain(minted.text if is_terminal else f"written to {minted.path}"), soft_wrap=True)
