"""A commit stopped at any changing call leaves no layer or a whole one, and the next one succeeds."""

import errno
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import pytest

from overlayfs import Overlay, StackConfig
from overlayfs.errors import UserError
from overlayfs.store.copy_upper import commit_unmounted
from tests.crash.harness import Fuse, Site, Stopped, View, closed_again, torn, view
from tests.crash.operations import OPERATIONS
from tests.support.campaign import Campaign
from tests.support.points import Points, chosen
from tests.support.requirements import need_root

STOPPED, FAILED = 9, 1
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EMFILE, errno.ENOMEM)
MakeSite = Callable[[], Site]
CHANGES = ("open a twin for writing", "chmod", "rename a merged directory", "unlink lower")


@pytest.fixture
def changed(place: Path) -> Callable[[], Site]:
    """Factory of equal stacks in which there is something of each kind to commit."""
    need_root()
    made = 0

    def make() -> Site:
        nonlocal made
        made += 1
        found = Site(place / str(made))
        overlay = found.open()
        for name in CHANGES:
            OPERATIONS[name](overlay)
        overlay.close()
        return found

    return make


def committed_view(place: Path) -> View:
    """Return what the new layer shows over the old ones."""
    lower = tuple(os.fsencode(place / name) for name in ("layer", "top", "base"))
    overlay = Overlay(StackConfig(lower=lower))
    try:
        return view(overlay)
    finally:
        overlay.close()


def commit(place: Path) -> None:
    """Commit the upper of a site to `layer` beside it."""
    top, base, up, work, layer = (os.fsencode(place / name) for name in ("top", "base", "up", "work", "layer"))
    commit_unmounted(StackConfig(lower=(top, base), upper=up, work=work, lock_wait=0.0), layer)


def undisturbed(changed: MakeSite) -> tuple[View, list[str]]:
    """Return what the stack shows, and the changing calls of a commit."""
    whole = changed()
    shown = whole.view()
    with Fuse() as fuse:
        commit(whole.place)
    assert committed_view(whole.place) == shown
    return shown, fuse.calls


def _stop_at(changed: MakeSite, shown: View, calls: list[str], fuses: Iterable[Fuse]) -> Points:
    points = Points()
    for fuse in fuses:
        where = f"at {calls[fuse.at - 1]}, call {fuse.at} of {len(calls)}"
        with points.at(where):
            stopped = changed()
            _commit_and_die(stopped.place, fuse)
            _check_after(stopped, shown, where)
            shutil.rmtree(stopped.place)
    return points


@pytest.mark.campaign("T1")
def test_stopped_at_every_call(campaign: Campaign, changed: MakeSite) -> None:
    """The layer appears by one rename; what was there before stays as it was."""
    shown, calls = undisturbed(changed)
    points = _stop_at(changed, shown, calls, map(Fuse, chosen(campaign, len(calls), 20)))
    campaign.held("commits to a directory stopped at every changing call", points.tried, points.violations)


@pytest.mark.campaign("T1")
def test_stopped_in_the_middle_of_copying(campaign: Campaign, changed: MakeSite) -> None:
    shown, calls = undisturbed(changed)
    points = _stop_at(changed, shown, calls, torn(campaign, calls, 2))
    campaign.held("commits to a directory stopped in the middle of copying", points.tried, points.violations)


@pytest.mark.campaign("T3")
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "for good"])
def test_failing_at_every_call(campaign: Campaign, changed: MakeSite, lasting: bool) -> None:
    """The caller gets the error, and the layer on the next attempt."""
    shown, calls = undisturbed(changed)
    points = Points()
    for error in ERRORS if campaign.full else ERRORS[:1]:
        for at in chosen(campaign, len(calls), 20):
            where = f"{errno.errorcode[error]} at {calls[at - 1]}, call {at} of {len(calls)}"
            with points.at(where), closed_again():
                failing = changed()
                with Fuse(at, error, lasting), suppress(UserError, OSError):
                    commit(failing.place)
                _check_after(failing, shown, where)
                shutil.rmtree(failing.place)
    what = "from every changing call on" if lasting else "at every changing call"
    campaign.held(f"commits to a directory failing {what}", points.tried, points.violations)


def _commit_and_die(place: Path, fuse: Fuse) -> None:
    """Commit in a process that ends at a changing call, so that only the kernel cleans up."""
    child = os.fork()
    if child == 0:
        try:
            with fuse:
                commit(place)
        except Stopped:
            os._exit(STOPPED)
        finally:
            os._exit(FAILED)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == STOPPED


def _check_after(stopped: Site, shown: View, where: str) -> None:
    layer = stopped.place / "layer"
    assert stopped.view() == shown, where
    if layer.exists():
        assert committed_view(stopped.place) == shown, where
        return
    commit(stopped.place)
    assert committed_view(stopped.place) == shown, where
    assert sorted(os.listdir(stopped.place)) == ["base", "layer", "top", "up", "work"], where


def test_an_unreadable_file_is_named(place: Path) -> None:
    need_root()
    site = Site(place / "site")
    thin = site.place / "up" / "thin"
    thin.touch()
    os.setxattr(thin, "trusted.overlay.metacopy", b"")
    with pytest.raises(UserError, match=r"Input/output error \(thin\)"):
        commit(site.place)
    assert not (site.place / "layer").exists()
