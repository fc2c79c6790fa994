"""`millpond worker`: one worker process, or several (in a container also one) under a supervisor.

Called by `main`, and started by `millpond up`. Invariants: step code gets the application's pool and
what is in `resources`, never the engine's pool; SIGTERM drains, a second signal ends at once.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Annotated

import typer

from millpond.cli.exit import ExitCode
from millpond.cli.options import DataDir, Flows, WorkerLabels, joined_labels
from millpond.cli.serve import ParentFd

if TYPE_CHECKING:
    from millpond.engine.registry import Flow
    from millpond.settings import Settings

# Time to close after the drain, before a worker whose parent is gone ends hard.
_CLOSE_S = 10.0


def worker(
    flows: Flows = None,
    queues: Annotated[
        str | None,
        typer.Option(help="Queues with their slots: name:slots,… (MILLPOND_QUEUES)."),
    ] = None,
    spill: Annotated[
        str | None,
        typer.Option(
            help="Whom idle slots help, in order: queue:helped+helped,… (MILLPOND_SPILL)."
        ),
    ] = None,
    spill_keep: Annotated[
        str | None,
        typer.Option(
            help="Slots that stay free when a queue helps: queue:slots,… (MILLPOND_SPILL_KEEP)."
        ),
    ] = None,
    reserve: Annotated[
        str | None,
        typer.Option(
            help="Slots for orgs not above their share: queue:slots,… (MILLPOND_RESERVE)."
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            help="Worker processes, each with all the slots (MILLPOND_PROCESSES).",
            min=1,
            max=256,
            show_default=False,
        ),
    ] = None,
    label: WorkerLabels = None,
    data_dir: DataDir = None,
    alone: Annotated[bool, typer.Option("--alone", hidden=True)] = False,
    name: Annotated[str, typer.Option("--process-name", hidden=True)] = "worker",
    parent_fd: ParentFd = None,
) -> None:
    """Run workers on MILLPOND_DATABASE_URL, or beside the `millpond up` of this machine."""
    from millpond.cli.config import read_settings
    from millpond.cli.logs import configure_logging
    from millpond.cli.loop import run_loop
    from millpond.cli.signals import end_with_parent
    from millpond.cli.workers import run_supervised

    settings = read_settings(
        flows=flows,
        queues=queues,
        spill=spill,
        spill_keep=spill_keep,
        reserve=reserve,
        labels=joined_labels(label),
        processes=processes,
        data_dir=data_dir,
    )
    configure_logging(settings.log_level, process=name)
    end_with_parent(parent_fd, grace_s=settings.drain_s + _CLOSE_S)
    # Linux shields the first process of a container from signals of those below it: its heartbeat could not end it.
    is_first = os.getpid() == 1
    if (settings.processes > 1 or is_first) and not alone:
        run_supervised(settings)
    else:
        run_loop(_work(settings, name, alone=alone))


async def _work(settings: Settings, name: str, *, alone: bool) -> None:
    from millpond.cli.config import queue_slots, spill_of, worker_labels
    from millpond.cli.key_ring import open_ring
    from millpond.cli.limit_settings import declare_code
    from millpond.cli.prune import keep
    from millpond.cli.resources import open_step_resources
    from millpond.cli.running import find_databases
    from millpond.cli.signals import on_continue, stop_event
    from millpond.cli.workers import alone_command
    from millpond.db.migrate import check_schema
    from millpond.db.pool import Database, EngineDatabase
    from millpond.engine.bulk import Operator
    from millpond.engine.hints import Hints
    from millpond.engine.registry import REGISTRY
    from millpond.engine.worker import Worker
    from millpond.identity.current_rights import CurrentRights
    from millpond.identity.vault import Vault

    slots, labels = queue_slots(settings), worker_labels(settings)
    databases = find_databases(settings)
    engine_url = databases.need_engine()
    async with contextlib.AsyncExitStack() as stack:
        stop = stack.enter_context(stop_event())
        await check_schema(engine_url)
        await check_schema(databases.app)
        flows = load_flows(settings)
        app = await Database.connect(databases.app, name="millpond-steps", min_size=0)
        stack.push_async_callback(app.close)
        vault = Vault(app, await open_ring(settings, app))
        hints = await Hints.connect(databases.app_listen)
        stack.push_async_callback(hints.close)
        if not alone:
            await declare_code(app, hints, flows)
        engine = await EngineDatabase.connect(engine_url)
        stack.push_async_callback(engine.close)
        made = Worker(
            database=engine,
            engine_url=engine_url,
            listen_url=databases.engine_listen,
            flows=flows,
            slots=slots,
            steps=REGISTRY.steps.values(),
            labels=labels,
            resources={
                **open_step_resources(settings, app, stack),
                Operator: Operator(db=app, hints=hints),
            },
            lease_s=settings.lease_s,
            drain_s=settings.drain_s,
            alone=alone,
            alone_command=alone_command(settings, name),
            keep=keep(settings),
            rights=CurrentRights(engine),
            vault=vault,
            spill=spill_of(settings, slots),
            lead_s=settings.interactive_lead_s,
        )
        stack.enter_context(on_continue(made.go_on))
        await made.run(stop)
    if alone and not made.has_worked:
        raise typer.Exit(ExitCode.FAILED)


def load_flows(settings: Settings) -> list[Flow]:
    """Import the modules that register flows; raises InvalidInput naming one that does not import."""
    from millpond.cli.config import flow_modules, import_from_here
    from millpond.engine.registry import REGISTRY
    from millpond.errors import InvalidInput

    import_from_here()
    try:
        return REGISTRY.select(flow_modules(settings))
    except ModuleNotFoundError as error:
        raise InvalidInput(
            f"the flow module cannot be imported: {error}",
            param="MILLPOND_FLOWS",
            advice="Name it as Python imports it, from the folder in which you start the worker.",
        ) from error
