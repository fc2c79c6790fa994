"""`millpond orgs`, `members`, `invitations`, `roles`, `apikeys`, `service-principals`, `grants`.

Called by `main`. Invariant: the text of a key is printed once, by the command that made it, and written nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

from millpond.cli.call import call
from millpond.cli.options import DEFAULT_URL, AsJson, Bearer, Limit, Token, Url
from millpond.cli.output import err, out, plain, print_json, print_table
from millpond.types import Json

Id = Annotated[str, typer.Argument(help="Id, as the list shows it.", show_default=False)]
Email = Annotated[str, typer.Argument(help="Email address.", show_default=False)]
Role = Annotated[str, typer.Option(help="A built-in role or one of the organization's own.")]
After = Annotated[str | None, typer.Option(help="Go on after this id (`last_id`).")]

orgs = typer.Typer(no_args_is_help=True, help="Organizations of the platform, for its operators.")
members = typer.Typer(no_args_is_help=True, help="Who is in the organization.")
invitations = typer.Typer(no_args_is_help=True, help="Invite people into the organization.")
roles = typer.Typer(no_args_is_help=True, help="Roles: built in, and of the organization's own.")
services = typer.Typer(no_args_is_help=True, help="Programs that act as themselves.")
apikeys = typer.Typer(no_args_is_help=True, help="API keys of the organization.")
grants = typer.Typer(
    no_args_is_help=True, help="Let operators of the platform look in, for a time."
)
GROUPS: Mapping[str, typer.Typer] = {
    "orgs": orgs,
    "members": members,
    "invitations": invitations,
    "roles": roles,
    "service-principals": services,
    "apikeys": apikeys,
    "grants": grants,
}


def _listed(app: typer.Typer, path: str, columns: Sequence[str], *, says: str, empty: str) -> None:
    """Give a group its command `list`, which prints a page of `path` by the members named as columns."""

    def command(
        limit: Limit = 50,
        after: After = None,
        as_json: AsJson = False,
        url: Url = DEFAULT_URL,
        token: Token = None,
    ) -> None:
        params = {"limit": limit, "after": after}
        page = call(url, token, lambda remote: remote.get(path, params))
        if as_json:
            print_json(page)
            return
        rows = [[one.get(column) for column in columns] for one in page["data"]]
        print_table([column.replace("_", " ") for column in columns], rows, empty=empty)
        if page.get("has_more"):
            err().print(f"more: --after {page['last_id']}", style="dim")

    app.command("list", help=says)(command)


def _told(document: Json, text: str, *, as_json: bool) -> None:
    if as_json:
        print_json(document)
    else:
        out().print(plain(text))


_listed(
    orgs,
    "/v1/platform/orgs",
    ["id", "slug", "name", "created_at", "suspended_reason"],
    says="List organizations, newest first; nothing of what they hold.",
    empty="No organizations.",
)


@orgs.command("create")
def create_org(
    slug: Annotated[str, typer.Argument(help="Lower-case letters, digits, dashes; for ever.")],
    name: Annotated[str, typer.Argument(help="What people see.")],
    owner: Annotated[str | None, typer.Option(help="Address to invite as the first owner.")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Make an organization, and invite its first owner."""
    body = {"slug": slug, "name": name, **({"owner_email": owner} if owner else {})}
    made = call(url, token, lambda remote: remote.post("/v1/platform/orgs", body))
    asked = f"; {owner} was invited as its owner" if owner else ""
    _told(made, f"organization {made['slug']} has the id {made['id']}{asked}", as_json=as_json)


@orgs.command("suspend")
def suspend_org(
    org_id: Id,
    reason: Annotated[str, typer.Option(help="Why; it stands in the audit log.")],
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Refuse everything of an organization from now on."""
    _change_org(org_id, {"is_suspended": True, "reason": reason}, as_json, url, token)


@orgs.command("unsuspend")
def unsuspend_org(
    org_id: Id, as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None
) -> None:
    """Let a suspended organization go on."""
    _change_org(org_id, {"is_suspended": False}, as_json, url, token)


def _change_org(org_id: str, body: Json, as_json: bool, url: str, token: Bearer | None) -> None:
    path = f"/v1/platform/orgs/{org_id}"
    changed = call(url, token, lambda remote: remote.patch(path, body))
    state = "suspended" if changed["is_suspended"] else "open"
    _told(changed, f"organization {changed['slug']} is {state}", as_json=as_json)


_listed(
    members,
    "/v1/members",
    ["id", "email", "name", "role", "created_at"],
    says="List who is in the organization.",
    empty="No members: invite somebody with `millpond invitations send`.",
)


@members.command("role")
def change_role(
    user_id: Id, role: Role, as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None
) -> None:
    """Give a member another role."""
    path = f"/v1/members/{user_id}"
    changed = call(url, token, lambda remote: remote.patch(path, {"role": role}))
    _told(changed, f"{changed['email']} is {changed['role']} now", as_json=as_json)


@members.command("remove")
def remove_member(user_id: Id, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """Take somebody out of the organization; what was signed for them ends at once."""
    call(url, token, lambda remote: remote.delete(f"/v1/members/{user_id}"))


_listed(
    invitations,
    "/v1/invitations",
    ["id", "email", "role", "state", "expires_at"],
    says="List who was asked to join.",
    empty="Nobody was invited.",
)


@invitations.command("send")
def send_invitation(
    email: Email,
    role: Role = "viewer",
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Mail an address a link to join."""
    body = {"email": email, "role": role}
    made = call(url, token, lambda remote: remote.post("/v1/invitations", body))
    text = f"{made['email']} was invited as {made['role']}; it expires {made['expires_at']}"
    _told(made, text, as_json=as_json)


@invitations.command("revoke")
def revoke_invitation(invitation_id: Id, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """Take an invitation back."""
    call(url, token, lambda remote: remote.delete(f"/v1/invitations/{invitation_id}"))


@roles.command("list")
def list_roles(as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """List roles with what they may."""
    page = call(url, token, lambda remote: remote.get("/v1/roles"))
    if as_json:
        print_json(page)
        return
    rows = [
        [one["name"], one["is_built_in"], ", ".join(one["permissions"])] for one in page["data"]
    ]
    print_table(["role", "built in", "permissions"], rows, empty="No roles.", whole=("role",))


_listed(
    services,
    "/v1/service-principals",
    ["id", "name", "role", "is_disabled", "created_at"],
    says="List programs that act as themselves.",
    empty="No service principals.",
)


@services.command("create")
def create_service(
    name: Annotated[str, typer.Argument(help="Unique in the organization.", show_default=False)],
    role: Role = "viewer",
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Make a program's own principal; give it keys with `millpond apikeys create --owner`."""
    body = {"name": name, "role": role}
    made = call(url, token, lambda remote: remote.post("/v1/service-principals", body))
    _told(made, f"{made['name']} acts as {made['subject']}", as_json=as_json)


_listed(
    apikeys,
    "/v1/api-keys",
    ["id", "name", "prefix", "owner", "scopes", "expires_at", "used_at", "revoked_at"],
    says="List API keys, without their texts.",
    empty="No API keys.",
)


@apikeys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="What it is for.", show_default=False)],
    scope: Annotated[list[str], typer.Option(help="A permission; may stand several times.")],
    days: Annotated[int, typer.Option(help="Days until it ends; 0: never.", min=0)] = 90,
    owner: Annotated[str | None, typer.Option(help="`service:<id>`. Unset: you.")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Make an API key and print it, this once."""
    body = {"name": name, "scopes": scope, "expires_in_days": days or None}
    if owner:
        body["owner"] = owner
    made = call(url, token, lambda remote: remote.post("/v1/api-keys", body))
    _told(made, made["key"], as_json=as_json)
    if not as_json:
        err().print("Keep it now: it is not shown again.", style="dim")


@apikeys.command("revoke")
def revoke_key(key_id: Id, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """End an API key at once."""
    call(url, token, lambda remote: remote.delete(f"/v1/api-keys/{key_id}"))


_listed(
    grants,
    "/v1/grants",
    ["id", "operator_email", "reason", "read_only", "is_open", "expires_at"],
    says="List operators who were let in.",
    empty="No operator was let in.",
)


@grants.command("open")
def open_grant(
    email: Email,
    reason: Annotated[str, typer.Option(help="Why; it stands in the audit log.")],
    hours: Annotated[int, typer.Option(help="It ends by itself.", min=1, max=72)] = 1,
    writes: Annotated[bool, typer.Option("--writes", help="Let them do what builders do.")] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Let an operator of the platform look in."""
    body = {"operator_email": email, "reason": reason, "hours": hours, "read_only": not writes}
    made = call(url, token, lambda remote: remote.post("/v1/grants", body))
    _told(made, f"{email} may look in until {made['expires_at']}", as_json=as_json)


@grants.command("end")
def end_grant(grant_id: Id, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """End a grant, and with it the operator's open streams."""
    call(url, token, lambda remote: remote.delete(f"/v1/grants/{grant_id}"))
