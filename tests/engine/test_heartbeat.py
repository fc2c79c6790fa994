"""What the heartbeat sees of its worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from millpond.engine.heartbeat import SILENT_S, Pulse, is_stopped_or_gone, is_stuck


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


def test_only_a_silent_loop_with_an_overdue_step_is_stuck() -> None:
    pulse = Pulse.make()
    try:
        now = 1000.0
        pulse.write(now - SILENT_S - 1, None)
        assert not is_stuck(pulse, now), "no step has a time limit"
        pulse.write(now - SILENT_S - 1, now + 5)
        assert not is_stuck(pulse, now), "the step still has time"
        pulse.write(now - 1, now - 5)
        assert not is_stuck(pulse, now), "the loop runs"
        pulse.write(now - SILENT_S - 1, now - 5)
        assert is_stuck(pulse, now)
        assert Pulse(os.dup(pulse.fd)).read() == pulse.read()
    finally:
        pulse.close()
