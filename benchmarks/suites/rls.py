"""The cost of row-level security: a drain whose steps read and write as `millpond_app`, with it and without, in pairs.

Called by `compare`. The steps work on the product's own tables of documents, through the pool that flow code has. On
the other side of a pair row-level security is off on every tenant table of the throwaway database; the product's code
is the same, so that setting the org in each transaction, one message with its begin, is on both sides. On both sides
the application's commits do not wait for the disk, behind which the cost would hide. `--seconds` and `--rounds` make
it small.
"""

from __future__ import annotations

from benchmarks.figures import Figure, Notes
from benchmarks.flows import BASE, DOCUMENTS, document_id, file_name, filing
from benchmarks.ground import Ground, Server, open_ground, postgres
from benchmarks.plan import Plan
from benchmarks.steady import Steady, drain_steadily
from benchmarks.suites.features import row_level_security

SECONDS = 60.0
ROUNDS = 5
DEPTH = 1_000
ORGS = 5


async def measure(plan: Plan) -> list[Figure]:
    """Measure pairs; who is first in one changes."""
    notes = Notes("rls")
    async with postgres() as server:
        async with open_ground(server) as at:
            org_ids = await at.orgs(ORGS)
            for org_id in org_ids:
                await _file(at, org_id)
            await at.fill(filing, org_ids[:1], plan.depth or DEPTH)
        await server.alter("alter role millpond_app set synchronous_commit = off")
        await server.settle()
        for number in range(plan.rounds_or(ROUNDS)):
            rates = {}
            for action in ("enable", "disable") if number % 2 else ("disable", "enable"):
                steady = await _drain(server, action, org_ids[0], plan.seconds_or(SECONDS))
                rates[action] = steady.rate
                title = "with" if action == "enable" else "without"
                notes.add(f"drain {title} row-level security", "runs/s", steady.rate)
                notes.add(f"put back meanwhile, {title} it", "%", steady.refilled * 100)
            notes.add(
                "with row-level security over without", "x", rates["enable"] / rates["disable"]
            )
    return notes.figures()


async def _file(at: Ground, org_id: int) -> None:
    """Store the documents of an org; its ids are those of every org."""
    async with at.db.org(org_id) as con:
        await con.execute(
            "insert into knowledge_base (org_id, base_id, name, embedder) values ($1, $2, 'bench', 'none')",
            org_id,
            BASE,
        )
        await con.executemany(
            "insert into document (org_id, document_id, base_id, filename, title, media_type, size_bytes, digest) "
            "values ($1, $2, $3, $4, $4, 'text/plain', 1, $5)",
            [
                (org_id, document_id(number), BASE, file_name(number), bytes(32))
                for number in range(DOCUMENTS)
            ],
        )


async def _drain(server: Server, action: str, org_id: int, seconds: float) -> Steady:
    """Drain on pools of its own, whose plans are made with row-level security as it is now."""
    await server.alter(row_level_security(action))
    async with open_ground(server) as at:
        steady = await drain_steadily(at, org_id, seconds=seconds, flow=filing)
    await server.settle()
    return steady
