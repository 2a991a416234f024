"""Stopped at any changing call: the old tree or the new one, never a third. Failing there: the old tree, and alive."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from overlayfs import Overlay
from tests.crash.harness import Fuse, Operation, Site, Stopped, View, abandon, view
from tests.crash.operations import OPERATIONS, PREPARATIONS
from tests.support.requirements import need_root

ERRORS = (errno.ENOSPC, errno.EIO)


@pytest.fixture
def site(scratch: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[], Site]]:
    """A maker of equal stacks, each prepared for the operation under test."""
    need_root()
    umask = os.umask(0)
    made = 0

    def make() -> Site:
        nonlocal made
        made += 1
        found = Site(scratch / f"crash-{os.getpid()}-{id(request)}-{made}")
        prepare(found, request.getfixturevalue("name"))
        return found

    yield make
    os.umask(umask)


def prepare(site: Site, name: str) -> None:
    """Do what goes before an operation."""
    overlay = site.open()
    if name in PREPARATIONS:
        PREPARATIONS[name](overlay)
    overlay.close()


def outcome(site: Site, operation: Operation) -> tuple[View, View, int]:
    """Return the tree before and after, and the number of changing calls between."""
    before = site.view()
    overlay = site.open()
    with Fuse() as fuse:
        operation(overlay)
    overlay.close()
    return before, site.view(), len(fuse.calls)


@pytest.mark.parametrize("name", OPERATIONS)
def test_stopped_at_every_call(site: Callable[[], Site], name: str) -> None:
    """A kill at any moment leaves one of two trees, and the next mount finds nothing to repair by hand."""
    old, new, calls = outcome(site(), OPERATIONS[name])
    assert calls
    for at in range(1, calls + 1):
        stopped = site()
        overlay = stopped.open()
        with Fuse(at) as fuse, pytest.raises(Stopped):
            OPERATIONS[name](overlay)
        abandon(overlay)
        assert stopped.view() in (old, new), f"at {fuse.calls[at - 1]}, call {at} of {calls}"
        assert stopped.staged() == []


@pytest.mark.parametrize("error", ERRORS, ids=lambda code: errno.errorcode[code])
@pytest.mark.parametrize("name", OPERATIONS)
def test_failing_at_every_call(site: Callable[[], Site], name: str, error: int) -> None:
    """The caller hears of it and the tree is as before, or the call did not matter; then the same call works."""
    old, new, calls = outcome(site(), OPERATIONS[name])
    for at in range(1, calls + 1):
        failing = site()
        overlay = failing.open()
        with Fuse(at, error) as fuse:
            failed = _fails(overlay, OPERATIONS[name], error)
        where = f"at {fuse.calls[at - 1]}, call {at} of {calls}"
        assert view(overlay) == (old if failed else new), where
        if failed:
            OPERATIONS[name](overlay)
            assert view(overlay) == new, where
            assert failing.staged() == [], where
        overlay.close()
        assert failing.view() == new, where


def _fails(overlay: Overlay, operation: Operation, error: int) -> bool:
    """Return whether the operation fails, which it may do with the injected error alone."""
    try:
        operation(overlay)
    except OSError as raised:
        if raised.errno == error:
            return True
        raise
    return False
