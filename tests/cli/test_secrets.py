"""`millpond secrets`, and hosts that do not have the key of their database."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys

import pytest
from tests.cli.conftest import ROOT, clean_environment

pytestmark = pytest.mark.xdist_group("platform")
VALUE = "sk_live_0123456789"


def test_a_secret_is_set_from_standard_input_listed_and_removed(cli, cli_json):
    made = cli_json("secrets", "set", "stripe", "--description", "live key", stdin=f"{VALUE}\n")
    assert (made["version"], made["description"]) == (1, "live key")
    told = cli("secrets", "set", "stripe", stdin="a longer value\nof two lines\n")
    assert told.stdout == "stripe has its value number 2\n"
    listed = cli("secrets", "list")
    assert "live key" in listed.stdout
    assert VALUE not in listed.stdout
    assert cli("secrets", "set", "empty", stdin="\n").exit_code == 2
    assert (
        cli("secrets", "set", "stripe", VALUE, stdin="").exit_code == 2
    )  # no argument takes a value
    assert cli("secrets", "remove", "stripe").exit_code == 0
    assert cli("secrets", "remove", "stripe").exit_code == 3


def test_the_key_is_rotated_under_a_running_platform(cli, cli_json, up):
    path = up.data_dir / "secret.key"
    before = path.read_text()
    cli_json("secrets", "set", "kept", stdin=VALUE)
    prepared = cli_json("secrets", "rotate-key", "--prepare")
    assert path.read_text().splitlines()[1:] == before.splitlines()
    assert path.stat().st_mode & 0o777 == 0o600
    done = cli_json("secrets", "rotate-key")
    assert done["id"] == prepared["id"]
    assert done["resealed"]["secrets"] >= 1
    assert done["resealed"]["signing keys"] >= 1
    assert len(done["old"]) == 1
    # API and workers read the file again by themselves.
    assert cli_json("secrets", "set", "after", stdin=VALUE)["version"] == 1
    run = cli("runs", "start", "sample.secret", "--input", '{"word": "kept"}', "--wait", "--json")
    assert json.loads(run.stdout)["output"] == "[secret:kept] of 18 characters", (
        run.stdout + run.stderr
    )
    told = cli("secrets", "rotate-key").stdout
    assert "opens nothing of this database any more" in told
    assert len(path.read_text().splitlines()) == 3
    assert cli("audit", "verify").exit_code == 0
    # An export too, once this host has given the older keys up: the database keeps what chained with them.
    export = str(up.data_dir / "export.ndjson")
    assert cli("audit", "export", "--to", export).exit_code == 0
    grown = path.read_text()
    try:
        path.write_text(grown.splitlines()[0] + "\n")
        verified = cli("audit", "verify", "--file", export, "--allow-no-heads")
        assert verified.exit_code == 0, verified.stdout + verified.stderr
        elsewhere = {"MILLPOND_DATABASE_URL": "postgresql://x@127.0.0.1:1/x"}
        apart = cli("audit", "verify", "--file", export, "--allow-no-heads", **elsewhere)
        assert apart.exit_code == 1
        assert "key_unknown" in apart.stdout
        assert "out of reach" in apart.stderr
    finally:
        path.write_text(grown)


def test_a_host_without_the_key_is_refused_and_left_as_it_was(up, folder):
    running = json.loads((up.data_dir / "running.json").read_text())["databases"]
    place = {
        "MILLPOND_DATABASE_URL": running["app"],
        "MILLPOND_ENGINE_DATABASE_URL": running["engine"],
        "MILLPOND_DATA_DIR": str(folder / "elsewhere"),
        "MILLPOND_FLOWS": "tests.cli.sample_flows",
    }
    wrong = base64.b64encode(os.urandom(32)).decode()
    for command in (
        ["api", "--port", "0"],
        ["worker"],
        ["up", "--port", "0"],
        ["secrets", "rotate-key"],
    ):
        for key, code in ((None, "no installation key"), (wrong, "what installation key")):
            given = {**place, **({"MILLPOND_SECRET_KEY": key} if key else {})}
            done = subprocess.run(
                [sys.executable, "-m", "millpond.cli", *command],
                cwd=ROOT,
                env=clean_environment(**given),
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode != 0, command
            assert code in done.stderr, (command, done.stderr[-2000:])
            assert wrong not in done.stderr
            assert "Traceback" not in done.stderr
    assert not (folder / "elsewhere" / "secret.key").exists()
