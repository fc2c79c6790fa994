"""The identity of lanes: computed from what a work item is, without asking the database.

Called by submit and by whatever readies a work item again. Invariant: equal (queue, org, capability,
keys, priority, urgency) give one id in every process and release; bits 0 and 1 are clear for new work. Bit 0 is set
in the lane of resumed work beside it, bit 1 in that of work whose worker died under it twice, which is executed
alone. Ids are unique within an org only, so every statement names both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from millpond.types import INTERACTIVE, STANDARD, Urgency

# One step of priority is worth a minute in line, so that low priorities age past high ones.
PRIORITY_STEP_US = 60_000_000
# Resumed work goes before new work of its org that arrived up to a day earlier: finish what was begun.
RESUME_LEAD_US = 86_400_000_000
RESUMED = 1
SUSPECT = 2
KEY_SEPARATOR = "\x1f"
# Work under which so many workers died is executed alone, by workers that name this ability.
SUSPECT_DEATHS = 2
ALONE = "!"


def lane_id(
    *,
    queue: str,
    org_id: int,
    capability: str,
    keys: Sequence[str],
    priority: int,
    urgency: Urgency = STANDARD,
) -> int:
    """Return the 64-bit id of the lane for new work; bits 0 and 1 are clear."""
    parts = [queue, str(org_id), capability, KEY_SEPARATOR.join(keys), str(priority)]
    if urgency != STANDARD:
        parts.append(urgency)
    digest = hashlib.blake2b("\x1e".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True) & ~3


def offset_us(priority: int, urgency: Urgency = STANDARD) -> int:
    """Return what is added to a rank where lanes of one org are compared; lower goes first.

    It is odd in lanes of interactive work, so that the claim finds these (`claim_urgent` of the migrations).
    """
    return -priority * PRIORITY_STEP_US - (urgency == INTERACTIVE)


def is_urgent(offset_us: int) -> bool:
    """Whether a lane with that offset has interactive work."""
    return bool(offset_us & 1)
