"""Stores for the tests of the store."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from overlayfs.store.store import LayerStore
from tests.store.samples import open_store
from tests.support.requirements import need_root


@pytest.fixture(autouse=True)
def _needs(request: pytest.FixtureRequest) -> None:
    """A test marked `root` is skipped with a reason for other users."""
    if request.node.get_closest_marker("root") is not None:
        need_root()


@pytest.fixture
def store(place: Path) -> Iterator[LayerStore]:
    """An empty store in the test's directory."""
    with open_store(place) as opened:
        yield opened
