"""The flow `knowledge.ingest`: parse → chunk → embed in batches → index, each a step that resumes.

Named in `--flows`; started by the API in the transaction that stores the upload. Invariant: a run that
fails leaves its reason on the document.
"""

from __future__ import annotations

import uuid

from pydantic import BaseModel

from millpond.engine.context import Context, StepFailed
from millpond.engine.registry import flow
from millpond.knowledge import steps
from millpond.knowledge.records import Ingested, Source
from millpond.knowledge.store import INGEST_FLOW, INGEST_QUEUE, INGEST_VERSION

BATCH = 64


class IngestInput(BaseModel):
    """Which document to ingest: its newest version at the time."""

    document_id: uuid.UUID


@flow(INGEST_FLOW, version=INGEST_VERSION, queue=INGEST_QUEUE, permission="knowledge:write")
async def ingest(ctx: Context, given: IngestInput) -> Ingested:
    """Make a stored document searchable, or say on it why that failed."""
    source = await ctx.step(steps.begin, given.document_id)
    if source.is_ready:
        return Ingested(
            document_id=source.document_id, version=source.version, outcome="unchanged", chunks=0
        )
    try:
        return await _stages(ctx, source)
    except StepFailed as error:
        await ctx.step(steps.fail, source.document_id, source.version, error.message)
        raise


async def _stages(ctx: Context, source: Source) -> Ingested:
    await ctx.step(steps.parse, source)
    total = await ctx.step(steps.chunk, source)
    for first in range(0, total, BATCH):
        await ctx.step(steps.embed, source, first, min(first + BATCH, total), total)
    return await ctx.step(steps.index, source)
