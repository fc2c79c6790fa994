"""Schemathesis against the running server: no 5xx, nothing that the OpenAPI document does not say."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
import schemathesis.cli
from tests.security.conftest import World

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "ignored_auth",
)
SECONDS = 45


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_generated_requests_find_no_5xx_and_no_breach_of_the_schema(
    world: World, tmp_path: Path
) -> None:
    await world.front.publish("echo")
    person = await world.member("owner")
    command = [
        sys.executable,
        "-m",
        schemathesis.cli.__name__,
        "run",
        f"{world.front.url}/openapi.json",
        "--checks",
        ",".join(CHECKS),
        "--max-examples",
        "10",
        "--max-time",
        str(SECONDS),
        "--phases",
        "examples,coverage,fuzzing",
        "--header",
        f"Authorization: Bearer {world.token(person, 3600)}",
        "--generation-deterministic",
        "--suppress-health-check",
        "all",
        "--warnings",
        "off",
        "--continue-on-failure",
        "--request-timeout",
        "20",
        "--no-color",
    ]
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said = (await process.communicate())[0].decode()
    assert process.returncode == 0, said[-6000:]
    assert "No issues found" in said or "passed" in said, said[-2000:]
