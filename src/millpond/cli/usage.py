"""`millpond usage` and `millpond quotas`: what the organization of the token used, and may use.

Called by `main`; `plans` shows quotas the same way.
"""

from __future__ import annotations

from typing import Annotated

import typer

from millpond.cli.call import call
from millpond.cli.options import DEFAULT_URL, AsJson, Token, Url
from millpond.cli.output import out, plain, print_json, print_table
from millpond.types import Json

_RATES = ("requests_per_s", "key_requests_per_s")


def usage(
    since: Annotated[
        str | None, typer.Option(help="First day, YYYY-MM-DD. Unset: the month's.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Last day. Unset: today (UTC).")] = None,
    flow: Annotated[str | None, typer.Option(help="Only this flow.")] = None,
    model: Annotated[str | None, typer.Option(help="Only this model.")] = None,
    by: Annotated[
        list[str] | None, typer.Option(help="day, flow or model; may be repeated. Unset: day.")
    ] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Show runs, worker-seconds, tokens and cost."""
    params = {"since": since, "until": until, "flow": flow, "model": model, "by": by}
    found = call(url, token, lambda remote: remote.get("/v1/usage", params))
    if as_json:
        print_json(found)
        return
    parted = by or ["day"]
    rows = [(*(plain(one[name]) for name in parted), *_sums(one)) for one in found["data"]]
    total = ("total", *("" for _ in parted[1:]), *_sums(found["total"]))
    headings = ["runs", "worker seconds", "input tokens", "output tokens", "cost"]
    print_table([*parted, *headings], [*rows, total], empty="nothing was used")


def quotas(as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """Show the organization's plan, and what is used of each quota."""
    print_quotas(call(url, token, lambda remote: remote.get("/v1/quotas")), as_json=as_json)


def print_quotas(found: Json, *, as_json: bool) -> None:
    """Print what an organization is limited to and has used."""
    if as_json:
        print_json(found)
        return
    rows = [
        (one["quota"], one["used"], one["maximum"], one["renews_at"] or "never")
        for one in found["quotas"]
    ]
    rows += [(name, "", found[name], "each second") for name in _RATES if found[name] is not None]
    out().print(plain(f"plan {found['plan']}"))
    print_table(["quota", "used", "maximum", "renews"], rows, empty="no limits")
    if off := [name for name, is_on in found["features"].items() if not is_on]:
        out().print(plain(f"switched off: {', '.join(off)}"))


def _sums(one: Json) -> tuple[str, ...]:
    return (
        str(one["runs"]),
        f"{one['worker_s']:.1f}",
        str(one["input_tokens"]),
        str(one["output_tokens"]),
        f"{one['cost_micros'] / 1_000_000:.6f}",
    )
