"""Duties: what the end of a run has to see to, kept as a set of bits on its live row.

Set by whoever makes something that must not outlive the run; read by the end of a run. Invariant: a run
without duties leaves nothing behind but its history, so that its end is one cheap group commit.
"""

from __future__ import annotations

from enum import IntFlag


class Duty(IntFlag):
    """The bits of `item.duties`; their values are stored, so they never change."""

    WAITS = 1  # timers, questions or signals of this run may be there
    PARENT = 2  # a parent run may wait for this one's end
    KEY = 4  # the run holds a live key
    CHILDREN = 8  # children or steps in other queues may still be live
    ENDING = (
        16  # steps with an undo, or a flow with on_failure: a cancelled run has something to do
    )
    SECRETS = 32  # the run has opened secrets: attempts hide their values
    LINES = 64  # steps of this run may stand in line for room


NO_DUTY = Duty(0)
