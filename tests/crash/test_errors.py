"""Every system call of the real daemon fails, once and for good, by both engines: campaign T3.

The caller gets the error, the tree is as before, nothing is left behind, and the same call works afterwards (C3); the
daemon lives on (C4).
"""

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.crash.aimed import COMPOUND, GROUPS, Scene, Undisturbed, acts, is_one_of
from tests.support import engines, processes
from tests.support.campaign import Campaign
from tests.support.launcher import Launcher
from tests.support.points import Points
from tests.support.tracer import Aim, Tracer

FOR_GOOD = 1 << 30
KINDS = (
    *((error, times) for error in (errno.ENOSPC, errno.EIO, errno.EMFILE) for times in (1, FOR_GOOD)),
    (errno.EINTR, 1),
    (errno.EINTR, 20),  # not for good: an interrupted call is repeated until it ends
)
FEW = 2  # of the kinds, for calls that only look
MOST = 450  # points of one act
QUICK_ACTS = 2  # of each group

Make = Callable[..., Scene]

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture
def make(place: Path, launch: Launcher) -> Make:
    """Factory of scenes: engine, act, number of rooms, mutant."""
    return lambda *words: Scene(place / "scene", launch, *words)


def every_aim(first: Undisturbed) -> Iterator[Aim]:
    """Each call that changes something fails in every way, each one that looks in a few."""
    changing = set(first.changing)
    for at in first.all:
        shift = FEW * at
        kinds = KINDS if at in changing else [KINDS[(shift + more) % len(KINDS)] for more in range(FEW)]
        yield from (Aim(at, *kind) for kind in kinds)


def fail(scene: Scene, choose: Callable[[Undisturbed], list[Aim]]) -> Points:
    """Let calls of an act fail, each in a room of its own."""
    points = Points()
    first = scene.undisturbed()
    aims = choose(first)
    used = scene.free(len(aims))
    for aim, room in zip(aims, used, strict=True):
        with points.at(_named(scene, first, aim)):
            points.tried -= not _fail(scene, room, aim, first)
        if processes.is_dead(scene.pid):
            scene.start()
    with points.at(f"{scene.name} by {scene.engine}, at the end"):
        scene.stop()
        scene.start()
        for room in used:
            is_one_of(scene.view(room), new=first.new)
        scene.check_layers()
        scene.stop()
    return points


def _named(scene: Scene, first: Undisturbed, aim: Aim) -> str:
    times = {1: "once", FOR_GOOD: "for good"}.get(aim.times, f"{aim.times} times")
    where = f"at {first.calls[aim.at - 1]}, call {aim.at} of {len(first.calls)}"
    return f"{scene.name} by {scene.engine}, {errno.errorcode[aim.error]} {times} {where}"


def _fail(scene: Scene, room: str, aim: Aim, first: Undisturbed) -> bool:
    with Tracer(scene.pid, aim) as tracer:
        failure = scene.do(room)
    assert not _has_ended(scene, failure), "the daemon has died"
    assert failure is None or failure.errno == aim.error != errno.EINTR, f"the caller got {failure!r}"
    done = scene.check(room, first)
    assert done or failure is not None, "it was not done"
    if aim.times != FOR_GOOD and scene.name not in COMPOUND:
        assert not done or failure is None, "it failed and was done"
    if failure is not None:
        assert aim.times == FOR_GOOD or scene.staged == [], "something is left in the work directory"
        _do_again(scene, room, aim)
    assert scene.check(room, first), "the second attempt went wrong"
    return tracer.hit


def _has_ended(scene: Scene, failure: OSError | None) -> bool:
    """Return whether the daemon has died; a caller may see that the mount is gone before that."""
    gone = failure is not None and failure.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return processes.ends(scene.pid) if gone else processes.is_dead(scene.pid)


def _do_again(scene: Scene, room: str, aim: Aim) -> None:
    again = scene.do(room)
    # What failed for good may have been done and could not be undone.
    late = aim.times == FOR_GOOD and isinstance(again, FileExistsError | FileNotFoundError)
    assert again is None or late, f"it cannot be done again: {again!r}"


@pytest.mark.campaign("T3")
@pytest.mark.parametrize("engine", engines.NAMES)
@pytest.mark.parametrize("group", GROUPS)
def test_every_call_fails(campaign: Campaign, make: Make, engine: str, group: str) -> None:
    def choose(first: Undisturbed) -> list[Aim]:
        aims = list(every_aim(first))
        return aims if campaign.full else aims[:: len(aims) // 8]

    points = Points()
    for name in acts(campaign, group, QUICK_ACTS):
        with make(engine, name, campaign.size(12, MOST)) as scene:
            points.add(fail(scene, choose))
    campaign.held(f"system calls of the daemon that fail, engine {engine}", points.tried, points.violations)


@pytest.mark.campaign("T3")
def test_treating_an_unreadable_name_as_absent_is_caught(campaign: Campaign, make: Make) -> None:
    with make(engines.KERNEL, "chmod", 40, "M5") as scene:
        points = fail(scene, lambda first: _aims_at(first, "newfstatat", errno.EIO))
    campaign.caught("M5", points.tried, [line for line in points.violations if "FileNotFoundError" in line])


@pytest.mark.campaign("T3")
@pytest.mark.parametrize("engine", engines.NAMES)
def test_exceptions_that_leave_the_filesystem_are_caught(campaign: Campaign, make: Make, engine: str) -> None:
    with make(engine, "chmod", 40, "M7") as scene:
        points = fail(scene, lambda first: _aims_at(first, "openat2", errno.EMFILE))
    campaign.caught("M7", points.tried, [line for line in points.violations if "has died" in line])


def _aims_at(first: Undisturbed, call: str, error: int) -> list[Aim]:
    return [Aim(at, error) for at, name in enumerate(first.calls, 1) if name == call]
