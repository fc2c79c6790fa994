"""Hints to workers of the same host: who hears them, who does not, and that the database's come as well."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from tests.engine.conftest import DEADLINE_S, Pond

from millpond.db.embedded import Urls
from millpond.engine import hints as hinting
from millpond.engine import nearby
from millpond.engine.hints import CANCELLED, WAKE, Hints, Listener, connect
from millpond.engine.nearby import Ear, Neighbours, ground_of
from millpond.engine.worker import Worker

HERE = "0123456789ab"
ECHO = "~me.0"


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the sockets of this test are; its name is short, as those of sockets have to be."""
    made = Path(tempfile.mkdtemp(prefix="mp"))
    monkeypatch.setattr(tempfile, "tempdir", str(made))
    yield made / f"millpond-{made.stat().st_uid}"
    shutil.rmtree(made)


class Heard(asyncio.Queue[tuple[str, str]]):
    def on(self, *channels: str) -> Ear:
        return Ear(
            {
                channel: lambda payload, channel=channel: self.put_nowait((channel, payload))  # type: ignore[misc]
                for channel in channels
            }
        )

    async def next(self) -> tuple[str, str]:
        async with asyncio.timeout(DEADLINE_S):
            return await self.get()


async def test_who_hears_on_this_host_is_told(folder: Path) -> None:
    heard = Heard()
    ears = [heard.on(WAKE, CANCELLED), heard.on(WAKE, CANCELLED)]
    for ear in ears:
        ear.open(HERE)
    with closing(Neighbours(HERE)) as near:
        assert near.tell(WAKE, ECHO, "default,llm")
        assert [await heard.next() for _ in ears] == [(WAKE, "default,llm")] * 2
        ears[0].close()
        assert near.tell(CANCELLED, ECHO, "1 2")
        assert await heard.next() == (CANCELLED, "1 2")
        ears[1].close()
        assert not folder.exists()
        assert not near.tell(WAKE, ECHO, "default")
        assert not folder.exists()
    assert heard.empty()


async def test_another_databases_workers_hear_nothing(folder: Path) -> None:
    heard = Heard()
    ear = heard.on(WAKE)
    ear.open("ba9876543210")
    with closing(Neighbours(HERE)) as near:
        assert not near.tell(WAKE, ECHO, "default")
    ear.open(HERE)  # it listens to another one now
    with closing(Neighbours("ba9876543210")) as near:
        assert not near.tell(WAKE, ECHO, "default")
    with closing(Neighbours(HERE)) as near:
        assert near.tell(WAKE, ECHO, "last")
    assert await heard.next() == (WAKE, "last")
    ear.close()


@pytest.mark.parametrize("how", ["open to others", "a link"])
async def test_a_folder_that_others_can_open_is_not_used(folder: Path, how: str) -> None:
    heard = Heard()
    ear = heard.on(WAKE)
    if how == "a link":
        (folder.parent / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(folder.parent / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(0o770)
    ear.open(HERE)
    assert not list(folder.iterdir())
    with closing(Neighbours(HERE)) as near:
        assert not near.tell(WAKE, ECHO, "default")
    ear.close()


async def test_another_users_folder_is_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    theirs = folder.parent / f"millpond-{user + 1}"
    theirs.mkdir(mode=0o700)
    ear = Heard().on(WAKE)
    ear.open(HERE)
    assert not list(theirs.iterdir())
    with closing(_socket_at(theirs / f"{HERE}-alive")), closing(Neighbours(HERE)) as near:
        assert not near.tell(WAKE, ECHO, "default")
    ear.close()


async def test_where_names_are_too_long_for_a_socket_nobody_is_near(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = folder.parent / ("d" * 120)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    ear = Heard().on(WAKE)
    ear.open(HERE)
    with closing(Neighbours(HERE)) as near:
        assert not near.tell(WAKE, ECHO, "default")
    ear.close()


def _socket_at(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    made.bind(str(path))
    return made


@pytest.mark.parametrize("by", ["who tells", "who comes"])
async def test_what_a_killed_worker_left_is_cleared_away(folder: Path, by: str) -> None:
    folder.mkdir(mode=0o700)
    left, other = folder / f"{HERE}-dead", folder / "another-alive"
    _socket_at(left).close()
    with closing(_socket_at(other)):
        if by == "who tells":
            with closing(Neighbours(HERE)) as near:
                assert not near.tell(WAKE, ECHO, "default")
        else:
            ear = Heard().on(WAKE)
            ear.open(HERE)
            ear.close()
        assert list(folder.iterdir()) == [other]


async def test_one_that_has_more_to_hear_than_fits_holds_nobody_up(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    with closing(_socket_at(folder / f"{HERE}-slow")), closing(Neighbours(HERE)) as near:
        told = [near.tell(WAKE, ECHO, "default") for _ in range(5000)]
    assert told[0]
    assert not told[-1]  # the database's hint is not to wait for it


async def test_what_is_too_long_or_not_known_is_not_heard(folder: Path) -> None:
    heard = Heard()
    ear = heard.on(WAKE)
    ear.open(HERE)
    with closing(Neighbours(HERE)) as near:
        assert not near.tell(WAKE, ECHO, "q" * 9000)
        near.tell("another_channel", ECHO, "default")
        (path,) = folder.iterdir()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as by_hand:
            by_hand.sendto(b"\xff\xfe", str(path))
        near.tell(WAKE, ECHO, "last")
    assert await heard.next() == (WAKE, "last")
    ear.close()


async def test_databases_are_told_apart_and_every_role_names_them_alike(
    urls: Urls, folder: Path
) -> None:
    cons = [await connect(url) for url in (urls.app, urls.engine)]
    grounds = [await ground_of(con) for con in cons]
    assert grounds[0] is not None
    assert grounds[0] == grounds[1]
    elsewhere = await asyncpg.connect(urls.owner, database="postgres")
    assert await ground_of(elsewhere) not in grounds
    for con in (*cons, elsewhere):
        await con.close()


async def test_everybody_else_is_told_by_the_database_as_well(urls: Urls, folder: Path) -> None:
    told: asyncio.Queue[object] = asyncio.Queue()
    far = await asyncpg.connect(urls.engine)
    await far.add_listener(WAKE, lambda _con, _pid, _channel, payload: told.put_nowait(payload))
    heard = Heard()
    ear = heard.on(WAKE)
    con = await connect(urls.app)
    ground = await ground_of(con)
    await con.close()
    assert ground is not None
    hints = await Hints.connect(urls.app, near=True)
    async with asyncio.timeout(DEADLINE_S):
        hints.wake(["before"])  # nobody is near
        assert await told.get() == "before"
        ear.open(ground)
        while not heard.qsize():
            hints.wake(["near"])
            await asyncio.sleep(0.05)
        assert heard.get_nowait() == (WAKE, "near")
        assert str(await told.get()).split(",")[0] == "near"
    await hints.close()
    ear.close()
    await far.close()


async def test_without_a_temporary_folder_nobody_is_near_and_nothing_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nowhere() -> str:
        raise FileNotFoundError("no usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    ear = Heard().on(WAKE)
    ear.open(HERE)
    with closing(Neighbours(HERE)) as near:
        assert not near.tell(WAKE, ECHO, "default")
        assert not near.tell(WAKE, ECHO, "\ud800")
    ear.close()


@pytest.mark.parametrize("how", ["refused", "unknown", "silent"])
async def test_where_the_database_does_not_tell_its_name_nobody_is_near(
    urls: Urls, folder: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    questions = {
        "refused": "select pg_read_file('PG_VERSION'), 1",
        "unknown": "select no_such_function(), 1",
        "silent": "select 1, 2 where false",
    }
    monkeypatch.setattr(nearby, "_GROUND", questions[how])
    told: asyncio.Queue[str] = asyncio.Queue()
    listener = Listener(urls.engine, {WAKE: told.put_nowait}, near=True)
    await listener.start()
    hints = await Hints.connect(urls.app, near=True)
    async with asyncio.timeout(DEADLINE_S):
        while told.empty():
            hints.wake(["default"])
            await asyncio.sleep(0.05)
    assert told.get_nowait() == "default"
    assert not folder.exists()
    await hints.close()
    await listener.close()


async def test_an_ear_whose_folder_was_taken_away_hears_again(folder: Path) -> None:
    heard = Heard()
    ear = heard.on(WAKE)
    ear.open(HERE)
    shutil.rmtree(folder)
    folder.touch(mode=0o600)
    ear.keep()  # there is no place for it, for now
    folder.unlink()
    ear.keep()
    with closing(Neighbours(HERE)) as near:
        assert near.tell(WAKE, ECHO, "default")
    assert await heard.next() == (WAKE, "default")
    ear.close()


class Sent(list[list[tuple[str, str]]]):
    """What would have gone by the database, batch by batch."""

    async def keep(self, _con: object, messages: list[tuple[str, str]]) -> None:
        if messages:
            self.append(messages)

    async def until(self, count: int) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while len(self) < count:
                await asyncio.sleep(0.001)


@pytest.fixture
async def near(
    urls: Urls, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Hints, Heard, Sent, Ear]]:
    """Hints with an ear beside them that hears them, and what they send to the database."""
    sent, heard = Sent(), Heard()
    monkeypatch.setattr(hinting, "send", sent.keep)
    con = await connect(urls.app)
    ground = await ground_of(con)
    await con.close()
    assert ground is not None
    ear = heard.on(WAKE, CANCELLED)
    ear.open(ground)
    hints = await Hints.connect(urls.app, near=True, pause_s=0.5)
    async with asyncio.timeout(DEADLINE_S):
        while hints._near is None:
            await asyncio.sleep(0.01)
    yield hints, heard, sent, ear
    await hints.close()
    ear.close()


async def test_the_databases_hint_of_the_same_words_is_known_as_their_echo(
    near: tuple[Hints, Heard, Sent, Ear],
) -> None:
    hints, heard, sent, ear = near
    hints.wake(["default"])
    assert await heard.next() == (WAKE, "default")
    await sent.until(1)
    (((channel, payload),),) = sent
    assert (channel, payload.split(",")[0]) == (WAKE, "default")
    assert ear.has_heard(payload)
    assert not ear.has_heard("default")


async def test_what_follows_at_once_goes_with_the_next_hint_of_the_database_and_is_no_echo(
    near: tuple[Hints, Heard, Sent, Ear],
) -> None:
    hints, heard, sent, ear = near
    for queue in ("default", "llm", "sql"):
        hints.wake([queue])
    assert await heard.next() == (WAKE, "default")
    await sent.until(1)
    (((_, payload),),) = sent
    assert set(payload.split(",")) == {"default", "llm", "sql"}
    assert not ear.has_heard(payload)
    assert heard.empty()


async def test_nothing_is_told_of_nothing(near: tuple[Hints, Heard, Sent, Ear]) -> None:
    hints, heard, sent, _ = near
    hints.wake([])
    hints.cancelled([])
    hints.changed([])
    hints.wake(["default"])
    assert await heard.next() == (WAKE, "default")
    await sent.until(1)
    assert [channel for channel, _ in sent[0]] == [WAKE]
    assert heard.empty()


async def test_a_workers_own_hints_go_by_the_database_alone(pond: Pond, folder: Path) -> None:
    async def idle(_ctx: Any, _: Any) -> None:
        return None

    async def both(ctx: Any, _: Any) -> None:
        await ctx.start(child, None)

    child, heard = pond.flow(idle, queue="elsewhere"), Heard()
    parent = pond.flow(both)
    con = await connect(pond.urls.app)
    ground = await ground_of(con)
    await con.close()
    assert ground is not None
    ear = heard.on(WAKE, CANCELLED)
    ear.open(ground)
    async with pond.worker({"default": 2}):
        run_id = await pond.submit(parent)
        assert (await pond.ended(run_id))["outcome"] == "succeeded"
    assert heard.empty()
    ear.close()


async def test_a_worker_hears_while_the_database_tells_nobody(
    pond: Pond, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def idle(_ctx: Any, _: Any) -> None:
        return None

    async def nobody(*_: object) -> None:
        return None

    heard: asyncio.Queue[str] = asyncio.Queue()
    hear = Worker._hear_wake

    def spied(worker: Worker, payload: str) -> None:
        heard.put_nowait(payload)
        hear(worker, payload)

    monkeypatch.setattr(Worker, "_hear_wake", spied)
    monkeypatch.setattr(hinting, "send", nobody)
    flow = pond.flow(idle)
    hints = await Hints.connect(pond.urls.app, near=True)
    async with pond.worker(), asyncio.timeout(DEADLINE_S):
        run_id = await pond.submit(flow)
        while heard.empty():
            hints.wake(["default"])
            await asyncio.sleep(0.05)
        assert heard.get_nowait().split(",")[0] == "default"
        assert (await pond.ended(run_id))["outcome"] == "succeeded"
    await hints.close()
    assert not folder.exists()
