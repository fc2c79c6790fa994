"""Flows that pass the commit points of steps, waits and ends: the workload of crash and chaos tests.

Those of patterns over several runs are in patterns.py, those with steps in another queue in elsewhere.py.
Add a flow when a new commit point appears: `test_crashes.py` fails until the workload passes it. Invariant:
what a step does outside goes through the sink, under the step's own key, with the effect's name.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from pydantic import BaseModel
from tests.crash.sink import SinkClient

from millpond.engine.context import Context, InputExpired, StepContext, StepFailed
from millpond.engine.registry import Registry, flow, step
from millpond.engine.vault import Opened
from millpond.errors import Permanent, Transient
from millpond.retry import Retry

REGISTRY = Registry()
QUICK = Retry(max_tries=20, unknown_tries=20, base_s=0.01, cap_s=0.05)
# Above what an attempt holds its slot for, so that the run parks.
PARKS_S = 1.05


class Approval(BaseModel):
    """What a person says."""

    approved: bool


class Chest:
    """A vault that has every secret, all with one value."""

    value = "what the chest holds"

    async def open(self, org_id: int, name: str, *, is_use: bool = True) -> Opened:
        """Return a secret."""
        return Opened(name, 1, self.value)


CHEST = Chest()


@step("crash.touch", retry=QUICK, registry=REGISTRY)
async def touch(step_ctx: StepContext, attempt: int, effect: str) -> int:
    """Take one effect at the sink."""
    return await effect_of(step_ctx, attempt, effect)


@step("crash.flaky", retry=QUICK, registry=REGISTRY)
async def flaky(step_ctx: StepContext, attempt: int, effect: str) -> int:
    """Take an effect, and fail the first time so that the next try is a wait."""
    number = await effect_of(step_ctx, attempt, effect)
    if step_ctx.try_number == 1:
        raise Transient("the first try fails", retry_after_s=PARKS_S)
    return number


@step("crash.refused", retry=QUICK, registry=REGISTRY)
async def refused(step_ctx: StepContext, attempt: int, effect: str) -> int:
    """Take an effect and fail for good."""
    await effect_of(step_ctx, attempt, effect)
    raise Permanent("this never works")


@step("crash.hold", retry=QUICK, registry=REGISTRY)
async def hold(step_ctx: StepContext, attempt: int, effect: str) -> int:
    """Take an effect, show text, then wait for the gate."""
    number = await effect_of(step_ctx, attempt, effect)
    step_ctx.delta("held")
    await step_ctx.get(SinkClient).wait()
    return number


async def effect_of(
    step_ctx: StepContext,
    attempt: int,
    effect: str,
    *,
    is_once: bool = False,
    execution: str = "",
) -> int:
    """Take an effect at the sink under the step's key; `execution` tells one of a step elsewhere."""
    return await step_ctx.get(SinkClient).call(
        run_id=str(step_ctx.run_id),
        effect=effect,
        key=step_ctx.idempotency_key,
        attempt=attempt,
        try_number=step_ctx.try_number,
        is_once=is_once,
        execution=execution,
    )


@step("crash.spends", registry=REGISTRY)
async def spends(step_ctx: StepContext) -> None:
    """Use a model, and never end."""
    step_ctx.spend("m", input_tokens=1, output_tokens=1)
    await asyncio.sleep(600)


@flow("crash.cut", registry=REGISTRY)
async def cut(ctx: Context, _: None) -> list[str]:
    """Give a step up that used a model, and wait: what it used is stored before that."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.05):
            await ctx.step(spends)
    await ctx.sleep(PARKS_S)
    return [await take(ctx, "after")]


@flow("crash.steps", registry=REGISTRY)
async def steps(ctx: Context, _: None) -> list[str]:
    """Take three steps in a row."""
    return [await take(ctx, name) for name in ("one", "two", "three")]


@flow("crash.fan", registry=REGISTRY)
async def fan(ctx: Context, _: None) -> list[str]:
    """Take steps side by side, which end together, tell of it, and take another."""

    async def strand(name: str) -> str:
        await asyncio.sleep(0.05)
        await ctx.emit("strand", {"strand": name})
        return await take(ctx, name)

    names = await ctx.parallel(*(strand(name) for name in ("left", "middle", "right")))
    await ctx.sleep(0.02, "breath")
    return [*names, await take(ctx, "after")]


@flow("crash.sleeper", registry=REGISTRY)
async def sleeper(ctx: Context, _: None) -> list[str]:
    """Look at the time, and sleep between steps, in one strand of two."""

    async def late() -> str:
        await ctx.sleep(PARKS_S)
        return await take(ctx, "late")

    await ctx.now()
    first = await take(ctx, "first")
    return [first, *await ctx.parallel(late(), take(ctx, "soon"))]


@flow("crash.opens", registry=REGISTRY)
async def opens(ctx: Context, _: None) -> list[str]:
    """Open a secret, and again after a wait, with what hides it."""
    assert await ctx.secret("door") == CHEST.value
    first = await take(ctx, "first")
    await ctx.sleep(PARKS_S)
    assert await ctx.secret("door") == CHEST.value
    return [first, await take(ctx, "last")]


@flow("crash.asks", registry=REGISTRY)
async def asks(ctx: Context, expires_in_s: float | None) -> list[str]:
    """Ask a person between steps; nobody is asked twice."""
    before = await take(ctx, "before")
    try:
        decision = await ctx.ask_human(
            "approve", role="support", form=Approval, proposal=before, expires_in_s=expires_in_s
        )
        said = f"approved:{decision.answer.approved}"
    except InputExpired:
        said = "expired"
    return [before, said, await take(ctx, "later")]


@flow("crash.flaky", registry=REGISTRY)
async def tries_again(ctx: Context, _: None) -> list[str]:
    """Take a step whose first try fails, with a long backoff."""
    await ctx.step(flaky, ctx.attempt, "flaky")
    return ["flaky", await take(ctx, "then")]


@flow("crash.body", retry=QUICK, registry=REGISTRY)
async def body(ctx: Context, _: None) -> list[str]:
    """Fail twice between steps, so that the body is tried again, the second time as its policy still allows."""
    first = await take(ctx, "first")
    if ctx.attempt <= 2:
        raise Transient("the first attempts fail")
    return [first, await take(ctx, "second")]


@flow("crash.fails", registry=REGISTRY)
async def fails(ctx: Context, is_caught: bool) -> list[str]:
    """Take a step that fails for good; caught, the run goes on."""
    try:
        await ctx.step(refused, ctx.attempt, "refused")
    except StepFailed:
        if not is_caught:
            raise
    return ["refused", await take(ctx, "instead")]


@flow("crash.together", registry=REGISTRY)
async def together(ctx: Context, _: None) -> list[str]:
    """Wait, and end in the same moment as others, so that one batch has several ends with duties."""
    await ctx.sleep(PARKS_S)
    await asyncio.sleep(0.3 - asyncio.get_running_loop().time() % 0.3)
    return ["together"]


@flow("crash.revoked", registry=REGISTRY)
async def revoked(ctx: Context, _: None) -> list[str]:
    """Take a step for somebody who may nothing any more, so that it is refused and audited."""
    return [await take(ctx, "revoked")]


@flow("crash.holds", registry=REGISTRY)
async def holds(ctx: Context, _: None) -> list[str]:
    """Stay in a step until the gate opens, or until it is cancelled or drained."""
    await ctx.step(hold, ctx.attempt, "hold")
    return ["hold"]


async def take(ctx: Context, effect: str) -> str:
    """Take one step with an effect of this name."""
    await ctx.step(touch, ctx.attempt, effect)
    return effect


def resources(path: str) -> dict[type, Any]:
    """Return what these flows need of a worker."""
    return {SinkClient: SinkClient(path)}


@step("crash.throttled", retry=QUICK, registry=REGISTRY)
async def throttled(step_ctx: StepContext, attempt: int, effect: str) -> int:
    """Take an effect; be refused as one too many, then find nobody, then get an answer."""
    number = await effect_of(step_ctx, attempt, effect)
    if step_ctx.try_number == 1:
        raise Transient("too much", details={"status": 429}, limit_keys=["provider:crash"])
    if step_ctx.try_number == 2:
        raise Transient("nobody is there", limit_keys=["provider:crash"])
    return number


@step("crash.answered", retry=QUICK, registry=REGISTRY)
async def answered(step_ctx: StepContext, attempt: int, effect: str) -> int:
    """Take an effect: its success closes a breaker that waits for a probe."""
    return await effect_of(step_ctx, attempt, effect)


@step("crash.failing", retry=QUICK, registry=REGISTRY)
async def failing(step_ctx: StepContext, attempt: int, effect: str) -> int:
    """Take an effect; find nobody, then get an answer: a row of failures of which no breaker knows, and its end."""
    number = await effect_of(step_ctx, attempt, effect)
    if step_ctx.try_number == 1:
        raise Transient("nobody is there", limit_keys=["provider:fails"])
    return number


@flow("crash.braked", keys=["provider:crash", "provider:answers"], registry=REGISTRY)
async def braked(ctx: Context, _: Any) -> list[int]:
    """Pass what tells of a provider that is asked too much, and of one that is down."""
    first = await ctx.step(answered, ctx.attempt, "answered")
    second = await ctx.step(failing, ctx.attempt, "failing")
    return [first, second, await ctx.step(throttled, ctx.attempt, "throttled")]


@step("crash.keyed", retry=QUICK, keys=["provider:keyed"], registry=REGISTRY)
async def keyed(step_ctx: StepContext, attempt: int, effect: str) -> int:
    """Take an effect under a key of the step's own; fail at first, so that its room goes back between tries."""
    number = await effect_of(step_ctx, attempt, effect)
    if step_ctx.try_number == 1:
        raise Transient("the first try fails")
    return number


@flow("crash.needs_room", registry=REGISTRY)
async def needs_room(ctx: Context, _: Any) -> list[int]:
    """Ask for room in two branches, and once more after them."""
    both = await ctx.parallel(
        ctx.step(keyed, ctx.attempt, "keyed left"), ctx.step(keyed, ctx.attempt, "keyed right")
    )
    return [*both, await ctx.step(keyed, ctx.attempt, "keyed last")]


@step("crash.works", retry=QUICK, registry=REGISTRY)
async def works(step_ctx: StepContext, attempt: int, effect: str) -> int:
    """Take an effect, and work on for a while."""
    number = await effect_of(step_ctx, attempt, effect)
    await asyncio.sleep(0.4)
    return number


@flow("crash.waits_beside", registry=REGISTRY)
async def waits_beside(ctx: Context, _: Any) -> list[int]:
    """Ask for room beside a branch that works for a while."""
    both = await ctx.parallel(
        ctx.step(works, ctx.attempt, "works"), ctx.step(keyed, ctx.attempt, "keyed beside")
    )
    return list(both)


@step("crash.metered", retry=QUICK, keys=["provider:metered"], tokens=400, registry=REGISTRY)
async def metered(step_ctx: StepContext, attempt: int, effect: str) -> int:
    """Take an effect, and use a few tokens of what the try has reserved."""
    number = await effect_of(step_ctx, attempt, effect)
    step_ctx.spend("metered:m", input_tokens=10, output_tokens=0)
    return number


@flow("crash.needs_tokens", registry=REGISTRY)
async def needs_tokens(ctx: Context, _: Any) -> list[int]:
    """Ask for tokens in two branches, and once more after them."""
    both = await ctx.parallel(
        ctx.step(metered, ctx.attempt, "metered left"),
        ctx.step(metered, ctx.attempt, "metered right"),
    )
    return [*both, await ctx.step(metered, ctx.attempt, "metered last")]
