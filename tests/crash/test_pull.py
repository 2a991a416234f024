"""A pull that dies, or finds the disk full, at any changing call: no image, or all of it, and the next one succeeds."""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlayfs.errors import UserError
from overlayfs.oci.http_client import HttpClient
from overlayfs.oci.pull import pull
from overlayfs.oci.push import push
from overlayfs.oci.reference import Reference, parse
from overlayfs.store.store import LayerStore
from tests.crash.harness import Fuse, Stopped
from tests.oci import registries
from tests.store.samples import add_image, there
from tests.support.campaign import Campaign
from tests.support.points import Points, chosen
from tests.support.requirements import need_root

STOPPED, FAILED = 9, 1
FILES = {"a": "content"}

pytestmark = [pytest.mark.root, pytest.mark.slow]


@pytest.fixture(scope="module")
def image(scratch: Path) -> Iterator[Reference]:
    """An image of one small layer in a registry."""
    need_root()
    place = scratch / "pulled"
    with registries.registry(place) as host, LayerStore(os.fsencode(place / "store")) as store:
        add_image(store, "it", FILES)
        reference = parse(f"{host}/it")
        with HttpClient(plain_http=True) as client:
            push(store, "it", reference, client=client, find=lambda _: None)
        yield reference


def _pull(base: Path, image: Reference, fuse: Fuse | None = None) -> None:
    with LayerStore(os.fsencode(base / "store")) as store, HttpClient(plain_http=True) as client, fuse or Fuse():
        pull(store, image, name="it", client=client, find=lambda _: None)


def _calls(place: Path, image: Reference) -> list[str]:
    """The changing calls of a pull without a fault."""
    base = _empty(place)
    with Fuse() as fuse:
        _pull(base, image, fuse)
    shutil.rmtree(base)
    return fuse.calls


def _empty(place: Path) -> Path:
    base = place / "base"
    base.mkdir()
    LayerStore(os.fsencode(base / "store")).close()
    return base


def _die_at(base: Path, image: Reference, at: int) -> None:
    child = os.fork()
    if child == 0:
        try:
            _pull(base, image, Fuse(at))
        except Stopped:
            os._exit(STOPPED)
        finally:
            os._exit(FAILED)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == STOPPED


def _check(base: Path, image: Reference, where: str) -> None:
    """The image is whole if it is there; the next pull makes it so; then there is nothing for gc."""
    with LayerStore(os.fsencode(base / "store")) as store:
        if list(store.images()):
            assert _contents(store) == [FILES], where
    _pull(base, image)
    with LayerStore(os.fsencode(base / "store")) as store:
        assert _contents(store) == [FILES], where
        store.gc()
        assert _contents(store) == [FILES], where
        assert len(list(store.layers())) == 1, where
    rooms = there(base)
    assert rooms["staging"] == rooms["trash"] == [], where


def _contents(store: LayerStore) -> list[dict[str, str]]:
    trees = (Path(os.fsdecode(layer.tree_path)) for layer in store.stack_of("it"))
    return [{path.name: path.read_text() for path in tree.iterdir()} for tree in trees]


@pytest.mark.campaign("T1")
def test_stopped_at_every_call(campaign: Campaign, place: Path, image: Reference) -> None:
    calls = _calls(place, image)
    points = Points()
    for at in chosen(campaign, len(calls), 8):
        where = f"at {calls[at - 1]}, call {at} of {len(calls)}"
        with points.at(where):
            base = _empty(place)
            _die_at(base, image, at)
            _check(base, image, where)
            shutil.rmtree(base)
    campaign.held("pulls stopped at every changing call", points.tried, points.violations)


@pytest.mark.campaign("T3")
def test_a_full_disk_at_every_call(campaign: Campaign, place: Path, image: Reference) -> None:
    calls = _calls(place, image)
    points, reported = Points(), 0
    for at in chosen(campaign, len(calls), 8):
        where = f"at {calls[at - 1]}, call {at} of {len(calls)}"
        with points.at(where):
            base = _empty(place)
            try:
                _pull(base, image, Fuse(at, errno.ENOSPC))
            except (UserError, OSError) as error:
                reported += "No space left on device" in str(error)
            _check(base, image, where)
            shutil.rmtree(base)
    campaign.held("pulls failing at every changing call", points.tried, points.violations)
    assert reported > points.tried // 2
