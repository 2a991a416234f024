"""T6: random lives of real mounts, on each engine, and bugs that they must meet. A million steps: `make steps`."""

import itertools
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.model.minimise import smallest
from tests.model.walk import STEPS, LifeKey, Step, Walk, live, replay, replay_of, walk, walking
from tests.support import engines
from tests.support.campaign import Campaign
from tests.support.mutants import seeded
from tests.support.mutants.together import NO_OPAQUE, WRITER_KEPT
from tests.support.requirements import need, need_root

SEED = 7


@pytest.fixture
def memory() -> Iterator[Path]:
    """The directory for lives."""
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
    """A planted bug is noticed."""
    key, steps = _first_difference(mutant, memory)
    campaign.caught(mutant, len(steps), [str(key)])


def test_a_difference_is_cut_down(memory: Path) -> None:
    """The remaining steps reproduce the difference, and pass without the bug."""
    key, steps = _first_difference(NO_OPAQUE, memory)
    with seeded(NO_OPAQUE):
        text = replay_of(key, steps, memory)
        assert text.count("\n") - 1 < len(steps)
        assert replay(text, memory) is not None
    assert replay(text, memory) is None


def _first_difference(mutant: str, place: Path) -> tuple[LifeKey, list[Step]]:
    with seeded(mutant):
        for number in range(20):
            key = LifeKey(engines.KERNEL, SEED, number)
            steps, wrong = live(key, place, partial(Walk.drawn, count=STEPS))
            if wrong is not None:
                return key, steps
    raise AssertionError("no life noticed it")


@pytest.mark.parametrize("needed", [{3}, {0, 9}, {2, 3, 7}, set(range(10))])
def test_cutting_down(needed: set[int]) -> None:
    assert smallest(range(10), lambda some: needed <= set(some)) == sorted(needed)
