"""`millpond login`, `logout` and `whoami`: a session with a server that the other commands use.

Called by `main`. Invariants: a password is asked for or read from standard input, never an argument, and is not sent
over another machine's network in the clear unless that was said; a session is ended that is replaced, or that could not
be kept.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from millpond.cli.options import DEFAULT_URL, AsJson, Bearer, Token, Url
from millpond.cli.output import out, plain, print_fields, print_json
from millpond.types import Json

if TYPE_CHECKING:
    from millpond.cli.kept import Kept, SessionFile

PasswordStdin = Annotated[
    bool, typer.Option("--password-stdin", help="Read the password from standard input.")
]
AllowHttp = Annotated[
    bool, typer.Option("--allow-http", help="Send the password without TLS to another machine.")
]


def login(
    email: Annotated[
        str | None, typer.Argument(help="Your address. Unset: asked for.", show_default=False)
    ] = None,
    password_stdin: PasswordStdin = False,
    org: Annotated[
        str | None,
        typer.Option(help="Organization to work in, as by `millpond org use`.", show_default=False),
    ] = None,
    allow_http: AllowHttp = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Sign in by email address and password; the other commands then use the session."""
    from millpond.cli.kept import SessionFile
    from millpond.cli.renewing import ask
    from millpond.errors import MillpondError

    file = SessionFile(url)
    check_is_private(file.url, allow_http=allow_http)
    who = email or typer.prompt("email", err=True)
    body = {"email": who, "password": read_password(password_stdin)}
    answer = ask(file.url, "sign-in", body)
    try:
        chosen = None if org is None else place_of(answer["organizations"], org)["slug"]
        former = _keep(file, answer, chosen)
    except BaseException:
        with suppress(MillpondError):
            _end(file.url, answer["refresh_token"])
        raise
    if former is not None and not former.is_over:
        _end(file.url, former.refresh_token)
    if as_json:
        print_json({"object": "kept_session", "server": file.url, **_shown(answer), "org": chosen})
        return
    out().print(plain(f"{answer['user']['email']} is signed in at {file.url}."), soft_wrap=True)
    if len(answer["organizations"]) > 1 and chosen is None:
        names = ", ".join(place["slug"] for place in answer["organizations"])
        out().print(
            plain(f"You are in {names}: choose one by `millpond org use NAME`."), soft_wrap=True
        )


def logout(
    forget: Annotated[
        bool,
        typer.Option(
            "--forget",
            help="Forget it also when it cannot be ended, as of a server that is gone.",
        ),
    ] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """End the session at the server and forget it; without one there is nothing to do."""
    from millpond.cli.kept import SessionFile
    from millpond.errors import MillpondError

    file = SessionFile(url)
    with file.lock():
        had_one = file.path.is_symlink() or file.path.exists()
        try:
            kept = file.read(is_strict=False)
            if kept is not None and not kept.is_over:
                _end(file.url, kept.refresh_token)
            is_ended = kept is not None
        except MillpondError:
            if not forget:
                raise
            is_ended = False
        file.remove()
    if as_json:
        print_json({"object": "kept_session", "server": file.url, "ended": is_ended})
        return
    text = f"Signed out of {file.url}." if is_ended else f"Nobody was signed in at {file.url}."
    if had_one and not is_ended:
        text = f"Forgot the session with {file.url}, which was not ended there."
    out().print(plain(text), soft_wrap=True)


def whoami(as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """Show who the commands call as, and in which organization."""
    from millpond.cli.call import call, find_caller
    from millpond.cli.kept import server_of
    from millpond.settings import Settings

    me = call(url, token, lambda remote: remote.get("/v1/me"))
    if as_json:
        print_json(me)
        return
    user, places = me["user"] or {}, me["organizations"]
    names = [place["slug"] for place in places if place["id"] == me["organization"]]
    print_fields(
        [
            ("server", server_of(url)),
            ("by", find_caller(token or Bearer(), url, Settings().data_dir).how),
            ("who", user.get("email") or me["subject"]),
            ("organization", names[0] if names else me["organization"]),
            ("role", me["role"]),
            ("operator", "yes" if user.get("is_operator") else "no"),
            ("organizations", ", ".join(place["slug"] for place in places)),
        ]
    )


def place_of(places: list[Json], wanted: str) -> Json:
    """Return somebody's place in the org wanted by name or id; raises InvalidInput when they have none there."""
    from millpond.errors import InvalidInput

    for place in places:
        if wanted in (place["slug"], str(place["id"])):
            return place
    names = ", ".join(place["slug"] for place in places) or "none"
    raise InvalidInput(f"You are not in {wanted!r}; your organizations: {names}.", param="--org")


def read_password(is_stdin: bool, what: str = "password", *, is_new: bool = False) -> str:
    """Return a password, asked for or as the next line of standard input; a new one is asked for twice."""
    if is_stdin:
        return sys.stdin.readline().rstrip("\r\n")
    given: str = typer.prompt(what, hide_input=True, err=True, confirmation_prompt=is_new)
    return given


def check_is_private(url: str, *, allow_http: bool) -> None:
    """Raise InvalidInput where a password would cross a network in the clear, and that was not said."""
    from millpond.cli.remote import is_this_machine
    from millpond.errors import InvalidInput

    if url.startswith("http:") and not is_this_machine(url) and not allow_http:
        raise InvalidInput(
            f"{url} has no TLS: whoever sees the network would see the password.",
            param="--url",
            advice="Use the https address; --allow-http sends it all the same.",
        )


def _keep(file: SessionFile, answer: Json, org: str | None) -> Kept | None:
    """Keep a new session; returns the one that was kept before, None for what cannot be read."""
    from millpond.cli.kept import Kept
    from millpond.cli.renewing import tokens_of
    from millpond.errors import MillpondError

    with file.lock():
        try:
            former = file.read(is_strict=False)
        except MillpondError:
            former = None
        email = answer["user"]["email"]
        file.write(Kept(url=file.url, email=email, org=org, **tokens_of(answer)))
        return former


def _end(url: str, refresh_token: str) -> None:
    from millpond.cli.renewing import ask

    ask(url, "sign-out", {"refresh_token": refresh_token})


def _shown(answer: Json) -> dict[str, Any]:
    return {name: answer[name] for name in ("user", "session_id", "organizations")}
