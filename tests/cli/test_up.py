"""`millpond up` as a process: how it starts, refuses, survives kills, and ends."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import stat
import subprocess
import sys
import time

import psutil
import pytest

pytestmark = [pytest.mark.xdist_group("platform"), pytest.mark.slow]


def wait_until(what, is_so, seconds=60):
    """Ask until it is so; a deadline, not a measure."""
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, what
        time.sleep(0.05)


def are_gone(processes):
    return not any(
        process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes
    )


def against(up, invoke):
    def run(*arguments):
        return invoke(*arguments, MILLPOND_URL=up.url, MILLPOND_DATA_DIR=str(up.data_dir))

    return run


def test_it_ends_in_order_and_leaves_nothing(started, invoke):
    up = started()
    below = up.members()
    assert len(below) >= 4  # API, worker, heartbeat, Postgres
    run = against(up, invoke)("runs", "start", "sample.wait", "--json")
    assert run.exit_code == 0
    assert up.stop() == 0
    assert are_gone(below)
    assert not (up.data_dir / "running.json").exists()
    log = up.log.read_text()
    assert log.index("Shutting down") < log.index("worker.draining")

    again = started()
    shown = against(again, invoke)("runs", "show", json.loads(run.stdout)["id"], "--json")
    assert json.loads(shown.stdout)["state"] == "waiting"
    assert again.stop() == 0


def test_a_second_one_on_the_same_folder_names_the_first(up, invoke):
    result = invoke("up", "--data-dir", str(up.data_dir), "--port", "0")
    assert result.exit_code == 6
    assert str(up.process.pid) in result.stderr
    assert against(up, invoke)("runs", "list").exit_code == 0


def test_a_taken_port_is_named(up, invoke, folder):
    port = up.url.rsplit(":", 1)[1]
    result = invoke("up", "--data-dir", str(folder / "other"), "--port", port)
    assert result.exit_code == 6
    assert port in result.stderr
    assert not list((folder / "other").glob("postgres/data/postmaster.pid"))


def test_kill_9_leaves_nothing_that_the_next_one_does_not_clean_up(started, invoke):
    up = started()
    run = json.loads(against(up, invoke)("runs", "start", "sample.wait", "--json").stdout)
    below = psutil.Process(up.process.pid).children(recursive=True)
    children = [child for child in below if not child.name().startswith("postgres")]
    assert len(children) >= 3
    up.process.kill()
    up.process.wait()
    wait_until("API, worker and heartbeat end by themselves", lambda: are_gone(children))

    again = started()
    shown = against(again, invoke)("runs", "show", run["id"], "--json")
    assert json.loads(shown.stdout)["state"] in ("waiting", "queued", "running")
    assert against(again, invoke)("runs", "start", "sample.shout", "--wait").exit_code == 0
    members = again.members()
    assert again.stop() == 0
    assert are_gone(members)


def test_a_killed_worker_is_started_again_while_the_api_answers(started, invoke):
    up = started()
    run = against(up, invoke)
    os.kill(up.worker_pid, signal.SIGKILL)
    assert run("runs", "start", "sample.shout", "--wait", "--timeout", "60").exit_code == 0
    assert psutil.Process(up.api_pid).is_running()
    assert up.stop() == 0


def test_a_killed_api_is_started_again_on_the_same_port(started, invoke):
    up = started()
    os.kill(up.api_pid, signal.SIGKILL)
    run = against(up, invoke)
    wait_until("the API is back", lambda: run("runs", "list").exit_code == 0)
    assert up.stop() == 0


def test_flows_that_cannot_be_imported_end_it(folder, invoke):
    result = subprocess.run(
        [
            *(sys.executable, "-m", "millpond.cli", "up", "--data-dir", str(folder / "data")),
            *("--port", "0", "--flows", "no.such.module"),
        ],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 1
    assert "worker does not stay up" in result.stderr
    assert "no.such.module" in result.stderr or "No module named 'no'" in result.stderr
    assert not list((folder / "data").glob("postgres/data/postmaster.pid"))


def test_with_its_own_database_it_listens_on_this_machine_only(folder, invoke):
    result = invoke("up", "--data-dir", str(folder / "data"), MILLPOND_HOST="0.0.0.0")
    assert result.exit_code == 2
    assert "MILLPOND_HOST" in result.stderr
    assert not (folder / "data").exists()


@pytest.mark.parametrize("command", ["up", "api", "worker"])
def test_an_external_database_without_the_schema_is_refused(command, server, invoke, folder):
    urls = server.urls("postgres")
    result = invoke(
        command,
        "--data-dir",
        str(folder / "data"),
        MILLPOND_PORT="0",
        MILLPOND_DATABASE_URL=urls.app,
        MILLPOND_ENGINE_DATABASE_URL=urls.engine,
    )
    assert result.exit_code == 6
    assert "millpond migrate" in result.stderr
    assert not (folder / "data" / "postgres").exists()


def test_migrate_says_when_there_is_nothing_to_do(urls, invoke):
    result = invoke(
        "migrate",
        "--json",
        MILLPOND_DATABASE_URL=urls.app,
        MILLPOND_ENGINE_DATABASE_URL=urls.engine,
        MILLPOND_OWNER_DATABASE_URL=urls.owner,
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["applied"] == []


def test_on_an_external_database_there_is_no_development_token(started, server, urls):
    up = started(
        MILLPOND_DATABASE_URL=urls.app,
        MILLPOND_ENGINE_DATABASE_URL=urls.engine,
    )
    assert up.token_file is None
    assert not (up.data_dir / "token").exists()
    assert not (up.data_dir / "postgres").exists()
    assert up.stop() == 0


def test_the_token_file_is_private_and_the_token_is_not_in_any_log(started):
    up = started()
    path = up.data_dir / "token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    token = path.read_text().strip()
    assert token.count(".") == 2
    assert up.stop() == 0
    assert token not in up.log.read_text()
    for secret in (up.data_dir / "postgres/passwords").iterdir():
        assert secret.read_text() not in up.log.read_text()


def test_the_token_is_printed_to_a_terminal(up):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "millpond.cli", "token", "--data-dir", str(up.data_dir)]
    process = subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE, close_fds=True)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(ours, 4096):
            shown += chunk
    os.close(ours)
    assert process.wait() == 0
    process.stderr.close()
    assert b"".join(shown.split()).decode() == (up.data_dir / "token").read_text().strip()


def test_the_second_signal_ends_everything_at_once(started):
    up = started()
    below = up.members()
    os.kill(up.worker_pid, signal.SIGSTOP)  # it will not drain
    up.process.send_signal(signal.SIGTERM)
    wait_until("it began to stop", lambda: "Shutting down" in up.log.read_text())
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(timeout=30) == 128 + signal.SIGTERM
    wait_until("everything is gone", lambda: are_gone(below))
