"""One's own account by command: from a mailed link to a place, another password, sessions that are ended."""

from __future__ import annotations

import json
import uuid

import pytest
from tests.cli.conftest import run_command
from tests.cli.founding import PASSWORD, mailed

from millpond.cli.kept import SessionFile

pytestmark = pytest.mark.xdist_group("platform")
OTHER = "another pass phrase of the test"


@pytest.fixture
def sign(up, tmp_path):
    """Run commands of somebody with an own configuration folder, without a development token."""

    def run(*arguments, stdin=None, at="home"):
        place = {
            "MILLPOND_URL": up.url,
            "MILLPOND_DATA_DIR": str(tmp_path / "no-data"),
            "XDG_CONFIG_HOME": str(tmp_path / at),
        }
        return run_command(*arguments, stdin=stdin, **place)

    return run


def done(result):
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture
def invited(founded, cli, up):
    """An address that was invited, and the token of its link."""
    address = f"dan-{uuid.uuid4().hex[:8]}@acme.example"
    send = ("invitations", "send", address, "--role", "builder", "--token", founded[1])
    assert cli(*send).exit_code == 0
    return address, mailed(up, address)


def log_in(sign, email, password=PASSWORD, at="home"):
    done(sign("login", email, "--password-stdin", stdin=f"{password}\n", at=at))


def test_who_was_invited_joins_and_manages_their_account_by_command(sign, invited, up, tmp_path):
    email, token = invited
    link = f"{up.url}/invitation#token={token}"
    confirm = ("account", "confirm", "--link", link, "--password-stdin")
    assert sign(*confirm, stdin="short\n").exit_code == 2
    assert "millpond login" in done(sign(*confirm, stdin=f"{PASSWORD}\n"))
    assert sign("invitations", "accept", "--link", link).exit_code == 4  # nobody is signed in
    log_in(sign, email)
    assert "as builder: millpond --org acme" in done(sign("invitations", "accept", "--link", token))
    # The session has the new place at once.
    assert json.loads(done(sign("whoami", "--json")))["role"] == "builder"
    assert sign("invitations", "accept", "--link", token).exit_code == 3
    assert "Dan D." in done(sign("account", "name", "Dan D."))

    log_in(sign, email, at="elsewhere")
    page = json.loads(done(sign("sessions", "list", "--json")))["data"]
    assert [one["is_current"] for one in page] == [False, True]
    assert "this one" in done(sign("sessions", "list"))
    done(sign("sessions", "end", page[0]["id"]))
    assert sign("whoami", at="elsewhere").exit_code == 4
    assert sign("sessions", "end", str(uuid.uuid4())).exit_code == 3

    log_in(sign, email, at="elsewhere")
    change = ("account", "password", "--password-stdin")
    assert sign(*change, stdin=f"wrong\n{OTHER}\n").exit_code == 4
    before = SessionFile(up.url, tmp_path / "home" / "millpond" / "sessions").read()
    assert "other sessions" in done(sign(*change, stdin=f"{PASSWORD}\n{OTHER}\n"))
    after = SessionFile(up.url, tmp_path / "home" / "millpond" / "sessions").read()
    assert after.refresh_token != before.refresh_token
    assert OTHER not in repr(after)
    assert sign("runs", "list").exit_code == 0
    assert sign("runs", "list", at="elsewhere").exit_code == 4


def test_a_forgotten_password_is_set_by_a_mailed_link(sign, invited, up):
    email, token = invited
    done(sign("account", "confirm", "--link", token, "--password-stdin", stdin=f"{PASSWORD}\n"))
    log_in(sign, email)
    known = done(sign("account", "forgot", email))
    unknown = done(sign("account", "forgot", "nobody@acme.example"))
    assert known.replace(email, "") == unknown.replace("nobody@acme.example", "")
    link = mailed(up, email, after=token)
    reset = ("account", "reset", "--link", link, "--password-stdin")
    assert "millpond login" in done(sign(*reset, stdin=f"{OTHER}\n"))
    assert sign("whoami").exit_code == 4  # all sessions ended
    assert sign(*reset, stdin=f"{OTHER}\n").exit_code == 2
    log_in(sign, email, OTHER)


def test_an_account_is_asked_for_where_anybody_may_have_one(sign):
    refused = sign("account", "register", "new@pond.example")
    assert refused.exit_code == 4
    assert "made by invitation here" in refused.stderr


@pytest.mark.parametrize(
    "command", [("confirm", "--link", "x"), ("reset", "--link", "x"), ("password",)]
)
def test_no_password_crosses_a_network_in_the_clear(sign, command):
    far = ("--url", "http://pond.example", "--password-stdin")
    refused = sign("account", *command, *far, stdin=f"{PASSWORD}\n{OTHER}\n")
    assert refused.exit_code == 2
    assert "no TLS" in refused.stderr
