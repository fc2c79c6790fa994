"""`millpond triggers`: flows that start when events arrive.

Called by `main`. Invariant: a trigger is named by its id or, where that is no id, by its name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from millpond.cli.call import call
from millpond.cli.named import act, path_of
from millpond.cli.options import DEFAULT_URL, AsJson, Limit, Token, Url, read_json, read_pairs
from millpond.cli.output import err, out, plain, print_fields, print_json, print_table
from millpond.types import Json

if TYPE_CHECKING:
    from millpond.cli.remote import Remote

app = typer.Typer(no_args_is_help=True, help="Start flows when events arrive.")

_PATH = "/v1/triggers"
Which = Annotated[str, typer.Argument(help="Id or name of the trigger.", show_default=False)]


@app.command("list")
def list_triggers(
    limit: Limit = 20,
    after: Annotated[str | None, typer.Option(help="Go on after this id (`last_id`).")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """List triggers, newest first."""
    page = call(url, token, lambda remote: remote.get(_PATH, {"limit": limit, "after": after}))
    if as_json:
        print_json(page)
        return
    rows = [
        [one["name"], one["event"], one["flow"], _mode(one), one["dropped"], one["last_error"]]
        for one in page["data"]
    ]
    columns = ["trigger", "event", "flow", "mode", "dropped", "last error"]
    print_table(columns, rows, empty="No triggers.")
    if page["has_more"]:
        err().print(f"more: --after {page['last_id']}", style="dim")


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Name, unique in the org.", show_default=False)],
    event: Annotated[str, typer.Argument(help="Name of the events.", show_default=False)],
    flow: Annotated[str, typer.Argument(help="Name of the flow.", show_default=False)],
    filter_text: Annotated[
        str | None,
        typer.Option("--filter", help="JSON schema of the data: text, @file, or - for stdin."),
    ] = None,
    mode: Annotated[str, typer.Option(help="each, debounce, throttle or batch.")] = "each",
    group_by: Annotated[str | None, typer.Option(help="A path such as customer.id.")] = None,
    period_s: Annotated[
        float | None, typer.Option("--period", help="Seconds of debounce or throttle.")
    ] = None,
    max_wait_s: Annotated[
        float | None, typer.Option("--max-wait", help="Seconds that the first event waits at most.")
    ] = None,
    max_count: Annotated[int | None, typer.Option(help="Events of a batch at most.")] = None,
    version: Annotated[int | None, typer.Option(help="Version. Unset: the newest.")] = None,
    queue: Annotated[str | None, typer.Option(help="Queue. Unset: the flow's.")] = None,
    priority: Annotated[int, typer.Option(help="Higher goes earlier.", min=-100, max=100)] = 0,
    label: Annotated[list[str] | None, typer.Option(help="A label as name=value.")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Make a trigger NAME that starts FLOW when an EVENT arrives."""
    body = {
        "name": name,
        "event": event,
        "flow": flow,
        "filter": None if filter_text is None else read_json(filter_text, param="--filter"),
        "mode": mode,
        "group_by": group_by,
        "period_s": period_s,
        "max_wait_s": max_wait_s,
        "max_count": max_count,
        "version": version,
        "queue": queue,
        "priority": priority,
        "labels": read_pairs(label or [], param="--label"),
    }
    made = call(url, token, lambda remote: remote.post(_PATH, body))
    if as_json:
        print_json(made)
    else:
        out().print(plain(f"trigger {name} ({made['id']}) listens for {event}"))


@app.command()
def show(
    which: Which, as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None
) -> None:
    """Show a trigger with what waits for it."""

    async def talk(remote: Remote) -> Json:
        return await remote.get(await path_of(remote, _PATH, which))

    found = call(url, token, talk)
    if as_json:
        print_json(found)
    else:
        print_fields((key, found[key]) for key in found if key != "object")


@app.command()
def pause(
    which: Which, as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None
) -> None:
    """Let a trigger take no events and start nothing until it is resumed."""
    found = act(url, token, _PATH, which, "pause")
    if as_json:
        print_json(found)
    else:
        out().print(plain(f"trigger {found['name']} is paused"))


@app.command()
def resume(
    which: Which, as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None
) -> None:
    """Let a paused trigger take events again."""
    found = act(url, token, _PATH, which, "resume")
    if as_json:
        print_json(found)
    else:
        out().print(plain(f"trigger {found['name']} listens for {found['event']}"))


@app.command()
def delete(
    which: Which, as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None
) -> None:
    """Remove a trigger with what waits for it; its runs stay."""

    async def talk(remote: Remote) -> str:
        path = await path_of(remote, _PATH, which)
        await remote.delete(path)
        return path.rpartition("/")[2]

    trigger_id = call(url, token, talk)
    if as_json:
        print_json({"id": trigger_id, "object": "trigger", "deleted": True})
    else:
        out().print(plain(f"trigger {which} is gone; its runs stay"))


def _mode(trigger: Json) -> str:
    return "paused" if trigger["is_paused"] else str(trigger["mode"])
