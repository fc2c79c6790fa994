"""`millpond runs cancel`, `rerun` and `release`: one run, or with --all every run that fits.

Called by `main`, which adds them to the commands of `runs`. Invariant: many runs are never acted on
before their number was shown and agreed to.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from millpond.cli.call import call
from millpond.cli.exit import ExitCode
from millpond.cli.options import DEFAULT_URL, AsJson, Bearer, Token, Url, read_json, read_pairs
from millpond.cli.output import err, out, plain, print_json, print_table
from millpond.cli.runs import (
    Key,
    RunId,
    Timeout,
    Wait,
    begin,
    follow_quietly,
    keyed,
    patiently,
)
from millpond.errors import InvalidInput
from millpond.types import Json

if TYPE_CHECKING:
    from millpond.cli.remote import Remote

OneRun = Annotated[str | None, typer.Argument(help="Id of the run.", show_default=False)]
Everyone = Annotated[bool, typer.Option("--all", help="Every run that fits the filter.")]
States = Annotated[list[str] | None, typer.Option("--state", help="With --all: in this state.")]
Flow = Annotated[str | None, typer.Option(help="With --all: of this flow.")]
Queue = Annotated[str | None, typer.Option(help="With --all: of this queue.")]
Labels = Annotated[
    list[str] | None, typer.Option("--label", help="With --all: with this label, name=value.")
]
After = Annotated[
    str | None, typer.Option("--created-after", help="With --all: made at or after this time.")
]
Before = Annotated[
    str | None, typer.Option("--created-before", help="With --all: made before this time.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="With --all: only count.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="With --all: do not ask.")]


def add_to(app: typer.Typer) -> None:
    """Add these commands to a group."""
    for command in (cancel, rerun, release):
        app.command()(command)


def cancel(
    run_id: OneRun = None,
    reason: Annotated[str, typer.Option(help="Why, for the record.")] = "",
    skip_endings: Annotated[
        bool, typer.Option("--skip-endings", help="Undo nothing, ask nothing: end it at once.")
    ] = False,
    everyone: Everyone = False,
    state: States = None,
    flow: Flow = None,
    queue: Queue = None,
    label: Labels = None,
    created_after: After = None,
    created_before: Before = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    wait: Wait = False,
    timeout_s: Timeout = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Ask a run to stop, or with --all every run that fits.

    With --wait, the exit code is 1 when a run ended otherwise before it could be cancelled.
    """
    wanted = _wanted(state, flow, queue, label, created_after, created_before)
    _one_or_all(run_id, wanted, everyone=everyone)
    if everyone:
        body: dict[str, Any] = {"action": "cancel", "filter": wanted, "reason": reason}
        if skip_endings:
            body["skip_endings"] = True
        if _agreed(body, dry_run=dry_run, yes=yes, as_json=as_json, url=url, token=token):
            _begin_bulk(body, {}, wait, timeout_s, as_json=as_json, url=url, token=token)
        return
    assert run_id is not None
    told = {"reason": reason, "skip_endings": skip_endings}

    async def talk(remote: Remote) -> Json:
        run = await remote.post(f"/v1/runs/{run_id}/cancel", told)
        if not wait:
            return run
        async with asyncio.timeout(timeout_s):
            await follow_quietly(remote, run_id)
        return await remote.get(f"/v1/runs/{run_id}")

    answer = patiently(lambda: call(url, token, talk), timeout_s)
    if as_json:
        print_json(answer)
    else:
        out().print(plain(f"run {run_id} is {answer['state']}"))
    if wait and answer["state"] != "cancelled":
        raise typer.Exit(ExitCode.FAILED)


def rerun(
    run_id: OneRun = None,
    from_step: Annotated[
        str | None,
        typer.Option(help="Key of the step from which on it runs again. Unset: from the start."),
    ] = None,
    input_text: Annotated[
        str | None,
        typer.Option("--input", "-i", help="Another input: JSON text, @file, or - for stdin."),
    ] = None,
    everyone: Everyone = False,
    state: States = None,
    flow: Flow = None,
    queue: Queue = None,
    label: Labels = None,
    created_after: After = None,
    created_before: Before = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    key: Key = None,
    wait: Wait = False,
    timeout_s: Timeout = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Repeat a run by a new one, or with --all every run that fits, from the start."""
    wanted = _wanted(state, flow, queue, label, created_after, created_before)
    _one_or_all(run_id, wanted, everyone=everyone)
    if everyone:
        if from_step is not None or input_text is not None:
            raise InvalidInput("many runs are repeated from the start, with their own input")
        body: dict[str, Any] = {"action": "rerun", "filter": wanted}
        if _agreed(body, dry_run=dry_run, yes=yes, as_json=as_json, url=url, token=token):
            _begin_bulk(body, keyed(key), wait, timeout_s, as_json=as_json, url=url, token=token)
        return
    body = {} if from_step is None else {"from_step": from_step}
    if input_text is not None:
        body["input"] = read_json(input_text, param="--input")

    async def post(remote: Remote) -> Json:
        run = await remote.post(f"/v1/runs/{run_id}/rerun", body, headers=keyed(key))
        await _tell_version(remote, run)
        return run

    begin(post, wait=wait, timeout_s=timeout_s, as_json=as_json, url=url, token=token)


def release(
    run_id: RunId,
    reason: Annotated[str, typer.Option(help="Why, for the record.")] = "",
    key: Key = None,
    wait: Wait = False,
    timeout_s: Timeout = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Let a run that was failed as poison be tried again, alone, from all that it recorded."""
    path, body = f"/v1/runs/{run_id}/release", {"reason": reason}
    begin(
        lambda remote: remote.post(path, body, headers=keyed(key)),
        wait=wait,
        timeout_s=timeout_s,
        as_json=as_json,
        url=url,
        token=token,
    )


async def _tell_version(remote: Remote, run: Json) -> None:
    """Say on stderr when a run is repeated by another version of its flow."""
    first = await remote.get(f"/v1/runs/{run['rerun_of']}")
    if first["version"] != run["version"]:
        text = f"by version {run['version']}: no worker has version {first['version']} any more"
        err().print(plain(text), style="dim")


def _wanted(
    states: list[str] | None,
    flow: str | None,
    queue: str | None,
    labels: list[str] | None,
    created_after: str | None,
    created_before: str | None,
) -> dict[str, Any]:
    """Return the filter of the options that were given."""
    given: dict[str, Any] = {
        "states": states,
        "flow": flow,
        "queue": queue,
        "labels": read_pairs(labels or [], param="--label"),
        "created_after": created_after,
        "created_before": created_before,
    }
    return {name: value for name, value in given.items() if value}


def _one_or_all(run_id: str | None, wanted: dict[str, Any], *, everyone: bool) -> None:
    if everyone == (run_id is not None):
        raise InvalidInput("give the id of a run, or --all with a filter", param="RUN_ID")
    if wanted and not everyone:
        raise InvalidInput("a filter needs --all", param="--all")


def _agreed(
    body: dict[str, Any], *, dry_run: bool, yes: bool, as_json: bool, url: str, token: Bearer | None
) -> bool:
    """Show how many runs it would be; return whether that was agreed to."""
    if yes and not dry_run:
        return True
    told = call(url, token, lambda remote: remote.post("/v1/runs/bulk", {**body, "dry_run": True}))
    if dry_run and as_json:
        print_json(told)
        return False
    more = "" if told["is_exact"] else "more than "
    if dry_run:
        rows = [[run["id"], run["flow"], run["state"]] for run in told["examples"]]
        print_table(["run", "flow", "state"], rows, empty="No runs.")
        out().print(plain(f"{more}{told['matched']} runs"))
        return False
    question = f"{told['action']} {more}{told['matched']} runs?"
    if not sys.stdin.isatty():
        raise InvalidInput(f"not asked on a terminal: {question}", advice="Agree to it by --yes.")
    return typer.confirm(question, err=True)


def _begin_bulk(
    body: dict[str, Any],
    headers: dict[str, str],
    wait: bool,
    timeout_s: float | None,
    *,
    as_json: bool,
    url: str,
    token: Bearer | None,
) -> None:
    begin(
        lambda remote: remote.post("/v1/runs/bulk", body, headers=headers),
        wait=wait,
        timeout_s=timeout_s,
        as_json=as_json,
        url=url,
        token=token,
    )
