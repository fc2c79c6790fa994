"""The examples of docs/client.md are taken from the page and run against a real server, in order."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from tests.api.conftest import Front

from millpond.engine import bulk
from millpond.engine.bulk import Operator
from millpond.engine.context import Context
from millpond.engine.triggers import EventInput
from millpond.knowledge.flows import ingest
from millpond.knowledge.store import KnowledgeStore


def flows(front: Front) -> None:
    """Register the flows that the page names, and one that asks a question."""

    async def ship(ctx: Context, order: dict[str, Any]) -> str:
        paid = await ctx.wait_event("paid")
        return f"{order['order']} shipped for {paid.data['cents']} cents"

    async def react(ctx: Context, event: EventInput[Any]) -> None:
        await ctx.emit("seen", {"order": event.event.data["order"]})

    async def ask(ctx: Context, _: Any) -> Any:
        form = {"type": "object", "properties": {"approved": {"type": "boolean"}}}
        question = ctx.ask_human("ship", title="Ship it?", role="support", form=form)
        return (await question).answer

    front.flow(ship, name="orders.ship")
    front.flow(react, name="orders.react")
    front.flow(ask)
    front.registry.add_flow(bulk.bulk)
    front.registry.add_flow(ingest)


async def test_the_examples_of_the_page_run(
    front: Front, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    page = (root / "docs" / "client.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 10  # but for the one that never ends
    (tmp_path / "returns.md").write_text("# Returns\n\nA kettle may be returned for 30 days.\n")
    monkeypatch.chdir(tmp_path)
    flows(front)
    known: dict[str, Any] = {"url": front.url, "token": front.token(), "__name__": "page"}

    def use() -> None:
        for number, block in enumerate(blocks):
            if "pond.inputs" in block:
                _ask(known["pond"])
            exec(compile(block, f"docs/client.md, block {number}", "exec"), known)
        known["pond"].close()

    resources = {
        KnowledgeStore: front.app.state.ports.knowledge,
        Operator: Operator(db=front.db, hints=front.app.state.ports.hints),
    }
    async with front.worker(resources, default=5, index=2):
        await asyncio.to_thread(use)
    printed = capsys.readouterr().out
    for shown in (
        "A-100 shipped for 4900 cents",
        "duplicate_run",
        "Ship it?",
        "queue:default repairs user:ann",
        "returns.md ready",
        "A-104 shipped for 700 cents",
    ):
        assert shown in printed


def _ask(pond: Any) -> None:
    """Let a run ask, and wait until it has."""
    for event in pond.runs.start("ask").events():
        if event.kind == "run.awaiting_input":
            return
    raise AssertionError("the run ended without a question")
