"""Recorded histories as files: `tests/golden/histories/NAME.json`, replayed by newer code.

Called by the tests of flows that keep such a file. Invariant: a file is what one real run recorded; it is
written anew under --renew-golden only, and a change of it means that unfinished runs of that flow break.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from millpond.db.pool import EngineDatabase
from millpond.engine.checking import Comparison, compare
from millpond.engine.history import Recorded
from millpond.engine.leases import Claimed, Lease
from millpond.engine.registry import Flow

FOLDER = Path(__file__).parent / "golden" / "histories"
_NOBODY = uuid.UUID(int=0)
_STEPS = """
select step_key, name, kind, state, output, error, tries, seq from step where run_id = $1
order by started_at, step_key
"""


async def save(name: str, database: EngineDatabase, run_id: uuid.UUID) -> None:
    """Write what a run has recorded to its file."""
    async with database.duty("test") as con:
        run = await con.fetchrow(
            "select flow, version, queue, input, subject, run_id from run where run_id = $1", run_id
        )
        steps = await con.fetch(_STEPS, run_id)
    assert run is not None
    document = {
        **{key: str(value) for key, value in run.items()},
        "version": run["version"],
        "input": json.loads(run["input"]),
        "steps": [
            {
                key: json.loads(value) if key in ("output", "error") else value
                for key, value in step.items()
                if value is not None
            }
            for step in steps
        ],
    }
    FOLDER.mkdir(exist_ok=True)
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")


async def replayed(
    name: str, flow: Flow, resources: Mapping[type, object] | None = None
) -> Comparison:
    """Replay a file by the flow code of today."""
    saved = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert (saved["flow"], saved["version"]) == (flow.name, flow.version)
    run_id = uuid.UUID(saved["run_id"])
    claimed = Claimed(
        lease=Lease(1, run_id, run_id, 1, _NOBODY),
        deaths=0,
        tries=0,
        cancel_requested=False,
        flow=flow.name,
        version=flow.version,
        queue=saved["queue"],
        input=json.dumps(saved["input"]),
        subject=saved["subject"],
        timeout_s=None,
    )
    recorded = {step["step_key"]: _recorded(step) for step in saved["steps"]}
    return await compare(flow, claimed, recorded, resources or {})


def _recorded(step: dict[str, Any]) -> Recorded:
    return Recorded(
        kind=step["kind"],
        state=step["state"],
        output=json.dumps(step["output"]) if "output" in step else None,
        error=json.dumps(step["error"]) if "error" in step else None,
        tries=step["tries"],
        age_s=0.0,
        is_due=True,
        name=step["name"],
        seq=step.get("seq"),
    )
