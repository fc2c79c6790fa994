"""Registered steps on models: `models.complete`.

Used by flows; the worker holds the `TextModel` as a resource. Invariant: the recorded output names
the model that wrote it.
"""

from __future__ import annotations

import asyncio

from millpond.engine.context import StepContext
from millpond.engine.registry import step
from millpond.errors import Transient
from millpond.models.port import Completion, Message, TextModel


@step("models.complete", timeout_s=300.0)
async def complete(
    step: StepContext,
    prompt: str,
    system: str = "",
    max_tokens: int = 512,
    temperature: float | None = None,
) -> Completion:
    """Have the worker's text model answer `prompt`, under the instructions of `system`.

    Its words are shown as they come to whoever follows the run; the record has all of them.
    """
    messages = [Message(role="user", content=prompt)]
    if system:
        messages.insert(0, Message(role="system", content=system))
    model = step.get(TextModel)  # type: ignore[type-abstract]
    try:
        made = await model.complete(
            messages, max_tokens=max_tokens, temperature=temperature, on_text=step.delta
        )
    except (asyncio.CancelledError, Transient) as error:
        # A refusal with a status used nothing; what broke off may have used anything.
        if not (isinstance(error, Transient) and "status" in error.details):
            step.spend_unknown(model.name)
        raise
    step.spend(made.model, input_tokens=made.input_tokens, output_tokens=made.output_tokens)
    return made
