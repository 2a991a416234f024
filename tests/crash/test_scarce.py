"""T10: the daemon runs out of descriptors, memory or the size that a file may have, in every kind of change."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.crash.aimed import COMPOUND, GROUPS, Scene, Undisturbed, acts, is_one_of
from tests.support import engines, processes
from tests.support.campaign import Campaign
from tests.support.launcher import Launcher
from tests.support.points import Points

PAGE = os.sysconf("SC_PAGE_SIZE")

Make = Callable[..., Scene]
pytestmark = pytest.mark.timeout(1200)


def _descriptors(pid: int) -> Iterator[int]:
    """The limit of descriptors: those that are open, and a few more."""
    is_open = len(os.listdir(f"/proc/{pid}/fd"))
    yield from range(is_open, is_open + 10)


def _memory(pid: int) -> Iterator[int]:
    """The limit of address space in bytes: what is in use, and a little more."""
    used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * PAGE
    yield from (used + pages * PAGE for pages in (0, 1, 4, 16, 64, 256, 2304))


def _sizes(_: int) -> Iterator[int]:
    yield from (0, 1, 10, 4096, 6899)


LACKS = {
    "descriptors": (resource.RLIMIT_NOFILE, _descriptors, (errno.EMFILE,)),
    "memory": (resource.RLIMIT_AS, _memory, (errno.ENOMEM,)),
    "size of a file": (resource.RLIMIT_FSIZE, _sizes, (errno.EFBIG,)),
}
"""The scarce resources: the limit, its values for a process, and the errors a caller may get."""
ROOMS = 12


@pytest.fixture
def make(place: Path, launch: Launcher) -> Make:
    """Factory of scenes: engine, act, number of rooms."""
    return lambda *words: Scene(place / "scene", launch, *words)


@contextmanager
def limited(pid: int, limit: int, value: int) -> Iterator[None]:
    """A process has this limit within the block."""
    before = resource.prlimit(pid, limit)
    resource.prlimit(pid, limit, (value, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, limit, before)


def starve(scene: Scene, lack: str, every: int) -> Points:
    """Act under each limit, each in its own room, and again without it; then check everything after a remount."""
    points = Points()
    first = scene.undisturbed()
    limit, values, errors = LACKS[lack]
    tried = list(values(scene.pid))[::every]
    used = scene.free(len(tried))
    for value, room in zip(tried, used, strict=True):
        with points.at(f"{scene.name} by {scene.engine}, {lack}: {value}"):
            _starve(scene, room, first, (limit, value), errors)
        if processes.is_dead(scene.pid):
            scene.start()
    with points.at(f"{scene.name} by {scene.engine}, {lack}, at the end"):
        scene.stop()
        scene.start()
        assert scene.staged == [], "something is left in the work directory"  # cleaning up needs descriptors as well
        for room in used:
            is_one_of(scene.view(room), new=first.new)
        scene.check_layers()
        scene.stop()
    return points


def _starve(scene: Scene, room: str, first: Undisturbed, limit: tuple[int, int], expected: tuple[int, ...]) -> None:
    with limited(scene.pid, *limit):
        failure = scene.do(room)
    assert not processes.is_dead(scene.pid), f"the daemon has died, the caller got {failure!r}"
    assert failure is None or failure.errno in expected, f"the caller got {failure!r}"
    done = scene.check(room, first)
    assert done == (failure is None) or scene.name in COMPOUND, f"the caller got {failure!r}, and it was {done=}"
    if failure is not None:
        again = scene.do(room)
        assert again is None, f"it cannot be done again: {again!r}"
    assert scene.check(room, first), "the second attempt went wrong"


@pytest.mark.campaign("T10")
@pytest.mark.parametrize("engine", engines.NAMES)
@pytest.mark.parametrize("lack", LACKS)
def test_scarce_resources(campaign: Campaign, make: Make, engine: str, lack: str) -> None:
    points = Points()
    for group in GROUPS:
        for name in acts(campaign, group, 1):
            with make(engine, name, ROOMS) as scene:
                points.add(starve(scene, lack, campaign.size(3, 1)))
    campaign.held(f"changes with too little: {lack}, engine {engine}", points.tried, points.violations)
