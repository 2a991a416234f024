"""Stopped at any changing call: the old tree or the new one, never a third. Failing there: the old tree, and alive."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from overlayfs import Overlay
from tests.crash.harness import Blindness, Fuse, Operation, Site, Stopped, View, abandon, closed_again, view
from tests.crash.operations import COPYING, OPERATIONS, PREPARATIONS
from tests.support.campaign import Campaign
from tests.support.mutants import seeded
from tests.support.points import Points, chosen
from tests.support.requirements import need_root

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EMFILE, errno.ENOMEM)
QUICK_ERRORS = ERRORS[:2]

REPEATED_BY_THE_INTERPRETER = ("copy_data", "write_at", "truncate_fd", "fsync")  # below the fuse (PEP 475)

THIRD = "a third tree"

MakeSite = Callable[[], Site]
every_operation = pytest.mark.parametrize("name", OPERATIONS)


@pytest.fixture
def site(scratch: Path, request: pytest.FixtureRequest) -> Iterator[MakeSite]:
    """Factory of equal stacks, each prepared for the operation under test; the one before is removed."""
    need_root()
    umask = os.umask(0)
    place = scratch / f"crash-{os.getpid()}-{id(request)}"

    def make() -> Site:
        shutil.rmtree(place, ignore_errors=True)
        found = Site(place)
        prepare(found, request.getfixturevalue("name"))
        return found

    yield make
    shutil.rmtree(place)
    os.umask(umask)


def prepare(site: Site, name: str) -> None:
    """Do what precedes an operation."""
    overlay = site.open()
    if name in PREPARATIONS:
        PREPARATIONS[name](overlay)
    overlay.close()


def outcome(site: Site, operation: Operation) -> tuple[View, View, list[str]]:
    """Return the tree before and after, and the changing calls between."""
    before = site.view()
    overlay = site.open()
    with Fuse() as fuse:
        operation(overlay)
    overlay.close()
    return before, site.view(), fuse.calls


# --- stopped -----------------------------------------------------------------------------------------------


def stop_at(make: MakeSite, name: str, chosen_of: Callable[[list[str]], list[Fuse]]) -> Points:
    """A kill at any moment leaves one of two trees, and the next mount finds nothing to repair by hand."""
    old, new, calls = outcome(make(), OPERATIONS[name])
    points = Points()
    for fuse in chosen_of(calls):
        with points.at(f"{name}, at {calls[fuse.at - 1]}, call {fuse.at} of {len(calls)}"):
            stopped = make()
            overlay = stopped.open()
            try:
                with fuse, pytest.raises(Stopped):
                    OPERATIONS[name](overlay)
            finally:
                abandon(overlay)
            assert stopped.view() in (old, new), THIRD
            assert stopped.staged() == [], "something is left in the work directory"
    return points


@pytest.mark.campaign("T1")
@every_operation
def test_stopped_at_every_call(campaign: Campaign, site: MakeSite, name: str) -> None:
    points = stop_at(site, name, lambda calls: [Fuse(at) for at in chosen(campaign, len(calls), 5)])
    campaign.held("changes stopped at every changing call", points.tried, points.violations)


@pytest.mark.campaign("T1")
@pytest.mark.parametrize("name", COPYING)
def test_stopped_in_the_middle_of_copying(campaign: Campaign, site: MakeSite, name: str) -> None:
    points = stop_at(site, name, lambda calls: [Fuse(calls.index("copy_data") + 1, torn=True)])
    campaign.held("copy-ups stopped in the middle of their data", points.tried, points.violations)


@pytest.mark.campaign("T1")
@pytest.mark.parametrize(("mutant", "name"), [("M2", "write"), ("M3", "rename lower")])
def test_mutants_are_caught(campaign: Campaign, site: MakeSite, mutant: str, name: str) -> None:
    with seeded(mutant):
        points = stop_at(site, name, lambda calls: [Fuse(at + 1) for at in range(len(calls))])
    campaign.caught(mutant, points.tried, [line for line in points.violations if THIRD in line])


# --- failing -----------------------------------------------------------------------------------------------


def fail_at(campaign: Campaign, make: MakeSite, name: str, lasting: bool, quick: int) -> Points:
    """The caller gets the error and the tree is as before, or the call did not matter; then the same call works."""
    old, new, calls = outcome(make(), OPERATIONS[name])
    points = Points()
    for error in ERRORS if campaign.full else QUICK_ERRORS:
        for at in chosen(campaign, len(calls), quick):
            where = f"{name}, {errno.errorcode[error]} at {calls[at - 1]}, call {at} of {len(calls)}"
            with points.at(where):
                check = _fail_on if lasting else _fail
                with closed_again():
                    check(make(), OPERATIONS[name], Fuse(at, error, lasting), old, new)
    return points


def _fail(failing: Site, operation: Operation, fuse: Fuse, old: View, new: View) -> None:
    overlay = failing.open()
    with fuse:
        failed = _fails(overlay, operation, fuse.errno)
    assert view(overlay) == (old if failed else new), "the tree is another one"
    if failed:
        operation(overlay)
        assert failing.staged() == [], "something is left in the work directory"
    assert view(overlay) == new, "the second attempt went wrong"
    overlay.close()
    assert failing.view() == new, "the next mount shows another tree"


def _fail_on(failing: Site, operation: Operation, fuse: Fuse, old: View, new: View) -> None:
    """If nothing can be written, nothing can be undone: the next attempt, or the next mount, undoes it."""
    overlay = failing.open()
    with fuse:
        failed = _fails(overlay, operation, fuse.errno)
    if failed:
        with suppress(FileExistsError, FileNotFoundError):  # it had come so far
            operation(overlay)
    assert _uncounted(view(overlay)) == _uncounted(new), "the second attempt went wrong"
    overlay.close()
    assert failing.view() == new, "the next mount shows another tree"
    assert failing.staged() == [], "the next mount has left something in the work directory"


def _uncounted(tree: View) -> View:
    """Leave out the link counts: a name in the work directory that could not be removed counts until the next mount."""
    return {path: (*facts[:5], *facts[6:]) for path, facts in tree.items()}


def _fails(overlay: Overlay, operation: Operation, error: int) -> bool:
    """Return whether the operation fails, which it may do with the injected error only."""
    try:
        operation(overlay)
    except OSError as raised:
        if raised.errno == error:
            return True
        raise
    return False


@pytest.mark.campaign("T3")
@every_operation
def test_failing_at_every_call(campaign: Campaign, site: MakeSite, name: str) -> None:
    points = fail_at(campaign, site, name, lasting=False, quick=4)
    campaign.held("changes failing at every changing call", points.tried, points.violations)


@pytest.mark.campaign("T3")
@every_operation
def test_failing_from_every_call_on(campaign: Campaign, site: MakeSite, name: str) -> None:
    points = fail_at(campaign, site, name, lasting=True, quick=2)
    campaign.held("changes failing from every changing call on", points.tried, points.violations)


@pytest.mark.campaign("T3")
@every_operation
def test_reading_fails_at_every_call(campaign: Campaign, site: MakeSite, name: str) -> None:
    """What cannot be read is not absent: the caller gets the error, and nothing has changed."""
    old, new, _ = outcome(site(), OPERATIONS[name])
    calls = looks(site(), OPERATIONS[name])
    points = Points()
    for error in (errno.EIO, errno.EMFILE) if campaign.full else (errno.EIO,):
        for at in chosen(campaign, len(calls), 4):
            where = f"{name}, {errno.errorcode[error]} at {calls[at - 1]}, look {at} of {len(calls)}"
            with points.at(where), closed_again():
                _fail(site(), OPERATIONS[name], Blindness(at, error), old, new)
    campaign.held("changes failing at every look", points.tried, points.violations)


def looks(site: Site, operation: Operation) -> list[str]:
    """Return the calls of an operation that only look."""
    overlay = site.open()
    with Blindness() as blindness:
        operation(overlay)
    overlay.close()
    return blindness.calls


@pytest.mark.campaign("T3")
@every_operation
def test_interrupted_at_every_call(campaign: Campaign, site: MakeSite, name: str) -> None:
    """No caller sees EINTR."""
    _, new, calls = outcome(site(), OPERATIONS[name])
    points = Points()
    changing = [at for at, call in enumerate(calls, 1) if call not in REPEATED_BY_THE_INTERPRETER]
    for number in chosen(campaign, len(changing), 1):
        at = changing[number - 1]
        with points.at(f"{name}, at {calls[at - 1]}, call {at} of {len(calls)}"):
            interrupted = site()
            overlay = interrupted.open()
            with Fuse(at, errno.EINTR):
                OPERATIONS[name](overlay)
            assert view(overlay) == new, "the tree is another one"
            overlay.close()
    campaign.held("changes interrupted at every changing call", points.tried, points.violations)
