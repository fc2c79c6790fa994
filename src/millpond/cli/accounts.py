"""`millpond account`, `sessions` and `invitations accept`: one's own account, and links that were mailed.

Called by `main`. Invariants: a password is asked for or read from standard input, never an argument, and is not sent
over another machine's network in the clear unless that was said; tokens that come for a changed password or a new place
are on disk before the command ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from millpond.cli.call import call
from millpond.cli.options import DEFAULT_URL, AsJson, Bearer, Token, Url
from millpond.cli.orgs import Email, Id, invitations
from millpond.cli.output import out, plain, print_json, print_table
from millpond.cli.sign_in import AllowHttp, PasswordStdin, check_is_private, read_password
from millpond.types import Json

if TYPE_CHECKING:
    from millpond.cli.kept import Kept

account = typer.Typer(no_args_is_help=True, help="One's own account and password.")
sessions = typer.Typer(no_args_is_help=True, help="Where one is signed in.")
GROUPS: Mapping[str, typer.Typer] = {"account": account, "sessions": sessions}
Link = Annotated[
    str | None,
    typer.Option(
        "--link", help="The mailed link, or the token in it. Unset: asked for.", show_default=False
    ),
]


@account.command("register")
def register(
    email: Email,
    name: Annotated[str, typer.Option(help="Your name.")] = "",
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Ask for an account, where anybody may have one; the mailed link makes it."""
    body = {"email": email, "name": name}
    told = _ask(url, "register", body)
    _told(told, f"A link was mailed to {email}: millpond account confirm", as_json=as_json)


@account.command("confirm")
def confirm(
    link: Link = None,
    password_stdin: PasswordStdin = False,
    allow_http: AllowHttp = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Make the account of a mailed link, of a registration or an invitation, with a password."""
    made = _with_new_password("register/confirm", link, password_stdin, allow_http, url)
    _told(made, "The account is made: millpond login", as_json=as_json)


@account.command("forgot")
def forgot(email: Email, as_json: AsJson = False, url: Url = DEFAULT_URL) -> None:
    """Ask for a link that sets another password; it is mailed to whoever has an account."""
    body = {"email": email}
    told = _ask(url, "password-reset", body)
    text = f"If {email} has an account, a link was mailed to it: millpond account reset"
    _told(told, text, as_json=as_json)


@account.command("reset")
def reset(
    link: Link = None,
    password_stdin: PasswordStdin = False,
    allow_http: AllowHttp = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Set another password by a mailed link; all sessions end."""
    _with_new_password("password-reset/confirm", link, password_stdin, allow_http, url)
    out().print(plain("The password is set: millpond login"))


@account.command("password")
def change_password(
    password_stdin: Annotated[
        bool,
        typer.Option(
            "--password-stdin", help="Read the old and the new password, a line each, from stdin."
        ),
    ] = False,
    allow_http: AllowHttp = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Change the password of who is signed in; all their other sessions end."""
    check_is_private(url, allow_http=allow_http)
    old = read_password(password_stdin, "old password")
    new = read_password(password_stdin, "new password", is_new=True)
    body = {"old_password": old, "new_password": new}
    _keep(url, call(url, None, lambda remote: remote.post("/v1/me/password", body)))
    out().print(plain("The password is changed; your other sessions have ended."), soft_wrap=True)


@account.command("name")
def change_name(
    name: Annotated[str, typer.Argument(help="What others see.", show_default=False)],
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Change one's own name."""
    me = call(url, token, lambda remote: remote.patch("/v1/me", {"name": name}))
    _told(me, f"Your name is {me['user']['name']}.", as_json=as_json)


@sessions.command("list")
def list_sessions(as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """List where one is signed in, newest first."""
    page = call(url, token, lambda remote: remote.get("/v1/me/sessions"))
    if as_json:
        print_json(page)
        return
    columns = ("id", "address", "agent", "created_at", "used_at")
    rows = [
        [*(one[column] for column in columns), "this one" if one["is_current"] else ""]
        for one in page["data"]
    ]
    print_table(["id", "from", "program", "since", "renewed", ""], rows, empty="No sessions.")


@sessions.command("end")
def end_session(session_id: Id, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """End a session of one's own; what was signed for it is refused from the next request on."""
    call(url, token, lambda remote: remote.delete(f"/v1/me/sessions/{session_id}"))


@invitations.command("accept")
def accept(
    link: Link = None, as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None
) -> None:
    """Join an organization by a mailed link, signed in with the address that it was mailed to."""
    body = {"token": _token_of(link)}
    joined = call(url, token, lambda remote: remote.post("/v1/auth/invitations/accept", body))
    if (token or Bearer()).token is None:
        _renew(url)
    text = f"You are in {joined['name']} as {joined['role']}: millpond --org {joined['slug']}"
    _told(joined, text, as_json=as_json)


def _with_new_password(
    path: str, link: str | None, is_stdin: bool, allow_http: bool, url: str
) -> Json:
    """POST a link's token with a new password to a route of `/v1/auth`; returns what comes back."""
    check_is_private(url, allow_http=allow_http)
    body = {"token": _token_of(link), "password": read_password(is_stdin, is_new=True)}
    return _ask(url, path, body)


def _ask(url: str, path: str, body: Json) -> Json:
    """POST to a route of `/v1/auth` as nobody; returns what comes back, None for nothing."""
    from millpond.cli.kept import server_of
    from millpond.cli.renewing import ask

    return ask(server_of(url), path, body)


def _token_of(link: str | None) -> str:
    """Return the token of a link that was given, or that is asked for; a bare token is one."""
    given: str = link or typer.prompt("link", hide_input=True, err=True)
    return given.strip().rpartition("#token=")[2]


def _keep(url: str, answer: Json) -> None:
    """Keep the tokens that came for the session that is kept."""
    from millpond.cli.kept import SessionFile
    from millpond.cli.renewing import tokens_of

    file = SessionFile(url)
    with file.lock():
        kept = file.read()
        if kept is not None:
            file.write(replace(kept, **tokens_of(answer)))


def _renew(url: str) -> Kept | None:
    """Renew the kept session, so that its next token has the new place; None without one."""
    from millpond.cli.kept import SessionFile
    from millpond.cli.renewing import renewed

    file = SessionFile(url)
    kept = file.read()
    return None if kept is None or kept.is_over else renewed(file, kept.access_token)


def _told(document: Json, text: str, *, as_json: bool) -> None:
    if as_json:
        print_json(document)
    else:
        out().print(plain(text), soft_wrap=True)
