"""Nothing is served by a database role that could pass over row-level security: the processes themselves refuse it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from tests.cli.conftest import ROOT, clean_environment

from millpond.db.embedded import Urls


@pytest.mark.parametrize(
    ("command", "too_powerful"), [("api", "app"), ("worker", "app"), ("worker", "engine")]
)
async def test_a_process_does_not_start_with_a_role_that_sees_every_org(
    urls: Urls, admin_url: str, tmp_path: Path, command: str, too_powerful: str
) -> None:
    addresses = {"app": urls.app, "engine": urls.engine, too_powerful: admin_url}
    environment = clean_environment(
        MILLPOND_DATABASE_URL=addresses["app"],
        MILLPOND_ENGINE_DATABASE_URL=addresses["engine"],
        MILLPOND_DATA_DIR=str(tmp_path),
        MILLPOND_PORT="0",
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "millpond.cli",
        command,
        cwd=ROOT,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(60):
            said = (await process.communicate())[0].decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 1, said
    assert "row-level security" in said
