"""`millpond events`: tell Millpond what happened, and see what came of it.

Called by `main`. Invariant: an event sent with an id is received once, however often it is sent.
"""

from __future__ import annotations

from typing import Annotated

import typer

from millpond.cli.call import call
from millpond.cli.options import DEFAULT_URL, AsJson, Limit, Token, Url, read_json
from millpond.cli.output import err, out, plain, print_json, print_table

app = typer.Typer(no_args_is_help=True, help="Send events that triggers listen for.")

_PATH = "/v1/events"


@app.command()
def send(
    name: Annotated[str, typer.Argument(help="Name of the event.", show_default=False)],
    data: Annotated[
        str, typer.Option("--data", "-d", help="Data: JSON text, @file, or - for stdin.")
    ] = "null",
    event_id: Annotated[
        str | None, typer.Option("--id", help="A repeat with it is answered as the first.")
    ] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Send an event NAME; tells of the runs that it started at once."""
    body = {"name": name, "data": read_json(data, param="--data"), "id": event_id}
    event = call(url, token, lambda remote: remote.post(_PATH, body))
    if as_json:
        print_json(event)
        return
    out().print(plain(f"event {event['id']} received"))
    for run in event["runs"]:
        out().print(plain(f"run {run['run_id']} started by {run['trigger']}"))


@app.command("list")
def list_events(
    name: Annotated[str | None, typer.Option(help="Only events of this name.")] = None,
    limit: Limit = 20,
    after: Annotated[str | None, typer.Option(help="Go on after this id (`last_id`).")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """List events as they were received, newest first, with the runs that they started."""
    params = {"name": name, "limit": limit, "after": after}
    page = call(url, token, lambda remote: remote.get(_PATH, params))
    if as_json:
        print_json(page)
        return
    rows = [
        [one["id"], one["name"], one["received_at"], " ".join(run["run_id"] for run in one["runs"])]
        for one in page["data"]
    ]
    print_table(["event", "name", "received", "runs"], rows, empty="No events.")
    if page["has_more"]:
        err().print(f"more: --after {page['last_id']}", style="dim")
