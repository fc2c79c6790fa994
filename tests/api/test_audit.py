"""The audit log over HTTP: filters, pages, exports that verify elsewhere, verification; no other org's rows."""

from __future__ import annotations

import csv
import io
from typing import Any

import asyncpg
import orjson
import pytest
from tests.api.conftest import ALL, Client, Front

from millpond.identity import audit
from millpond.identity.audit_chain import PURPOSE, START
from millpond.identity.audit_sealer import Sealer
from millpond.identity.seal import KEY_BYTES, Seal
from millpond.types import NO_ORG, Principal, new_id

READS = frozenset({"audit:read"})
SEAL = Seal(bytes(KEY_BYTES))


async def tell(front: Front, resource: str, action: str = "thing.done", **who: Any) -> None:
    org_id = who.pop("org_id", front.org_id)
    extra = {name: who.pop(name) for name in ("run_id", "address", "details") if name in who}
    principal = Principal(org_id=org_id, subject=who.pop("subject", "user:ann"), **who)
    async with front.db.of(principal) as con:
        await audit.record(con, principal, action, resource, **extra)


def sealer(front: Front) -> Sealer:
    return Sealer(front.db, SEAL, front.app.state.ports.auditor.heads)


async def listed(client: Client, **params: Any) -> list[str]:
    answer = await client.get("/v1/audit", params=params)
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [one["id"] for one in data] == sorted((one["id"] for one in data), reverse=True)
    return sorted(one["resource"] for one in data)


async def by_resource(client: Client) -> list[Any]:
    data = (await client.get("/v1/audit")).json()["data"]
    return sorted(data, key=lambda one: one["resource"])


async def test_rows_are_listed_newest_first_with_who_let_them_in(front: Front) -> None:
    reader = await front.client(permissions=READS)
    await tell(front, "thing:1", address="10.0.0.1", details={"name": "a"})
    await tell(front, "thing:2", subject="user:op", granted_by="user:owner")
    first, second = await by_resource(reader)
    assert (first["resource"], first["address"], first["details"]) == (
        "thing:1",
        "10.0.0.1",
        {"name": "a"},
    )
    assert (second["subject"], second["granted_by"]) == ("user:op", "user:owner")
    assert (first["granted_by"], first["seal"]) == (None, None)
    await sealer(front).seal_all()
    assert [one["seal"]["seq"] for one in await by_resource(reader)] == [1, 2]


async def test_filters(front: Front) -> None:
    reader = await front.client(permissions=READS)
    run_id = new_id()
    await tell(front, "thing:1", "member.removed")
    await tell(front, "thing:2", "member.changed", subject="user:bob")
    await tell(front, "thing:3", "key.created", run_id=run_id)
    assert await listed(reader) == ["thing:1", "thing:2", "thing:3"]
    assert await listed(reader, action="member.") == ["thing:1", "thing:2"]
    assert await listed(reader, action="member.%") == []
    assert await listed(reader, subject="user:bob") == ["thing:2"]
    assert await listed(reader, resource="thing:1") == ["thing:1"]
    assert await listed(reader, run_id=str(run_id)) == ["thing:3"]
    at = (await reader.get("/v1/audit", params={"resource": "thing:2"})).json()["data"][0]["at"]
    assert await listed(reader, since=at) == ["thing:2", "thing:3"]
    assert await listed(reader, until=at) == ["thing:1"]
    refused = await reader.get("/v1/audit", params={"since": "2026-01-01T00:00:00"})
    assert refused.status_code == 422


async def test_pages(front: Front) -> None:
    reader = await front.client(permissions=READS)
    for number in range(5):
        await tell(front, f"thing:{number}")
    page = (await reader.get("/v1/audit", params={"limit": 2})).json()
    assert page["has_more"]
    first = [one["resource"] for one in page["data"]]
    rest = await listed(reader, after=page["last_id"])
    assert sorted(first + rest) == [f"thing:{number}" for number in range(5)]


async def test_no_row_of_another_org_is_read_exported_or_verified(
    front: Front, other_org: int
) -> None:
    await tell(front, "thing:secret")
    await sealer(front).seal_all()
    stranger = await front.client(org_id=other_org, permissions=READS)
    assert await listed(stranger) == []
    assert (await stranger.get("/v1/audit/export")).text == ""
    report = (await stranger.get("/v1/audit/verification")).json()
    assert (report["sealed"], report["head"]) == (0, None)


@pytest.mark.parametrize("path", ["", "/export", "/verification"])
async def test_reading_needs_its_permission(front: Front, path: str) -> None:
    other = await front.client(permissions=ALL - READS)
    assert (await other.get(f"/v1/audit{path}")).status_code == 403


async def test_an_export_verifies_elsewhere_with_the_key(front: Front) -> None:
    """The way of an outside verifier, written out: nothing of ours but the key's derivation."""
    import hmac

    reader = await front.client(permissions=READS)
    for number in range(4):
        await tell(front, f"thing:{number}", details={"name": 'ü"x', "count": 1.5})
        await sealer(front).seal_all()
    await tell(front, "thing:waits")
    answer = await reader.get("/v1/audit/export")
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = [orjson.loads(line) for line in answer.text.splitlines()]
    assert [line["seq"] for line in lines] == [1, 2, 3, 4, None]
    key = SEAL.derive(PURPOSE, lines[0]["key_id"])
    mac = START
    row = [
        "audit_id",
        "at",
        "subject",
        "granted_by",
        "action",
        "resource",
        "run_id",
        "address",
        "details",
    ]
    for line in lines[:4]:
        covered = [
            "millpond.audit.1",
            line["org"],
            line["seq"],
            line["key_id"],
            line["sealed_at"],
            *(line[name] for name in row),
        ]
        mac = hmac.digest(key, mac + orjson.dumps(covered), "sha256")
        assert mac.hex() == line["mac"]


async def test_an_export_goes_on_after_a_place(front: Front) -> None:
    reader = await front.client(permissions=READS)
    for number in range(5):
        await tell(front, f"thing:{number}")
    await sealer(front).seal_all()
    answer = await reader.get("/v1/audit/export", params={"after": 1, "limit": 2})
    assert [orjson.loads(line)["seq"] for line in answer.text.splitlines()] == [2, 3]


async def test_a_table_holds_no_formula(front: Front) -> None:
    reader = await front.client(permissions=READS)
    await tell(front, '=1+1,"x"')
    answer = await reader.get("/v1/audit/export", params={"format": "csv"})
    assert answer.headers["content-type"] == "text/csv"
    names, row = csv.reader(io.StringIO(answer.text))
    assert dict(zip(names, row, strict=True))["resource"] == '\'=1+1,"x"'


async def test_verification_tells_of_what_waits_and_of_the_first_fault(
    front: Front, admin_url: str
) -> None:
    reader = await front.client(permissions=READS)
    await tell(front, "thing:1")
    report = (await reader.get("/v1/audit/verification")).json()
    assert (report["is_intact"], report["sealed"], report["unsealed"]) == (True, 0, 1)
    await tell(front, "thing:2")
    await tell(front, "thing:3")
    await sealer(front).seal_all()
    report = (await reader.get("/v1/audit/verification", params={"limit": 2})).json()
    assert (report["sealed"], report["last_seq"], report["has_more"]) == (2, 2, True)
    report = (await reader.get("/v1/audit/verification", params={"after": 2})).json()
    assert (report["sealed"], report["has_more"], report["published_seq"]) == (1, False, 3)
    assert report["head"]["seq"] == 3
    con = await asyncpg.connect(admin_url)
    await con.execute("update millpond.audit set subject = 'user:eve' where resource = 'thing:2'")
    await con.close()
    report = (await reader.get("/v1/audit/verification")).json()
    assert not report["is_intact"]
    assert (report["fault_count"], report["first_fault"]["kind"], report["first_fault"]["seq"]) == (
        1,
        "row_changed",
        2,
    )


async def test_operators_read_the_platforms_own_log(front: Front) -> None:
    await tell(front, "thing:1")
    await tell(front, "plan:big", "plan.changed", org_id=NO_ORG)
    operator = await front.client(permissions=frozenset({"platform:read"}))
    page = (await operator.get("/v1/platform/audit")).json()
    assert [one["resource"] for one in page["data"]] == ["plan:big"]
    page = (await operator.get("/v1/platform/audit", params={"action": "org."})).json()
    assert page["data"] == []
    reader = await front.client(permissions=READS)
    assert (await reader.get("/v1/platform/audit")).status_code == 403
