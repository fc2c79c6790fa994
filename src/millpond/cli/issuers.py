"""`millpond issuers`: whose tokens the organization accepts, and whom they vouch for.

Called by `main`. Invariant: what is left out of a change stays; rules are given all at once.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from millpond.cli.call import call
from millpond.cli.options import DEFAULT_URL, AsJson, Bearer, Limit, Token, Url
from millpond.cli.output import err, out, plain, print_fields, print_json, print_table
from millpond.errors import InvalidInput, Unavailable
from millpond.types import Json

app = typer.Typer(
    no_args_is_help=True,
    help="Outside issuers of tokens (OpenID Connect), and whom they vouch for.",
)
_PATH = "/v1/issuers"
_IDENTITIES = "/v1/outside-identities"

Id = Annotated[str, typer.Argument(help="Id, as the list shows it.", show_default=False)]
After = Annotated[str | None, typer.Option(help="Go on after this id (`last_id`).")]
Audience = Annotated[
    list[str] | None, typer.Option(help="`aud` that tokens name; may stand several times.")
]
MapRule = Annotated[
    list[str] | None,
    typer.Option(
        "--map", help="`claim=value:role`; may stand several times, the first that fits counts."
    ),
]
Algorithm = Annotated[
    list[str] | None, typer.Option(help="A signature that is accepted; may stand several times.")
]
OrgIs = Annotated[
    list[str] | None,
    typer.Option(
        help="`claim=value` that tokens of this organization have; several values may do."
    ),
]
TrustDays = Annotated[
    int | None,
    typer.Option(help="Days after somebody's last token that their runs go on.", min=1, max=365),
]


@app.command("list")
def list_issuers(
    limit: Limit = 50,
    after: After = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """List issuers whose tokens are accepted."""
    columns = ["id", "name", "url", "audiences", "is_disabled"]
    _list(_PATH, columns, {"limit": limit, "after": after}, as_json, url, token, "No issuers.")


@app.command("show")
def show_issuer(
    issuer_id: Id, as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None
) -> None:
    """Show an issuer with its rules."""
    found = call(url, token, lambda remote: remote.get(f"{_PATH}/{issuer_id}"))
    _print(found, as_json=as_json)


@app.command("create")
def create_issuer(
    name: Annotated[str, typer.Argument(help="What people call it.", show_default=False)],
    issuer: Annotated[str, typer.Argument(help="Its address, exactly as `iss` says.")],
    audience: Audience = None,
    rule: MapRule = None,
    algorithm: Algorithm = None,
    org_is: OrgIs = None,
    trust_days: TrustDays = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Accept the tokens of an issuer."""
    if not audience:
        raise InvalidInput("at least one `--audience` is needed", param="--audience")
    terms = _terms(audience, rule or [], algorithm, org_is, trust_days)
    body = {"name": name, "url": issuer, **terms}
    made = call(url, token, lambda remote: remote.post(_PATH, body))
    _print(made, as_json=as_json)
    if not as_json:
        err().print(plain(f"Try it: millpond issuers test {made['id']}"), style="dim")


@app.command("change")
def change_issuer(
    issuer_id: Id,
    name: Annotated[str | None, typer.Option(help="What people call it.")] = None,
    audience: Audience = None,
    rule: MapRule = None,
    algorithm: Algorithm = None,
    org_is: OrgIs = None,
    any_org: Annotated[
        bool, typer.Option("--any-org", help="Every token is of this organization.")
    ] = False,
    trust_days: TrustDays = None,
    disabled: Annotated[
        bool | None,
        typer.Option(
            "--disable/--enable", help="Disabled, its tokens are refused.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Change what an issuer's tokens may, disable or enable it."""
    body = _terms(audience, rule, algorithm, org_is, trust_days)
    if any_org:
        body |= {"org_claim": None, "org_values": []}
    body |= {} if name is None else {"name": name}
    body |= {} if disabled is None else {"is_disabled": disabled}
    changed = call(url, token, lambda remote: remote.patch(f"{_PATH}/{issuer_id}", body))
    _print(changed, as_json=as_json)


@app.command("remove")
def remove_issuer(issuer_id: Id, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """Accept an issuer's tokens no more; whom it vouched for may nothing from then on."""
    call(url, token, lambda remote: remote.delete(f"{_PATH}/{issuer_id}"))


@app.command("test")
def ask_issuer(
    issuer_id: Id, as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None
) -> None:
    """Let the server ask an issuer for its keys now."""
    found = call(url, token, lambda remote: remote.post(f"{_PATH}/{issuer_id}/test"))
    if as_json:
        print_json(found)
        return
    if not found["is_good"]:
        raise Unavailable(found["message"], code=found["code"])
    rows = [[one["kid"], ", ".join(one["algorithms"])] for one in found["keys"]]
    print_table(["key", "algorithms"], rows, empty="No keys.")


@app.command("identities")
def list_identities(
    issuer: Annotated[str | None, typer.Option(help="Only of the issuer at this address.")] = None,
    limit: Limit = 50,
    after: After = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """List whom issuers vouched for, with the roles that their tokens gave."""
    columns = ["id", "issuer", "outside_subject", "label", "role", "is_disabled", "seen_at"]
    params = {"limit": limit, "after": after, "issuer": issuer}
    _list(_IDENTITIES, columns, params, as_json, url, token, "Nobody came yet.")


@app.command("disable")
def disable_identity(
    identity_id: Id, as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None
) -> None:
    """Disable an outside identity, whatever token it has."""
    _set(identity_id, {"is_disabled": True}, as_json, url, token)


@app.command("enable")
def enable_identity(
    identity_id: Id, as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None
) -> None:
    """Enable an outside identity again."""
    _set(identity_id, {"is_disabled": False}, as_json, url, token)


def _set(identity_id: str, body: Json, as_json: bool, url: str, token: Bearer | None) -> None:
    path = f"{_IDENTITIES}/{identity_id}"
    changed = call(url, token, lambda remote: remote.patch(path, body))
    if as_json:
        print_json(changed)
        return
    state = "disabled" if changed["is_disabled"] else "enabled"
    out().print(plain(f"{changed['subject']} is {state}"), soft_wrap=True)


def _list(
    path: str,
    columns: list[str],
    params: dict[str, Any],
    as_json: bool,
    url: str,
    token: Bearer | None,
    empty: str,
) -> None:
    page = call(url, token, lambda remote: remote.get(path, params))
    if as_json:
        print_json(page)
        return
    rows = [[_word(one.get(column)) for column in columns] for one in page["data"]]
    print_table([column.replace("_", " ") for column in columns], rows, empty=empty)
    if page.get("has_more"):
        err().print(f"more: --after {page['last_id']}", style="dim")


def _terms(
    audience: list[str] | None,
    rule: list[str] | None,
    algorithm: list[str] | None,
    org_is: list[str] | None,
    trust_days: int | None,
) -> dict[str, Any]:
    """Return what was given of an issuer's terms, as the API takes it."""
    given: dict[str, Any] = {"audiences": audience, "algorithms": algorithm}
    given["trust_days"] = trust_days
    if rule is not None:
        given["rules"] = [_rule(one) for one in rule]
    if org_is:
        pairs = [_pair(one, "--org-is") for one in org_is]
        if len({claim for claim, _ in pairs}) > 1:
            raise InvalidInput("`--org-is` names one claim", param="--org-is")
        given |= {"org_claim": pairs[0][0], "org_values": [value for _, value in pairs]}
    return {name: value for name, value in given.items() if value not in (None, [])}


def _rule(text: str) -> dict[str, Any]:
    """Read `claim=value:role`; a claim or a value may hold colons."""
    claim, rest = _pair(text, "--map")
    value, _, role = rest.rpartition(":")
    if not value or not role:
        raise InvalidInput(f"{text!r} is not `claim=value:role`", param="--map")
    return {"claim": claim, "values": [value], "role": role}


def _pair(text: str, param: str) -> tuple[str, str]:
    claim, _, value = text.partition("=")
    if not claim or not value:
        raise InvalidInput(f"{text!r} is not `claim=value`", param=param)
    return claim, value


def _print(document: Json, *, as_json: bool) -> None:
    if as_json:
        print_json(document)
        return
    named = ("id", "name", "url", "audiences", "algorithms", "org_claim", "org_values")
    rules = [
        (f"{one['claim']} is {_word(one['values'])}", one["role"]) for one in document["rules"]
    ]
    more = [(one, document[one]) for one in ("trust_days", "is_disabled", "created_at")]
    print_fields([*((one, _word(document[one])) for one in named), *rules, *more])


def _word(value: Json) -> Json:
    return ", ".join(map(str, value)) if isinstance(value, list) else value
