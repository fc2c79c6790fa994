"""Providers over real sockets: one request per call, and errors by class."""

from __future__ import annotations

import json
from typing import Any

import pytest

from millpond.errors import InvalidInput, Permanent, Transient
from millpond.models import Message, TextModel, open_embedder, open_text_model
from millpond.models.provider_errors import translate
from models.provider_server import Reply, far_end

OPENAI: dict[str, Any] = {
    "id": "c1",
    "object": "chat.completion",
    "created": 1_700_000_000,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "Within 60 days."},
        }
    ],
    "usage": {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16},
}
ANTHROPIC: dict[str, Any] = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [{"type": "text", "text": "Within 60 days."}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 11, "output_tokens": 5},
}
GOOGLE: dict[str, Any] = {
    "candidates": [
        {
            "content": {"role": "model", "parts": [{"text": "Within 60 days."}]},
            "finishReason": "STOP",
            "index": 0,
        }
    ],
    "usageMetadata": {"promptTokenCount": 11, "candidatesTokenCount": 5, "totalTokenCount": 16},
    "modelVersion": "m",
}
BODIES = {"openai": OPENAI, "ollama": OPENAI, "anthropic": ANTHROPIC, "google": GOOGLE}
PATHS = {"openai": "/v1", "ollama": "/v1", "anthropic": "", "google": ""}
PROVIDERS = list(BODIES)
ERROR = {"error": {"message": "no: the prompt was SECRETPROMPT", "type": "e", "code": "some_code"}}


def _open(provider: str, url: str, timeout_s: float = 20.0) -> TextModel:
    return open_text_model(f"{provider}:m", url + PATHS[provider], "key", timeout_s=timeout_s)


def _without_finish(provider: str) -> dict[str, Any]:
    if provider == "anthropic":
        return {**ANTHROPIC, "stop_reason": None}
    if provider == "google":
        candidate = {**GOOGLE["candidates"][0]}
        del candidate["finishReason"]
        return {**GOOGLE, "candidates": [candidate]}
    return {**OPENAI, "choices": [{**OPENAI["choices"][0], "finish_reason": None}]}


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_completion_is_read_from_one_request(provider: str) -> None:
    async with far_end(Reply(body=BODIES[provider])) as far:
        model = _open(provider, far.url)
        completion = await model.complete(
            [
                Message(role="system", content="Be brief."),
                Message(role="user", content="How long may I return it?"),
            ],
            max_tokens=77,
            temperature=0.0,
        )
        await model.close()
        assert completion.text == "Within 60 days."
        assert completion.model == f"{provider}:m"
        assert (completion.input_tokens, completion.output_tokens) == (11, 5)
        assert completion.finish_reason == "stop"
        assert len(far.requests) == 1
        sent = str(far.requests[0][2])
        assert "Be brief." in sent
        assert "How long may I return it?" in sent
        assert "77" in sent


def _events(*documents: dict[str, Any], named: bool = False) -> list[str]:
    """Return documents as server-sent events, with their types as names where the protocol has them."""
    return [
        (f"event: {one['type']}\n" if named else "") + f"data: {json.dumps(one)}\n\n"
        for one in documents
    ]


def _chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {**OPENAI, "object": "chat.completion.chunk", "choices": [choice], "usage": None}


def _streamed(provider: str) -> list[str]:
    """Return what a provider sends as it writes, its last words first to go where an answer breaks off."""
    if provider == "anthropic":
        start = {**ANTHROPIC, "content": [], "stop_reason": None}
        block = {"type": "text", "text": ""}
        return _events(
            {"type": "message_start", "message": start},
            {"type": "content_block_start", "index": 0, "content_block": block},
            *(
                {
                    "type": "content_block_delta",
                    "index": 0,
                    "delta": {"type": "text_delta", "text": text},
                }
                for text in ("Within ", "60 days.")
            ),
            {"type": "content_block_stop", "index": 0},
            {
                "type": "message_delta",
                "delta": {"stop_reason": "end_turn", "stop_sequence": None},
                "usage": {"input_tokens": 11, "output_tokens": 5},
            },
            {"type": "message_stop"},
            named=True,
        )
    if provider == "google":
        (whole,) = GOOGLE["candidates"]
        first = {"content": {"role": "model", "parts": [{"text": "Within "}]}, "index": 0}
        last = {**whole, "content": {"role": "model", "parts": [{"text": "60 days."}]}}
        return _events({**GOOGLE, "candidates": [first]}, {**GOOGLE, "candidates": [last]})
    usage = {**_chunk({}), "choices": [], "usage": OPENAI["usage"]}
    pieces = [_chunk({"role": "assistant", "content": "Within "}), _chunk({"content": "60 days."})]
    return [*_events(*pieces, _chunk({}, "stop"), usage), "data: [DONE]\n\n"]


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_words_are_passed_on_as_they_come_and_the_completion_has_all(provider: str) -> None:
    async with far_end(Reply(chunks=_streamed(provider))) as far:
        model = _open(provider, far.url)
        pieces: list[str] = []
        completion = await model.complete("How long?", on_text=pieces.append)
        await model.close()
        assert [piece for piece in pieces if piece] == ["Within ", "60 days."]
        assert completion.text == "Within 60 days."
        assert (completion.input_tokens, completion.output_tokens) == (11, 5)
        assert completion.finish_reason == "stop"
        assert len(far.requests) == 1


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_stream_without_a_finish_reason_is_an_error(provider: str) -> None:
    whole = _streamed(provider)
    kept = {"anthropic": 4, "google": 1}.get(provider, 2)
    async with far_end(Reply(chunks=whole[:kept])) as far:
        model = _open(provider, far.url)
        pieces: list[str] = []
        with pytest.raises(Transient) as caught:
            await model.complete("How long?", on_text=pieces.append)
        await model.close()
        assert caught.value.code in ("model_cut_off", "model_unreachable")
        assert "Within " in pieces
        assert len(far.requests) == 1


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_refused_stream_is_an_error_by_its_status_and_asked_once(provider: str) -> None:
    async with far_end(Reply(status=429, body=ERROR, headers={"retry-after": "17"})) as far:
        model = _open(provider, far.url)
        with pytest.raises(Transient) as caught:
            await model.complete("hello", on_text=lambda _: None)
        await model.close()
        assert (caught.value.code, caught.value.retry_after_s) == ("model_rate_limited", 17)
        assert len(far.requests) == 1


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_rate_limit_is_transient_with_the_wished_delay_and_asked_once(provider: str) -> None:
    reply = Reply(status=429, body=ERROR, headers={"retry-after": "17"})
    async with far_end(reply) as far:
        model = _open(provider, far.url)
        with pytest.raises(Transient) as caught:
            await model.complete("hello")
        await model.close()
        assert caught.value.retry_after_s == 17
        assert caught.value.code == "model_rate_limited"
        assert len(far.requests) == 1


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("status", [500, 502, 503, 529])
async def test_server_error_is_transient_and_asked_once(provider: str, status: int) -> None:
    async with far_end(Reply(status=status, body=ERROR)) as far:
        model = _open(provider, far.url)
        with pytest.raises(Transient):
            await model.complete("hello")
        await model.close()
        assert len(far.requests) == 1


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "model_refused"),
        (401, "model_key_refused"),
        (403, "model_key_refused"),
        (404, "model_not_found"),
    ],
)
async def test_refusal_is_permanent_and_echoes_no_prompt(
    provider: str, status: int, code: str
) -> None:
    async with far_end(Reply(status=status, body=ERROR)) as far:
        model = _open(provider, far.url)
        with pytest.raises(Permanent) as caught:
            await model.complete("SECRETPROMPT")
        await model.close()
        assert caught.value.code == code
        assert "SECRETPROMPT" not in str(caught.value)
        assert len(far.requests) == 1


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_answer_cut_off_in_transit_is_transient_and_asked_once(provider: str) -> None:
    async with far_end(Reply(body=BODIES[provider], cut_after=60)) as far:
        model = _open(provider, far.url)
        with pytest.raises(Transient):
            await model.complete("hello")
        await model.close()
        assert len(far.requests) == 1


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_answer_without_finish_reason_is_an_error(provider: str) -> None:
    async with far_end(Reply(body=_without_finish(provider))) as far:
        model = _open(provider, far.url)
        with pytest.raises(Transient) as caught:
            await model.complete("hello")
        await model.close()
        assert caught.value.code == "model_cut_off"
        assert len(far.requests) == 1


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_silence_ends_in_a_transient_timeout_after_one_request(provider: str) -> None:
    async with far_end(Reply(hang=True)) as far:
        model = _open(provider, far.url, timeout_s=0.5)
        with pytest.raises(Transient) as caught:
            await model.complete("hello")
        await model.close()
        assert caught.value.code == "model_timeout"
        assert len(far.requests) == 1


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_nobody_listening_is_transient(provider: str) -> None:
    async with far_end(Reply()) as far:
        url = far.url
    model = _open(provider, url)
    with pytest.raises(Transient):
        await model.complete("hello")
    await model.close()


async def test_used_up_quota_is_permanent() -> None:
    body = {"error": {"message": "no", "type": "insufficient_quota", "code": "insufficient_quota"}}
    async with far_end(Reply(status=429, body=body)) as far:
        model = _open("openai", far.url)
        with pytest.raises(Permanent) as caught:
            await model.complete("hello")
        await model.close()
        assert caught.value.code == "model_quota"


def _vectors(*numbers: float, length: int = 384) -> dict[str, Any]:
    rows = [
        {"object": "embedding", "index": n, "embedding": [value] * length}
        for n, value in enumerate(numbers)
    ]
    return {
        "object": "list",
        "model": "m",
        "data": rows,
        "usage": {"prompt_tokens": 2, "total_tokens": 2},
    }


async def test_provider_embeddings_come_back_with_length_one() -> None:
    async with far_end(Reply(body=_vectors(0.5, 2.0))) as far:
        embedder = open_embedder("openai:m", far.url + "/v1", "key")
        vectors = await embedder.embed(["a", "b"])
        await embedder.close()
        assert [len(vector) for vector in vectors] == [384, 384]
        assert all(abs(sum(x * x for x in vector) - 1) < 1e-6 for vector in vectors)
        assert far.requests[0][2]["input"] == ["a", "b"]
        assert far.requests[0][2]["dimensions"] == 384


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (Reply(status=429, body=ERROR, headers={"retry-after": "3"}), Transient),
        (Reply(status=500, body=ERROR), Transient),
        (Reply(status=401, body=ERROR), Permanent),
        (Reply(body=_vectors(0.5)), Transient),
        (Reply(body=_vectors(0.5, 0.5, length=8)), Permanent),
        (Reply(body=_vectors(0.5, 0.5), cut_after=50), Transient),
    ],
)
async def test_failed_embedding_is_classified_and_asked_once(
    reply: Reply, error: type[Exception]
) -> None:
    async with far_end(reply) as far:
        embedder = open_embedder("openai:m", far.url + "/v1", "key")
        with pytest.raises(error):
            await embedder.embed(["a", "b"])
        await embedder.close()
        assert len(far.requests) == 1


@pytest.mark.parametrize("spec", ["openai", "openai:", "nobody:m", ":m"])
def test_malformed_spec_is_refused(spec: str) -> None:
    with pytest.raises(InvalidInput):
        open_text_model(spec, api_key="key")


@pytest.mark.parametrize("spec", ["openai:m", "anthropic:m", "google:m"])
def test_missing_key_is_refused_naming_the_setting(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "from the environment")
    with pytest.raises(InvalidInput) as caught:
        open_text_model(spec)
    assert caught.value.advice is not None
    assert "MILLPOND_LLM_API_KEY" in caught.value.advice


def test_an_answer_that_cannot_be_read_holds_back_nobody_on_its_provider() -> None:
    unread, absent = (translate(error, "openai:m") for error in (ValueError("?"), TimeoutError()))
    assert isinstance(unread, Transient)
    assert isinstance(absent, Transient)
    assert unread.limit_keys == ()
    assert absent.limit_keys == ("provider:openai", "model:m")
