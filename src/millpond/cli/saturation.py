"""The command `limits saturation`: how full things are, and what waits for room there.

Called by `limits`. Invariant: with `--everyone` it is of all organizations, which needs an operator's right.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated
from urllib.parse import urlencode

import typer

from millpond.cli.call import call
from millpond.cli.options import DEFAULT_URL, AsJson, Token, Url
from millpond.cli.output import out, print_json, print_table
from millpond.cli.remote import Remote
from millpond.types import Json

_PAGE = 200
_FIRST = ("of", "name", "limit", "in use")
_LAST = ("waiting", "oldest", "full 1 min", "full 1 h")


class Of(StrEnum):
    """What rows of all organizations are of."""

    QUEUE = "queue"
    LIMIT = "limit"
    ORG = "org"


def add_to(app: typer.Typer) -> None:
    """Add the command to those of limits."""
    app.command("saturation")(show_saturation)


def show_saturation(
    everyone: Annotated[
        bool,
        typer.Option("--everyone", help="Of all organizations; needs an operator's right."),
    ] = False,
    of: Annotated[
        Of | None, typer.Option(help="With --everyone: only these.", show_default=False)
    ] = None,
    starved_after_s: Annotated[
        float, typer.Option("--starved-after", help="Seconds after which work counts as starved.")
    ] = 60.0,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Show how full the organization, its queues and the limits on its work are, and what waits for room there."""
    if of is not None and not everyone:
        raise typer.BadParameter("--of goes with --everyone")
    wish: dict[str, object] = {"starved_after_s": starved_after_s}
    if everyone:
        wish |= {"limit": _PAGE, **({} if of is None else {"of": of.value})}
        page = call(url, token, lambda remote: _all_pages(remote, wish))
    else:
        path = f"/v1/limits/saturation?{urlencode(wish)}"
        page = call(url, token, lambda remote: remote.get(path))
    if as_json:
        print_json(page)
        return
    whose = ["keys", "orgs"] if everyone else ["own"]
    print_table(
        [*_FIRST, *whose, *_LAST],
        [_row(one, is_of_all=everyone) for one in page["data"]],
        empty="Nothing is there.",
    )
    if page["has_more"]:
        out().print("There are more limits; these have most waiting.")


async def _all_pages(remote: Remote, wish: Mapping[str, object]) -> Json:
    """Read page after page; returns them as one."""
    data: list[Json] = []
    last: Mapping[str, object] = {}
    while True:
        query = urlencode({**wish, **last})
        page = await remote.get(f"/v1/platform/limits/saturation?{query}")
        data += page["data"]
        if not page["has_more"]:
            return {**page, "data": data}
        last = {"after": page["last_id"]}


def _row(one: Json, *, is_of_all: bool) -> list[str]:
    about = "" if one["is_exact"] else "about "
    used = "" if one["in_use"] is None else f"{about}{one['in_use']}"
    if one["of"] == "limit" and one["kind"] in ("rate", "tokens"):
        used = f"next at {one['until']}" if one["until"] else "has room"
    elif one["maximum"] is not None:
        used = f"{used} of {one['maximum']}"
    limit = "" if one["limit"] is None else f"{one['kind']} {one['limit']}"
    waiting = f"{one['waiting']}{'' if one['is_waiting_exact'] else ' or more'}"
    oldest = "" if one["oldest_s"] is None else f"{one['oldest_s']:.0f} s"
    if one["is_starved"]:
        oldest += " (starved)"
    whose = [_text(one["keys"]), _text(one["orgs"])] if is_of_all else [str(one["own"])]
    full = [_share(one["full_minute"]), _share(one["full_hour"])]
    return [one["of"], one["name"], limit, used, *whose, waiting, oldest, *full]


def _text(value: Json) -> str:
    return "" if value is None else str(value)


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
