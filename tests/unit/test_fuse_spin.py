"""How long the loop looks for the next request, with a clock of the test's own."""

import os
import resource
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlayfs.fuse.kernel import spin
from overlayfs.fuse.kernel.spin import LONGEST, SHORTEST, Spin

BUSY, IDLE = LONGEST / 2, LONGEST * 50


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A machine with that many processors and no other work; 2 until it says otherwise."""

    def have(count: int) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)))

    have(2)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_nivcsw=0))
    return have


@pytest.fixture
def preempted(cores: object, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how often the system took the processor away."""
    count = [0]
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_nivcsw=count[0]))
    return lambda more: count.__setitem__(0, count[0] + more)


@pytest.mark.usefixtures("cores")
def test_an_idle_mount_costs_nothing() -> None:
    found = Spin()
    for _ in range(10):
        found.waited(IDLE)
    assert found.seconds == 0


@pytest.mark.usefixtures("cores")
def test_a_busy_client_is_looked_for_again() -> None:
    found = Spin()
    for _ in range(10):
        found.waited(IDLE)
    found.waited(BUSY)
    assert found.seconds == SHORTEST
    for _ in range(10):
        found.waited(BUSY)
    assert found.seconds == LONGEST


@given(st.lists(st.floats(0, 1), max_size=2000))
def test_the_time_has_bounds(gaps: list[float]) -> None:
    found = Spin()
    for gap in gaps:
        found.waited(gap)
        assert 0 <= found.seconds <= LONGEST
        assert found.seconds == 0 or found.seconds >= SHORTEST / 2


def test_on_one_core_nobody_is_looked_for(cores: Callable[[int], None]) -> None:
    cores(1)
    found = Spin()
    assert found.seconds == 0
    for _ in range(1000):
        found.waited(BUSY)
    assert found.seconds == 0


def test_who_is_pushed_off_the_processor_stops_looking(preempted: Callable[[int], None]) -> None:
    found = Spin()
    _wait_until_it_looks_around(found)
    assert found.seconds == LONGEST
    preempted(400)
    _wait_until_it_looks_around(found)
    assert found.seconds == 0
    _wait_until_it_looks_around(found)  # nobody disturbs any more
    assert found.seconds > 0


def _wait_until_it_looks_around(found: Spin) -> None:
    for _ in range(spin._SAMPLE + 1):
        found.waited(BUSY)


@pytest.mark.parametrize("seconds", [0.0, 60e-6, 1.0])
def test_a_fixed_time_stays(seconds: float) -> None:
    found = Spin(seconds)
    for gap in (IDLE, BUSY) * 1000:
        found.waited(gap)
    assert found.seconds == seconds


def test_the_clock_can_be_given() -> None:
    assert Spin(clock=lambda: 7.0).clock() == 7.0
    assert Spin().clock is time.perf_counter
