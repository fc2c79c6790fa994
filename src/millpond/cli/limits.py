"""`millpond limits`: show and set ceilings on keys.

Called by `main`. Invariant: with `--everyone` it is the platform's limits, which need an operator's right.
"""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlencode

import typer

from millpond.cli import limit_replay, saturation
from millpond.cli.call import call
from millpond.cli.options import DEFAULT_URL, AsJson, Token, Url
from millpond.cli.output import out, plain, print_json, print_table
from millpond.types import Json

app = typer.Typer(no_args_is_help=True, help="Limits on keys: how much at once, or how often.")
limit_replay.add_to(app)
saturation.add_to(app)

Key = Annotated[
    str,
    typer.Argument(
        metavar="KEY", help="noun:name, noun:*, or two of these with ' x ' between them."
    ),
]
Everyone = Annotated[
    bool, typer.Option("--everyone", help="The platform's limits; needs an operator's right.")
]
IsRate = Annotated[bool, typer.Option("--rate", help="The rate on it, not how much at once.")]
IsOfTokens = Annotated[bool, typer.Option("--tokens", help="The limit on tokens on it.")]


@app.command("list")
def list_limits(
    everyone: Everyone = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """List what limits the organization's work: its own limits and the platform's."""
    page = call(url, token, lambda remote: remote.get(_path(everyone=everyone)))
    if as_json:
        print_json(page)
        return
    rows = [
        [
            one["key"],
            _shown(one),
            "platform" if one["is_of_platform"] else "own",
            _source(one),
            one["set_by"],
        ]
        for one in page["data"]
    ]
    print_table(["key", "limit", "of", "from", "set by"], rows, empty="Nothing is limited.")


@app.command("set")
def set_limit(
    key: Key,
    concurrency: Annotated[
        int | None, typer.Option(help="So much at once at most; 0 lets nothing go.", min=0)
    ] = None,
    rate: Annotated[int | None, typer.Option(help="So many starts per period.", min=0)] = None,
    tokens: Annotated[
        int | None, typer.Option(help="So many tokens of models per period.", min=0)
    ] = None,
    period_s: Annotated[float, typer.Option("--period", help="Seconds of the period.")] = 60.0,
    burst: Annotated[
        int | None,
        typer.Option(help="How many at once: of a rate 1 if not given, of tokens all.", min=1),
    ] = None,
    everyone: Everyone = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Set a limit on KEY; it holds from the next claim on."""
    given = {"concurrency": concurrency, "rate": rate, "tokens": tokens}
    kinds = [kind for kind, maximum in given.items() if maximum is not None]
    if len(kinds) != 1:
        raise typer.BadParameter("give --concurrency, --rate or --tokens")
    body: Json = {"key": key, "kind": kinds[0], "maximum": given[kinds[0]]}
    if kinds[0] != "concurrency":
        body |= {"period_s": period_s, "burst": burst}
    answer = call(url, token, lambda remote: remote.put(_path(everyone=everyone), body))
    if as_json:
        print_json(answer)
        return
    out().print(plain(f"{answer['key']}: {_shown(answer)}"))


@app.command("remove")
def remove_limit(
    key: Key,
    is_rate: IsRate = False,
    is_of_tokens: IsOfTokens = False,
    everyone: Everyone = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Remove a limit on KEY."""
    kind = "tokens" if is_of_tokens else "rate" if is_rate else "concurrency"
    query = urlencode({"key": key, "kind": kind})
    call(url, token, lambda remote: remote.delete(f"{_path(everyone=everyone)}?{query}"))
    out().print(plain(f"{key}: removed"))


@app.command("brakes")
def list_brakes(
    everyone: Everyone = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """List what holds back work: keys that cool down or recover, and open breakers."""
    page = call(url, token, lambda remote: remote.get(f"{_path(everyone=everyone)}/brakes"))
    if as_json:
        print_json(page)
        return
    rows = [
        [
            one["key"],
            "platform" if one["is_of_platform"] else "own",
            one["state"],
            one["until"],
            f"{one['factor']:.0%}",
            one["reason"],
        ]
        for one in page["data"]
    ]
    names = ["key", "of", "state", "nothing before", "allowed now", "reason"]
    print_table(names, rows, empty="Nothing is held back.")


@app.command("reset")
def reset(
    key: Key,
    everyone: Everyone = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Take a cooldown or an open breaker off KEY: its work goes on at once."""
    query = urlencode({"key": key})
    call(url, token, lambda remote: remote.delete(f"{_path(everyone=everyone)}/brakes?{query}"))
    out().print(plain(f"{key}: released"))


def _path(*, everyone: bool) -> str:
    return "/v1/platform/limits" if everyone else "/v1/limits"


def _source(limit: Json) -> str:
    """Return where a limit comes from, and what it stands above."""
    below = [
        f"{one['source']}: {_size(one | {'kind': limit['kind']})}" for one in limit["overrides"]
    ]
    return f"{limit['source']} (above {', '.join(below)})" if below else str(limit["source"])


def _shown(limit: Json) -> str:
    now = "" if limit["factor"] >= 1 else f" ({limit['factor']:.0%} of it now)"
    return f"{_size(limit)}{now}"


def _size(limit: Json) -> str:
    if limit["kind"] == "concurrency":
        return f"{limit['maximum']} at once"
    of = " tokens" if limit["kind"] == "tokens" else ""
    return f"{limit['maximum']}{of} in {limit['period_s']:g} s, {limit['burst']} at once"
