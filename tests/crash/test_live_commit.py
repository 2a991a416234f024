"""A live commit stopped at any changing call: the old state or the new one, the same tree, and nothing lost."""

import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from overlayfs.store.layers import Layer
from tests.crash.harness import Fuse, Stopped, View, build_layers, change_upper, closed_again, torn, view, write
from tests.crash.operations import OPERATIONS
from tests.store.live import IMAGE, NAME, Site, Used
from tests.support.campaign import Campaign
from tests.support.points import Points, chosen
from tests.support.requirements import need_root

STOPPED, FAILED = 9, 1
CHANGES = ("open a twin for writing", "chmod", "rename a merged directory", "unlink lower")
NEW = "site:2"
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EMFILE, errno.ENOMEM)
MakeSite = Callable[[], Site]


@pytest.fixture
def make_site(place: Path) -> Callable[[], Site]:
    """Factory of equal stores, each with a workspace in which there is something of each kind to commit."""
    need_root()
    made = 0

    def make() -> Site:
        nonlocal made
        made += 1
        base = place / str(made)
        base.mkdir()
        build_layers(base / "base", base / "top")
        site = Site(base, base / "top", base / "base")
        with site.used() as used:
            change(used)
        return site

    return make


def change(used: Used) -> None:
    """Change something of each kind."""
    change_upper(used.overlay)
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


@pytest.mark.campaign("T1")
def test_stopped_at_every_call(campaign: Campaign, make_site: MakeSite) -> None:
    tree, calls = undisturbed(make_site)
    assert len(calls) > 40
    stopped = _stop_at(make_site, tree, calls, map(Fuse, chosen(campaign, len(calls), 20)))
    campaign.held("live commits stopped at every changing call", stopped.tried, stopped.violations)


@pytest.mark.campaign("T1")
def test_stopped_in_the_middle_of_every_write(campaign: Campaign, make_site: MakeSite) -> None:
    tree, calls = undisturbed(make_site)
    stopped = _stop_at(make_site, tree, calls, torn(campaign, calls, 3))
    campaign.held("live commits stopped in the middle of every write", stopped.tried, stopped.violations)


def undisturbed(make_site: MakeSite) -> tuple[View, list[str]]:
    """Return what the workspace shows before and after a commit, and the changing calls of one."""
    first = make_site()
    tree = shown(first)
    calls = calls_of(first)
    assert shown(first) == tree
    first.remove()
    return tree, calls


def _stop_at(make_site: MakeSite, tree: View, calls: list[str], fuses: Iterable[Fuse]) -> Points:
    points = Points()
    for fuse in fuses:
        where = f"at {calls[fuse.at - 1]}, call {fuse.at} of {len(calls)}"
        with points.at(where):
            site = make_site()
            _commit_and_die(site, fuse)
            _check_after(site, tree, where)
            site.remove()
    return points


def _commit_and_die(site: Site, fuse: Fuse) -> None:
    """Commit in a process that ends at a changing call, so that only the kernel cleans up."""
    child = os.fork()
    if child == 0:
        try:
            with site.used() as used, fuse:
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
        layers = store.workspaces.find(NAME).record.layers
        base = store.images.find(IMAGE).layers
        committed = store.images.get(NEW)
        assert [layer.id for layer in store.layers()] == sorted(layers), where
    if committed is None:
        assert layers == base, where
        return
    assert layers == committed.layers == (layers[0], *base), where
    with site.image_view(NEW) as image:
        assert view(image) == tree, where


def _check_leftovers(site: Site, where: str) -> None:
    """Nothing is left that the next commit and gc have not removed."""
    with site.open() as store:
        store.gc()
        kept: list[Layer] = list(store.layers())
    rooms = site.place / "store"
    assert sorted(os.listdir(rooms / "workspaces" / NAME)) == ["lock", "record", "upper", "work"], where
    for room in ("intents", "staging", "trash"):
        assert os.listdir(rooms / room) == [], where
    assert len(os.listdir(rooms / "layers")) == len(kept), where


@pytest.mark.campaign("T3")
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "for good"])
def test_failing_at_every_call(campaign: Campaign, make_site: MakeSite, lasting: bool) -> None:
    """The tree stays, the error is raised unless the call did not matter, and the next commit succeeds."""
    tree, calls = undisturbed(make_site)
    points = Points()
    for error in ERRORS if campaign.full else ERRORS[:1]:
        for number in chosen(campaign, len(calls), 20):
            where = f"{errno.errorcode[error]} at {calls[number - 1]}, call {number} of {len(calls)}"
            with points.at(where), closed_again():
                _fail(make_site(), tree, Fuse(number, error, lasting))
    what = "from every changing call on" if lasting else "at every changing call"
    campaign.held(f"live commits failing {what}", points.tried, points.violations)


def _fail(site: Site, tree: View, fuse: Fuse) -> None:
    with site.used() as used:
        with fuse:
            _commit_or_fail(used, fuse.errno)
        assert view(used.overlay) == tree, "the tree has changed"
        write(used.overlay, b"later", b"later", create=True)
        later = view(used.overlay)
        used.commit("site:3")
        assert view(used.overlay) == later, "the next commit has changed the tree"
    assert shown(site) == later, "the next mount shows another tree"
    with site.image_view("site:3") as image:
        assert view(image) == later, "the image shows another tree"
    _check_leftovers(site, "after the next commit")
    site.remove()


def _commit_or_fail(used: Used, error: int) -> None:
    try:
        used.commit(NEW)
    except OSError as raised:
        if raised.errno != error:
            raise
