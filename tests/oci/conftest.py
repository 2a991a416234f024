"""Stores for the tests of images."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from overlayfs.store.store import LayerStore
from tests.oci import archives, registries
from tests.oci.engines import Engines, build_two, engines, filled
from tests.oci.transfers import BASE, TOP, Side
from tests.store.samples import add_image, open_store
from tests.support.dump import Dump
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
def server(scratch: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A registry for the tests of one file; each test uses its own repositories."""
    with registries.registry(scratch / f"{request.module.__name__}-registry") as host:
        yield host


@pytest.fixture(scope="module")
def peers(scratch: Path, request: pytest.FixtureRequest) -> Iterator[Engines]:
    """Podman, buildah, skopeo and umoci, with the image localhost/two:1 of two layers."""
    with engines(scratch / request.module.__name__) as found:
        build_two(found)
        yield found


@pytest.fixture
def shown(peers: Engines) -> Dump:
    """The tree of localhost/two:1 as podman mounts it."""
    with peers.mounted("localhost/two:1") as point:
        return filled(archives.picture(point))


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
