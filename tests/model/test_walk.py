"""T6: random lives of real mounts, on each engine, and bugs that they must meet. A million steps: `make steps`."""

import itertools
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.model.minimise import smallest
from tests.model.walk import STEPS, Step, Walk, Who, live, replay, replay_of, walk, walking
from tests.support import engines
from tests.support.campaign import Campaign
from tests.support.mutants import seeded
from tests.support.mutants.together import NO_OPAQUE, WRITER_KEPT
from tests.support.requirements import need, need_root

SEED = 7


@pytest.fixture
def memory() -> Iterator[Path]:
    """Where lives take place."""
    need_root()
    need(os.path.exists("/dev/fuse"), "needs /dev/fuse")
    with walking() as place:
        yield place


@pytest.mark.campaign("T6")
@pytest.mark.parametrize("engine", engines.NAMES)
def test_steps(memory: Path, campaign: Campaign, engine: str) -> None:
    """Results, errors, attributes, content and listings are those of the model."""
    found = walk(engine, SEED, itertools.count(), campaign.size(2000, 12000), memory)
    campaign.held(f"steps on engine {engine}", found.steps, found.differences, SEED)


@pytest.mark.campaign("T6")
@pytest.mark.parametrize("mutant", [NO_OPAQUE, WRITER_KEPT])
def test_mutants(memory: Path, campaign: Campaign, mutant: str) -> None:
    """What is wrong is noticed."""
    who, steps = _first_difference(mutant, memory)
    campaign.caught(mutant, len(steps), [str(who)])


def test_a_difference_is_cut_down(memory: Path) -> None:
    """A few steps are left that show it again, and nothing without the bug."""
    who, steps = _first_difference(NO_OPAQUE, memory)
    with seeded(NO_OPAQUE):
        told = replay_of(who, steps, memory)
        assert told.count("\n") - 1 < len(steps)
        assert replay(told, memory) is not None
    assert replay(told, memory) is None


def _first_difference(mutant: str, place: Path) -> tuple[Who, list[Step]]:
    with seeded(mutant):
        for number in range(20):
            who = Who(engines.KERNEL, SEED, number)
            steps, wrong = live(who, place, partial(Walk.drawn, count=STEPS))
            if wrong is not None:
                return who, steps
    raise AssertionError("no life noticed it")


@pytest.mark.parametrize("needed", [{3}, {0, 9}, {2, 3, 7}, set(range(10))])
def test_cutting_down(needed: set[int]) -> None:
    assert smallest(range(10), lambda some: needed <= set(some)) == sorted(needed)
