"""The embedded server: kept data, one holder, recovery from kills, closed folders."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import psutil
import pytest
import pytest_asyncio

from millpond.db.embedded import EmbeddedPostgres, Urls
from millpond.db.migrate import migrate
from millpond.errors import Conflict, Forbidden, Permanent

FAST = {"fsync": "off", "shared_buffers": "32MB"}
AS_ROOT = os.geteuid() == 0


@pytest.fixture(scope="module")
def made_dir(folder_of_module: Path) -> Path:
    """A data directory that was started and stopped once: setting one up takes seconds."""
    server = EmbeddedPostgres(folder_of_module / "data", options=FAST)

    async def start_and_stop() -> None:
        await server.start()
        await server.stop()

    asyncio.run(start_and_stop())
    return server.data_dir


@pytest_asyncio.fixture
async def used_dir(made_dir: Path) -> AsyncIterator[Path]:
    """A data directory of earlier runs, whose server is stopped before and after the test."""
    yield made_dir
    await EmbeddedPostgres(made_dir, options=FAST).stop_left_over()


HOLDER = """
import asyncio, sys
from pathlib import Path
from millpond.db.embedded import EmbeddedPostgres

async def hold():
    server = EmbeddedPostgres(Path(sys.argv[1]), owner_note="millpond up", options=%r)
    await server.start()
    print(server.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(hold())
"""


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@asynccontextmanager
async def holder(data_dir: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """Run a process that holds the server; yields it and the postmaster's pid."""
    code = HOLDER % FAST
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, str(data_dir), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        yield process, int(await process.stdout.readline())
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def note(urls: Urls, text: str) -> None:
    con = await asyncpg.connect(urls.owner)
    await con.execute("drop table if exists public.note; create table public.note (text text)")
    await con.execute("insert into public.note values ($1)", text)
    await con.close()


async def notes(urls: Urls) -> list[str]:
    con = await asyncpg.connect(urls.owner)
    rows = await con.fetch("select text from public.note order by 1")
    await con.close()
    return [row["text"] for row in rows]


async def test_start_stop_start_keeps_the_data(used_dir: Path) -> None:
    server = EmbeddedPostgres(used_dir, options=FAST)
    first = await server.start()
    pid = server.pid
    assert pid is not None
    assert server.is_alive
    await note(first, "kept")
    await server.stop()
    await server.stop()
    assert not psutil.pid_exists(pid)
    assert await server.start() == first
    assert await notes(first) == ["kept"]
    await server.stop()


def test_folders_and_passwords_are_closed(server: EmbeddedPostgres) -> None:
    home = server.data_dir / "postgres"
    assert mode(home / "run") == 0o700
    assert mode(home / "data") == 0o700
    assert mode(home / "passwords") == 0o700
    assert mode(home / "server.log") == 0o600
    files = sorted((home / "passwords").iterdir())
    assert [path.name for path in files] == ["app", "engine", "owner", "superuser"]
    assert {mode(path) for path in files} == {0o600}
    secrets = {path.read_text() for path in files}
    assert len(secrets) == 4
    assert not any(secret in " ".join(psutil.Process(server.pid).cmdline()) for secret in secrets)


async def test_every_role_needs_its_password(server: EmbeddedPostgres, urls: Urls) -> None:
    for url in (urls.owner, urls.app, urls.engine, server.admin_url("postgres")):
        role, rest = url.removeprefix("postgresql://").split(":", 1)
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(f"postgresql://{role}:guess{rest}")


async def test_the_server_listens_on_its_socket_only(server: EmbeddedPostgres) -> None:
    assert psutil.Process(server.pid).net_connections("inet") == []


async def test_the_server_is_durable_by_default(used_dir: Path) -> None:
    server = EmbeddedPostgres(used_dir)
    con = await asyncpg.connect((await server.start()).owner)
    for name, value in {
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
        "max_connections": "200",
        "jit": "off",
        "autovacuum_naptime": "5s",
        "max_wal_size": "4GB",
    }.items():
        assert await con.fetchval("select current_setting($1)", name) == value, name
    await con.close()
    await server.stop()


async def test_a_second_start_names_the_process_that_holds_it(used_dir: Path) -> None:
    async with holder(used_dir) as (process, _):
        with pytest.raises(Conflict) as caught:
            await EmbeddedPostgres(used_dir, options=FAST).start()
        assert f"process {process.pid} (millpond up)" in caught.value.message
    server = EmbeddedPostgres(used_dir, owner_note="this test", options=FAST)
    await server.start()
    with pytest.raises(Conflict):
        await server.start()
    with pytest.raises(Conflict) as caught:
        await EmbeddedPostgres(used_dir, options=FAST).start()
    assert f"process {os.getpid()} (this test)" in caught.value.message
    await server.stop()


async def test_a_server_left_by_a_killed_holder_is_adopted(used_dir: Path) -> None:
    async with holder(used_dir) as (process, pid):
        process.kill()
        await process.wait()
    assert psutil.pid_exists(pid)
    server = EmbeddedPostgres(used_dir, options=FAST)
    urls = await server.start()
    assert server.pid == pid
    await note(urls, "adopted")
    await server.stop()
    assert not server.is_alive
    await server.start()
    assert server.pid != pid
    assert await notes(urls) == ["adopted"]
    await server.stop()


async def test_a_left_server_with_other_options_is_restarted(used_dir: Path) -> None:
    async with holder(used_dir) as (process, pid):
        process.kill()
        await process.wait()
    server = EmbeddedPostgres(used_dir, options=FAST | {"max_connections": "50"})
    urls = await server.start()
    assert server.pid != pid
    con = await asyncpg.connect(urls.owner)
    assert await con.fetchval("select current_setting('max_connections')") == "50"
    await con.close()
    await server.stop()


async def test_a_left_server_that_is_shutting_down_is_started_anew(used_dir: Path) -> None:
    async with holder(used_dir) as (process, pid):
        process.kill()
        await process.wait()
    os.kill(pid, signal.SIGINT)
    server = EmbeddedPostgres(used_dir, options=FAST)
    await note(await server.start(), "anew")
    assert server.pid != pid
    await server.stop()


async def test_a_killed_postmaster_recovers_at_the_next_start(used_dir: Path) -> None:
    server = EmbeddedPostgres(used_dir, options=FAST)
    urls = await server.start()
    await note(urls, "before the crash")
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        while server.is_alive:
            await asyncio.sleep(0.01)
    await server.stop()
    assert (used_dir / "postgres" / "data" / "postmaster.pid").exists()
    await server.start()
    assert await notes(urls) == ["before the crash"]
    await server.stop()


async def test_a_pid_that_another_process_has_now_is_no_server(used_dir: Path) -> None:
    """After a reboot, or in a new container, the old number may be anybody's: here our own."""
    server = EmbeddedPostgres(used_dir, options=FAST)
    urls = await server.start()
    await note(urls, "kept")
    await server.stop()
    stale = used_dir / "postgres" / "data" / "postmaster.pid"
    for file in (stale, used_dir / "postgres" / "run" / ".s.PGSQL.5432.lock"):
        file.write_text(f"{os.getpid()}\n{stale.parent}\n")
    await server.start()
    assert server.pid != os.getpid()
    assert await notes(urls) == ["kept"]
    await server.stop()


async def test_what_users_wrote_stays_out_of_the_log(used_dir: Path) -> None:
    server = EmbeddedPostgres(used_dir, options=FAST)
    con = await asyncpg.connect((await server.start()).owner)
    await con.execute("create temp table once (text text primary key)")
    for wanted in (None, asyncpg.UniqueViolationError):
        with contextlib.nullcontext() if wanted is None else pytest.raises(wanted):
            await con.execute("insert into once values ($1)", "a private sentence")
    await con.close()
    await server.stop()
    log = server.log.read_text()
    assert "duplicate key" in log
    assert "a private sentence" not in log


async def test_a_killed_first_start_is_begun_again(data_dir: Path) -> None:
    """What initdb left half done is not taken for a database."""
    half = data_dir / "postgres" / "data.new"
    half.mkdir(parents=True)
    data_dir.chmod(0o711)
    (half / "PG_VERSION").write_text("18\n")
    server = EmbeddedPostgres(data_dir, options=FAST)
    await note(await server.start(), "made")
    assert not half.exists()
    await server.stop()


async def test_a_lost_password_file_is_made_anew_but_the_superusers(used_dir: Path) -> None:
    server = EmbeddedPostgres(used_dir, options=FAST)
    urls = await server.start()
    await migrate(urls.owner, app_url=urls.app, engine_url=urls.engine)
    await server.stop()
    passwords = used_dir / "postgres" / "passwords"
    (passwords / "app").unlink()
    renewed = await server.start()
    assert renewed.app != urls.app
    con = await asyncpg.connect(renewed.app)
    await con.close()
    await server.stop()
    kept = (passwords / "superuser").rename(passwords.parent / "superuser")
    with pytest.raises(Permanent, match="superuser"):
        await server.start()
    kept.rename(passwords / "superuser")


async def test_a_data_directory_with_a_long_name_works(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir / ("long" * 30), options=FAST)
    (data_dir).mkdir(mode=0o711)
    urls = await server.start()
    await note(urls, "short socket")
    socket_folder = Path(psutil.Process(server.pid).cmdline()[4])
    assert mode(socket_folder) == 0o700
    await server.stop()
    socket_folder.rmdir()


async def test_another_major_version_is_refused(used_dir: Path) -> None:
    server = EmbeddedPostgres(used_dir, options=FAST)
    await server.start()
    await server.stop()
    (used_dir / "postgres" / "data" / "PG_VERSION").write_text("17\n")
    with pytest.raises(Conflict, match="Postgres 17"):
        await server.start()
    (used_dir / "postgres" / "data" / "PG_VERSION").write_text("18\n")


@pytest.mark.skipif(not AS_ROOT, reason="only root runs the server as another user")
async def test_as_root_no_closed_folder_is_opened(data_dir: Path) -> None:
    data_dir.mkdir(mode=0o700)
    with pytest.raises(Forbidden, match="millpond-pg"):
        await EmbeddedPostgres(data_dir / "inside", options=FAST).start()
    assert mode(data_dir) == 0o700


@pytest.mark.skipif(not AS_ROOT, reason="only root runs the server as another user")
def test_as_root_the_server_runs_as_a_system_user(server: EmbeddedPostgres) -> None:
    process = psutil.Process(server.pid)
    assert process.username() == "millpond-pg"
    assert Path(process.exe()).is_relative_to(server.data_dir)


ASKER = """
import sys
from millpond.db import server_home
server_home.SYSTEM_USER = sys.argv[1]
sys.stdin.readline()
print(server_home._system_user().uid)
"""


@pytest.mark.skipif(not AS_ROOT, reason="only root makes the server's user")
def test_as_root_many_first_starts_make_one_system_user() -> None:
    """Of several that make it at once each holds the user that is there afterwards."""
    name = f"millpond-t{os.getpid()}"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    askers = [subprocess.Popen([sys.executable, "-c", ASKER, name], **pipes) for _ in range(4)]
    try:
        for asker in askers:
            assert asker.stdin is not None
            asker.stdin.write("go\n")
            asker.stdin.flush()
        held = {int(asker.communicate(timeout=60)[0]) for asker in askers}
        assert held == {pwd.getpwnam(name).pw_uid}
    finally:
        subprocess.run(["userdel", name], check=True)
