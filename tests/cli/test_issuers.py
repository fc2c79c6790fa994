"""`millpond issuers` against a running installation and a real issuer, both reached over sockets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
from tests.issuer import AUDIENCE, Issuer, an_issuer

from millpond.cli.issuers import _rule
from millpond.errors import InvalidInput

pytestmark = pytest.mark.xdist_group("platform")


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    """Serve an issuer beside the test's own thread."""
    begun, found = threading.Event(), []

    async def serve() -> None:
        async with an_issuer() as served:
            stop = asyncio.Event()
            found.append((served, asyncio.get_running_loop(), stop))
            begun.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=[serve()])
    thread.start()
    assert begun.wait(20)
    served, loop, stop = found[0]
    yield served
    loop.call_soon_threadsafe(stop.set)
    thread.join(20)


def test_an_owner_registers_an_issuer_and_its_tokens_work_at_the_command_line(
    cli, cli_json, founded, issuer
):
    ann = ("--token", founded[1])
    made = cli_json(
        *("issuers", "create", "Staff", issuer.url, "--audience", AUDIENCE),
        *("--map", "roles=pond-users:viewer", "--org-is", "tid=acme", *ann),
    )
    assert made["rules"] == [{"claim": "roles", "values": ["pond-users"], "role": "viewer"}]
    assert issuer.keys[0].kid in cli("issuers", "test", made["id"], *ann).stdout
    assert "Staff" in cli("issuers", "list", *ann).stdout
    assert "tid" in cli("issuers", "show", made["id"], *ann).stdout

    outside = ("--token", issuer.token(tid="acme", name="Ann"))
    assert "organization" in cli("runs", "list", *outside).stderr
    assert cli("--org", "acme", "runs", "list", *outside).exit_code == 0
    named = cli("runs", "list", *outside, MILLPOND_ORG="acme")
    assert named.exit_code == 0, named.stderr
    (seen,) = cli_json("issuers", "identities", *ann)["data"]
    assert (seen["label"], seen["role"]) == ("Ann", "viewer")

    assert "disabled" in cli("issuers", "disable", seen["id"], *ann).stdout
    refused = cli("--org", "acme", "runs", "list", *outside)
    assert "disabled" in refused.stderr
    assert "enabled" in cli("issuers", "enable", seen["id"], *ann).stdout
    change = ("issuers", "change", made["id"], *ann)
    changed = cli_json(*change, "--any-org", "--trust-days", "5", "--map", "roles=x:analyst")
    assert (changed["org_claim"], changed["trust_days"]) == (None, 5)
    assert changed["rules"][0]["role"] == "analyst"
    assert cli_json(*change, "--disable")["is_disabled"]
    assert cli("issuers", "remove", made["id"], *ann).exit_code == 0
    assert cli("issuers", "list", *ann).stdout == "No issuers.\n"


def test_a_rule_is_read_with_colons_in_its_claim_and_value() -> None:
    assert _rule("https://x.example/r=a:b:viewer") == {
        "claim": "https://x.example/r",
        "values": ["a:b"],
        "role": "viewer",
    }
    for text in ("x", "x=", "x=y", "x=:viewer", "=y:viewer", "x=y:"):
        with pytest.raises(InvalidInput):
            _rule(text)
