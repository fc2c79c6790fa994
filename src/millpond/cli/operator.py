"""`millpond operator`: the first operator of the platform, made by whoever has its database.

Called by `main`. Invariant: a token that makes an operator is printed to a terminal only, else written to a 0600
file; it works once, for an hour.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated

import typer

from millpond.cli.call import NOBODY, call_as
from millpond.cli.options import DEFAULT_URL, AsJson, DataDir, Url
from millpond.cli.output import out, plain, print_json

app = typer.Typer(no_args_is_help=True, help="Make the first operator of the platform.")
FILE = "operator.token"


@app.command()
def link(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Make the token of the first operator; refused once there is one."""
    _issue(data_dir, as_json=as_json, is_reset=False)


@app.command()
def reset(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Make a token though there are operators, for when none of them can sign in; it is audited."""
    _issue(data_dir, as_json=as_json, is_reset=True)


@app.command()
def claim(
    email: Annotated[str, typer.Argument(help="Your email address.", show_default=False)],
    name: Annotated[str, typer.Option(help="Your name.")] = "",
    token: Annotated[
        str | None, typer.Option(help="The token. Unset: asked for.", show_default=False)
    ] = None,
    password_stdin: Annotated[
        bool, typer.Option("--password-stdin", help="Read the password from standard input.")
    ] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Become the operator by a token of `millpond operator link`."""
    given = token or typer.prompt("token", hide_input=True)
    if password_stdin:
        password = sys.stdin.readline().rstrip("\n")
    else:
        password = typer.prompt("password", hide_input=True, confirmation_prompt=True)
    body = {"token": given, "email": email, "name": name, "password": password}
    made = call_as(NOBODY, url, lambda remote: remote.post("/v1/auth/operator", body))
    if as_json:
        print_json(made)
    else:
        out().print(plain(f"{email} is an operator of this platform; sign in with the password."))


def _issue(data_dir: DataDir, *, as_json: bool, is_reset: bool) -> None:
    from millpond.cli.config import read_settings
    from millpond.cli.running import write_private

    settings = read_settings(data_dir=data_dir)
    token = asyncio.run(_token(data_dir, is_reset=is_reset))
    is_terminal = sys.stdout.isatty()
    path = settings.data_dir / FILE
    if not is_terminal:
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(path, token + "\n")
    if as_json:
        document = {"object": "operator_token", "expires_in_s": 3600}
        print_json({**document, **({"token": token} if is_terminal else {"file": str(path)})})
        return
    what = token if is_terminal else f"the token is in {path}"
    out().print(plain(what), soft_wrap=True)
    out().print(plain("It works once, for an hour: millpond operator claim EMAIL"), soft_wrap=True)


async def _token(data_dir: DataDir, *, is_reset: bool) -> str:
    from millpond.cli.config import read_settings
    from millpond.cli.running import find_databases
    from millpond.db.pool import Database
    from millpond.identity.operators import make_link

    settings = read_settings(data_dir=data_dir)
    db = await Database.connect(find_databases(settings).app, name="millpond-operator", max_size=1)
    try:
        token = await make_link(db, is_reset=is_reset)
    finally:
        await db.close()
    assert token is not None
    return token
