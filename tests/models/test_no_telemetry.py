"""The bundled embedder reports to nobody: its runtime's telemetry leaves files when it is on."""

from __future__ import annotations

import os
import subprocess
import sys

EMBED = """
import asyncio
from millpond.models.opening import open_embedder

embedder = open_embedder("local")
assert len(asyncio.run(embedder.embed(["a pond"]))[0]) == 384
"""


def test_embedding_leaves_no_file_of_a_telemetry_client(tmp_path):
    # Telemetry is off by itself where it takes the machine for a CI or a test run.
    names = ("CI", "ORT_RUNNING_UNIT_TESTS", "ORT_DISABLE_TELEMETRY")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    homes = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", EMBED], env={**kept, **homes}, check=True, timeout=100)
    assert list(tmp_path.rglob("*")) == []
