"""`millpond org`, `operators`, and what changes roles, service principals and invitations.

Called by `main`; the other commands of those groups are in `orgs`. Invariant: what is left out of a change stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from millpond.cli.call import call, call_as, find_caller
from millpond.cli.options import DEFAULT_URL, AsJson, Bearer, Token, Url
from millpond.cli.orgs import Email, Id, invitations, roles, services
from millpond.cli.output import out, plain, print_fields, print_json, print_table
from millpond.types import Json

if TYPE_CHECKING:
    from millpond.cli.remote import Remote

org = typer.Typer(no_args_is_help=True, help="The organization of the token, and its policy.")
operators = typer.Typer(no_args_is_help=True, help="Who works on the platform itself.")
GROUPS: Mapping[str, typer.Typer] = {"org": org, "operators": operators}

_OPERATORS = "/v1/platform/operators"
Name = Annotated[str, typer.Argument(help="Name of the role.", show_default=False)]


@org.command("show")
def show_org(as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """Show the organization with its policy."""
    _print_org(call(url, token, lambda remote: remote.get("/v1/org")), as_json=as_json)


@org.command("use")
def use_org(
    name: Annotated[
        str | None, typer.Argument(help="Name or id. Unset: none is chosen.", show_default=False)
    ] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Choose the organization that the commands of this session work in; `millpond --org NAME` wins over it."""
    from millpond.cli.kept import SessionFile
    from millpond.cli.sign_in import place_of
    from millpond.settings import Settings

    chosen = None
    if name is not None:
        # Without the org chosen now: a place in that one may be gone.
        caller = replace(find_caller(Bearer(), url, Settings().data_dir), org=None)
        me = call_as(caller, url, lambda remote: remote.get("/v1/me"))
        chosen = place_of(me["organizations"], name)["slug"]
    SessionFile(url).choose(chosen)
    text = "No organization is chosen." if chosen is None else f"Commands work in {chosen}."
    out().print(plain(text), soft_wrap=True)


@org.command("set")
def set_org(
    name: Annotated[str | None, typer.Option(help="What people see.")] = None,
    may_resolve_own: Annotated[
        bool | None,
        typer.Option(
            "--may-resolve-own/--may-not-resolve-own",
            help="Whether somebody may answer questions of runs that they started.",
            show_default=False,
        ),
    ] = None,
    invitation_days: Annotated[
        int | None, typer.Option(help="How long an invitation is good.", min=1, max=30)
    ] = None,
    domain: Annotated[
        list[str] | None, typer.Option(help="Only addresses of these domains may join.")
    ] = None,
    any_domain: Annotated[bool, typer.Option("--any-domain", help="All may join.")] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Change the organization's name or policy; what is not given stays."""
    domains = [] if any_domain else domain or None
    policy = _given(
        may_resolve_own=may_resolve_own, invitation_days=invitation_days, email_domains=domains
    )
    body = _given(name=name, policy=policy or None)
    changed = call(url, token, lambda remote: remote.patch("/v1/org", body))
    _print_org(changed, as_json=as_json)


@roles.command("put")
def put_role(
    name: Name,
    permission: Annotated[list[str], typer.Option(help="A permission; may stand several times.")],
    description: Annotated[str, typer.Option(help="What it is for.")] = "",
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Make or replace a role of the organization's own; who holds it has the new rights at once."""
    body = {"description": description, "permissions": permission}
    made = call(url, token, lambda remote: remote.put(f"/v1/roles/{quote(name)}", body))
    _told(made, f"{made['name']} may {', '.join(made['permissions'])}", as_json=as_json)


@roles.command("delete")
def delete_role(name: Name, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """Remove a role of the organization's own that nobody holds."""
    call(url, token, lambda remote: remote.delete(f"/v1/roles/{quote(name)}"))


@invitations.command("resend")
def resend_invitation(
    invitation_id: Id, as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None
) -> None:
    """Mail another link; the former one is good no more."""
    path = f"/v1/invitations/{invitation_id}/resend"
    sent = call(url, token, lambda remote: remote.post(path))
    text = f"{sent['email']} got another link; it expires {sent['expires_at']}"
    _told(sent, text, as_json=as_json)


@services.command("change")
def change_service(
    service_id: Id,
    name: Annotated[str | None, typer.Option(help="Unique in the organization.")] = None,
    role: Annotated[str | None, typer.Option(help="Another role.")] = None,
    disabled: Annotated[
        bool | None,
        typer.Option(
            "--disable/--enable", help="Disabled, its keys are refused.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Rename a program's principal, give it another role, disable or enable it."""
    body = _given(name=name, role=role, is_disabled=disabled)
    path = f"/v1/service-principals/{service_id}"
    changed = call(url, token, lambda remote: remote.patch(path, body))
    how = "disabled" if changed["is_disabled"] else f"enabled, as {changed['role']}"
    _told(changed, f"{changed['name']} is {how}", as_json=as_json)


@operators.command("list")
def list_operators(as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """List the operators of the platform."""
    page = call(url, token, lambda remote: remote.get(_OPERATORS))
    if as_json:
        print_json(page)
        return
    columns = ["id", "email", "name", "is_disabled"]
    rows = [[one[column] for column in columns] for one in page["data"]]
    print_table(["id", "email", "name", "is disabled"], rows, empty="No operators.")


@operators.command("add")
def add_operator(
    email: Email, as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None
) -> None:
    """Make an account an operator's."""
    added = call(url, token, lambda remote: remote.post(_OPERATORS, {"email": email}))
    _told(added, f"{added['email']} is an operator now", as_json=as_json)


@operators.command("remove")
def remove_operator(user_id: Id, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """Take the operator's right from an account; the last operator stays."""

    async def talk(remote: Remote) -> None:
        await remote.delete(f"{_OPERATORS}/{user_id}")

    call(url, token, talk)


def _print_org(document: Json, *, as_json: bool) -> None:
    if as_json:
        print_json(document)
        return
    named = ("id", "slug", "name", "created_at")
    print_fields([*((one, document[one]) for one in named), *document["policy"].items()])


def _told(document: Json, text: str, *, as_json: bool) -> None:
    if as_json:
        print_json(document)
    else:
        out().print(plain(text), soft_wrap=True)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
