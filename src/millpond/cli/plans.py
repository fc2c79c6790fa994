"""`millpond plans` and `millpond prices`: what operators limit organizations to, and what models cost.

Called by `main`. Invariant: a plan is written whole; what is not named of it is not limited.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated
from urllib.parse import quote

import typer

from millpond.cli.call import call
from millpond.cli.options import DEFAULT_URL, AsJson, Token, Url
from millpond.cli.output import print_json, print_table
from millpond.cli.usage import print_quotas
from millpond.errors import InvalidInput
from millpond.types import Json

plans = typer.Typer(no_args_is_help=True, help="Plans of organizations, for operators.")
prices = typer.Typer(no_args_is_help=True, help="What models cost, for operators.")

Name = Annotated[str, typer.Argument(help="Name of the plan.", show_default=False)]
OrgId = Annotated[int, typer.Argument(help="Number of the organization.", show_default=False)]
Limit = Annotated[
    list[str] | None,
    typer.Option(help="A limit as name=number, such as runs_per_month=10000; may be repeated."),
]
Off = Annotated[
    list[str] | None,
    typer.Option(help="A feature that is switched off, such as schedules; may be repeated."),
]
Model = Annotated[str, typer.Argument(help="The model as its provider names it.")]


@plans.command("list")
def list_plans(as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """List plans with their limits."""
    found = call(url, token, lambda remote: remote.get("/v1/platform/plans"))
    if as_json:
        print_json(found)
        return
    rows = [
        (
            one["name"] + (" (default)" if one["is_default"] else ""),
            one["orgs"],
            ", ".join(f"{name}={most:g}" for name, most in one["limits"].items()) or "no limits",
            ", ".join(name for name, is_on in one["features"].items() if not is_on) or "none",
        )
        for one in found["data"]
    ]
    print_table(["plan", "organizations", "limits", "switched off"], rows, empty="no plans")


@plans.command("put")
def put_plan(
    name: Name,
    limit: Limit = None,
    off: Off = None,
    title: Annotated[str, typer.Option(help="What people call it.")] = "",
    default: Annotated[
        bool, typer.Option("--default", help="The plan of organizations that were given none.")
    ] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Make or replace a plan."""
    body = {
        "title": title,
        "limits": limits_of(limit or ()),
        "features": dict.fromkeys(off or (), False),
        "is_default": default,
    }
    made = call(url, token, lambda remote: remote.put(f"/v1/platform/plans/{quote(name)}", body))
    if as_json:
        print_json(made)


@plans.command("delete")
def delete_plan(name: Name, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """Remove a plan that no organization was given."""
    call(url, token, lambda remote: remote.delete(f"/v1/platform/plans/{quote(name)}"))


@plans.command("show")
def show_plan(
    org_id: OrgId, as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None
) -> None:
    """Show an organization's plan, and what it has used of it."""
    path = f"/v1/platform/orgs/{org_id}/quotas"
    print_quotas(call(url, token, lambda remote: remote.get(path)), as_json=as_json)


@plans.command("set")
def set_plan(
    org_id: OrgId,
    plan: Annotated[
        str | None, typer.Option(help="Which plan. Unset: the default one.", show_default=False)
    ] = None,
    limit: Limit = None,
    no_limit: Annotated[
        list[str] | None, typer.Option(help="A limit of the plan that is lifted; may be repeated.")
    ] = None,
    off: Off = None,
    on: Annotated[
        list[str] | None,
        typer.Option(help="A feature that is on, whatever the plan says; may be repeated."),
    ] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Give an organization a plan, and limits and features instead of that plan's."""
    lifted: dict[str, Json] = dict.fromkeys(no_limit or ())
    body = {
        "plan": plan,
        "overrides": {**limits_of(limit or ()), **lifted},
        "features": {**dict.fromkeys(off or (), False), **dict.fromkeys(on or (), True)},
    }
    path = f"/v1/platform/orgs/{org_id}/plan"
    print_quotas(call(url, token, lambda remote: remote.put(path, body)), as_json=as_json)


@prices.command("list")
def list_prices(as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """List what models cost."""
    found = call(url, token, lambda remote: remote.get("/v1/platform/prices"))
    if as_json:
        print_json(found)
        return
    rows = [(one["model"], one["input_micros"], one["output_micros"]) for one in found["data"]]
    print_table(
        ["model", "per million input tokens", "output tokens (millionths)"], rows, empty="no prices"
    )


@prices.command("set")
def set_price(
    model: Model,
    input_micros: Annotated[
        int, typer.Option("--input", help="Per million input tokens, in millionths.", min=0)
    ],
    output_micros: Annotated[
        int, typer.Option("--output", help="Per million output tokens, in millionths.", min=0)
    ],
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Set what a model costs from now on."""
    body = {"input_micros": input_micros, "output_micros": output_micros}
    path = f"/v1/platform/prices/{quote(model)}"
    made = call(url, token, lambda remote: remote.put(path, body))
    if as_json:
        print_json(made)


@prices.command("delete")
def delete_price(model: Model, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """Let a model cost nothing from now on."""
    call(url, token, lambda remote: remote.delete(f"/v1/platform/prices/{quote(model)}"))


def limits_of(pairs: Sequence[str]) -> dict[str, float]:
    """Read limits given as name=number; raises InvalidInput."""
    limits: dict[str, float] = {}
    for pair in pairs:
        name, _, number = pair.partition("=")
        try:
            limits[name] = float(number)
        except ValueError as error:
            raise InvalidInput(f"a limit is name=number, not {pair!r}", param="--limit") from error
    return limits
