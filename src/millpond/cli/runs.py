"""`millpond runs`: start, list, show, tail and signal runs through the API.

Called by `main`; `reruns` adds cancel, rerun and release. Invariant: with --wait or tail the exit
code tells how the run ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.text import Text

from millpond.cli import timeline
from millpond.cli.batch_file import read_batch
from millpond.cli.call import call
from millpond.cli.exit import ExitCode, TimedOut
from millpond.cli.growing import Growing
from millpond.cli.options import (
    DEFAULT_URL,
    AsJson,
    Bearer,
    Limit,
    Token,
    Url,
    read_json,
    read_pairs,
)
from millpond.cli.output import (
    err,
    out,
    plain,
    print_fields,
    print_json,
    print_json_line,
    print_table,
    progress,
)
from millpond.errors import InvalidInput
from millpond.types import Json

if TYPE_CHECKING:
    from millpond.cli.remote import Remote

T = TypeVar("T")
_FIRST_PLACE = f"0-{'0' * 32}-0"

app = typer.Typer(no_args_is_help=True, help="Start, watch, signal, repeat and cancel runs.")

RunId = Annotated[str, typer.Argument(help="Id of the run.", show_default=False)]
Wait = Annotated[bool, typer.Option("--wait", help="Follow it and exit by its outcome.")]
Key = Annotated[
    str | None, typer.Option("--idempotency-key", help="A repeat returns the first run.")
]
Timeout = Annotated[
    float | None,
    typer.Option("--timeout", help="Stop following after so many seconds (exit code 7).", min=0),
]


@app.command()
def start(
    flow: Annotated[
        str | None,
        typer.Argument(
            help="Name of the flow; with --batch, of lines without.", show_default=False
        ),
    ] = None,
    input_text: Annotated[
        str, typer.Option("--input", "-i", help="Input: JSON text, @file, or - for stdin.")
    ] = "{}",
    version: Annotated[int | None, typer.Option(help="Version. Unset: the newest.")] = None,
    queue: Annotated[str | None, typer.Option(help="Queue. Unset: the flow's.")] = None,
    priority: Annotated[int, typer.Option(help="Higher goes earlier.", min=-100, max=100)] = 0,
    urgency: Annotated[
        str | None, typer.Option(help="standard where nobody waits for it. Unset: the flow's.")
    ] = None,
    delay_s: Annotated[float, typer.Option("--delay", help="Seconds until it may go.", min=0)] = 0,
    deadline_s: Annotated[
        float | None,
        typer.Option("--deadline", help="Seconds until it must be over. Unset: the flow's."),
    ] = None,
    label: Annotated[list[str] | None, typer.Option(help="A label as name=value.")] = None,
    dedup_key: Annotated[
        str | None, typer.Option(help="Of the runs with this key, one is live at a time.")
    ] = None,
    on_duplicate: Annotated[
        str | None, typer.Option(help="reject, join or cancel_old the live run with the key.")
    ] = None,
    limit_key: Annotated[
        list[str] | None,
        typer.Option("--key", help="A key that it counts on under limits, as noun:name."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="About how many tokens it uses, where these are limited.")
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            help="Start the runs of a file (- is stdin), one JSON object a line. "
            "Other options hold where a line says nothing."
        ),
    ] = None,
    key: Key = None,
    wait: Wait = False,
    timeout_s: Timeout = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Start a run of FLOW, or with --batch up to 1,000 runs, all or none."""
    options = {
        "flow": flow,
        "version": version,
        "queue": queue,
        "priority": priority or None,
        "urgency": urgency,
        "delay_s": delay_s or None,
        "deadline_s": deadline_s,
        "dedup_key": dedup_key,
        "on_duplicate": on_duplicate,
        "labels": read_pairs(label or [], param="--label") or None,
        "keys": limit_key or None,
        "tokens": tokens,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if batch is not None:
        _start_batch(batch, given, keyed(key), wait=wait, as_json=as_json, url=url, token=token)
        return
    if flow is None:
        raise InvalidInput("name the flow to start", param="FLOW")
    body = {**given, "input": read_json(input_text, param="--input")}
    begin(
        lambda remote: remote.post("/v1/runs", body, headers=keyed(key)),
        wait=wait,
        timeout_s=timeout_s,
        as_json=as_json,
        url=url,
        token=token,
    )


@app.command("list")
def list_runs(
    state: Annotated[str | None, typer.Option(help="Only runs in this state.")] = None,
    flow: Annotated[str | None, typer.Option(help="Only runs of this flow.")] = None,
    queue: Annotated[str | None, typer.Option(help="Only runs of this queue.")] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="Only runs with this label, name=value.")
    ] = None,
    limit: Limit = 20,
    after: Annotated[str | None, typer.Option(help="Go on after this id (`last_id`).")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """List runs, newest first."""
    read_pairs(label or [], param="--label")
    params: dict[str, Json] = {
        "state": state,
        "flow": flow,
        "queue": queue,
        "limit": limit,
        "after": after,
    }
    params["label"] = label or None
    page = call(url, token, lambda remote: remote.get("/v1/runs", params))
    if as_json:
        print_json(page)
        return
    rows = [
        [run["id"], run["flow"], run["state"], run["attempts"], run["created_at"], _took(run)]
        for run in page["data"]
    ]
    print_table(["run", "flow", "state", "attempts", "created", "took"], rows, empty="No runs.")
    if page["has_more"]:
        err().print(f"more: --after {page['last_id']}", style="dim")


@app.command()
def show(
    run_id: RunId, as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None
) -> None:
    """Show a run with its recorded steps."""
    run = call(url, token, lambda remote: remote.get(f"/v1/runs/{run_id}"))
    print_run(run, as_json=as_json, brief=False)


@app.command()
def tail(
    run_id: RunId,
    after: Annotated[int, typer.Option(help="Only events after this number.", min=0)] = 0,
    timeout_s: Timeout = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Print the events of a run, live, until it ends; with --json one event a line.

    On a terminal, what steps write while they go on grows between the events.
    """

    async def talk(remote: Remote) -> str:
        page = Growing(out())
        async with asyncio.timeout(timeout_s), aclosing(remote.watch(run_id, after)) as told:
            async for one in told:
                if not as_json:
                    page.show(one)
                elif "kind" in one:
                    print_json_line(one)
        run = await remote.get(f"/v1/runs/{run_id}")
        return str(run["state"])

    exit_by(patiently(lambda: call(url, token, talk), timeout_s))


@app.command()
def feed(
    after: Annotated[
        str, typer.Option(help="Only events after this place (`last_id`); `now` is after all.")
    ] = "",
    kind: Annotated[list[str] | None, typer.Option(help="Only events of this kind.")] = None,
    flow: Annotated[str | None, typer.Option(help="Only runs of this flow.")] = None,
    limit: Limit = 100,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what comes, until interrupted.")
    ] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Print events of all runs in the order in which they were stored; with --json and --follow one a line."""
    params: dict[str, Json] = {"kind": kind or None, "flow": flow}

    async def talk(remote: Remote) -> Json:
        if not follow:
            return await remote.get("/v1/run-events", {**params, "after": after, "limit": limit})
        async with aclosing(remote.feed(after or _FIRST_PLACE, params)) as events:
            async for event in events:
                if as_json:
                    print_json_line(event)
                else:
                    _print_event(event)
        return None

    page = call(url, token, talk)
    if as_json and page is not None:
        print_json(page)
        return
    for event in page["data"] if page is not None else ():
        _print_event(event)
    if page is not None and page["has_more"]:
        err().print(f"more: --after {page['last_id']}", style="dim")


def _print_event(event: Json) -> None:
    line = Text.assemble((f"{plain(event['run_id'])} ", "dim"), timeline.event_line(event))
    out().print(line, soft_wrap=True)


def keyed(key: str | None) -> dict[str, str]:
    """Return the header of an idempotency key, if there is one."""
    return {"Idempotency-Key": key} if key else {}


def begin(
    post: Callable[[Remote], Awaitable[Json]],
    *,
    wait: bool,
    timeout_s: float | None,
    as_json: bool,
    url: str,
    token: Bearer | None,
) -> None:
    """Let a run be accepted and print it; with `wait`, follow it and exit by its outcome."""

    async def talk(remote: Remote) -> Json:
        run = await post(remote)
        if not wait:
            return run
        progress(f"run {run['id']} accepted")
        async with asyncio.timeout(timeout_s):
            await follow_quietly(remote, run["id"])
        return await remote.get(f"/v1/runs/{run['id']}")

    run = patiently(lambda: call(url, token, talk), timeout_s)
    print_run(run, as_json=as_json, brief=not wait)
    if wait:
        exit_by(run["state"])


@app.command()
def why(
    run_id: RunId, as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None
) -> None:
    """Tell why a run does not run, or since when it does."""
    answer = call(url, token, lambda remote: remote.get(f"/v1/runs/{run_id}/why"))
    if as_json:
        print_json(answer)
        return
    out().print(plain(f"run {run_id} is {answer['state']}"))
    for reason in answer["reasons"]:
        out().print(plain(f"{reason['kind']}: {reason['text']}"), soft_wrap=True)
    if answer["estimate"]:
        out().print(plain(answer["estimate"]["text"]), soft_wrap=True)
    if answer["deadline_at"]:
        out().print(plain(f"It has to be over by {answer['deadline_at']}."))


@app.command()
def signal(
    run_id: RunId,
    name: Annotated[str, typer.Argument(help="What the flow waits for.", show_default=False)],
    data_text: Annotated[
        str, typer.Option("--data", "-d", help="Data: JSON text, @file, or - for stdin.")
    ] = "null",
    key: Annotated[
        str | None, typer.Option("--idempotency-key", help="A repeat sends nothing.")
    ] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Tell a run something that it waits for, or will."""
    body = {"name": name, "data": read_json(data_text, param="--data")}
    answer = call(
        url,
        token,
        lambda remote: remote.post(f"/v1/runs/{run_id}/signals", body, headers=keyed(key)),
    )
    if as_json:
        print_json(answer)
    else:
        out().print(plain(f"run {run_id} was sent {answer['name']}"))


@app.command()
def resume(
    run_id: RunId, as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None
) -> None:
    """Set a blocked run going again, after the code that its history needs was deployed."""
    answer = call(url, token, lambda remote: remote.post(f"/v1/runs/{run_id}/resume", {}))
    if as_json:
        print_json(answer)
    else:
        out().print(plain(f"run {run_id} is {answer['state']}"))


async def follow_quietly(remote: Remote, run_id: str) -> None:
    """Follow a run to its end, telling its events as progress."""
    async with aclosing(remote.follow(run_id)) as events:
        async for event in events:
            progress(timeline.event_line(event).plain)


def patiently(work: Callable[[], T], timeout_s: float | None) -> T:
    """Run `work`; when its own timeout passed, say so instead of raising TimeoutError."""
    try:
        return work()
    except TimeoutError as error:
        raise TimedOut(
            f"the run did not finish within {timeout_s} s",
            advice="It goes on; `millpond runs tail` follows it.",
        ) from error


def print_run(run: Json, *, as_json: bool, brief: bool) -> None:
    """Print a run as JSON, as one line, or with its steps."""
    if as_json:
        print_json(run)
        return
    if brief:
        known = "" if run.get("is_new", True) else " (live already)"
        out().print(plain(f"run {run['id']} {run['state']}{known}"))
        return
    fields = ["id", "flow", "version", "queue", "state", "subject", "attempts"]
    fields += ["created_at", "started_at", "finished_at", "input", "output", "error"]
    told = ("parent_id", "continued_from", "continued_to", "rerun_of", "rerun_from", "reruns")
    fields += [name for name in told if run.get(name)]
    shown = [(name, run.get(name)) for name in fields]
    shown += [(f"state {name}", value) for name, value in run.get("state_values", {}).items()]
    print_fields(shown)
    if run.get("blocked"):
        out().print(plain(f"blocked: {run['blocked'].get('message', '')}"))
    if run.get("steps"):
        columns = ["step", "kind", "state", "tries", "took", "key"]
        print_table(columns, timeline.step_rows(run["steps"]), empty="")
    for request in run.get("input_requests") or []:
        out().print(plain(f"waits for {request['role']}: {request['title']} ({request['id']})"))


def _start_batch(
    path: str,
    defaults: dict[str, Json],
    headers: dict[str, str],
    *,
    wait: bool,
    as_json: bool,
    url: str,
    token: Bearer | None,
) -> None:
    if wait:
        raise InvalidInput("--wait follows one run, not a batch", param="--wait")
    body = {"runs": read_batch(path, defaults)}
    answer = call(url, token, lambda remote: remote.post("/v1/runs/batch", body, headers=headers))
    if as_json:
        print_json(answer)
        return
    joined = set(answer["joined"])
    for place, run_id in enumerate(answer["ids"]):
        out().print(plain(f"run {run_id} {'is live already' if place in joined else 'accepted'}"))


def exit_by(state: str) -> None:
    """Leave with the code of a final state; a stream that ended before it tells of the state itself."""
    if state in ("failed", "cancelled"):
        raise typer.Exit(ExitCode.FAILED)


def _took(run: Json) -> str:
    return timeline.duration(run)
