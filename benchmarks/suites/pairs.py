"""Millpond beside each peer, in interleaved pairs: submit, bulk submit, drain, three steps, idle dispatch, neighbours.

Called by `compare`. A pair starts both on fresh servers and then measures, suite by suite, first ours
and then the peer's; the ratio is that of the pair. Invariant: while one is measured, the other has no
worker, and its server was vacuumed and checkpointed after its last turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack

from benchmarks import bar
from benchmarks.figures import OURS, Figure, Notes, percentile
from benchmarks.peers.wire import NAP_S
from benchmarks.plan import Plan
from benchmarks.systems import SYSTEMS, PeerFailed, Running, System, run_system
from millpond.types import Json

SUITES = ("submit", "bulk", "drain", "steps", "idle", "noisy")
ROUNDS = 5
RATES = {"bulk": bar.BULK, "drain": bar.DRAIN, "steps": bar.STEPS}
COMPARED = {*RATES.values(), bar.IDLE_P50, bar.IDLE_P99, bar.SUBMIT_P50, bar.SUBMIT_P99}
COMPARED |= {bar.NOISY_P50, bar.NOISY_P99, bar.NOISY_BESIDE, bar.NOISY_ALONE}


async def measure(plan: Plan, suites: Sequence[str]) -> tuple[list[Figure], dict[str, str]]:
    """Measure suites in pairs; returns the figures and who was left out, with the reason."""
    notes = {suite: Notes(suite) for suite in suites}
    wanted = [name for name in SYSTEMS if name != OURS and name in (plan.systems or SYSTEMS)]
    missing = {name: SYSTEMS[name].missing() for name in wanted}
    left_out = {name: reason for name, reason in missing.items() if reason is not None}
    rounds = plan.rounds_or(ROUNDS)
    for number in range(rounds):
        peers = [SYSTEMS[name] for name in wanted if name not in left_out]
        # Who runs first in a round changes, so that no pair always has the same place in it.
        turned = peers[number % len(peers) :] + peers[: number % len(peers)] if peers else [None]
        for peer in turned:
            print(f"round {number + 1} of {rounds}, {peer.name if peer else OURS}", flush=True)
            try:
                await _pair(plan, peer, notes)
            except PeerFailed as error:
                if peer is None or str(error).startswith(OURS):
                    raise
                left_out[peer.name] = str(error)
                print(f"  left out from here on: {error}", flush=True)
    return [figure for one in notes.values() for figure in one.figures()], left_out


async def _pair(plan: Plan, peer: System | None, notes: Mapping[str, Notes]) -> None:
    async with AsyncExitStack() as stack:
        ours = await stack.enter_async_context(run_system(SYSTEMS[OURS]))
        theirs = await stack.enter_async_context(run_system(peer)) if peer else None
        for suite, note in notes.items():
            if theirs is not None and suite not in theirs.system.counts:
                continue
            mine = await _turn(plan, ours, suite, note)
            if theirs is None:
                continue
            other = await _turn(plan, theirs, suite, note)
            for figure, value in mine.items():
                if figure in other:
                    note.add(figure, "x", value / other[figure], bar.over(theirs.system.name))


async def _turn(plan: Plan, running: Running, suite: str, note: Notes) -> dict[str, float]:
    """Measure one suite of one system; returns what a pair can be compared by."""
    count = plan.runs(running.system.counts[suite])
    answer = await running.ask(suite, count)
    await running.settle()
    found = read(suite, count, answer)
    for figure, (unit, value) in found.items():
        note.add(figure, unit, value, running.system.name)
    return {name: value for name, (_, value) in found.items() if name in COMPARED}


def read(suite: str, count: int, answer: Mapping[str, Json]) -> dict[str, tuple[str, float]]:
    """Make figures, as unit and value, of a driver's answer."""
    took = answer["took_s"]
    if suite in RATES:
        return {RATES[suite]: ("runs/s", count / took)}
    if suite == "idle":
        return {
            bar.IDLE_P50: ("ms", percentile(took, 0.5) * 1e3),
            bar.IDLE_P99: ("ms", percentile(took, 0.99) * 1e3),
        }
    if suite == "noisy":
        return _read_noisy(count, answer)
    p50 = percentile(took, 0.5)
    found = {
        bar.SUBMIT_P50: ("ms", p50 * 1e3),
        bar.SUBMIT_P99: ("ms", percentile(took, 0.99) * 1e3),
    }
    if "commits_s" in answer:
        commit, transaction = (
            percentile(answer[name], 0.5) for name in ("commits_s", "transactions_s")
        )
        found["a one-row commit, p50"] = ("ms", commit * 1e3)
        found["a one-row transaction, p50"] = ("ms", transaction * 1e3)
        found[bar.SUBMIT_RATIO] = ("x", p50 / commit)
        found["submit p50 over a one-row transaction"] = ("x", p50 / transaction)
    return found


def _read_noisy(count: int, answer: Mapping[str, Json]) -> dict[str, tuple[str, float]]:
    waits, beside_s, alone_s = answer["took_s"], answer["beside_s"], answer["alone_s"]
    p99 = percentile(waits, 0.99)
    return {
        bar.NOISY_P50: ("ms", percentile(waits, 0.5) * 1e3),
        bar.NOISY_P99: ("ms", p99 * 1e3),
        bar.NOISY_RUNS: ("x", p99 / NAP_S),
        bar.NOISY_BESIDE: ("runs/s", count / beside_s),
        bar.NOISY_ALONE: ("runs/s", count / alone_s),
        bar.NOISY_KEPT: ("x", alone_s / beside_s),
    }
