"""A session kept between commands: signing in, renewing, choosing an org, signing out."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid

import httpx2
import pytest
from tests.cli.conftest import ROOT, clean_environment, run_command
from tests.cli.founding import PASSWORD, joined, mailed

from millpond.cli.kept import SessionFile, server_of
from millpond.errors import Forbidden, InvalidInput

pytestmark = pytest.mark.xdist_group("platform")


@pytest.fixture(scope="module")
def email(up, founded):
    """Somebody of the org acme who is an owner of the org brook besides."""
    place = {"MILLPOND_URL": up.url, "MILLPOND_DATA_DIR": str(up.data_dir)}
    address = f"cleo-{uuid.uuid4().hex[:8]}@acme.example"
    send = ("invitations", "send", address, "--role", "builder", "--token", founded[1])
    assert run_command(*send, **place).exit_code == 0
    first = mailed(up, address)
    joined(up, address)
    create = ("orgs", "create", "brook", "Brook", "--owner", address, "--token", founded[0])
    assert run_command(*create, **place).exit_code == 0
    joined(up, address, after=first)
    return address


@pytest.fixture
def home(tmp_path):
    return tmp_path / "config"


@pytest.fixture
def sign(up, home):
    """Run commands of somebody with an own configuration folder, without a development token."""

    def run(*arguments, stdin=None, **environment):
        place = {
            "MILLPOND_URL": up.url,
            "MILLPOND_DATA_DIR": str(home / "no-data"),
            "XDG_CONFIG_HOME": str(home),
        }
        return run_command(*arguments, stdin=stdin, **{**place, **environment})

    return run


@pytest.fixture
def file(up, home):
    return SessionFile(up.url, home / "millpond" / "sessions")


@pytest.fixture
def kept(sign, email, file):
    """Sign in, and return what is kept."""
    done = sign("login", email, "--password-stdin", "--org", "acme", stdin=f"{PASSWORD}\n")
    assert done.exit_code == 0, done.stderr
    assert f"{email} is signed in" in done.stdout
    return file.read()


def spoiled(file, **changes):
    """Change what is kept, as time or another command would."""
    document = json.loads(file.path.read_text())
    file.path.write_text(json.dumps({**document, **changes}))


def refused_now(up, refresh_token):
    """Whether a refresh token is of no use; one that is, is used up by asking."""
    answer = httpx2.post(
        f"{up.url}/v1/auth/refresh", json={"refresh_token": refresh_token}, trust_env=False
    )
    return answer.status_code == 401


def test_commands_use_the_session_until_it_is_ended(sign, kept, email, file, up):
    assert file.path.stat().st_mode & 0o077 == 0
    assert file.path.parent.stat().st_mode & 0o077 == 0
    assert PASSWORD not in file.path.read_text()
    assert kept.refresh_token not in repr(kept)
    assert sign("runs", "list").exit_code == 0
    shown = sign("whoami").stdout
    assert email in shown
    assert "builder" in shown
    assert "acme, brook" in shown
    assert sign("whoami", "--token", "mpk_wrong").exit_code == 4
    assert sign("whoami", MILLPOND_TOKEN="mpk_wrong").exit_code == 4

    assert "Signed out" in sign("logout").stdout
    assert not file.path.exists()
    assert refused_now(up, kept.refresh_token)
    left = httpx2.get(
        f"{up.url}/v1/me", headers={"Authorization": f"Bearer {kept.access_token}"}, trust_env=False
    )
    assert left.status_code == 401
    assert sign("runs", "list").exit_code == 4
    assert "Nobody was signed in" in sign("logout").stdout


def test_address_and_password_are_asked_for(sign, email, file):
    asked = sign("login", "--json", "--org", "brook", stdin=f"{email}\n{PASSWORD}\n")
    assert asked.exit_code == 0, asked.stderr
    # The runner of the tests shows prompts on stdout.
    document = json.loads(asked.stdout[asked.stdout.index("{") :])
    assert document["org"] == "brook"
    kept = file.read()
    assert kept.access_token not in asked.stdout
    assert kept.refresh_token not in asked.stdout + asked.stderr
    assert PASSWORD not in asked.stdout + asked.stderr
    assert sign("logout").exit_code == 0


def test_an_org_is_chosen_for_one_command_for_the_shell_or_for_good(sign, kept, file):
    def role(*before, **environment):
        return json.loads(sign(*before, "whoami", "--json", **environment).stdout)["role"]

    assert role() == "builder"
    assert role("--org", "brook") == "owner"
    assert role(MILLPOND_ORG="brook") == "owner"
    assert role("--org", "acme", MILLPOND_ORG="brook") == "builder"
    assert sign("org", "use", "brook").exit_code == 0
    assert role() == "owner"
    assert "Brook" in sign("org", "show").stdout
    unknown = sign("org", "use", "sea")
    assert unknown.exit_code == 2
    assert "acme, brook" in unknown.stderr
    assert role() == "owner"
    assert sign("org", "use").exit_code == 0
    open_end = sign("runs", "list")
    assert open_end.exit_code == 2
    assert "millpond org use" in open_end.stderr
    # One whose place in the chosen org is gone chooses another.
    spoiled(file, org="gone")
    assert sign("runs", "list").exit_code == 4
    assert sign("org", "use", "acme").exit_code == 0
    assert sign("runs", "list").exit_code == 0


def test_signing_in_to_an_org_that_one_is_not_in_keeps_nothing(sign, email, file, up):
    done = sign("login", email, "--password-stdin", "--org", "sea", stdin=f"{PASSWORD}\n")
    assert done.exit_code == 2
    assert not file.path.exists()


def test_an_old_access_token_is_renewed_and_a_wrong_one_is_not(sign, kept, file):
    spoiled(file, renew_at=time.time() - 1)
    assert sign("runs", "list").exit_code == 0
    second = file.read()
    assert second.refresh_token != kept.refresh_token
    assert second.renew_at > time.time() + 60
    assert second.org == "acme"
    # A wrong token is no reason to renew: it is refused, and the session goes on.
    head, body, _ = second.access_token.split(".")
    spoiled(file, access_token=f"{head}.{body}.AAAA")
    assert sign("runs", "list").exit_code == 4
    assert file.read().refresh_token == second.refresh_token
    spoiled(file, access_token=second.access_token)
    assert sign("runs", "list").exit_code == 0


def test_a_role_that_changed_makes_the_next_command_renew(sign, kept, cli, founded, file, email):
    me = json.loads(sign("whoami", "--json").stdout)
    change = ("members", "role", me["user"]["id"])
    owner = ("--token", founded[1])
    try:
        changed = cli(*change, "--role", "viewer", *owner)
        assert changed.exit_code == 0, changed.stderr
        assert sign("runs", "list").exit_code == 0
        assert file.read().refresh_token != kept.refresh_token
        assert json.loads(sign("whoami", "--json").stdout)["role"] == "viewer"
    finally:
        assert cli(*change, "--role", "builder", *owner).exit_code == 0


def test_commands_that_renew_at_once_do_not_sign_anybody_out(kept, file, up, home):
    spoiled(file, renew_at=time.time() - 1)
    environment = clean_environment(
        MILLPOND_URL=up.url,
        MILLPOND_DATA_DIR=str(home / "no-data"),
        XDG_CONFIG_HOME=str(home),
    )
    command = [sys.executable, "-m", "millpond.cli", "whoami", "--json"]
    together = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(5)
    ]
    answers = [process.communicate(timeout=90) for process in together]
    assert [process.returncode for process in together] == [0] * 5, answers
    assert len({json.loads(answer)["session_id"] for answer, _ in answers}) == 1
    now = file.read()
    assert now.refresh_token != kept.refresh_token
    assert refused_now(up, kept.refresh_token)  # and that ends the session: it is a second use


def test_the_lock_is_what_keeps_them_apart(sign, kept, file):
    """A command that has to renew waits for one that does, and then uses what that one got."""
    spoiled(file, renew_at=time.time() - 1)
    done = threading.Event()
    codes = []

    def command():
        codes.append(sign("runs", "list").exit_code)
        done.set()

    with file.lock():
        waiting = threading.Thread(target=command)
        waiting.start()
        assert not done.wait(2)
        assert file.read().refresh_token == kept.refresh_token
    waiting.join(30)
    assert codes == [0]
    assert file.read().refresh_token != kept.refresh_token


def test_a_session_that_was_ended_elsewhere_says_sign_in_again(sign, kept, email, file, up):
    httpx2.post(
        f"{up.url}/v1/auth/sign-out", json={"refresh_token": kept.refresh_token}, trust_env=False
    )
    for _ in range(2):
        ended = sign("runs", "list")
        assert ended.exit_code == 4
        assert "session" in ended.stderr
        assert "sign in again with `millpond login`" in ended.stderr
    assert kept.refresh_token not in file.path.read_text()
    again = sign("login", email, "--password-stdin", "--org", "acme", stdin=f"{PASSWORD}\n")
    assert again.exit_code == 0
    assert sign("runs", "list").exit_code == 0


def test_signing_in_again_ends_the_former_session(sign, kept, email, file, up):
    assert sign("login", email, "--password-stdin", stdin=f"{PASSWORD}\n").exit_code == 0
    assert refused_now(up, kept.refresh_token)
    assert file.read().org is None


def test_a_wrong_password_and_too_many_tries_are_told_apart(sign, file):
    nobody = f"{uuid.uuid4().hex}@acme.example"
    wrong = sign("login", nobody, "--password-stdin", stdin="not it at all\n")
    assert wrong.exit_code == 4
    assert "password are not right" in wrong.stderr
    assert "MILLPOND_TOKEN" not in wrong.stderr
    for _ in range(20):
        last = sign("login", nobody, "--password-stdin", stdin="not it at all\n")
        if last.exit_code != 4:
            break
    assert last.exit_code == 5
    assert "Too many tries" in last.stderr
    assert "Try again in" in last.stderr
    assert not file.path.exists()


def test_a_server_that_is_away_is_said_and_costs_no_session(sign, kept, file, home):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        away = f"http://127.0.0.1:{free.getsockname()[1]}"
    gone = sign("login", "a@b.example", "--password-stdin", "--url", away, stdin="x\n")
    assert gone.exit_code == 5
    assert "cannot be reached" in gone.stderr
    other = SessionFile(away, file.path.parent)
    document = json.loads(file.path.read_text())
    other.path.write_text(json.dumps({**document, "url": away, "renew_at": 0}))
    other.path.chmod(0o600)
    assert sign("runs", "list", "--url", away).exit_code == 5
    assert other.read().refresh_token == kept.refresh_token
    assert sign("logout", "--url", away).exit_code == 5
    assert other.read() is not None
    forgotten = sign("logout", "--forget", "--url", away)
    assert forgotten.exit_code == 0
    assert "not ended there" in forgotten.stdout
    assert other.read() is None
    assert file.read() is not None
    assert "Nobody was signed in" in sign("logout", "--forget", "--url", away).stdout


def test_a_session_that_cannot_be_kept_is_ended(sign, kept, email, up, tmp_path):
    bearer = {"Authorization": f"Bearer {kept.access_token}"}

    def sessions():
        answer = httpx2.get(f"{up.url}/v1/me/sessions", headers=bearer, trust_env=False)
        return {one["id"] for one in answer.json()["data"]}

    before = sessions()
    assert before
    elsewhere = SessionFile(up.url, tmp_path / "full" / "millpond" / "sessions")
    in_the_way = elsewhere.path.with_name(f".{elsewhere.path.name}.{os.getpid()}")
    in_the_way.mkdir(parents=True)
    place = {"XDG_CONFIG_HOME": str(tmp_path / "full")}
    done = sign("login", email, "--password-stdin", stdin=f"{PASSWORD}\n", **place)
    assert done.exit_code != 0
    assert sessions() == before
    in_the_way.rmdir()
    assert sign("login", email, "--password-stdin", stdin=f"{PASSWORD}\n", **place).exit_code == 0
    assert len(sessions() - before) == 1


def test_servers_are_kept_apart(sign, kept, up, file):
    elsewhere = up.url.replace("127.0.0.1", "localhost")
    assert sign("runs", "list", "--url", elsewhere).exit_code == 4
    assert sign("runs", "list", "--url", f"{up.url}/").exit_code == 0
    assert sign("logout", "--url", elsewhere).exit_code == 0
    assert file.read() is not None


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_file_that_others_can_read_is_refused_until_it_is_made_anew(
    sign, kept, email, file, mode, up
):
    file.path.chmod(mode)
    refused = sign("runs", "list")
    assert refused.exit_code == 4
    assert "Others can read" in refused.stderr
    assert kept.access_token not in refused.stderr
    assert sign("login", email, "--password-stdin", stdin=f"{PASSWORD}\n").exit_code == 0
    assert file.path.stat().st_mode & 0o077 == 0
    assert refused_now(up, kept.refresh_token)


def test_a_link_or_a_foreign_text_is_no_session(file, home):
    file.path.parent.mkdir(parents=True)
    (home / "other.json").write_text("{}")
    file.path.symlink_to(home / "other.json")
    with pytest.raises(InvalidInput):
        file.read()
    file.path.unlink()
    file.path.write_text("not JSON")
    file.path.chmod(0o600)
    with pytest.raises(InvalidInput) as caught:
        file.read()
    assert "millpond login" in caught.value.advice


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_somebody_else_is_refused(kept, file):
    os.chown(file.path, 12345, 12345)
    with pytest.raises(Forbidden):
        file.read()


def test_a_password_goes_over_a_network_only_by_tls(sign):
    refused = sign("login", "a@b.example", "--url", "http://pond.example", stdin="x\n")
    assert refused.exit_code == 2
    assert "no TLS" in refused.stderr


@pytest.mark.parametrize(
    ("url", "server"),
    [
        ("HTTP://Pond.Example:80/", "http://pond.example"),
        ("https://pond.example:443", "https://pond.example"),
        ("https://pond.example:8443/ai/", "https://pond.example:8443/ai"),
        ("http://[::1]:8080", "http://[::1]:8080"),
    ],
)
def test_one_server_has_one_name(url, server):
    assert server_of(url) == server
    assert SessionFile(url).path == SessionFile(server).path


@pytest.mark.parametrize("url", ["pond", "ftp://pond", "http://", "http://a:b@pond", "http://p:x"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(InvalidInput):
        server_of(url)
