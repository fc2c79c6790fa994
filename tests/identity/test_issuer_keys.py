"""Keys of issuers: when an issuer is asked, how many at once, and what is kept of it."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable

import orjson
import pytest
from tests.issuer import public_jwk, rsa_key

from millpond.errors import Transient, Unauthenticated, Unavailable
from millpond.identity import issuer_keys
from millpond.identity.issuer_documents import WELL_KNOWN
from millpond.identity.issuer_keys import IssuerKeys, Patience, Room


class Web:
    """All issuers there are: each publishes what a test says, is slow or down, and is counted."""

    def __init__(self) -> None:
        self.published = ["k1"]
        self.is_down = False
        self.held: asyncio.Event | None = None
        self.asked: Counter[str] = Counter()
        self.payers: set[str] = set()

    def check(self, url: str, *, param: str) -> None:
        """Any address is good."""

    async def get(self, url: str, *, max_bytes: int, timeout_s: float, payer: str) -> bytes:
        base = url.removesuffix(WELL_KNOWN).removesuffix("/keys")
        self.asked[base] += url.endswith(WELL_KNOWN)
        self.payers.add(payer)
        if self.held is not None:
            await self.held.wait()
        if self.is_down:
            raise Transient("down")
        if url.endswith(WELL_KNOWN):
            return orjson.dumps({"issuer": base, "jwks_uri": f"{base}/keys"})
        keys = [public_jwk(rsa_key(), "RS256", kid) for kid in self.published]
        return orjson.dumps({"keys": keys})


class Time:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def web() -> Web:
    return Web()


@pytest.fixture
def clock() -> Time:
    return Time()


@pytest.fixture
async def make(web: Web, clock: Time) -> AsyncIterator[Callable[..., IssuerKeys]]:
    made: list[IssuerKeys] = []

    def one(**room: int) -> IssuerKeys:
        made.append(IssuerKeys(web, Patience(), clock, Room(**room)))
        return made[-1]

    yield one
    for keys in made:
        await keys.close()


async def code_of(keys: IssuerKeys, url: str, *, org_id: int = 1, kid: str = "k1") -> str:
    """Ask for a key; returns the code of the refusal, or nothing."""
    try:
        await keys.key(url, kid, "RS256", org_id=org_id)
    except (Unavailable, Unauthenticated) as error:
        return error.code
    return ""


async def until_held(web: Web, count: int) -> None:
    async with asyncio.timeout(10):
        while web.asked.total() < count:
            await asyncio.sleep(0)


async def test_requests_with_a_rotated_key_wait_for_the_answer_that_one_of_them_asked_for(
    web: Web, clock: Time, make: Callable[..., IssuerKeys]
) -> None:
    keys = make()
    assert await code_of(keys, "https://a") == ""
    clock.now_s += 10
    web.published, web.held = ["k2"], asyncio.Event()
    asking = [asyncio.create_task(code_of(keys, "https://a", kid="k2")) for _ in range(5)]
    await until_held(web, 2)
    asking += [asyncio.create_task(code_of(keys, "https://a", kid="k2")) for _ in range(5)]
    await asyncio.sleep(0.01)
    web.held.set()
    assert await asyncio.gather(*asking) == [""] * 10
    assert web.asked["https://a"] == 2


async def test_an_issuer_that_fails_is_asked_after_pauses_that_double(
    web: Web, clock: Time, make: Callable[..., IssuerKeys]
) -> None:
    keys = make()
    web.is_down = True
    asked_at = []
    for _ in range(80):
        before = web.asked.total()
        assert await code_of(keys, "https://a") == "issuer_unavailable"
        if web.asked.total() > before:
            asked_at.append(clock.now_s)
        clock.now_s += 10
    pauses = [b - a for a, b in itertools.pairwise(asked_at)]
    assert pauses == [10, 20, 40, 80, 160, 160, 160, 160]
    web.is_down = False
    clock.now_s += 160
    assert await code_of(keys, "https://a") == ""
    web.is_down = True
    clock.now_s += 3601
    assert await code_of(keys, "https://a") == "issuer_unavailable"
    clock.now_s += 10  # the pauses begin anew
    web.is_down = False
    assert await code_of(keys, "https://a") == ""


async def test_through_an_outage_known_keys_are_good_for_their_time_and_an_unknown_one_is_told_so(
    web: Web, clock: Time, make: Callable[..., IssuerKeys]
) -> None:
    keys = make()
    assert await code_of(keys, "https://a") == ""
    web.is_down = True
    for _ in range(360):
        clock.now_s += 10
        assert await code_of(keys, "https://a") == ""
        await asyncio.sleep(0)  # let a question beside the request come to its end
    # After five minutes it was asked again, each pause up to 160 s: not with every request.
    assert 15 <= web.asked["https://a"] <= 30
    with pytest.raises(
        Unavailable, match=r"a key that is not known here.*cannot be asked"
    ) as caught:
        await keys.key("https://a", "k2", "RS256", org_id=1)
    assert caught.value.retry_after_s is not None
    clock.now_s += 10
    assert await code_of(keys, "https://a") == "issuer_unavailable"
    web.is_down = False
    clock.now_s += 160
    assert await code_of(keys, "https://a") == ""
    assert await code_of(keys, "https://a", kid="k2") == "token_unknown_key"


async def test_who_tests_an_issuer_need_not_wait_out_the_pause(
    web: Web, clock: Time, make: Callable[..., IssuerKeys]
) -> None:
    keys = make()
    web.is_down = True
    for _ in range(20):
        await code_of(keys, "https://a")
        clock.now_s += 10
    web.is_down = False
    assert await code_of(keys, "https://a") == "issuer_unavailable"
    assert list(await keys.test("https://a", org_id=1)) == [("k1", "RS256")]
    assert await code_of(keys, "https://a") == ""


async def test_slow_issuers_of_one_org_leave_room_for_those_of_others(
    web: Web, make: Callable[..., IssuerKeys]
) -> None:
    keys = make(for_org=2, in_all=3)
    web.held = asyncio.Event()
    asking = [
        asyncio.create_task(code_of(keys, f"https://{name}", org_id=org_id))
        for name, org_id in (("a", 1), ("b", 1), ("c", 1), ("d", 2), ("e", 3))
    ]
    assert await asking[2] == "issuer_busy"  # the third of its org
    assert await asking[4] == "issuer_busy"  # the fourth of all
    web.held.set()
    assert [await asking[n] for n in (0, 1, 3)] == ["", "", ""]
    assert set(web.asked) == {"https://a", "https://b", "https://d"}
    assert web.payers == {"org:1", "org:2"}
    # None is punished for it: there is room again, and they are asked at once.
    assert await code_of(keys, "https://c") == ""
    assert await code_of(keys, "https://e", org_id=3) == ""


async def test_a_question_has_a_longest_time(
    web: Web, make: Callable[..., IssuerKeys], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(issuer_keys, "_ASK_S", 0.05)
    keys = make(for_org=1)
    web.held = asyncio.Event()
    assert await code_of(keys, "https://a") == "issuer_unavailable"
    web.held.set()
    assert await code_of(keys, "https://b") == ""


async def test_whom_nobody_used_for_longest_is_forgotten_first_and_nobody_who_rests(
    web: Web,
    clock: Time,
    make: Callable[..., IssuerKeys],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(issuer_keys, "_MAX_ISSUERS", 3)
    keys = make()
    for name in "abc":
        assert await code_of(keys, f"https://{name}") == ""
    assert await code_of(keys, "https://d") == "issuer_busy"  # all were asked just now
    assert len(keys._entries) == 3
    clock.now_s += 10
    assert await code_of(keys, "https://a") == ""  # in use
    assert await code_of(keys, "https://d") == ""
    assert list(keys._entries) == ["https://c", "https://a", "https://d"]
    assert await code_of(keys, "https://a") == ""
    assert web.asked["https://a"] == 1
    clock.now_s += 10
    web.is_down = True
    assert await code_of(keys, "https://e") == "issuer_unavailable"  # in place of c
    assert await code_of(keys, "https://b") == "issuer_unavailable"  # in place of d
    assert await code_of(keys, "https://f") == "issuer_unavailable"  # in place of a: e and b rest
    assert await code_of(keys, "https://e") == "issuer_unavailable"
    assert web.asked["https://e"] == 1


async def test_each_caller_gets_an_exception_of_their_own(
    web: Web, make: Callable[..., IssuerKeys]
) -> None:
    keys = make()
    web.is_down = True
    caught = await asyncio.gather(
        *[keys.key("https://a", "k1", "RS256", org_id=1) for _ in range(5)], return_exceptions=True
    )
    assert all(isinstance(one, Unavailable) for one in caught)
    assert len({id(one) for one in caught}) == 5
    assert {one.code for one in caught if isinstance(one, Unavailable)} == {"issuer_unavailable"}
    assert [one.retry_after_s for one in caught if isinstance(one, Unavailable)] == [10.0] * 5
