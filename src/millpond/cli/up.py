"""`millpond up`: the whole platform on one machine, until it is told to stop.

Called by `main`. Invariant: a token, and links in mail, are printed to a terminal only; elsewhere they are in 0600
files.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from millpond.cli.options import AsJson, DataDir, Flows, WorkerLabels, joined_labels
from millpond.cli.output import out, plain, print_json_line, progress

if TYPE_CHECKING:
    from millpond.cli.platform import Platform
    from millpond.settings import Settings

Port = Annotated[
    int | None,
    typer.Option("--port", help="Port of the API; 0 takes a free one (MILLPOND_PORT).", max=65535),
]


def up(
    data_dir: DataDir = None,
    port: Port = None,
    flows: Flows = None,
    label: WorkerLabels = None,
    as_json: AsJson = False,
) -> None:
    """Start Postgres, the API and workers on this machine; Ctrl-C stops them in order."""
    from millpond.cli.config import read_settings
    from millpond.cli.logs import configure_logging

    settings = read_settings(data_dir=data_dir, port=port, flows=flows, labels=joined_labels(label))
    configure_logging(settings.log_level, process="up")
    asyncio.run(_up(settings, as_json=as_json))


async def _up(settings: Settings, *, as_json: bool) -> None:
    from millpond.cli.platform import platform
    from millpond.cli.signals import stop_event

    running: list[Platform] = []

    def kill() -> None:
        for made in running:
            made.kill()

    with stop_event(on_second=kill) as stop:
        progress(f"starting on {settings.data_dir}")
        async with platform(settings, stop=stop, show_links=not as_json) as made:
            running.append(made)
            if not stop.is_set():
                _banner(made, as_json=as_json)
                await _first(stop, made.supervisor.failed)
            progress("stopping: what ends soon may end; Ctrl-C again stops at once")
        made.supervisor.raise_if_failed()


def _banner(made: Platform, *, as_json: bool) -> None:
    token = made.token
    if as_json:
        document = {
            "url": made.url,
            "api_pid": made.api.pid,
            "worker_pid": made.worker.pid,
            "worker_pids": [worker.pid for worker in made.workers],
            "token_file": str(token.path) if token else None,
        }
        print_json_line(document)
        return
    lines = [
        ("Millpond", made.url),
        ("API", f"{made.url}/openapi.json"),
        ("health", f"{made.url}/readyz"),
        ("database", "embedded Postgres" if made.is_embedded else "MILLPOND_DATABASE_URL"),
    ]
    if token is not None:
        lines.append(("token file", f"{token.path} (development, 8 h)"))
        if sys.stdout.isatty():
            lines.append(("token", token.text))
    for name, value in lines:
        out().print(Text.assemble((f"{name:<12}", "bold"), plain(value)), soft_wrap=True)
    if made.url != "http://127.0.0.1:8080":
        out().print(Text(f"export MILLPOND_URL={made.url}"), soft_wrap=True)
    sys.stdout.flush()


async def _first(stop: asyncio.Event, failed: asyncio.Future[str]) -> None:
    """Return when `stop` is set or a child was given up on."""
    failed.add_done_callback(lambda _: stop.set())
    await stop.wait()
