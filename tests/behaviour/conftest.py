"""The suite's one fixture: `stack(LAYER...)` gives a union tree on the driver of this run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.stacks import StackMaker, stack_maker


@pytest.fixture
def stack(driver: str, place: Path) -> Iterator[StackMaker]:
    """Factory of stacks on the driver; each is closed, checked and removed after the test."""
    with stack_maker(driver, place, StackMaker) as maker:
        yield maker
