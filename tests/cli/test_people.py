"""From an empty platform to a member of an organization: the first operator, an owner, somebody invited."""

from __future__ import annotations

import pytest
from tests.cli.founding import joined, mailed

pytestmark = pytest.mark.xdist_group("platform")


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
