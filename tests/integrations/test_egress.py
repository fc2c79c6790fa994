"""The egress guard on real sockets; a resolver's double stands in only where a public name would be needed."""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from millpond.errors import InvalidInput, Permanent, Unavailable
from millpond.integrations.egress import Caps, Egress, GuardedTransport
from millpond.integrations.egress_rules import Rules, is_public
from millpond.integrations.names import Names, payer

CLOSED = [
    "0.0.0.0",
    "10.1.2.3",
    "100.64.0.1",
    "100.100.100.200",  # a cloud's metadata
    "127.0.0.1",
    "127.8.8.8",
    "168.63.129.16",  # a cloud's host agent
    "169.254.169.254",  # clouds' metadata
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.7",
    "203.0.113.9",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",
    "::ffff:127.0.0.1",
    "::ffff:8.8.8.8",
    "::ffff:0:8.8.8.8",
    "64:ff9b::8.8.8.8",
    "64:ff9b::7f00:1",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",  # a cloud's metadata
    "fe80::1",
    "fe80::1%1",
    "fec0::1",
    "ff02::1",
]
OPEN = [
    "1.1.1.1",
    "8.8.8.8",
    "172.32.0.1",
    "100.128.0.1",
    "2606:4700::1111",
    "2a00:1450:4001::200e",
]


@pytest.mark.parametrize("address", CLOSED)
def test_an_address_that_is_not_public_is_closed(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", OPEN)
def test_a_public_address_is_open(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


class Far:
    """A far end: counts connections, and answers each request by its path as scripted."""

    def __init__(self) -> None:
        self.port = 0
        self.connections = 0
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.answers: dict[str, bytes] = {}
        self.hang = asyncio.Event()

    def url(self, path: str = "/", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                first, *lines = head.split("\r\n")
                path = first.split()[1]
                pairs = (line.partition(":") for line in lines if line)
                self.requests.append((path, {k.lower(): v.strip() for k, _, v in pairs}))
                if path == "/hang":
                    await self.hang.wait()
                writer.write(self.answers.get(path, answer(b"hello")))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def answer(body: bytes = b"", status: str = "200 OK", **headers: str) -> bytes:
    named = {
        "content-length": str(len(body)),
        **{k.replace("_", "-"): v for k, v in headers.items()},
    }
    lines = "".join(f"{k}: {v}\r\n" for k, v in named.items())
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


@pytest.fixture
async def far() -> AsyncIterator[Far]:
    far = Far()
    server = await asyncio.start_server(far.serve, "127.0.0.1", 0)
    far.port = server.sockets[0].getsockname()[1]
    yield far
    far.hang.set()
    server.close()


@asynccontextmanager
async def guard(allow: str = "", resolver: Any = None) -> AsyncIterator[Egress]:
    egress = Egress(Rules.of_text(allow), resolver=resolver)
    yield egress
    await egress.close()


def says(*rounds: Sequence[str]) -> Callable[[str, int], Any]:
    """A resolver that gives other addresses each time, the last for ever."""
    left = list(rounds)

    async def resolver(host: str, port: int) -> list[Any]:
        found = left.pop(0) if len(left) > 1 else left[0]
        return [ipaddress.ip_address(one) for one in found]

    return resolver


async def refusal(egress: Egress, url: str, **more: Any) -> str:
    with pytest.raises(Permanent) as caught:
        await egress.request("GET", url, **more)
    return caught.value.code


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "0.0.0.0", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "[::1]",
     "[::ffff:127.0.0.1]", "127.0.0.1.", "LOCALHOST."],
)  # fmt: skip
async def test_this_machine_is_closed_by_whatever_name(far: Far, host: str) -> None:
    async with guard() as egress:
        url = far.url(host=host).replace("http://", "https://")
        assert await refusal(egress, url) == "egress_refused"
    assert far.connections == 0


async def test_plain_http_is_refused_before_anything_is_resolved(far: Far) -> None:
    asked: list[str] = []

    async def resolver(host: str, port: int) -> list[Any]:
        asked.append(host)
        return []

    async with guard(resolver=resolver) as egress:
        assert await refusal(egress, "http://public.example/") == "egress_refused"
    assert asked == []


@pytest.mark.parametrize(
    "url",
    ["", "x", "//x", "ftp://x.example/", "file:///etc/passwd", "https://", "https://u:p@x.example/",
     "https://x.example:0/", "https://x.example:99999/", "https://x.example /", "https://x_.example\x00/",
     "https://[::1", "gopher://x.example/", "https://ex\u00e4mple.example/", "unix:///run/x.sock",
     "https://x.example/\r\nHost: y"],
)  # fmt: skip
async def test_what_is_no_https_address_is_refused(url: str) -> None:
    async with guard() as egress:
        assert await refusal(egress, url) == "egress_refused"
        with pytest.raises(InvalidInput):
            egress.check(url, param="url")


async def test_what_the_operator_listed_is_open_at_that_port_alone(far: Far) -> None:
    async with guard(f"http://127.0.0.1:{far.port}") as egress:
        reply = await egress.request("GET", far.url())
        assert (reply.status, reply.body) == (200, b"hello")
        other = f"http://127.0.0.1:{far.port + 1 if far.port < 65_535 else 1}/"
        assert await refusal(egress, other) == "egress_refused"
    async with guard(f"127.0.0.1:{far.port}") as egress:  # HTTPS alone
        assert await refusal(egress, far.url()) == "egress_refused"
    async with guard("http://127.0.0.0/8:*") as egress:
        assert (await egress.request("GET", far.url())).status == 200
    async with guard(f"http://localhost:{far.port}") as egress:
        assert (await egress.request("GET", far.url(host="localhost"))).status == 200
        assert (
            await refusal(egress, far.url()) == "egress_refused"
        )  # it is the name that was listed


@pytest.mark.parametrize(
    "text", ["x", "x:", ":1", "x:y", "10.0.0.0/8", "10.0.0.1/8:1", "x:70000", "http://:1", "a/b:1"]
)
def test_a_setting_that_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Rules.of_text(text)
    assert caught.value.param == "MILLPOND_EGRESS_ALLOW"


async def test_a_name_is_resolved_once_and_the_address_that_was_judged_is_used(far: Far) -> None:
    """A name that is open when it is looked at and this machine after reaches nothing here."""
    asked: list[str] = []
    rounds = says(["127.0.0.2"], ["127.0.0.1"])

    async def resolver(host: str, port: int) -> Any:
        asked.append(host)
        return await rounds(host, port)

    async with guard(f"127.0.0.2/32:{far.port}", resolver=resolver) as egress:
        url = f"https://rebinding.example:{far.port}/"
        with pytest.raises(Unavailable):  # nothing listens at the address that was judged
            await egress.request("GET", url)
        assert asked == ["rebinding.example"]
        assert far.connections == 0
        assert await refusal(egress, url) == "egress_refused"
    assert far.connections == 0


async def test_of_mixed_addresses_only_those_that_are_open_are_tried(far: Far) -> None:
    """The name resolves to a closed address and to one that the operator listed: the far end sees one connection."""
    async with guard(
        f"127.0.0.1/32:{far.port}",
        resolver=says(["10.0.0.1", "127.0.0.1"]),
    ) as egress:
        with pytest.raises(Unavailable):  # it speaks no TLS; but it was reached
            await egress.request("GET", f"https://mixed.example:{far.port}/")
    assert far.connections == 1


async def test_every_redirect_is_judged_anew(far: Far) -> None:
    far.answers["/away"] = answer(status="302 Found", location="https://10.0.0.1/secret")
    far.answers["/plain"] = answer(status="302 Found", location="http://public.example/")
    far.answers["/metadata"] = answer(status="307 T", location="http://169.254.169.254/latest/")
    far.answers["/file"] = answer(status="301 M", location="file:///etc/passwd")
    far.answers["/named"] = answer(status="302 Found", location="https://inner.example/")
    async with guard(f"http://127.0.0.1:{far.port}", resolver=says(["192.168.0.1"])) as egress:
        for path in ("/away", "/plain", "/metadata", "/file", "/named"):
            assert await refusal(egress, far.url(path), caps=Caps(redirects=3)) == "egress_refused"
    assert len(far.requests) == 5


async def test_redirects_are_followed_so_far_and_without_secrets_elsewhere(far: Far) -> None:
    far.answers["/here"] = answer(status="302 Found", location="/there")
    far.answers["/there"] = answer(status="302 Found", location=far.url("/end", host="localhost"))
    allow = f"http://127.0.0.1:{far.port},http://localhost:{far.port}"
    secret = {"Authorization": "Bearer x", "X-Other": "y"}
    async with guard(allow) as egress:
        one = await egress.request("GET", far.url("/here"), headers=secret, caps=Caps(redirects=1))
        assert one.status == 302
        two = await egress.request("GET", far.url("/here"), headers=secret, caps=Caps(redirects=2))
        assert (two.status, two.url) == (200, far.url("/end", host="localhost"))
        posted = await egress.request("POST", far.url("/here"), caps=Caps(redirects=2))
        assert posted.status == 302
    headers = next(headers for path, headers in far.requests if path == "/end")
    assert "authorization" not in headers
    assert headers["x-other"] == "y"
    assert ["authorization" in h for p, h in far.requests if p == "/there"] == [True, True]


async def test_an_answer_has_a_largest_size_said_or_not(far: Far) -> None:
    far.answers["/large"] = answer(b"x" * 70_000)
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    far.answers["/endless"] = (
        head + b"1000\r\n" + b"y" * 4096 + b"\r\n" + b"FFFF\r\n" + b"z" * 65535
    )
    async with guard(f"http://127.0.0.1:{far.port}") as egress:
        for path in ("/large", "/endless"):
            caps = Caps(size_bytes=50_000)
            assert await refusal(egress, far.url(path), caps=caps) == "egress_too_large"
        reply = await egress.request("GET", far.url("/large"), caps=Caps(size_bytes=70_000))
        assert len(reply.body) == 70_000


async def test_a_packed_answer_is_refused_for_it_could_unfold_to_any_size(far: Far) -> None:
    far.answers["/bomb"] = answer(gzip.compress(b"0" * 10_000_000), content_encoding="gzip")
    async with guard(f"http://127.0.0.1:{far.port}") as egress:
        assert await refusal(egress, far.url("/bomb")) == "egress_encoding"
    assert far.requests[0][1]["accept-encoding"] == "identity"


async def test_an_answer_has_a_longest_time(far: Far) -> None:
    async with guard(f"http://127.0.0.1:{far.port}") as egress:
        with pytest.raises(Unavailable) as caught:
            await egress.request("GET", far.url("/hang"), caps=Caps(time_s=0.1))
    assert caught.value.code == "egress_failed"


async def test_a_far_end_that_is_not_there_is_unavailable(far: Far) -> None:
    async with guard("http://127.0.0.1:*", resolver=says([])) as egress:
        for url in ("http://127.0.0.1:1/", "https://no-such-name.example/"):
            with pytest.raises(Unavailable):
                await egress.request("GET", url)


async def test_neither_proxies_nor_netrc_of_the_environment_are_used(
    far: Far, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "http_proxy",
        "https_proxy",
        "all_proxy",
    ):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with guard(f"http://127.0.0.1:{far.port}") as egress:
        assert (await egress.request("GET", far.url())).status == 200
    assert "authorization" not in far.requests[0][1]


async def test_no_cookie_that_an_answer_set_comes_back(far: Far) -> None:
    far.answers["/set"] = answer(b"x", Set_Cookie="a=b; Path=/")
    far.answers["/moved"] = answer(status="302 Found", location="/end", Set_Cookie="c=d; Path=/")
    async with guard(f"http://127.0.0.1:{far.port}") as egress:
        for path in ("/set", "/moved", "/end"):
            await egress.request("GET", far.url(path), caps=Caps(redirects=1))
        assert len(egress._client.cookies) == 0
    assert [path for path, _ in far.requests] == ["/set", "/moved", "/end", "/end"]
    assert not any("cookie" in headers for _, headers in far.requests)


class Stalled:
    """A resolver of a system whose servers do not answer, until it is let go."""

    def __init__(self) -> None:
        self.gone_on = threading.Event()
        self.asked: list[str] = []

    def __call__(self, host: str, port: int) -> list[Any]:
        self.asked.append(host)
        assert self.gone_on.wait(30)
        return [(2, 1, 6, "", ("192.0.2.1", port))]


async def test_stalled_lookups_are_so_many_for_one_payer_and_in_all_and_hold_up_nothing_else() -> (
    None
):
    stalled = Stalled()
    names = Names(stalled, for_payer=2, in_all=3)

    async def asked_by(who: str, name: str) -> str:
        payer.set(who)
        try:
            await asyncio.wait_for(names.resolve(name, 443), 0.05)
        except TimeoutError:
            return "stalled"
        except Unavailable as error:
            return error.code
        return "found"

    try:
        for who, name, came in (
            ("org:1", "a", "stalled"),
            ("org:1", "b", "stalled"),
            ("org:1", "c", "egress_busy"),  # those whom nobody waits for any more count still
            ("org:2", "d", "stalled"),
            ("org:3", "e", "egress_busy"),
        ):
            assert await asyncio.create_task(asked_by(who, name)) == came, name
        # The threads that everything else of the process shares are free.
        assert await asyncio.wait_for(asyncio.to_thread(lambda: 1), 5) == 1
        stalled.gone_on.set()
        async with asyncio.timeout(20):
            while await asyncio.create_task(asked_by("org:1", "f")) != "found":
                await asyncio.sleep(0.01)
    finally:
        stalled.gone_on.set()
        names.close()
    assert "c" not in stalled.asked
    assert "e" not in stalled.asked


async def test_the_guard_looks_names_up_for_whoever_pays(far: Far) -> None:
    payers: list[str] = []

    async def resolver(host: str, port: int) -> list[Any]:
        payers.append(payer.get())
        return []

    async with guard(resolver=resolver) as egress:
        for who in ("org:1", "org:2"):
            with pytest.raises(Unavailable):
                await egress.get("https://x.example/", max_bytes=1, timeout_s=5, payer=who)
    assert payers == ["org:1", "org:2"]
    assert payer.get() == ""


def test_a_library_that_keeps_its_connections_elsewhere_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(httpx2.AsyncHTTPTransport, "__init__", lambda self, **_: None)
    with pytest.raises(TypeError):
        GuardedTransport(Rules())


async def test_clients_of_other_libraries_are_guarded_by_the_transport(far: Far) -> None:
    rules = Rules.of_text(f"http://127.0.0.1:{far.port}")
    far.answers["/away"] = answer(status="302 Found", location="https://10.0.0.1/")
    client = httpx2.AsyncClient(transport=GuardedTransport(rules), follow_redirects=True)
    async with client:
        assert (await client.get(far.url())).text == "hello"
        for url in (far.url("/away"), "https://127.0.0.1:1/", far.url(host="localhost")):
            with pytest.raises(Permanent):
                await client.get(url)
