"""`millpond demo`: starts a private platform, plays, tells the verdict, leaves nothing behind.

Called by `main`, and by `make demo`. Invariant: it ends with 0 only if every finding is true.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from millpond.cli.exit import ExitCode, Interrupted
from millpond.cli.options import AsJson
from millpond.cli.output import print_json
from millpond.errors import MillpondError
from millpond.types import Json

if TYPE_CHECKING:
    from millpond.cli.demo.play import Play
    from millpond.cli.demo.stage import Stage
    from millpond.settings import Settings

# Short, so that nobody waits long for the rescue; `millpond up` has its own setting.
LEASE_S = 4.0
_LOG = "demo.log"


def demo(
    keep: Annotated[bool, typer.Option(help="Keep the data folder of the demo.")] = False,
    as_json: AsJson = False,
) -> None:
    """Watch one real AI job take the whole road, a killed worker included (about a minute)."""
    from millpond.cli.config import read_settings
    from millpond.cli.demo.folder import private_folder
    from millpond.cli.demo.script import FLOW_MODULE, find_clone
    from millpond.cli.demo.stage import Stage
    from millpond.cli.logs import configure_logging

    clone = find_clone()
    os.chdir(clone)
    stage = Stage(is_quiet=as_json)
    with private_folder(keep=keep) as folder, (folder / _LOG).open("a") as log:
        settings = read_settings(
            data_dir=folder / "data",
            host="127.0.0.1",
            port=0,
            flows=FLOW_MODULE,
            lease_s=LEASE_S,
            database_url="",
        )
        configure_logging(settings.log_level, process="demo", stream=log)
        try:
            verdict = asyncio.run(_perform(settings, stage, clone, folder / _LOG))
        except Interrupted:
            raise
        except MillpondError:
            stage.say(_end_of(folder / _LOG), style="dim")
            raise
        if not verdict["ok"]:
            stage.say(_end_of(folder / _LOG), style="dim")
        if keep:
            stage.say(f"Kept: {folder}")
    if as_json:
        print_json(verdict)
    if not verdict["ok"]:
        raise typer.Exit(ExitCode.FAILED)


async def _perform(settings: Settings, stage: Stage, clone: Path, log: Path) -> Json:
    """Start the platform, play, and return the verdict as JSON."""
    from millpond.cli.demo.play import Play
    from millpond.cli.platform import platform
    from millpond.cli.remote import Remote
    from millpond.cli.signals import stop_event

    began = time.monotonic()
    stage.act("Starting Postgres, the API and a worker, each a process of its own")
    with log.open("ab") as sink, stop_event() as stop:
        async with platform(settings, stop=stop, log_file=sink) as made:
            if stop.is_set() or made.token is None:
                raise Interrupted("The demo was stopped.")
            stage.say(f"   ready after {time.monotonic() - began:.1f} s: API at {made.url}")
            stage.say(
                f"   text model: {settings.llm or 'the bundled SmolLM2-135M, on this machine'}"
            )
            async with Remote.connect(made.url, made.token.text) as remote:
                play = Play(
                    remote=remote, platform=made, stage=stage, clone=clone, lease_s=settings.lease_s
                )
                runs = await _or_stopped(play, stop)
    took_s = time.monotonic() - began
    return _verdict(play, runs, stage, took_s)


async def _or_stopped(play: Play, stop: asyncio.Event) -> list[Json]:
    """Play to the end, or raise Interrupted when a signal comes first."""
    playing = asyncio.create_task(play.perform(), name="play")
    stopped = asyncio.create_task(stop.wait(), name="stop")
    await asyncio.wait({playing, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if not playing.done():
        playing.cancel()
        await asyncio.wait({playing})
        raise Interrupted("The demo was stopped.")
    stopped.cancel()
    return playing.result()


def _verdict(play: Play, runs: list[Json], stage: Stage, took_s: float) -> Json:
    """Say who wrote the text and whether all is true; returns the same as JSON."""
    models = sorted(
        {run["output"]["model"] for run in runs if run["output"] and run["output"]["model"]}
    )
    is_ok = bool(play.findings) and all(finding.is_true for finding in play.findings)
    stage.say("")
    stage.say(f"The drafts were written by {', '.join(models) or 'no model'}.")
    if any(model.startswith("local:") for model in models):
        stage.say(
            "That is a very small model (135 million parameters) on this machine's processor. It "
            "proves the plumbing, not judgement:"
        )
        stage.say("do not expect its words to be right. Set MILLPOND_LLM to use a real one.")
    failed = sum(not finding.is_true for finding in play.findings)
    words = "Everything above is true." if is_ok else f"{failed} claims above are NOT true."
    stage.say(f"{words} The demo took {took_s:.0f} s.", style="bold green" if is_ok else "bold red")
    return {
        "object": "demo",
        "ok": is_ok,
        "took_s": round(took_s, 1),
        "models": models,
        "findings": [
            {"claim": one.claim, "is_true": one.is_true, "detail": one.detail}
            for one in play.findings
        ],
        "runs": runs,
    }


def _end_of(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(["the log ends with:", *lines[-15:]])
