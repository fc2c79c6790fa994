"""Rotation of the installation's key: all is sealed anew, nothing is lost, whoever works meanwhile or is killed."""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from millpond.cli.key_ring import KEY_FILE, new_key, open_ring, read_ring
from millpond.cli.secrets import _advice
from millpond.db.embedded import Urls
from millpond.db.pool import Connection, Database, EngineDatabase
from millpond.errors import Conflict, Permanent
from millpond.identity import key_file, resealing, secret_store
from millpond.identity.audit_check import Auditor
from millpond.identity.audit_heads import Heads
from millpond.identity.audit_sealer import Sealer
from millpond.identity.gate import Gate, Wish
from millpond.identity.mailing import Mail, Postman, post
from millpond.identity.resealing import rotate
from millpond.identity.ring import KeyRing
from millpond.identity.seal import KEY_BYTES, Seal
from millpond.identity.signing import load
from millpond.identity.signing import rotate as rotate_signing_key
from millpond.identity.tokens import Keyring
from millpond.identity.vault import Vault
from millpond.settings import Settings
from millpond.types import Principal

OLD, NEW, NEXT = (Seal(bytes([n]) * KEY_BYTES) for n in (1, 2, 3))
SEALED = """select seal_key_id from signing_key union all select seal_key_id from mail_outbox
            union all select seal_key_id from secret"""


class Tray:
    def __init__(self) -> None:
        self.mails: list[Mail] = []

    async def send(self, mail: Mail) -> None:
        self.mails.append(mail)


@pytest.fixture
async def owner(admin_url: str) -> asyncpg.Connection:
    con = await asyncpg.connect(admin_url, server_settings={"search_path": "millpond"})
    yield con
    await con.close()


async def put(db: Database, ring: KeyRing, org_id: int, name: str, value: str) -> None:
    async with db.globals() as con:
        await ring.current(con)  # as every process does at its start
    async with db.org(org_id) as con:
        await secret_store.put(con, ring, Principal(org_id=org_id, subject="user:ann"), name, value)


async def filled(db: Database, org: int, other: int, count: int = 7) -> None:
    """Seal something of every kind with the old key, in two orgs."""
    ring = KeyRing(OLD)
    await load(db, ring)
    for nth in range(count):
        await put(db, ring, org, f"one-{nth}", f"value one {nth}")
        await put(db, ring, other, f"two-{nth}", f"value two {nth}")
    async with db.globals() as con:
        await post(con, ring, Mail(to="a@x.example", subject="s", text="t"), ttl_s=600)


async def keys_in_use(owner: asyncpg.Connection) -> set[str]:
    return {row["seal_key_id"] for row in await owner.fetch(SEALED)}


async def test_everything_is_sealed_anew_and_opens_without_the_old_key(
    db: Database,
    org: int,
    other_org: int,
    owner: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resealing, "_BATCH", 3)
    await filled(db, org, other_org)
    signer, _ = await load(db, KeyRing(OLD))
    done = await rotate(db, KeyRing(NEW, OLD))
    assert done.counts == {"signing keys": 1, "waiting mail": 1, "secrets": 14}
    assert (done.broken, done.old_key_ids) == ([], [OLD.key_id])
    assert await keys_in_use(owner) == {NEW.key_id}
    only = KeyRing(NEW)
    await only.check(db)
    assert (await load(db, only))[0].kid == signer.kid
    assert (await Vault(db, only).open(other_org, "two-3")).value == "value two 3"
    assert (await Vault(db, only).open(org, "one-0")).version == 1
    tray = Tray()
    assert await Postman(db, only, tray).send_one(tray)
    assert tray.mails[0].to == "a@x.example"
    with pytest.raises(Permanent, match="what installation key"):
        await KeyRing(OLD).check(db)


async def test_a_second_rotation_does_nothing_and_a_third_key_is_turned_to(
    db: Database, org: int, other_org: int, owner: asyncpg.Connection
) -> None:
    await filled(db, org, other_org, 2)
    await rotate(db, KeyRing(NEW, OLD))
    assert (await rotate(db, KeyRing(NEW, OLD))).counts == {}
    done = await rotate(db, KeyRing(NEXT, NEW))
    assert done.counts["secrets"] == 4
    assert set(done.old_key_ids) == {OLD.key_id, NEW.key_id}
    assert await keys_in_use(owner) == {NEXT.key_id}
    actions = [row["action"] for row in await owner.fetch("select action from platform_audit")]
    assert sorted(actions) == ["seal_key.emptied"] * 2 + ["seal_key.rotated"] * 2
    # Back to a key that sealed here before.
    await rotate(db, KeyRing(OLD, NEXT))
    assert await keys_in_use(owner) == {OLD.key_id}
    await KeyRing(OLD).check(db)


async def test_a_rotation_without_the_old_key_changes_nothing(
    db: Database, org: int, other_org: int, owner: asyncpg.Connection
) -> None:
    await filled(db, org, other_org, 1)
    with pytest.raises(Permanent) as caught:
        await rotate(db, KeyRing(NEW))
    assert caught.value.code == "seal_key_mismatch"
    assert await owner.fetchval("select key_id from seal_key where is_current") == OLD.key_id


async def test_a_rotation_that_is_killed_anywhere_is_gone_on_with(
    db: Database,
    urls: Urls,
    org: int,
    other_org: int,
    owner: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ended before and after each of its commits, one after the other, until it comes through."""
    monkeypatch.setattr(resealing, "_BATCH", 2)
    await filled(db, org, other_org, 5)
    left = [0]

    async def end(_: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt("killed")

    probed = await Database.connect(urls.app, probe=end)
    both, kills = KeyRing(NEW, OLD), 0
    while True:
        left[0] = kills + 1
        try:
            done = await rotate(probed, KeyRing(NEW, OLD))
        except BaseException as error:
            assert "killed" in repr(error)  # noqa: PT017
        else:
            break
        kills += 1
        for nth in range(5):
            assert (await Vault(db, both).open(org, f"one-{nth}")).value == f"value one {nth}"
        await load(db, both)
    await probed.close()
    assert kills > 8
    assert done.old_key_ids == [OLD.key_id]
    assert await keys_in_use(owner) == {NEW.key_id}
    assert await owner.fetchval("select emptied_at from seal_key where key_id = $1", OLD.key_id)


async def test_writers_and_readers_go_on_while_keys_are_rotated(
    db: Database,
    org: int,
    other_org: int,
    owner: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resealing, "_BATCH", 2)
    await filled(db, org, other_org, 10)
    stop = asyncio.Event()
    written: dict[str, str] = {}

    async def write(ring: KeyRing, who: str) -> None:
        nth = 0
        while not stop.is_set():
            nth += 1
            name = f"{who}-{nth % 4}"
            await put(db, ring, org, name, f"{who} {nth}")
            written[name] = f"{who} {nth}"

    async def read(ring: KeyRing) -> None:
        vault = Vault(db, ring)
        while not stop.is_set():
            for nth in range(10):
                assert (await vault.open(org, f"one-{nth}")).value == f"value one {nth}"

    # As on hosts that have both keys, each in the order in which it got them.
    working = [
        asyncio.create_task(write(KeyRing(OLD, NEW), "old")),
        asyncio.create_task(write(KeyRing(NEW, OLD), "new")),
        asyncio.create_task(read(KeyRing(OLD, NEW))),
    ]
    await asyncio.sleep(0.1)
    rotations = await asyncio.gather(*(rotate(db, KeyRing(NEW, OLD)) for _ in range(3)))
    await asyncio.sleep(0.1)
    stop.set()
    await asyncio.gather(*working)
    assert sum(one.counts.get("signing keys", 0) for one in rotations) == 1
    assert await keys_in_use(owner) == {NEW.key_id}
    only = Vault(db, KeyRing(NEW))
    assert len(written) == 8
    for name, value in written.items():
        assert (await only.open(org, name)).value == value
    assert (
        await owner.fetchval(
            "select count(*) from platform_audit where action = 'seal_key.rotated'"
        )
        == 1
    )


async def test_a_value_that_does_not_open_is_named_and_keeps_the_old_key_needed(
    db: Database, org: int, other_org: int, owner: asyncpg.Connection
) -> None:
    await filled(db, org, other_org, 2)
    await owner.execute(
        "update secret set sealed = set_byte(sealed, 20, get_byte(sealed, 20) # 1) where name = 'one-1'"
    )
    done = await rotate(db, KeyRing(NEW, OLD))
    assert done.counts["secrets"] == 3
    [broken] = done.broken
    assert broken.startswith(f"secret:{org}:")
    assert done.old_key_ids == []
    await put(db, KeyRing(NEW, OLD), org, "one-1", "set anew")
    assert (await rotate(db, KeyRing(NEW, OLD))).old_key_ids == [OLD.key_id]


async def test_the_audit_log_is_verified_after_its_key_is_gone(
    db: Database, org: int, other_org: int, tmp_path: Path
) -> None:
    heads = Heads(tmp_path)
    await put(db, KeyRing(OLD), org, "one", "value of one")
    await Sealer(db, KeyRing(OLD), heads).seal_all()
    await rotate(db, KeyRing(NEW, OLD))
    ring = KeyRing(NEW)
    await ring.check(db)
    await put(db, ring, org, "one", "another value")
    await Sealer(db, ring, heads).seal_all()
    await rotate(db, KeyRing(NEXT, NEW))
    last = KeyRing(NEXT)
    await last.check(db)
    report = await Auditor(last, heads).verify(lambda: db.org(org), org)
    assert report.is_intact, report.faults
    assert report.sealed == 2
    with pytest.raises(Permanent):
        KeyRing(NEXT).derive("audit", OLD.key_id)


async def test_processes_that_seal_first_on_an_empty_database_agree_on_one_key(
    db: Database,
) -> None:
    rings = [KeyRing(Seal(bytes([n + 10]) * KEY_BYTES)) for n in range(6)]
    outcomes = await asyncio.gather(*(ring.check(db) for ring in rings), return_exceptions=True)
    assert sum(one is None for one in outcomes) == 1
    assert all(getattr(one, "code", None) == "seal_key_mismatch" for one in outcomes if one)


async def test_a_key_file_that_grew_is_read_again_by_who_runs(
    db: Database, org: int, tmp_path: Path
) -> None:
    path = tmp_path / "secret.key"
    key_file.make(path)
    running = KeyRing(*key_file.read(path), read=lambda: key_file.read(path))
    await put(db, running, org, "one", "value of one")
    key_file.add(path)
    await rotate(db, KeyRing(*key_file.read(path)))
    assert (await Vault(db, running).open(org, "one")).value == "value of one"
    await put(db, running, org, "two", "value of two")
    assert running.key_id == key_file.read(path)[0].key_id


async def test_a_host_without_the_new_key_keeps_mail_waiting(
    db: Database, org: int, other_org: int, owner: asyncpg.Connection
) -> None:
    await filled(db, org, other_org, 1)
    await rotate(db, KeyRing(NEW, OLD))
    tray = Tray()
    assert await Postman(db, KeyRing(OLD), tray, first_delay_s=0.0).send_one(tray)
    assert await owner.fetchval("select count(*) from mail_outbox") == 1
    assert tray.mails == []
    assert await Postman(db, KeyRing(NEW), tray).send_one(tray)
    assert tray.mails[0].to == "a@x.example"


async def test_a_host_without_the_new_key_goes_on_admitting_whom_it_knows(
    db: Database, org: int, other_org: int
) -> None:
    here = await Keyring.open(db, KeyRing(OLD))
    token = here.mint(Principal(org_id=org, subject="user:ann"), "acme", 60)
    await rotate(db, KeyRing(NEW, OLD))
    there = await Keyring.open(db, KeyRing(NEW))
    newer = await rotate_signing_key(db, KeyRing(NEW))
    here._refreshed_at = there._refreshed_at = float("-inf")
    await there.refresh()
    gate = Gate(here)
    assert (await gate.admit(token, Wish())).subject == "user:ann"
    # Also tokens that another host signed with a key made since.
    fresh = there.mint(Principal(org_id=org, subject="user:bob"), "acme", 60)
    assert (await gate.admit(fresh, Wish())).subject == "user:bob"
    assert newer in {key["kid"] for key in here.jwks()["keys"]}


async def test_a_key_that_the_file_lost_is_not_turned_to(
    db: Database, org: int, tmp_path: Path
) -> None:
    path = tmp_path / "secret.key"
    key_file.make(path)
    before = path.read_text()
    running = KeyRing(*key_file.read(path), read=lambda: key_file.read(path))
    await put(db, running, org, "one", "value of one")
    key_file.add(path)
    running.reread()
    path.write_text(before)
    with pytest.raises(Permanent, match="not in this host's key file"):
        await rotate(db, running)
    assert (await Vault(db, running).open(org, "one")).value == "value of one"


async def test_no_key_is_made_while_other_hosts_are_at_work_that_nobody_gave_it_to(
    db: Database, engine_db: EngineDatabase, org: int, tmp_path: Path
) -> None:
    path = tmp_path / "secret.key"
    key_file.make(path)
    ring = KeyRing(*key_file.read(path), read=lambda: key_file.read(path))
    await put(db, ring, org, "one", "value of one")
    async with engine_db.duty("test") as con:
        for host, lasts_s in ((socket.gethostname(), 60), ("elsewhere", 60), ("gone", -60)):
            await con.execute(
                """insert into worker (worker_id, host, pid, queues, capabilities, expires_at)
                   values ($1, $2, 1, '{}', '{}', clock_timestamp() + $3 * interval '1 second')""",
                uuid.uuid4(), host, float(lasts_s),
            )  # fmt: skip
    with pytest.raises(Conflict, match=r"this database: elsewhere$"):
        await new_key(ring, db, path)
    assert len(key_file.read(path)) == 1
    with pytest.raises(Conflict):  # as with variables: the new key is at hand and not current
        await new_key(KeyRing(NEW, *key_file.read(path)), db, None)
    assert not await new_key(KeyRing(NEW, *key_file.read(path)), db, None, others_have_it=True)
    assert await new_key(ring, db, path, others_have_it=True)
    assert len(key_file.read(path)) == 2
    assert not await new_key(ring, db, path)  # it is there now: as after `--prepare`


def test_a_key_file_that_vanished_is_said_to_be_missing(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    path = tmp_path / KEY_FILE
    key_file.make(path)
    ring = read_ring(settings)
    path.unlink()
    with pytest.raises(Permanent) as caught:
        ring.reread()
    assert caught.value.code == "seal_key_missing"


def test_advice_about_what_does_not_open_goes_by_its_kind() -> None:
    assert "set or remove" in _advice(["secret:1:x", "mail_outbox:y"])
    assert "set or remove" not in (told := _advice(["signing_key:x", "mail_outbox:y"]))
    assert "keys rotate" in told


def test_a_ring_shows_ids_of_keys_alone() -> None:
    assert repr(KeyRing(NEW, OLD)) == f"KeyRing({NEW.key_id}, {OLD.key_id})"


async def test_a_host_without_its_databases_key_is_refused_and_left_as_it_was(
    db: Database, tmp_path: Path
) -> None:
    await open_ring(Settings(data_dir=tmp_path / "first"), db)
    other = tmp_path / "other"
    with pytest.raises(Permanent) as caught:
        await open_ring(Settings(data_dir=other), db)
    assert caught.value.code == "seal_key_missing"
    assert not other.exists()


async def test_processes_of_a_host_that_start_together_for_the_first_time_all_find_the_key(
    db: Database, tmp_path: Path
) -> None:
    settings = Settings(data_dir=tmp_path)

    class Beaten(Database):
        """The database of a process whose neighbour comes first, after it has looked for the file in vain."""

        def __init__(self) -> None:
            self.others: KeyRing | None = None

        def globals(self) -> AbstractAsyncContextManager[Connection]:
            return self._globals()

        @asynccontextmanager
        async def _globals(self) -> AsyncIterator[Connection]:
            if self.others is None:
                assert not (tmp_path / KEY_FILE).exists()
                self.others = await open_ring(settings, db)
            async with db.globals() as con:
                yield con

    beaten = Beaten()
    ring = await open_ring(settings, beaten)
    assert beaten.others is not None
    assert ring.key_ids == beaten.others.key_ids
