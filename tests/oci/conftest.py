"""Stores for the tests of images."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from overlayfs.store.store import LayerStore
from tests.oci import registries
from tests.oci.transfers import BASE, TOP, Side
from tests.store.samples import add_image, open_store
from tests.support.requirements import need_root


@pytest.fixture(autouse=True)
def _needs(request: pytest.FixtureRequest) -> None:
    """Skip tests marked `root`, with a message, for other users."""
    if request.node.get_closest_marker("root") is not None:
        need_root()


@pytest.fixture
def store(place: Path) -> Iterator[LayerStore]:
    """An empty store in the test's directory."""
    with open_store(place) as opened:
        yield opened


@pytest.fixture(scope="module")
def server(scratch: Path) -> Iterator[str]:
    """A registry for the tests of one file; each test uses its own repositories."""
    with registries.registry(scratch / "transfers") as host:
        yield host


@pytest.fixture
def sides(place: Path) -> Iterator[Callable[[str], Side]]:
    """A function that makes sides, each with its own store."""
    with ExitStack() as undo:

        def make(name: str) -> Side:
            side = Side(place / name)
            undo.callback(side.store.close)
            return side

        yield make


@pytest.fixture
def here(sides: Callable[[str], Side]) -> Side:
    """A side with the image `it` of two layers."""
    side = sides("here")
    add_image(side.store, "it", BASE, TOP)
    return side


@pytest.fixture
def away(sides: Callable[[str], Side]) -> Side:
    """A side with an empty store."""
    return sides("away")
