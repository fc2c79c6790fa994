"""The veil hides values in every form that is promised, also where text comes in pieces, and nothing else."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from urllib.parse import quote, quote_plus, urlencode

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond import veil
from millpond.veil import Stream, Veil

VALUE = 'k/9+"ä\\ \n=&x~Zürich'
SHOWN = "[secret:stripe]"
values = st.text(st.characters(exclude_categories=["Cs"]), min_size=8, max_size=40)
around = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def drawn(*pairs: tuple[str, str]) -> Veil:
    made = Veil()
    for name, value in pairs or (("stripe", VALUE),):
        made.add(name, value)
    return made


@pytest.mark.parametrize(
    "form",
    [
        VALUE,
        json.dumps(VALUE)[1:-1],
        json.dumps(VALUE, ensure_ascii=False)[1:-1],
        json.dumps(VALUE)[1:-1].replace("/", "\\/"),
        quote(VALUE),
        quote(VALUE, safe=""),
        quote_plus(VALUE),
        urlencode({"": VALUE})[1:],
        re.sub("%..", lambda one: one[0].lower(), quote(VALUE, safe="")),
    ],
)
def test_escaped_forms_are_hidden(form: str) -> None:
    assert VALUE not in form or form == VALUE
    hidden = drawn().text(f"before {form} after")
    assert hidden.startswith("before [secret:stripe]")
    assert hidden.endswith(" after")
    assert form not in hidden


@given(values, st.binary(max_size=9), st.binary(max_size=9))
def test_base64_is_hidden_wherever_the_value_stands_in_it(
    value: str, before: bytes, after: bytes
) -> None:
    whole = before + value.encode() + after
    for coded in (base64.b64encode(whole).decode(), base64.urlsafe_b64encode(whole).decode()):
        hidden = drawn(("stripe", value)).text(coded)
        assert SHOWN in hidden
        # What is left of the value's own letters are at most the two that a neighbour has a part in.
        assert len(hidden) - len(SHOWN) <= -(-4 * len(before) // 3) + -(-4 * len(after) // 3) + 6


@given(values, around, around)
def test_values_are_hidden_inside_json_and_the_rest_reads_back(
    value: str, before: str, after: str
) -> None:
    made = drawn(("stripe", value))
    document = {"a": [before + value + after, 1.5, True, None], before + value: {"n": 10**30}}
    for text in (json.dumps(document), json.dumps(document, ensure_ascii=False)):
        read = json.loads(made.json(text))
        assert SHOWN in read["a"][0]
        assert read["a"][1:] == [1.5, True, None]
        assert any(SHOWN in name for name in read)
        assert made.json(made.json(text)) == made.json(text)
    nested = orjson.dumps({"a": json.dumps(document)}).decode()
    assert SHOWN in json.loads(made.json(nested))["a"]


def test_numbers_keep_their_letters_and_one_that_shows_a_value_becomes_text() -> None:
    made = drawn(("pin", "1234567890"))
    text = '{"a":1234567890,"b":12345678909999999999999,"c":1.50,"d":"1234567890","e":7}'
    assert made.json(text) == (
        '{"a":"[secret:pin]","b":"[secret:pin]9999999999999","c":1.50,"d":"[secret:pin]","e":7}'
    )
    assert made.value([1234567890, True, 3]) == ["[secret:pin]", True, 3]


def test_what_shows_nothing_is_handed_back_as_it_is() -> None:
    text = '{"a": "no value",  "b": 1}'
    assert drawn().json(text) is text


def test_short_values_are_not_hidden_and_an_empty_veil_is_false() -> None:
    made = drawn(("pin", "1234567"))
    assert not made
    assert made.text("1234567") == "1234567"
    assert drawn(("pin", "12345678"))


def test_blanks_around_a_value_are_not_part_of_what_is_hidden() -> None:
    made = drawn(("pem", "  key-of-8-more\n"))
    assert made.text("Bearer key-of-8-more!") == "Bearer [secret:pem]!"
    assert not drawn(("pin", "1234567"))
    assert drawn(("pin", " 1234567 ")).text("pin 1234567") == "pin 1234567"


def test_texts_in_a_json_object_are_hidden_too() -> None:
    account = {
        "private_key": "-----BEGIN\nabcdef\n-----END\n",
        "id": "short",
        "more": [{"in": "deep-inside"}],
    }
    made = drawn(("gcp", json.dumps(account)))
    for told in (account["private_key"], json.dumps(account["private_key"])[1:-1], "deep-inside"):
        assert made.text(f"<{told}>") == "<[secret:gcp]>"
    assert made.text("short") == "short"
    assert drawn(("odd", '{"no json": ')).text("no json") == "no json"


def test_many_texts_in_an_object_stay_cheap() -> None:
    made = drawn(("big", json.dumps({f"k{n}": f"value-{n:06d}" for n in range(3000)})))
    assert made.text("value-000000") == SHOWN.replace("stripe", "big")
    assert len(made._hidden) < 4000


def test_a_value_that_is_known_is_not_worked_on_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = drawn(), []
    monkeypatch.setattr(veil, "forms", lambda value: asked.append(value) or [value])
    made.add("stripe", VALUE)
    assert asked == []
    made.add("other", "another value")
    assert asked == ["another value"]


def test_one_value_inside_another_leaves_no_rest() -> None:
    made = drawn(("short", "abcdefgh"), ("long", "xxabcdefghyy"))
    assert made.text("xxabcdefghyy") == "[secret:long]"
    assert made.text("abcdefgh") == "[secret:short]"


def test_a_veil_shows_nothing_of_its_values() -> None:
    assert VALUE not in repr(drawn())
    assert repr(drawn()) == "Veil(1 secrets)"


@given(values, st.lists(st.integers(1, 9), max_size=40), around, around)
def test_a_stream_hides_values_across_pieces(
    value: str, sizes: list[int], before: str, after: str
) -> None:
    made = drawn(("stripe", value))
    coded = base64.b64encode(value.encode()).decode()
    whole = before + value + after + coded + value[:-1]
    stream, shown, rest = Stream(made), [], whole
    for size in sizes:
        shown.append(stream.feed(rest[:size]))
        rest = rest[size:]
    shown += [stream.feed(one) for one in rest]
    shown.append(stream.end())
    assert value not in "".join(shown).replace(SHOWN, "")
    assert coded[:10] not in "".join(shown).replace(SHOWN, "")


def test_a_stream_keeps_back_no_more_than_the_beginning_of_a_value() -> None:
    stream = Stream(drawn(("stripe", "sk_live_0123456789")))
    assert stream.feed("hello sk_") == "hello "
    assert stream.feed("is not it, sk_live_0123") == "sk_is not it, "
    assert stream.feed("456789!") == "[secret:stripe]!"
    assert stream.feed("sk_live") == ""
    assert stream.end() == "sk_live"
    assert stream.feed("sk_live_0") == ""
    assert stream.end() == "[secret:stripe]", "as much of it as is hidden of any value"


def test_a_long_value_is_streamed_in_little_time() -> None:
    value = "".join(f"{nth:06d}" for nth in range(10_000))
    stream = Stream(drawn(("file", value)))
    shown = "".join(stream.feed(value[at : at + 997]) for at in range(0, len(value), 997))
    assert shown + stream.end() == "[secret:file]"


async def test_the_veil_of_a_task_is_its_own_and_that_of_its_children() -> None:
    async def run(value: str) -> str:
        veil.begin().add("mine", value)

        async def child() -> str:
            seen = veil.current()
            assert seen is not None
            return seen.text("value-of-one value-of-two")

        return await asyncio.create_task(child())

    assert veil.current() is None
    one, two = await asyncio.gather(
        asyncio.create_task(run("value-of-one")), asyncio.create_task(run("value-of-two"))
    )
    assert one == "[secret:mine] value-of-two"
    assert two == "value-of-one [secret:mine]"
