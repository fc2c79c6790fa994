"""`millpond flows`: what can be started, and whether changed code still fits what was recorded.

Called by `main`. Invariant: both only read.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from millpond.cli.call import call
from millpond.cli.catalog import paused
from millpond.cli.exit import ExitCode
from millpond.cli.options import DEFAULT_URL, AsJson, DataDir, Flows, Token, Url
from millpond.cli.output import err, plain, print_json, print_table
from millpond.types import Json

if TYPE_CHECKING:
    from millpond.engine.checking import Checked
    from millpond.engine.registry import Flow
    from millpond.settings import Settings

app = typer.Typer(help="See the flows that can be started; check changed code against histories.")


@app.callback(invoke_without_command=True)
def flows(
    ctx: typer.Context, as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None
) -> None:
    """List the flows that workers have published; with --json also their input schemas."""
    if ctx.invoked_subcommand is not None:
        return
    page = call(url, token, lambda remote: remote.get("/v1/flows"))
    if as_json:
        print_json(page)
        return
    rows = [
        [
            flow["name"],
            flow["version"],
            flow["queue"],
            flow["urgency"],
            paused(flow["pauses"]),
            _first_line(flow.get("description")),
        ]
        for flow in page["data"]
    ]
    print_table(
        ["flow", "version", "queue", "urgency", "paused", "what it does"],
        rows,
        empty="No flows: no worker has published any yet (`millpond worker --flows …`).",
    )


@app.command()
def check(
    modules: Flows = None,
    flow: Annotated[str | None, typer.Option("--flow", help="Only this flow.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many runs.", min=1, max=100_000)] = 1000,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Replay recorded runs by the code of --flows, executing and writing nothing; exit code 1 on a mismatch."""
    from millpond.cli.config import read_settings
    from millpond.cli.logs import configure_logging

    settings = read_settings(flows=modules, data_dir=data_dir)
    configure_logging(settings.log_level, process="check")
    checked = asyncio.run(_check(settings, flow, limit))
    found = [_document(one) for one in checked]
    bad = [one for one in found if one["result"] == "mismatch"]
    if as_json:
        print_json(
            {"object": "check", "checked": len(found), "mismatches": len(bad), "data": found}
        )
    else:
        rows = [[one["run_id"], one["flow"], one["state"], one["result"]] for one in found]
        print_table(["run", "flow", "state", "result"], rows, empty="No begun runs of these flows.")
        for one in found:
            if one["message"]:
                err().print(plain(f"{one['run_id']}: {one['message']}"))
    if bad:
        raise typer.Exit(ExitCode.FAILED)


async def _check(settings: Settings, name: str | None, limit: int) -> list[Checked]:
    from millpond.cli.resources import open_step_resources
    from millpond.cli.running import find_databases
    from millpond.cli.work import load_flows
    from millpond.db.migrate import check_schema
    from millpond.db.pool import Database, EngineDatabase
    from millpond.engine.checking import check

    databases = find_databases(settings)
    wanted = _named(load_flows(settings), name)
    async with contextlib.AsyncExitStack() as stack:
        await check_schema(databases.need_engine())
        app_db = await Database.connect(databases.app, name="millpond-check", min_size=0)
        stack.push_async_callback(app_db.close)
        engine = await EngineDatabase.connect(databases.need_engine(), min_size=1, max_size=1)
        stack.push_async_callback(engine.close)
        resources = open_step_resources(settings, app_db, stack)
        return [one async for one in check(engine, wanted, resources, limit=limit)]


def _named(flows: list[Flow], name: str | None) -> list[Flow]:
    from millpond.errors import NotFound

    wanted = [flow for flow in flows if name in (None, flow.name)]
    if not wanted:
        raise NotFound(f"no module of --flows registers the flow {name}", param="--flow")
    return wanted


def _document(one: Checked) -> Json:
    mismatch = one.comparison.mismatch
    return {
        "run_id": str(one.run_id),
        "org_id": one.org_id,
        "flow": one.flow,
        "version": one.version,
        "state": one.state,
        "steps": one.steps,
        "result": one.comparison.result,
        "message": str(one.comparison),
        "mismatch": None if mismatch is None else mismatch.described(),
    }


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]
