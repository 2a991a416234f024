"""A live commit stopped at any changing call: the old state or the new one, the same tree, and nothing lost."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from overlayfs.store.layers import Layer
from tests.crash.harness import Fuse, Stopped, View, _build_layers, _change_upper, view, write
from tests.crash.operations import OPERATIONS
from tests.store.live import IMAGE, NAME, Site, Used
from tests.support.campaign import Campaign
from tests.support.requirements import need_root

STOPPED, FAILED = 9, 1
CHANGES = ("open a twin for writing", "chmod", "rename a merged directory", "unlink lower")
NEW = "site:2"
ERRORS = (errno.ENOSPC, errno.EIO)


@pytest.fixture
def make_site(scratch: Path) -> Callable[[], Site]:
    """A maker of equal stores, each with a workspace in which there is something of each kind to commit."""
    need_root()
    made = 0

    def make() -> Site:
        nonlocal made
        made += 1
        place = scratch / f"live-{os.getpid()}-{id(make_site)}-{made}"
        place.mkdir()
        _build_layers(place)
        site = Site(place, place / "top", place / "base")
        with site.used() as used:
            change(used)
        return site

    return make


def change(used: Used) -> None:
    """Change something of each kind."""
    _change_upper(used.overlay)
    for name in CHANGES:
        OPERATIONS[name](used.overlay)


def shown(site: Site) -> View:
    """What a mount of the workspace shows."""
    with site.used() as used:
        return view(used.overlay)


def calls_of(site: Site) -> list[str]:
    """The changing calls of an undisturbed commit."""
    with site.used() as used, Fuse() as fuse:
        used.commit(NEW)
    return fuse.calls


@pytest.mark.campaign("T18")
def test_stopped_at_every_call(make_site: Callable[[], Site], campaign: Campaign) -> None:
    first = make_site()
    tree = shown(first)
    calls = calls_of(first)
    assert shown(first) == tree
    assert len(calls) > 40
    for number, call in enumerate(calls, 1):
        site = make_site()
        _commit_and_die(site, number)
        _check_after(site, tree, f"at {call}, call {number} of {len(calls)}")
        site.remove()
    first.remove()
    campaign.held("changing calls of a live commit, the process ends there", len(calls), [])


def _commit_and_die(site: Site, number: int) -> None:
    """Commit in a process that ends at a changing call, so that the kernel alone cleans up."""
    child = os.fork()
    if child == 0:
        try:
            with site.used() as used, Fuse(number):
                used.commit(NEW)
        except BaseException as error:
            os._exit(STOPPED if _is_stopped(error) else FAILED)
        finally:
            os._exit(FAILED)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == STOPPED


def _is_stopped(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(map(_is_stopped, error.exceptions))
    return isinstance(error, Stopped)


def _check_after(site: Site, tree: View, where: str) -> None:
    assert shown(site) == tree, where
    _check_records(site, tree, where)
    with site.used() as used:
        write(used.overlay, b"later", b"later", create=True)
        later = view(used.overlay)
        used.commit("site:3")
        assert view(used.overlay) == later, where
    with site.image_view("site:3") as image:
        assert view(image) == later, where
    _check_leftovers(site, where)


def _check_records(site: Site, tree: View, where: str) -> None:
    """The layer, the workspace and the image are all there, or none of them is."""
    with site.open() as store:
        layers = store.workspace(NAME).record.layers
        base = store.image(IMAGE).layers
        committed = store.find_image(NEW)
        assert [layer.id for layer in store.layers()] == sorted(layers), where
    if committed is None:
        assert layers == base, where
        return
    assert layers == committed.layers == (layers[0], *base), where
    with site.image_view(NEW) as image:
        assert view(image) == tree, where


def _check_leftovers(site: Site, where: str) -> None:
    """Nothing is left that the next commit, and gc, have not taken away."""
    with site.open() as store:
        store.gc()
        kept: list[Layer] = list(store.layers())
    rooms = site.place / "store"
    assert sorted(os.listdir(rooms / "workspaces" / NAME)) == ["lock", "record", "upper", "work"], where
    for room in ("intents", "staging", "trash"):
        assert os.listdir(rooms / room) == [], where
    assert len(os.listdir(rooms / "layers")) == len(kept), where


@pytest.mark.campaign("T18")
@pytest.mark.parametrize("error", ERRORS, ids=lambda code: errno.errorcode[code])
def test_failing_at_every_call(make_site: Callable[[], Site], campaign: Campaign, error: int) -> None:
    """The tree stays, who asked hears of it unless the call did not matter, and the next commit succeeds."""
    first = make_site()
    tree = shown(first)
    calls = calls_of(first)
    first.remove()
    for number, call in enumerate(calls, 1):
        site = make_site()
        where = f"at {call}, call {number} of {len(calls)}"
        with site.used() as used:
            with Fuse(number, error):
                _commit_or_fail(used, error)
            assert view(used.overlay) == tree, where
            write(used.overlay, b"later", b"later", create=True)
            later = view(used.overlay)
            used.commit("site:3")
            assert view(used.overlay) == later, where
        assert shown(site) == later, where
        with site.image_view("site:3") as image:
            assert view(image) == later, where
        _check_leftovers(site, where)
        site.remove()
    campaign.held(f"changing calls of a live commit, {errno.errorcode[error]} there", len(calls), [])


def _commit_or_fail(used: Used, error: int) -> None:
    try:
        used.commit(NEW)
    except OSError as raised:
        if raised.errno != error:
            raise
