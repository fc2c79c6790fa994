"""What the heartbeat sees of its worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from millpond.engine.heartbeat import SILENT_S, Pulse, is_stopped_or_gone, is_stuck
from millpond.engine.scope import Deadlines


def _until_state(pid: int, stopped: bool) -> None:
    deadline = time.monotonic() + 10
    while is_stopped_or_gone(pid) is not stopped:
        assert time.monotonic() < deadline


def test_a_stopped_or_dead_process_is_told_from_a_living_one() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert not is_stopped_or_gone(child.pid)
        child.send_signal(signal.SIGSTOP)
        _until_state(child.pid, stopped=True)
        child.send_signal(signal.SIGCONT)
        _until_state(child.pid, stopped=False)
        child.kill()
        child.wait()
        assert is_stopped_or_gone(child.pid)


def _store(pulse: Pulse, tick: float, deadline: float | None) -> None:
    pulse.tick(tick)
    pulse.expect(deadline)


def test_the_first_deadline_is_told_at_once_whatever_begins_and_ends() -> None:
    told: list[float | None] = []
    deadlines = Deadlines(told.append)
    late, early, middle = deadlines.add(9.0), deadlines.add(3.0), deadlines.add(5.0)
    deadlines.end(middle)
    assert told == [9.0, 3.0]
    deadlines.end(early)
    deadlines.end(late)
    assert told == [9.0, 3.0, 9.0, None]
    assert deadlines.first is None


def test_short_steps_beside_a_long_one_are_forgotten_as_they_end() -> None:
    told: list[float | None] = []
    deadlines = Deadlines(told.append)
    long = deadlines.add(1.0)
    for nth in range(5000):
        deadlines.end(deadlines.add(2.0 + nth))
    assert len(deadlines._heap) < 1000
    deadlines.end(long)
    assert told == [1.0, None]


def test_only_a_silent_loop_with_an_overdue_step_is_stuck() -> None:
    pulse = Pulse.make()
    try:
        now = 1000.0
        _store(pulse, now - SILENT_S - 1, None)
        assert not is_stuck(pulse, now), "no step has a time limit"
        _store(pulse, now - SILENT_S - 1, now + 5)
        assert not is_stuck(pulse, now), "the step still has time"
        _store(pulse, now - 1, now - 5)
        assert not is_stuck(pulse, now), "the loop runs"
        _store(pulse, now - SILENT_S - 1, now - 5)
        assert is_stuck(pulse, now)
        assert Pulse(os.dup(pulse.fd)).read() == pulse.read()
    finally:
        pulse.close()


def test_an_attempt_that_outlives_the_session_finds_its_leases_gone() -> None:
    pulse = Pulse.make()
    pulse.renew(2000.0)
    assert pulse.sure_until == 2000.0
    pulse.close()
    pulse.tick(1000.0)
    pulse.expect(1000.0)
    pulse.renew(3000.0)
    assert pulse.sure_until < 0
