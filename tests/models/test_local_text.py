"""The bundled text model, really run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator

import psutil
import pytest
import pytest_asyncio

from millpond.errors import InvalidInput, Permanent, Transient
from millpond.models import Message, open_text_model, wheels
from millpond.models.local_text import LocalTextModel


@pytest_asyncio.fixture
async def model() -> AsyncIterator[LocalTextModel]:
    model = LocalTextModel()
    yield model
    await model.close()


async def _gone(pid: int) -> None:
    """Wait, 20 s at most, until a process is gone or only its parent's to bury."""
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(psutil.NoSuchProcess):
                if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    await asyncio.sleep(0.02)
                    continue
            return


async def test_it_writes_text_and_says_what_it_used(model: LocalTextModel) -> None:
    completion = await model.complete(
        [
            Message(role="system", content="Answer from the facts only."),
            Message(role="user", content="Facts: returns take 60 days.\nHow long is a return?"),
        ],
        max_tokens=24,
    )
    assert completion.text
    assert completion.model == "local:SmolLM2-135M-Instruct"
    assert completion.input_tokens > 10
    assert 0 < completion.output_tokens <= 24
    assert completion.finish_reason in ("stop", "length")


async def test_same_prompt_gives_the_same_text_and_max_tokens_cuts(model: LocalTextModel) -> None:
    first = await model.complete("Tell me a long story.", max_tokens=12)
    second = await model.complete("Tell me a long story.", max_tokens=12)
    assert first == second
    assert first.finish_reason == "length"
    assert first.output_tokens == 12


async def test_words_are_passed_on_as_they_come_and_the_completion_has_all(
    model: LocalTextModel,
) -> None:
    pieces: list[str] = []
    shown = await model.complete("Tell me a long story.", max_tokens=12, on_text=pieces.append)
    assert len(pieces) > 3
    assert "".join(pieces).strip() == shown.text
    # The same as without, and what was used is known too.
    assert shown == await model.complete("Tell me a long story.", max_tokens=12)
    with pytest.raises(InvalidInput):
        await model.complete("word " * 3000, on_text=pieces.append)


async def test_two_at_once_share_one_process(model: LocalTextModel) -> None:
    assert model.pid is None
    one, two = await asyncio.gather(
        model.complete("Name a colour.", max_tokens=8), model.complete("Name a fish.", max_tokens=8)
    )
    assert one.text != two.text
    assert model.pid is not None


async def test_the_event_loop_goes_on_while_it_loads_and_writes(model: LocalTextModel) -> None:
    asked = asyncio.create_task(model.complete("Tell me a long story.", max_tokens=64))
    ticks = 0
    while not asked.done():
        await asyncio.sleep(0.005)
        ticks += 1
    await asked
    assert ticks > 20


async def test_prompt_longer_than_the_context_is_refused(model: LocalTextModel) -> None:
    with pytest.raises(InvalidInput) as caught:
        await model.complete("word " * 3000)
    assert caught.value.code == "context_too_long"
    assert (await model.complete("Say hi.", max_tokens=4)).text


async def test_giving_up_ends_the_process_and_the_next_request_starts_another(
    model: LocalTextModel,
) -> None:
    await model.complete("Say hi.", max_tokens=2)
    pid = model.pid
    assert pid is not None
    asked = asyncio.create_task(model.complete("Tell me a long story.", max_tokens=1500))
    await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    await _gone(pid)
    assert (await model.complete("Say hi.", max_tokens=2)).output_tokens > 0
    assert model.pid != pid


async def test_a_killed_process_is_a_transient_error(model: LocalTextModel) -> None:
    await model.complete("Say hi.", max_tokens=2)
    asked = asyncio.create_task(model.complete("Tell me a long story.", max_tokens=1500))
    await asyncio.sleep(0)
    assert model.pid is not None
    os.kill(model.pid, signal.SIGKILL)
    with pytest.raises(Transient):
        await asked


_WORKER = """
import asyncio
from millpond.models.local_text import LocalTextModel
async def main():
    model = LocalTextModel()
    await model.complete("Say hi.", max_tokens=2)
    print(model.pid, flush=True)
    await model.complete("Tell me a long story.", max_tokens=1900)
asyncio.run(main())
"""


async def test_it_dies_with_a_worker_that_is_killed() -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", _WORKER],
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert worker.stdout is not None
    pid = int(await asyncio.to_thread(worker.stdout.readline))
    assert psutil.pid_exists(pid)
    worker.kill()
    worker.wait()
    await _gone(pid)


def test_absent_wheel_says_what_to_install() -> None:
    with pytest.raises(Permanent) as caught:
        wheels.data_file("a-wheel-that-nobody-installed", ".gguf")
    assert caught.value.code == "local_model_missing"
    assert caught.value.advice is not None
    assert "requirements-local.txt" in caught.value.advice


def test_empty_spec_opens_the_local_model() -> None:
    assert open_text_model("").name == "local:SmolLM2-135M-Instruct"
