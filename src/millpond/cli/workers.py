"""Worker processes side by side: what each is called and how it is started.

Called by `worker --processes` and by `platform`. Invariants: each has all the slots and a name that
its log lines carry; they end together, after whatever brings new work.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from millpond.cli.supervise import Child, Supervisor

if TYPE_CHECKING:
    from millpond.settings import Settings

WORKER_STAGE = 1
# Beyond its own drain, a worker needs time to hand back what did not end and to close.
WORKER_EXTRA_S = 10.0


def worker_children(settings: Settings, environment: Mapping[str, str]) -> list[Child]:
    """Describe as many worker processes as the settings ask for; nothing runs yet."""
    several = [f"worker-{nth}" for nth in range(1, settings.processes + 1)]
    return [
        Child(
            name=name,
            arguments=["worker", "--process-name", name],
            environment=environment,
            grace_s=settings.drain_s + WORKER_EXTRA_S,
            stage=WORKER_STAGE,
        )
        for name in (several if settings.processes > 1 else ["worker"])
    ]


async def supervise(settings: Settings) -> None:
    """Keep worker processes alive until told to stop; raises when one does not stay up."""
    from millpond.cli.config import child_environment
    from millpond.cli.running import find_databases
    from millpond.cli.signals import stop_event
    from millpond.db.migrate import check_schema

    databases = find_databases(settings)
    await check_schema(databases.need_engine())
    supervisor = Supervisor()
    with stop_event(on_second=supervisor.kill) as stop:
        supervisor.failed.add_done_callback(lambda _: stop.set())
        try:
            for child in worker_children(settings, child_environment(settings, databases)):
                await supervisor.start(child)
            await stop.wait()
        finally:
            await supervisor.end()
    supervisor.raise_if_failed()


def alone_command(settings: Settings, name: str) -> list[str]:
    """Return the command of a process that executes one work item alone; it watches its stdin."""
    from millpond.cli.config import worker_labels

    command = [sys.executable, "-m", "millpond.cli", "worker", "--alone", "--parent-fd", "0"]
    command += ["--process-name", f"{name}-alone", "--data-dir", str(settings.data_dir)]
    command += ["--flows", settings.flows, "--queues", settings.queues]
    command += ["--spill", settings.spill]
    labels = worker_labels(settings)
    return [*command, *(f"--label={name}={value}" for name, value in labels.items())]


def run_supervised(settings: Settings) -> None:
    """Run the supervisor's loop."""
    asyncio.run(supervise(settings))
