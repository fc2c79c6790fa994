"""Registration where anybody may: a link by mail makes the account, and no answer tells who has one."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace

import pytest

from millpond.identity.brake import ADDRESS, MAIL
from millpond.identity.people import Registration

from .conftest import Client, Front
from .test_links import collected, token_in
from .test_sign_in import EMAIL, made, post, signed_in

NEW = "new@pond.example"
PASSWORD = f"a long one {uuid.uuid4()}"
Policy = Callable[[Registration], None]


@pytest.fixture
def policy(front: Front) -> Policy:
    """Set who may make an account, as MILLPOND_REGISTRATION does."""

    def set_to(value: Registration) -> None:
        ports = front.app.state.ports
        front.app.state.ports = replace(ports, people=replace(ports.people, registration=value))

    set_to("open")
    return set_to


@pytest.fixture
async def nobody(front: Front, policy: Policy) -> Client:
    return await front.client(token="")


async def test_a_mailed_link_makes_an_account_once(front: Front, nobody: Client) -> None:
    asked = await post(nobody, "auth/register", email=NEW.upper(), name="Nia")
    assert asked.status_code == 202
    (mail,) = await collected(front)
    assert mail.to == NEW
    token = token_in(mail)
    assert token not in asked.text
    weak = await post(nobody, "auth/register/confirm", token=token, password="short")
    assert weak.status_code == 422
    confirmed = await post(nobody, "auth/register/confirm", token=token, password=PASSWORD)
    assert confirmed.status_code == 201
    again = await post(nobody, "auth/register/confirm", token=token, password=PASSWORD)
    assert (again.status_code, again.json()["code"]) == (422, "link_invalid")
    answer = await signed_in(nobody, PASSWORD, NEW)
    assert answer["user"]["name"] == "Nia"
    assert answer["user"]["is_operator"] is False
    assert answer["organizations"] == []
    caller = await front.client(token=answer["access_token"])
    assert (await caller.get("/v1/runs")).status_code == 403


async def test_no_answer_tells_who_has_an_account(front: Front, nobody: Client) -> None:
    await made(front, PASSWORD)
    known = await post(nobody, "auth/register", email=EMAIL, name="Mallory")
    unknown = await post(nobody, "auth/register", email=NEW, name="Mallory")
    assert (known.status_code, known.content) == (unknown.status_code, unknown.content)
    shown = {name.lower() for name in known.headers} ^ {name.lower() for name in unknown.headers}
    assert shown == set()
    mails = {mail.to: mail for mail in await collected(front)}
    assert set(mails) == {EMAIL, NEW}
    assert "#token=" not in mails[EMAIL].text  # nothing that makes or changes an account
    assert "#token=" in mails[NEW].text
    await signed_in(nobody, PASSWORD)  # and what was there stays as it was


async def test_of_two_links_for_one_address_one_makes_the_account(
    front: Front, nobody: Client
) -> None:
    for _ in range(2):
        assert (await post(nobody, "auth/register", email=NEW)).status_code == 202
    first, second = [token_in(mail) for mail in await collected(front)]
    body = {"password": PASSWORD}
    assert (await post(nobody, "auth/register/confirm", token=first, **body)).status_code == 201
    late = await post(nobody, "auth/register/confirm", token=second, password=f"other {PASSWORD}")
    assert (late.status_code, late.json()["code"]) == (409, "account_exists")
    await signed_in(nobody, PASSWORD, NEW)


async def test_a_link_is_good_for_an_hour_and_only_while_anybody_may(
    front: Front, nobody: Client, policy: Policy
) -> None:
    await post(nobody, "auth/register", email=NEW)
    (mail,) = await collected(front)
    body = {"token": token_in(mail), "password": PASSWORD}
    for closed in ("invited", "closed"):
        policy(closed)
        refused = await post(nobody, "auth/register/confirm", **body)
        assert (refused.status_code, refused.json()["code"]) == (403, "registration_closed")
        assert (await post(nobody, "auth/register", email=NEW)).status_code == 403
    policy("open")
    async with front.db.globals() as con:
        left = await con.fetchval(
            "select max(expires_at) - clock_timestamp() from single_use_token"
        )
        assert 3500 < left.total_seconds() <= 3600
        await con.execute("update single_use_token set expires_at = clock_timestamp()")
    late = await post(nobody, "auth/register/confirm", **body)
    assert (late.status_code, late.json()["code"]) == (422, "link_invalid")


async def test_one_address_is_mailed_a_few_times_whether_it_has_an_account_or_not(
    front: Front, nobody: Client
) -> None:
    await made(front, PASSWORD)
    answers = {}
    for email in (EMAIL, NEW):
        codes = [
            (await post(nobody, "auth/register", email=email)).status_code
            for _ in range(MAIL.tries + 2)
        ]
        answers[email] = codes
    assert answers[EMAIL] == answers[NEW] == [202] * MAIL.tries + [429] * 2
    refused = await post(nobody, "auth/register", email=NEW.upper())
    assert int(refused.headers["Retry-After"]) > 1
    mails = [mail.to for mail in await collected(front)]
    assert sorted(mails) == sorted([EMAIL, NEW] * MAIL.tries)


async def test_one_caller_cannot_mail_the_world(front: Front, nobody: Client) -> None:
    codes = [
        (await post(nobody, "auth/register", email=f"a{n}@pond.example")).status_code
        for n in range(ADDRESS.tries + 20)
    ]
    assert codes[: ADDRESS.tries] == [202] * ADDRESS.tries
    assert 429 in codes[ADDRESS.tries :]
    assert len(await collected(front)) == codes.count(202)


@pytest.mark.parametrize(
    "email", ["a", "a@", "@b.example", "a b@c.example", "a@b.example\r\nBcc: c"]
)
async def test_what_is_no_address_is_refused_and_mailed_nothing(
    front: Front, nobody: Client, email: str
) -> None:
    assert (await post(nobody, "auth/register", email=email)).status_code == 422
    assert await collected(front) == []
