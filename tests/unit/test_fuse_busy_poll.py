"""How long the loop polls for the next request, with a clock controlled by the test."""

import os
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlayfs.fuse.kernel import busy_poll
from overlayfs.fuse.kernel.busy_poll import LONGEST, SAMPLE, SHORTEST, BusyPoll

BUSY, IDLE = LONGEST / 2, LONGEST * 50


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A machine with that many processors and no other work; 2 by default."""

    def have(count: int) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)))

    have(2)
    monkeypatch.setattr(busy_poll, "stalled_seconds", lambda: 0.0)
    return have


class Machine:
    """A clock, and for how long processes have waited for a CPU, both in seconds."""

    def __init__(self) -> None:
        self.now = self.stalled = 100.0

    def after(self, seconds: float, stalled: float) -> None:
        """Let time pass."""
        self.now += seconds
        self.stalled += stalled


@pytest.mark.usefixtures("cores")
def test_an_idle_mount_costs_nothing() -> None:
    found = BusyPoll()
    for _ in range(10):
        found.waited(IDLE)
    assert found.seconds == 0


@pytest.mark.usefixtures("cores")
def test_a_busy_client_is_polled_for_again() -> None:
    found = BusyPoll()
    for _ in range(10):
        found.waited(IDLE)
    found.waited(BUSY)
    assert found.seconds == SHORTEST
    for _ in range(10):
        found.waited(BUSY)
    assert found.seconds == LONGEST


@given(st.lists(st.floats(0, 1), max_size=2000))
def test_the_time_has_bounds(gaps: list[float]) -> None:
    found = BusyPoll()
    for gap in gaps:
        found.waited(gap)
        assert 0 <= found.seconds <= LONGEST
        assert found.seconds == 0 or found.seconds >= SHORTEST / 2


def test_on_one_core_there_is_no_polling(cores: Callable[[int], None]) -> None:
    cores(1)
    found = BusyPoll()
    assert found.seconds == 0
    for _ in range(1000):
        found.waited(BUSY)
    assert found.seconds == 0


@pytest.mark.usefixtures("cores")
def test_there_is_no_polling_while_processes_wait_for_a_cpu() -> None:
    machine = Machine()
    found = BusyPoll(clock=lambda: machine.now, stalled=lambda: machine.stalled)
    found.waited(BUSY)
    assert found.seconds == LONGEST
    machine.after(2 * SAMPLE, stalled=SAMPLE)
    found.waited(BUSY)
    assert found.seconds == 0
    machine.after(SAMPLE / 2, stalled=0)  # too soon to look around again
    found.waited(BUSY)
    assert found.seconds == 0
    machine.after(2 * SAMPLE, stalled=0)  # no process waits any more
    found.waited(BUSY)
    assert found.seconds > 0


def test_the_system_counts_waiting_for_a_cpu() -> None:
    assert 0 <= busy_poll.stalled_seconds() <= busy_poll.stalled_seconds()


def test_without_that_count_the_load_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy_poll, "_PRESSURE", "/nowhere")
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0, 0))
    assert 0 < busy_poll.stalled_seconds() <= busy_poll.stalled_seconds()
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0, 0))
    assert busy_poll.stalled_seconds() == 0


@pytest.mark.parametrize("seconds", [0.0, 60e-6, 1.0])
def test_a_fixed_time_stays(seconds: float) -> None:
    found = BusyPoll(seconds)
    for gap in (IDLE, BUSY) * 1000:
        found.waited(gap)
    assert found.seconds == seconds


def test_the_clock_can_be_given() -> None:
    assert BusyPoll(clock=lambda: 7.0).clock() == 7.0
    assert BusyPoll().clock is time.perf_counter
