"""A commit stopped at any changing call leaves no layer or a whole one, and the next one succeeds."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from overlayfs import Overlay, StackConfig
from overlayfs.errors import UserError
from overlayfs.store.commit import commit_unmounted
from tests.crash.harness import Fuse, Site, Stopped, View, view
from tests.crash.operations import OPERATIONS
from tests.support.requirements import need_root

STOPPED, FAILED = 9, 1
CHANGES = ("open a twin for writing", "chmod", "rename a merged directory", "unlink lower")


@pytest.fixture
def changed(scratch: Path) -> Callable[[], Site]:
    """A maker of equal stacks in which there is something of each kind to commit."""
    need_root()
    made = 0

    def make() -> Site:
        nonlocal made
        made += 1
        found = Site(scratch / f"commit-{os.getpid()}-{id(changed)}-{made}")
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


def test_stopped_at_every_call(changed: Callable[[], Site]) -> None:
    """The layer appears by one rename; what was there before stays as it was."""
    whole = changed()
    shown = whole.view()
    with Fuse() as fuse:
        commit(whole.place)
    assert committed_view(whole.place) == shown
    for at in range(1, len(fuse.calls) + 1):
        stopped = changed()
        _commit_and_die(stopped.place, at)
        _check_after(stopped, shown, f"at {fuse.calls[at - 1]}, call {at} of {len(fuse.calls)}")


def _commit_and_die(place: Path, at: int) -> None:
    """Commit in a process that ends at a changing call, so that the kernel alone cleans up."""
    child = os.fork()
    if child == 0:
        try:
            with Fuse(at):
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


def test_what_cannot_be_read_is_told_with_its_name(place: Path) -> None:
    need_root()
    site = Site(place / "site")
    thin = site.place / "up" / "thin"
    thin.touch()
    os.setxattr(thin, "trusted.overlay.metacopy", b"")
    with pytest.raises(UserError, match=r"Input/output error \(thin\)"):
        commit(site.place)
    assert not (site.place / "layer").exists()
