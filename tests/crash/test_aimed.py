"""SIGKILL at every system call of the real daemon, by both engines: campaign T1."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.aimed import GROUPS, Scene, Undisturbed, acts, is_one_of
from tests.support import engines, processes
from tests.support.campaign import Campaign
from tests.support.launcher import Launcher
from tests.support.points import Points
from tests.support.tracer import Aim, Tracer

MOST = 130  # system calls of one act
QUICK_ACTS = 3  # of each group

Make = Callable[..., Scene]
Choose = Callable[[Undisturbed], list[int]]

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture
def make(place: Path, launch: Launcher) -> Make:
    """Factory of scenes: engine, act, number of rooms, mutant."""
    return lambda *words: Scene(place / "scene", launch, *words)


def kill(scene: Scene, choose: Choose) -> Points:
    """Kill the daemon at chosen calls of an act, each in a room of its own, and mount again; then look at everything.

    A call that is not made, since the kernel had cached something, is not a point.
    """
    points = Points()
    first = scene.undisturbed()
    numbers = choose(first)
    used = scene.free(len(numbers))
    for at, room in zip(numbers, used, strict=True):
        with points.at(f"{scene.name} by {scene.engine}, at {first.calls[at - 1]}, call {at} of {len(first.calls)}"):
            points.tried -= not _kill_at(scene, room, at, first)
        if processes.is_dead(scene.pid):
            scene.start()
    with points.at(f"{scene.name} by {scene.engine}, at the end"):
        for room in used:
            is_one_of(scene.view(room), new=first.new)
        scene.check_layers()
        scene.stop()
    return points


def _kill_at(scene: Scene, room: str, at: int, first: Undisturbed) -> bool:
    with Tracer(scene.pid, Aim(at)) as tracer:
        error = scene.do(room)
    if tracer.hit:
        assert processes.reap(scene.pid) == -signal.SIGKILL
        scene.start()
        assert scene.staged == [], "something is left in the work directory"
    done = scene.check(room, first)
    assert done or error is not None, "what had returned is lost"
    assert tracer.hit or error is None, f"undisturbed, it failed: {error!r}"
    if not done:
        error = scene.do(room)
        assert error is None, f"it cannot be done again: {error!r}"
        is_one_of(scene.view(room), new=first.new)
    return tracer.hit


@pytest.mark.campaign("T1")
@pytest.mark.parametrize("engine", engines.NAMES)
@pytest.mark.parametrize("group", GROUPS)
def test_killed_at_every_call(campaign: Campaign, make: Make, engine: str, group: str) -> None:
    def choose(first: Undisturbed) -> list[int]:
        changing = first.changing
        return first.all if campaign.full else [changing[len(changing) // 2]]

    points = Points()
    for name in acts(campaign, group, QUICK_ACTS):
        with make(engine, name, campaign.size(3, MOST)) as scene:
            points.add(kill(scene, choose))
    campaign.held(f"kill -9 of the daemon at every system call, engine {engine}", points.tried, points.violations)


@pytest.mark.campaign("T1")
@pytest.mark.parametrize(("mutant", "name"), [("M2", "write"), ("M3", "rename a file")])
def test_mutants_are_caught(campaign: Campaign, make: Make, mutant: str, name: str) -> None:
    with make(engines.KERNEL, name, 30, mutant) as scene:
        points = kill(scene, lambda first: first.changing)
    campaign.caught(mutant, points.tried, [line for line in points.violations if "not old" in line])
