"""`millpond schedules`: runs that start by the clock.

Called by `main`. Invariant: a schedule is named by its id or, where that is no id, by its name.
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

app = typer.Typer(no_args_is_help=True, help="Start runs at times of a calendar.")

_PATH = "/v1/schedules"
Which = Annotated[str, typer.Argument(help="Id or name of the schedule.", show_default=False)]


@app.command("list")
def list_schedules(
    limit: Limit = 20,
    after: Annotated[str | None, typer.Option(help="Go on after this id (`last_id`).")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """List schedules, newest first."""
    page = call(url, token, lambda remote: remote.get(_PATH, {"limit": limit, "after": after}))
    if as_json:
        print_json(page)
        return
    rows = [
        [one["name"], one["flow"], one["cron"], one["time_zone"], _next(one), one["last_error"]]
        for one in page["data"]
    ]
    columns = ["schedule", "flow", "cron", "time zone", "next", "last error"]
    print_table(columns, rows, empty="No schedules.")
    if page["has_more"]:
        err().print(f"more: --after {page['last_id']}", style="dim")


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Name, unique in the org.", show_default=False)],
    flow: Annotated[str, typer.Argument(help="Name of the flow.", show_default=False)],
    cron: Annotated[
        str, typer.Option("--cron", help="Five fields, such as `0 9 * * MON-FRI`, or @daily.")
    ],
    time_zone: Annotated[str, typer.Option(help="Such as Europe/Berlin.")] = "UTC",
    input_text: Annotated[
        str, typer.Option("--input", "-i", help="Input: JSON text, @file, or - for stdin.")
    ] = "{}",
    version: Annotated[int | None, typer.Option(help="Version. Unset: the newest.")] = None,
    queue: Annotated[str | None, typer.Option(help="Queue. Unset: the flow's.")] = None,
    priority: Annotated[int, typer.Option(help="Higher goes earlier.", min=-100, max=100)] = 0,
    label: Annotated[list[str] | None, typer.Option(help="A label as name=value.")] = None,
    missed: Annotated[
        str, typer.Option(help="Of times missed while nothing ran: skip, one or all.")
    ] = "one",
    overlap: Annotated[
        str, typer.Option(help="While the last run is live: allow, skip or cancel_old.")
    ] = "allow",
    paused: Annotated[bool, typer.Option("--paused", help="Start nothing yet.")] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Make a schedule NAME that starts FLOW."""
    body = {
        "name": name,
        "flow": flow,
        "cron": cron,
        "time_zone": time_zone,
        "input": read_json(input_text, param="--input"),
        "version": version,
        "queue": queue,
        "priority": priority,
        "labels": read_pairs(label or [], param="--label"),
        "missed": missed,
        "overlap": overlap,
        "is_paused": paused,
    }
    made = call(url, token, lambda remote: remote.post(_PATH, body))
    if as_json:
        print_json(made)
    else:
        out().print(plain(f"schedule {name} ({made['id']}) is next due at {_next(made)}"))


@app.command()
def show(
    which: Which, as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None
) -> None:
    """Show a schedule with its next times and its last run."""

    async def talk(remote: Remote) -> Json:
        return await remote.get(await path_of(remote, _PATH, which))

    found = call(url, token, talk)
    if as_json:
        print_json(found)
        return
    print_fields((key, found[key]) for key in found if key not in ("object", "last_run"))
    if found["last_run"]:
        run = found["last_run"]
        out().print(plain(f"last run {run['id']} {run['state']}"))


@app.command()
def pause(
    which: Which, as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None
) -> None:
    """Let a schedule start nothing until it is resumed."""
    found = act(url, token, _PATH, which, "pause")
    if as_json:
        print_json(found)
    else:
        out().print(plain(f"schedule {found['name']} is paused"))


@app.command()
def resume(
    which: Which, as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None
) -> None:
    """Let a paused schedule go on from now."""
    found = act(url, token, _PATH, which, "resume")
    if as_json:
        print_json(found)
    else:
        out().print(plain(f"schedule {found['name']} is next due at {_next(found)}"))


@app.command()
def run(which: Which, as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """Start a schedule's flow now, besides its times."""
    started = act(url, token, _PATH, which, "run_now")
    if as_json:
        print_json(started)
    else:
        out().print(plain(f"run {started['id']} {started['state']}"))


@app.command()
def delete(
    which: Which, as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None
) -> None:
    """Remove a schedule; its runs stay."""

    async def talk(remote: Remote) -> str:
        path = await path_of(remote, _PATH, which)
        await remote.delete(path)
        return path.rpartition("/")[2]

    schedule_id = call(url, token, talk)
    if as_json:
        print_json({"id": schedule_id, "object": "schedule", "deleted": True})
    else:
        out().print(plain(f"schedule {which} is gone; its runs stay"))


def _next(schedule: Json) -> str:
    return "paused" if schedule["is_paused"] else str(schedule["next_due_at"] or "never")
