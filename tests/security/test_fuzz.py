"""Schemathesis against the running server: no 5xx, nothing that the OpenAPI document does not say.

Invariant: its own report is held against the document, so that a run which left operations out, or stopped early,
fails.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import schemathesis.cli
from tests.security.conftest import Person, World
from tests.security.test_matrix import DOCUMENT

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "ignored_auth",
)
PHASES = ("examples", "coverage", "fuzzing")
PLATFORM = "/v1/platform/"
# Of each operation in the phase of random requests; those of the other phases follow from the document.
EXAMPLES = 5


def operations(below: str = "/") -> int:
    """Count the operations of the document."""
    return sum(
        len(methods) for path, methods in DOCUMENT["paths"].items() if path.startswith(below)
    )


async def report_of(
    world: World, person: Person, folder: Path, words: Sequence[str] = ()
) -> dict[str, Any]:
    """Let schemathesis ask as somebody; returns its report."""
    path = folder / "report.json"
    command = [
        sys.executable,
        "-m",
        schemathesis.cli.__name__,
        "run",
        f"{world.front.url}/openapi.json",
        *("--checks", ",".join(CHECKS)),
        *("--phases", ",".join(PHASES)),
        *("--max-examples", str(EXAMPLES)),
        *("--header", f"Authorization: Bearer {world.token(person, 3600)}"),
        "--generation-deterministic",
        *("--suppress-health-check", "all"),
        *("--warnings", "off"),
        "--continue-on-failure",
        *("--request-timeout", "20"),
        *("--report-json-path", str(path)),
        "--no-color",
        *words,
    ]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said = (await process.communicate())[0].decode()
    assert process.returncode == 0, said[-6000:]
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def check(report: dict[str, Any], selected: int) -> None:
    """Nothing was found, in all of so many operations, none of which was left out."""
    asked = report["operations"]
    assert (asked["selected"], asked["tested"]) == (selected, selected), asked
    assert (asked["errored"], asked["skipped"]) == (0, 0)
    assert report["complete"] is True
    assert {phase: report["phases"][phase]["status"] for phase in PHASES[1:]} == dict.fromkeys(
        PHASES[1:], "success"
    )
    assert report["test_cases"]["generated"] > EXAMPLES * selected
    assert (report["failures"], report["errors"]) == ([], [])


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_generated_requests_find_no_5xx_and_no_breach_of_the_schema(
    world: World, tmp_path: Path
) -> None:
    await world.front.publish("echo")
    report = await report_of(world, await world.member("owner"), tmp_path)
    check(report, operations())


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_generated_requests_of_an_operator_find_none_either(
    world: World, tmp_path: Path
) -> None:
    """An owner gets no further than 403 there."""
    operator = await world.person(is_operator=True)
    report = await report_of(world, operator, tmp_path, ["--include-path-regex", f"^{PLATFORM}"])
    check(report, operations(PLATFORM))
    assert await world.count("platform_audit") > operations(PLATFORM)
