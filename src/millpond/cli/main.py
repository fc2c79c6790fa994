"""The `millpond` command: groups every command, turns expected errors into a line and an exit code.

Called by the console script and by `python -m millpond.cli`. Invariant: an expected error never
shows a traceback, and an unexpected one never shows the values of variables.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from millpond.cli import (
    accounts,
    audit,
    catalog,
    doctor,
    events,
    flows,
    inputs,
    issuers,
    kb,
    keys,
    limits,
    operator,
    org,
    orgs,
    pauses,
    plans,
    prune,
    reruns,
    runs,
    schedules,
    schema,
    secrets,
    serve,
    sign_in,
    tokens,
    triggers,
    up,
    usage,
    work,
)
from millpond.cli.demo import command
from millpond.cli.exit import MEANINGS, exit_code
from millpond.cli.output import print_error
from millpond.errors import MillpondError


class Commands(TyperGroup):
    """A group of commands that reports Millpond's errors in words."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an expected error becomes a line on stderr and its exit code."""
        try:
            return super().invoke(ctx)
        except MillpondError as error:
            print_error(error)
            raise typer.Exit(exit_code(error)) from error


_CODES = "\n".join(f"* {code.value}: {meaning}" for code, meaning in MEANINGS.items())

app = typer.Typer(
    name="millpond",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog=f"Exit codes:\n\n{_CODES}",
    help="Run AI work for many organizations: durable, limited, fair, visible.",
)
app.command()(up.up)
app.command()(serve.api)
app.command()(work.worker)
app.command()(schema.migrate)
app.command()(doctor.doctor)
app.command()(prune.prune)
app.command()(sign_in.login)
app.command()(sign_in.logout)
app.command()(sign_in.whoami)
app.command()(tokens.token)
app.command()(command.demo)
app.add_typer(runs.app, name="runs")
app.add_typer(schedules.app, name="schedules")
app.add_typer(triggers.app, name="triggers")
app.add_typer(events.app, name="events")
reruns.add_to(runs.app)
app.add_typer(inputs.app, name="inputs")
app.add_typer(kb.app, name="kb")
app.add_typer(keys.app, name="keys")
app.add_typer(issuers.app, name="issuers")
app.add_typer(secrets.app, name="secrets")
app.add_typer(audit.app, name="audit")
app.add_typer(operator.app, name="operator")
for name, group in {**accounts.GROUPS, **org.GROUPS, **orgs.GROUPS}.items():
    app.add_typer(group, name=name)
app.add_typer(plans.plans, name="plans")
app.add_typer(plans.prices, name="prices")
app.command()(usage.usage)
app.command()(usage.quotas)
app.add_typer(flows.app, name="flows")
app.command()(catalog.queues)
app.command()(catalog.workers)
app.add_typer(pauses.pause, name="pause")
app.add_typer(pauses.resume, name="resume")
app.command()(pauses.pauses)
app.add_typer(limits.app, name="limits")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("millpond"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    org: Annotated[
        str | None,
        typer.Option(
            envvar="MILLPOND_ORG",
            help="Organization to work in, by name or id. Unset: the one chosen by `millpond org use`.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Read the options that stand before a command."""


def main() -> None:
    """Run the command line: the entry point of the console script."""
    app(prog_name="millpond")
