"""Links that work once: resets, and the first operator; mail that waits is sealed."""

from __future__ import annotations

import asyncio
import re
import uuid
from datetime import timedelta

import pytest

from millpond.errors import Conflict
from millpond.identity import operators
from millpond.identity.mailing import Mail, Postman
from millpond.identity.ring import KeyRing
from millpond.identity.seal import KEY_BYTES, Seal

from .conftest import Client, Front
from .test_sign_in import EMAIL, made, post, signed_in


class Tray:
    """Keeps mail that is handed in."""

    def __init__(self) -> None:
        self.mails: list[Mail] = []

    async def send(self, mail: Mail) -> None:
        self.mails.append(mail)


async def collected(front: Front) -> list[Mail]:
    tray = Tray()
    postman = Postman(front.db, KeyRing(Seal(bytes(KEY_BYTES))), tray)
    while await postman.send_one(tray):
        pass
    return tray.mails


def token_in(mail: Mail) -> str:
    found = re.search(r"#token=(\S+)", mail.text)
    assert found
    return found[1]


async def test_of_two_resets_by_one_link_one_works_and_all_sessions_end(front: Front) -> None:
    nobody: Client = await front.client(token="")
    old, new = f"an old one {uuid.uuid4()}", f"a new one {uuid.uuid4()}"
    await made(front, old)
    before = await signed_in(nobody, old)
    known = await post(nobody, "auth/password-reset", email=EMAIL)
    unknown = await post(nobody, "auth/password-reset", email="who@pond.example")
    assert known.status_code == unknown.status_code == 202
    assert known.content == unknown.content
    (mail,) = await collected(front)
    assert mail.to == EMAIL
    token = token_in(mail)
    answers = await asyncio.gather(
        *(post(nobody, "auth/password-reset/confirm", token=token, password=new) for _ in range(2))
    )
    assert sorted(one.status_code for one in answers) == [204, 422]
    caller = await front.client(token=before["access_token"])
    assert (await caller.get("/v1/me")).status_code == 401
    assert (await post(nobody, "auth/sign-in", email=EMAIL, password=old)).status_code == 401
    await signed_in(nobody, new)


async def test_of_two_operator_links_at_once_one_works_and_makes_one_operator(front: Front) -> None:
    nobody: Client = await front.client(token="")
    password = f"a long one {uuid.uuid4()}"
    tokens = await asyncio.gather(*(operators.make_link(front.db) for _ in range(2)))
    answers = await asyncio.gather(
        *(
            post(nobody, "auth/operator", token=token, email=f"op{n}@x.example", password=password)
            for n, token in enumerate(tokens)
        )
    )
    assert sorted(one.status_code for one in answers) == [201, 422]
    async with front.db.globals() as con:
        assert await con.fetchval("select count(*) from account where is_operator") == 1
    with pytest.raises(Conflict):
        await operators.make_link(front.db)
    assert await operators.make_link(front.db, is_reset=True)


@pytest.mark.parametrize("kind", ["first operator", "operator reset", "password reset"])
async def test_a_link_is_good_for_its_time_and_no_longer(front: Front, kind: str) -> None:
    """An hour for operators' links; one that is too old makes nobody an operator and sets no password."""
    nobody: Client = await front.client(token="")
    old, new = f"an old one {uuid.uuid4()}", f"a new one {uuid.uuid4()}"
    await made(front, old)
    path, body = "auth/operator", {"email": "op@x.example", "password": new}
    if kind == "password reset":
        path, body = "auth/password-reset/confirm", {"password": new}
        await post(nobody, "auth/password-reset", email=EMAIL)
        (mail,) = await collected(front)
        token = token_in(mail)
    else:
        if kind == "operator reset":
            first = await operators.make_link(front.db)
            assert (await post(nobody, path, token=first, **body)).status_code == 201
            body = {**body, "password": f"a third one {uuid.uuid4()}"}
        token = await operators.make_link(front.db, is_reset=kind == "operator reset")
    operating = "select count(*) from account where is_operator"
    async with front.db.globals() as con:
        before = await con.fetchval(operating)
        left = await con.fetchval(
            "select max(expires_at) - clock_timestamp() from single_use_token"
        )
        assert timedelta(minutes=59) < left <= timedelta(hours=1)
        await con.execute("update single_use_token set expires_at = clock_timestamp()")
    refused = await post(nobody, path, token=token, **body)
    assert (refused.status_code, refused.json()["code"]) == (422, "link_invalid")
    async with front.db.globals() as con:
        assert await con.fetchval(operating) == before
    if kind == "password reset":
        await signed_in(nobody, old)
    assert (
        await post(nobody, "auth/sign-in", email=EMAIL, password=body["password"])
    ).status_code == 401


async def test_registration_is_closed_unless_it_is_opened(front: Front) -> None:
    nobody: Client = await front.client(token="")
    refused = await post(nobody, "auth/register", email=EMAIL)
    assert (refused.status_code, refused.json()["code"]) == (403, "registration_closed")
    assert await collected(front) == []
