"""From an empty platform to a member of an organization: the first operator, an owner, somebody invited."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import httpx2
import pytest
from tests.cli.conftest import run_command

pytestmark = pytest.mark.xdist_group("platform")
PASSWORD = "a pass phrase of the test"


def mailed(up, to, after=""):
    """Wait for the newest mail to an address and return the token of its link."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        path = up.data_dir / "mail.txt"
        text = path.read_text() if path.exists() else ""
        mails = [mail for mail in text.split("From: ") if f"To: {to}" in mail]
        tokens = re.findall(r"#token=3?D?(\S+)", mails[-1].replace("=\n", "")) if mails else []
        if tokens and tokens[-1] != after:
            return tokens[-1]
        time.sleep(0.1)
    raise AssertionError(f"no mail to {to}")


def signed_in(up, email):
    answer = httpx2.post(
        f"{up.url}/v1/auth/sign-in", json={"email": email, "password": PASSWORD}, trust_env=False
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["access_token"]


def joined(up, email):
    """Make the account of an invitation, sign in, accept, and sign in for the new place."""
    token = mailed(up, email)
    body = {"token": token, "password": PASSWORD}
    made = httpx2.post(f"{up.url}/v1/auth/register/confirm", json=body, trust_env=False)
    assert made.status_code == 201, made.text
    headers = {"Authorization": f"Bearer {signed_in(up, email)}"}
    accepted = httpx2.post(
        f"{up.url}/v1/auth/invitations/accept",
        json={"token": token},
        headers=headers,
        trust_env=False,
    )
    assert accepted.status_code == 200, accepted.text
    return signed_in(up, email)


@pytest.fixture(scope="module")
def founded(up):
    """Make the first operator, an org, and its owner."""
    place = {"MILLPOND_URL": up.url, "MILLPOND_DATA_DIR": str(up.data_dir)}
    made = json.loads(run_command("operator", "link", "--json", **place).stdout)
    token = Path(made["file"]).read_text().strip()
    assert Path(made["file"]).stat().st_mode & 0o077 == 0
    claim = ("operator", "claim", "op@pond.example", "--token", token, "--password-stdin")
    assert run_command(*claim, stdin=f"{PASSWORD}\n", **place).exit_code == 0
    assert run_command(*claim, stdin=f"{PASSWORD}\n", **place).exit_code != 0
    operator = signed_in(up, "op@pond.example")
    create = ("orgs", "create", "acme", "Acme", "--owner", "ann@acme.example")
    assert run_command(*create, "--token", operator, **place).exit_code == 0
    return operator, joined(up, "ann@acme.example")


def test_a_platform_gets_an_operator_an_owner_and_a_member(cli, founded, up):
    operator, ann = founded
    refused = cli("operator", "link")
    assert "has an operator" in refused.stderr
    assert "acme" in cli("orgs", "list", "--token", operator).stdout
    assert cli("runs", "list", "--token", operator).exit_code != 0
    assert "owner" in cli("members", "list", "--token", ann).stdout
    assert cli("orgs", "list", "--token", ann).exit_code != 0
    send = ("invitations", "send", "bob@acme.example", "--role", "support", "--token", ann)
    assert cli(*send).exit_code == 0
    bob = joined(up, "bob@acme.example")
    assert cli("runs", "list", "--token", bob).stdout.strip()
    assert cli("apikeys", "list", "--token", bob).exit_code != 0

    key = cli("apikeys", "create", "ci", "--scope", "runs:read", "--token", ann).stdout.strip()
    assert key.startswith("mpk_")
    assert cli("runs", "list", "--token", key).exit_code == 0
    assert cli("members", "list", "--token", key).exit_code != 0
    assert "ci" in cli("apikeys", "list", "--token", ann).stdout
    assert "owner" in cli("roles", "list", "--token", ann).stdout
    assert cli("grants", "list", "--token", ann).stdout == "No operator was let in.\n"
    grant = ("grants", "open", "op@pond.example", "--reason", "a look", "--token", ann)
    assert cli(*grant).exit_code == 0


def test_an_owner_sets_policy_roles_and_programs_by_command(cli, cli_json, founded, up):
    ann = ("--token", founded[1])
    changed = cli_json("org", "set", "--invitation-days", "3", "--domain", "acme.example", *ann)
    assert changed["policy"]["email_domains"] == ["acme.example"]
    assert "invitation_days" in cli("org", "show", *ann).stdout
    assert cli("invitations", "send", "z@other.example", *ann).exit_code == 2
    assert cli_json("org", "set", "--any-domain", *ann)["policy"]["email_domains"] == []

    made = cli_json("invitations", "send", "zoe@acme.example", *ann)
    first = mailed(up, "zoe@acme.example")
    assert "another link" in cli("invitations", "resend", made["id"], *ann).stdout
    assert mailed(up, "zoe@acme.example", after=first) != first

    put = cli("roles", "put", "reader", "--permission", "runs:read", *ann)
    assert "reader may runs:read" in put.stdout
    bot = cli_json("service-principals", "create", "bot", "--role", "reader", *ann)
    assert cli("roles", "delete", "reader", *ann).exit_code != 0
    change = ("service-principals", "change", bot["id"], *ann)
    assert "bot is enabled, as viewer" in cli(*change, "--role", "viewer").stdout
    assert "disabled" in cli(*change, "--disable").stdout
    assert cli("roles", "delete", "reader", *ann).exit_code == 0


def test_operators_are_made_and_one_stays(cli, cli_json, founded):
    operator = ("--token", founded[0])
    added = cli_json("operators", "add", "ann@acme.example", *operator)
    assert "ann@acme.example" in cli("operators", "list", *operator).stdout
    assert cli("operators", "remove", added["id"], *operator).exit_code == 0
    (last,) = cli_json("operators", "list", *operator)["data"]
    refused = cli("operators", "remove", last["id"], *operator)
    assert "last one" in refused.stderr


def test_signing_keys_are_rotated_and_listed(cli, cli_json):
    rotated = cli_json("keys", "rotate")["id"]
    keys = cli_json("keys", "list")["data"]
    assert (keys[0]["id"], keys[0]["state"]) == (rotated, "current")
    assert keys[1]["state"] == "overlapping"
    assert rotated in cli("keys", "list").stdout
