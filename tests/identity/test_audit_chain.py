"""The audit log's chain: rows are sealed after their commit, and whatever is done to them afterwards is found."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from millpond.db.embedded import Urls
from millpond.db.pool import Database, EngineDatabase
from millpond.errors import MillpondError, Permanent
from millpond.identity import audit
from millpond.identity.audit_chain import START, Head
from millpond.identity.audit_check import Auditor, Report
from millpond.identity.audit_heads import Heads
from millpond.identity.audit_sealer import Sealer, opened, sealing
from millpond.identity.seal import KEY_BYTES, Seal
from millpond.types import NO_ORG, Principal

DEADLINE_S = 20.0
OLD, NEW = Seal(bytes(KEY_BYTES)), Seal(bytes([7] * KEY_BYTES))


class Ring:
    """Several keys, the current one first."""

    def __init__(self, *seals: Seal) -> None:
        self._seals = {seal.key_id: seal for seal in seals}
        self.key_id = seals[0].key_id

    def derive(self, purpose: str, key_id: str) -> bytes:
        if key_id not in self._seals:
            raise Permanent("unknown", code="seal_key_unknown")
        return self._seals[key_id].derive(purpose, key_id)


@dataclass
class Pond:
    """An org's log, its sealer, and the superuser who tampers with it."""

    db: Database
    org_id: int
    heads: Heads
    folder: Path
    sealer: Sealer
    root: asyncpg.Connection

    async def tell(self, *resources: str, org_id: int | None = None) -> None:
        for resource in resources:
            principal = Principal(
                org_id=self.org_id if org_id is None else org_id, subject="user:ann"
            )
            async with self.db.of(principal) as con:
                await audit.record(con, principal, "thing.done", resource, details={"was": "told"})

    async def sealed(self, count: int = 5) -> list[Any]:
        """Tell and seal rows, each in a round of its own; returns their seals."""
        for number in range(count):
            await self.tell(f"thing:{number}")
            assert await self.sealer.seal_all() == 1
        return await self.seals()

    async def seals(self) -> list[Any]:
        return await self.root.fetch(
            "select * from audit_seal where org_id = $1 order by seq", self.org_id
        )

    async def verify(self, keys: Any = OLD, org_id: int | None = None, **wish: Any) -> Report:
        log = self.org_id if org_id is None else org_id
        return await Auditor(keys, self.heads).verify(lambda: opened(self.db, log), log, **wish)


@pytest_asyncio.fixture
async def pond(db: Database, org: int, admin_url: str, tmp_path: Path) -> AsyncIterator[Pond]:
    root = await asyncpg.connect(admin_url, server_settings={"search_path": "millpond"})
    heads = Heads(tmp_path / "heads")
    yield Pond(db, org, heads, tmp_path / "heads", Sealer(db, OLD, heads), root)
    await root.close()


async def kinds(pond: Pond) -> list[tuple[str, int | None]]:
    report = await pond.verify()
    assert not report.is_intact
    return [(fault.kind, fault.seq) for fault in report.faults]


async def test_a_log_that_nobody_touched_is_intact(pond: Pond) -> None:
    seals = await pond.sealed(5)
    report = await pond.verify()
    assert report.is_intact, report.faults
    assert (report.sealed, report.last_seq, report.unsealed) == (5, 5, 0)
    assert report.head is not None
    assert report.head.mac == seals[-1]["mac"]
    assert [head.seq for head in pond.heads.read(pond.org_id)] == [1, 2, 3, 4, 5]


async def test_an_empty_log_is_intact(pond: Pond) -> None:
    report = await pond.verify()
    assert report.is_intact
    assert (report.sealed, report.head) == (0, None)


@pytest.mark.parametrize("log", ["of the org", "of the platform"])
async def test_a_log_that_was_emptied_is_unproven_without_its_heads(pond: Pond, log: str) -> None:
    """Only while the org is new, or for the platform the oldest one, an empty log is believed."""
    await pond.sealed(2)
    org_id = pond.org_id if log == "of the org" else NO_ORG
    for table in ("audit_seal", "audit_unsealed", "audit"):
        await pond.root.execute(f"delete from {table} where org_id = $1", pond.org_id)
    elsewhere = Auditor(OLD, Heads(pond.folder / "elsewhere"))

    async def look() -> Report:
        report = await elsewhere.verify(lambda: opened(pond.db, org_id), org_id)
        assert (report.is_intact, report.sealed, report.published_seq) == (True, 0, None)
        return report

    assert not (await look()).is_unproven
    await pond.root.execute("update org set created_at = now() - interval '61 minutes'")
    assert (await look()).is_unproven
    if org_id != NO_ORG:
        assert await kinds(pond) == [("tail_cut", 1)]  # with its heads it is found


@pytest.mark.parametrize(
    "change",
    [
        "subject = 'user:bob'",
        "granted_by = 'user:bob'",
        "action = 'thing.undone'",
        "resource = 'thing:9'",
        "run_id = gen_random_uuid()",
        "address = '10.0.0.1'",
        "at = at + interval '1 microsecond'",
        """details = '{"was": "told"}'""",
        "details = '{}'",
    ],
)
async def test_an_edited_row_is_found(pond: Pond, change: str) -> None:
    seals = await pond.sealed()
    await pond.root.execute(f"update audit set {change} where audit_id = $1", seals[2]["audit_id"])
    report = await pond.verify()
    assert [(fault.kind, fault.seq) for fault in report.faults] == [("row_changed", 3)]
    assert report.first_fault is not None
    assert report.first_fault.audit_id == seals[2]["audit_id"]


async def test_a_removed_row_is_found(pond: Pond) -> None:
    seals = await pond.sealed()
    await pond.root.execute("delete from audit where audit_id = $1", seals[1]["audit_id"])
    assert await kinds(pond) == [("row_removed", 2)]


async def test_a_row_that_was_removed_before_it_was_sealed_is_found(pond: Pond) -> None:
    await pond.sealed(1)
    await pond.tell("thing:gone")
    await pond.root.execute("delete from audit where resource = 'thing:gone'")
    assert await pond.sealer.seal_all() == 0
    assert await kinds(pond) == [("row_removed", None)]


async def test_a_row_removed_with_its_seal_is_found(pond: Pond) -> None:
    seals = await pond.sealed()
    await pond.root.execute("delete from audit where audit_id = $1", seals[1]["audit_id"])
    await pond.root.execute("delete from audit_seal where seq = 2")
    assert await kinds(pond) == [("seal_removed", 2)]


async def test_a_gap_that_was_closed_is_found(pond: Pond) -> None:
    await pond.sealed()
    await pond.root.execute("delete from audit_seal where seq = 2")
    for seq in (3, 4, 5):
        await pond.root.execute("update audit_seal set seq = seq - 1 where seq = $1", seq)
    found = await kinds(pond)
    assert ("row_changed", 2) in found
    assert ("fork", 2) in found
    assert ("tail_cut", 5) in found


async def test_rows_in_another_order_are_found(pond: Pond) -> None:
    seals = await pond.sealed()
    await pond.root.execute("update audit_seal set audit_id = gen_random_uuid() where seq = 2")
    await pond.root.execute(
        "update audit_seal set audit_id = $1 where seq = 3", seals[1]["audit_id"]
    )
    await pond.root.execute(
        "update audit_seal set audit_id = $1 where seq = 2", seals[2]["audit_id"]
    )
    assert await kinds(pond) == [("row_changed", 2), ("row_changed", 3)]


async def test_seals_that_were_exchanged_or_forged_are_found(pond: Pond) -> None:
    seals = await pond.sealed()
    await pond.root.execute("update audit_seal set mac = $1 where seq = 2", seals[3]["mac"])
    found = await kinds(pond)
    assert ("row_changed", 2) in found
    assert ("fork", 2) in found
    await pond.root.execute("update audit_seal set mac = $1 where seq = 2", seals[1]["mac"])
    assert (await pond.verify()).is_intact
    await pond.root.execute("update audit_seal set sealed_at = now() where seq = 4")
    assert await kinds(pond) == [("row_changed", 4)]


async def test_seals_of_another_log_do_not_fit(pond: Pond, other_org: int) -> None:
    await pond.sealed(2)
    await pond.root.execute("update audit set org_id = $1", other_org)
    await pond.root.execute("update audit_seal set org_id = $1", other_org)
    report = await pond.verify(org_id=other_org)
    assert report.first_fault is not None
    assert (report.first_fault.kind, report.first_fault.seq) == ("row_changed", 1)


async def test_a_cut_tail_is_found_by_what_was_published(pond: Pond) -> None:
    seals = await pond.sealed()
    for one in seals[3:]:
        await pond.root.execute("delete from audit_seal where seq = $1", one["seq"])
        await pond.root.execute("delete from audit where audit_id = $1", one["audit_id"])
    assert await kinds(pond) == [("tail_cut", 4)]


async def test_a_log_that_was_cut_and_went_on_is_a_fork(pond: Pond) -> None:
    seals = await pond.sealed()
    await pond.root.execute("delete from audit_seal where seq = 5")
    await pond.root.execute("delete from audit where audit_id = $1", seals[4]["audit_id"])
    await pond.tell("thing:other", "thing:more")
    assert await pond.sealer.seal_all() == 2
    assert await kinds(pond) == [("fork", 5)]


async def test_a_row_that_was_put_in_is_found(pond: Pond) -> None:
    await pond.sealed(2)
    await pond.tell("thing:hidden")
    await pond.root.execute("delete from audit_unsealed")
    assert await pond.sealer.seal_all() == 0
    assert await kinds(pond) == [("unsealed", None)]


async def test_rows_that_wait_are_told_of_and_are_a_fault_only_when_they_wait_long(
    pond: Pond,
) -> None:
    await pond.tell("thing:1", "thing:2")
    report = await pond.verify()
    assert report.is_intact
    assert report.unsealed == 2
    assert report.oldest_unsealed_s is not None
    await pond.root.execute(
        "update audit set at = at - interval '1 hour' where resource = 'thing:1'"
    )
    assert await kinds(pond) == [("unsealed", None)]


async def test_what_commits_late_is_chained_late(pond: Pond) -> None:
    principal = Principal(org_id=pond.org_id, subject="user:late")
    async with pond.db.of(principal) as con:
        await audit.record(con, principal, "thing.done", "thing:late")
        await pond.sealed(2)
    assert await pond.sealer.seal_all() == 1
    last = (await pond.seals())[-1]
    row = await pond.root.fetchrow("select * from audit where audit_id = $1", last["audit_id"])
    assert (row["subject"], last["seq"]) == ("user:late", 3)
    first = (await pond.seals())[0]
    assert row["at"] < await pond.root.fetchval(
        "select at from audit where audit_id = $1", first["audit_id"]
    )
    assert (await pond.verify()).is_intact


async def test_what_is_rolled_back_leaves_nothing_to_seal(pond: Pond) -> None:
    principal = Principal(org_id=pond.org_id, subject="user:ann")
    with contextlib.suppress(ZeroDivisionError):
        async with pond.db.of(principal) as con:
            await audit.record(con, principal, "thing.done", "thing:never")
            raise ZeroDivisionError
    assert await pond.sealer.seal_all() == 0
    assert (await pond.verify()).unsealed == 0


async def test_several_sealers_make_one_chain(pond: Pond, urls: Urls) -> None:
    others = [Sealer(pond.db, OLD, pond.heads) for _ in range(3)]

    async def tell() -> None:
        for number in range(30):
            await pond.tell(f"thing:{number}")

    async def seal(sealer: Sealer) -> None:
        while not telling.done():
            await sealer.seal_all()

    telling = asyncio.gather(tell(), tell())
    await asyncio.gather(telling, *map(seal, others))
    await pond.sealer.seal_all()
    report = await pond.verify()
    assert report.is_intact, report.faults
    assert (report.sealed, report.unsealed) == (60, 0)


async def test_a_sealer_leaves_a_log_to_whoever_is_at_it(pond: Pond) -> None:
    await pond.tell("thing:1")
    async with pond.root.transaction():
        await pond.root.execute(
            "select pg_advisory_xact_lock(hashtextextended($1, 0))",
            f"millpond.audit_seal:{pond.org_id}",
        )
        assert await pond.sealer.seal_all() == 0
    assert await pond.sealer.seal_all() == 1


async def test_more_rows_than_a_round_takes_are_sealed(pond: Pond) -> None:
    async with pond.db.org(pond.org_id) as con:
        await con.execute(
            """insert into audit (org_id, audit_id, subject, action, resource)
               select $1, gen_random_uuid(), 'user:ann', 'thing.done', 'thing:' || n
               from generate_series(1, 1203) n""",
            pond.org_id,
        )
    assert await pond.sealer.seal_all() == 1203
    report = await pond.verify()
    assert report.is_intact
    assert report.sealed == 1203


async def test_a_sealer_that_is_killed_before_it_commits_leaves_the_log_as_it_was(
    pond: Pond, urls: Urls
) -> None:
    await pond.sealed(2)
    await pond.tell("thing:2")

    async def die(point: str) -> None:
        if point == "before:org":
            raise KeyboardInterrupt

    dying = await Database.connect(urls.app, probe=die)
    with pytest.raises(KeyboardInterrupt):
        await Sealer(dying, OLD, pond.heads).seal_log(pond.org_id)
    await dying.close()
    assert [head.seq for head in pond.heads.read(pond.org_id)] == [1, 2]
    assert await pond.sealer.seal_all() == 1
    assert (await pond.verify()).is_intact


async def test_a_head_that_a_killed_sealer_did_not_publish_is_published_by_the_next(
    pond: Pond, urls: Urls
) -> None:
    await pond.sealed(2)
    await pond.tell("thing:2")

    async def die(point: str) -> None:
        if point == "after:org":
            raise KeyboardInterrupt

    dying = await Database.connect(urls.app, probe=die)
    with pytest.raises(KeyboardInterrupt):
        await Sealer(dying, OLD, pond.heads).seal_log(pond.org_id)
    await dying.close()
    assert [head.seq for head in pond.heads.read(pond.org_id)] == [1, 2]
    assert (await pond.verify()).is_intact
    await pond.sealer.publish_all()
    assert [head.seq for head in pond.heads.read(pond.org_id)] == [1, 2, 3]
    assert (await pond.verify()).is_intact


async def test_a_head_that_was_sealed_as_its_sealer_stopped_is_published_before_it_ends(
    pond: Pond, urls: Urls
) -> None:
    await pond.sealed(2)
    logs = await pond.root.fetchval("select count(*) from org")
    looked = 0
    is_published, is_sealed = asyncio.Event(), asyncio.Event()

    async def stall(point: str) -> None:
        nonlocal looked
        if point != "after:org" or is_sealed.is_set():
            return
        looked += 1
        if looked >= logs:
            is_published.set()
        if len(await pond.seals()) == 3:
            is_sealed.set()
            await asyncio.sleep(3600)

    stalling = await Database.connect(urls.app, probe=stall)
    async with sealing(Sealer(stalling, OLD, pond.heads, poll_s=0.02)):
        async with asyncio.timeout(DEADLINE_S):
            # What was sealed before it began is published first.
            await is_published.wait()
            await pond.tell("thing:2")
            await is_sealed.wait()
        assert [head.seq for head in pond.heads.read(pond.org_id)] == [1, 2]
    await stalling.close()
    assert [head.seq for head in pond.heads.read(pond.org_id)] == [1, 2, 3]


async def until_sealed(pond: Pond, count: int) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while len(await pond.seals()) < count:
            await asyncio.sleep(0.02)


async def test_rows_are_sealed_without_a_poke_and_at_the_end(pond: Pond) -> None:
    async with sealing(pond.sealer):
        await pond.tell("thing:1", "thing:2")
        await until_sealed(pond, 2)
    async with sealing(Sealer(pond.db, OLD, pond.heads, poll_s=3600)):
        await until_published(pond, 2)
        await pond.tell("thing:3")
    assert len(await pond.seals()) == 3
    assert (await pond.verify()).is_intact


async def until_published(pond: Pond, seq: int) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while (head := pond.heads.last(pond.org_id)) is None or head.seq < seq:
            await asyncio.sleep(0.02)


async def until_count(pond: Pond, least: int) -> None:
    """Wait until there are so many seals in all logs."""
    async with asyncio.timeout(DEADLINE_S):
        while await pond.root.fetchval("select count(*) from audit_seal") < least:
            await asyncio.sleep(0.02)


async def test_a_log_with_a_backlog_keeps_no_other_waiting(pond: Pond, other_org: int) -> None:
    """A row that another org tells while the backlog is sealed has its seal before that is done."""
    async with pond.db.org(pond.org_id) as con:
        await con.execute(
            """insert into audit (org_id, audit_id, subject, action, resource)
               select $1, gen_random_uuid(), 'user:ann', 'thing.done', 'thing:' || n
               from generate_series(1, 20000) n""",
            pond.org_id,
        )
    newest = "select max(sealed_at) from audit_seal where org_id = $1"
    async with sealing(Sealer(pond.db, OLD, pond.heads, poll_s=0.02)):
        await until_count(pond, 1)
        await pond.tell("thing:other", org_id=other_org)
        await until_count(pond, 20001)
    of_other = await pond.root.fetchval(newest, other_org)
    assert of_other is not None
    assert of_other < await pond.root.fetchval(newest, pond.org_id)
    assert (await pond.verify()).is_intact


async def test_rows_whose_mark_is_all_that_is_left_hold_up_no_others(pond: Pond) -> None:
    """As many marks without a row as a part has, before a row that is there."""
    await pond.root.execute(
        "insert into audit_unsealed (org_id, audit_id)"
        " select $1, ('00000000-0000-7000-8000-' || lpad(n::text, 12, '0'))::uuid from generate_series(1, 600) n",
        pond.org_id,
    )
    await pond.tell("thing:1")
    assert await pond.sealer.seal_all() == 1


async def test_a_sealer_goes_on_after_the_database_was_away(pond: Pond) -> None:
    async with sealing(Sealer(pond.db, OLD, pond.heads, poll_s=0.05)):
        await pond.tell("thing:1")
        await until_sealed(pond, 1)
        await pond.root.execute(
            "alter role millpond_app in database %s set default_transaction_read_only = on"
            % await pond.root.fetchval("select quote_ident(current_database())")
        )
        await cut(pond)
        principal = Principal(org_id=pond.org_id, subject="user:ann")
        with pytest.raises(MillpondError):
            async with pond.db.of(principal) as con:
                await audit.record(con, principal, "thing.done", "thing:2")
        await pond.root.execute(
            "alter role millpond_app in database %s reset default_transaction_read_only"
            % await pond.root.fetchval("select quote_ident(current_database())")
        )
        await cut(pond)
        async with asyncio.timeout(DEADLINE_S):
            while True:
                with contextlib.suppress(MillpondError):
                    await pond.tell("thing:2")
                    break
        await until_sealed(pond, 2)
    assert (await pond.verify()).is_intact


async def cut(pond: Pond) -> None:
    """End every session of the application."""
    await pond.root.execute(
        """select pg_terminate_backend(pid) from pg_stat_activity
           where usename = 'millpond_app' and datname = current_database()"""
    )


async def test_rows_under_an_old_key_verify_after_a_rotation(pond: Pond) -> None:
    await pond.sealed(2)
    ring = Ring(NEW, OLD)
    await pond.tell("thing:new")
    assert await Sealer(pond.db, ring, pond.heads).seal_all() == 1
    assert [one["key_id"] for one in await pond.seals()] == [OLD.key_id, OLD.key_id, NEW.key_id]
    report = await pond.verify(ring)
    assert report.is_intact, report.faults
    unknown = await pond.verify(NEW)
    assert [(one.kind, one.seq) for one in unknown.faults] == [
        ("key_unknown", 1),
        ("key_unknown", 2),
    ]


async def test_a_seal_needs_the_key(pond: Pond) -> None:
    await pond.sealed(1)
    await pond.root.execute("update audit_seal set key_id = $1", NEW.key_id)
    report = await pond.verify(Ring(OLD, NEW))
    assert [(one.kind, one.seq) for one in report.faults] == [("row_changed", 1)]


async def test_a_log_verifies_in_parts(pond: Pond) -> None:
    seals = await pond.sealed(5)
    first = await pond.verify(limit=2)
    assert (first.sealed, first.last_seq, first.has_more, first.is_intact) == (2, 2, True, True)
    rest = await pond.verify(after=2, limit=3)
    assert (rest.sealed, rest.last_seq, rest.has_more, rest.is_intact) == (3, 5, False, True)
    await pond.root.execute("delete from audit where audit_id = $1", seals[0]["audit_id"])
    assert not (await pond.verify(limit=2)).is_intact
    assert (await pond.verify(after=2)).is_intact
    beyond = await pond.verify(after=9)
    assert [(one.kind, one.seq) for one in beyond.faults] == [("seal_removed", 9)]


async def test_the_platform_has_a_chain_of_its_own(pond: Pond) -> None:
    await pond.tell("plan:free", "plan:big", org_id=NO_ORG)
    await pond.tell("thing:1")
    assert await pond.sealer.seal_all() == 3
    report = await pond.verify(org_id=NO_ORG)
    assert report.is_intact, report.faults
    assert report.sealed == 2
    await pond.root.execute(
        "update platform_audit set subject = 'user:bob' where resource = 'plan:big'"
    )
    report = await pond.verify(org_id=NO_ORG)
    assert [(one.kind, one.seq) for one in report.faults] == [("row_changed", 2)]
    assert (await pond.verify()).is_intact


async def test_orgs_have_chains_of_their_own(pond: Pond, other_org: int) -> None:
    await pond.tell("thing:1")
    await pond.tell("thing:1", "thing:2", org_id=other_org)
    assert await pond.sealer.seal_all() == 3
    assert (await pond.verify()).sealed == 1
    assert (await pond.verify(org_id=other_org)).sealed == 2


async def test_nobody_who_serves_can_change_the_log(pond: Pond, engine_db: EngineDatabase) -> None:
    for role in ("millpond_app", "millpond_engine"):
        for table in ("audit", "audit_seal", "platform_audit", "platform_audit_seal"):
            for deed in ("update", "delete", "truncate"):
                if deed == "update":
                    asked = "select has_any_column_privilege($1, $2, $3)"
                else:
                    asked = "select has_table_privilege($1, $2, $3)"
                assert not await pond.root.fetchval(asked, role, table, deed), (role, table, deed)
    await pond.sealed(1)
    with pytest.raises(MillpondError) as caught:
        async with pond.db.org(pond.org_id) as con:
            await con.execute("delete from audit")
    assert caught.value.code == "database_privilege"


async def test_rows_of_the_engine_are_sealed_too(pond: Pond, engine_db: EngineDatabase) -> None:
    async with engine_db.duty("test") as con:
        await con.execute(
            """insert into audit (org_id, audit_id, subject, action, resource)
               values ($1, gen_random_uuid(), 'run:x', 'step.refused', 'run:x')""",
            pond.org_id,
        )
    assert await pond.sealer.seal_all() == 1
    assert (await pond.verify()).is_intact


async def test_the_function_across_orgs_tells_ids_alone(pond: Pond, other_org: int) -> None:
    await pond.tell("thing:1")
    await pond.tell("thing:1", org_id=other_org)
    async with pond.db.globals() as con:
        rows = await con.fetch("select * from orgs_with_unsealed()")
        assert await con.fetch("select * from audit_unsealed") == []
    assert sorted(tuple(row.values()) for row in rows) == sorted([(pond.org_id,), (other_org,)])
    columns = await pond.root.fetch(
        """select table_name, column_name, privilege_type from information_schema.column_privileges
           where grantee = 'millpond_sealer'"""
    )
    assert [tuple(row.values()) for row in columns] == [("audit_unsealed", "org_id", "SELECT")]


async def test_heads_are_private_and_only_rise(pond: Pond) -> None:
    await pond.sealed(3)
    path = pond.folder / f"org-{pond.org_id}.jsonl"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    early = next(pond.heads.read(pond.org_id))
    assert not pond.heads.publish(early)
    assert len(path.read_bytes().splitlines()) == 3


def test_heads_above_a_place_are_found_in_a_long_file(tmp_path: Path) -> None:
    heads = Heads(tmp_path)
    at = datetime(2026, 1, 1, tzinfo=UTC)
    for seq in range(2, 1202, 2):
        heads.publish(Head(org_id=1, seq=seq, mac=bytes(32), key_id="k", sealed_at=at))
    for after in (0, 1, 2, 3, 599, 600, 1199, 1200, 1201):
        found = [head.seq for head in heads.read(1, after=after)]
        assert found == [seq for seq in range(2, 1202, 2) if seq > after], after


async def test_a_torn_line_of_heads_is_passed_over(pond: Pond) -> None:
    await pond.sealed(2)
    path = pond.folder / f"org-{pond.org_id}.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    await pond.tell("thing:more")
    await pond.sealer.seal_all()
    assert [head.seq for head in pond.heads.read(pond.org_id)] == [1, 3]
    assert (await pond.verify()).is_intact


def test_keys_of_purposes_differ_and_tell_nothing_of_the_root() -> None:
    key = OLD.derive("audit", OLD.key_id)
    assert len(key) == len(START)
    assert key != OLD.derive("other", OLD.key_id) != bytes(KEY_BYTES)
    assert key != NEW.derive("audit", NEW.key_id)
    with pytest.raises(Permanent):
        OLD.derive("audit", NEW.key_id)
