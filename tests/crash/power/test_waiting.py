"""T11: a disk that blocks one request does not block the others, and the daemon ends once the disk responds."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlayfs.errors import MountError
from overlayfs.mount import unmount
from tests.crash.power import waiting
from tests.crash.power.conftest import Memory
from tests.crash.power.rig import ENDING, Rig, left, rigged
from tests.crash.power.session import mutant, ours
from tests.crash.power.test_failing import every_engine, every_kind
from tests.crash.power.waiting import Running, build, changes, frozen, looks, waits_for_disk
from tests.support import engines, processes
from tests.support.campaign import Campaign
from tests.support.mutants.together import NO_STANDBY
from tests.support.polling import until

MANY = 1_500
QUICK = ("mkdir", "chmod a lower file", "rename", "first write")

pytestmark = [pytest.mark.campaign("T11"), pytest.mark.timeout(600)]


def _prepared(rig: Rig, name: str) -> Path:
    """The directory of one change."""
    waiting.prepare(rig, rig.point / name)
    return rig.point / name


def _names(campaign: Campaign) -> list[str]:
    return [name for name in changes(Path()) if campaign.full or name in QUICK]


@every_kind
def test_a_frozen_upper_keeps_only_changes_waiting(campaign: Campaign, memory: Memory, kind: str) -> None:
    """Whatever the loop hangs in, other clients look and read; afterwards the change succeeds."""
    wrong, points = [], 0
    with rigged(kind, memory.fresh(), ours(f"engine={engines.KERNEL},io=cached"), build=build) as rig:
        for name in _names(campaign):
            place = _prepared(rig, name)
            with frozen(rig.disk.point):
                change = Running(changes(place)[name])
                until(lambda: waits_for_disk(rig.daemon.pid))
                for look, act in looks(rig).items():
                    points += 1
                    why = Running(act).wrong()
                    wrong += [f"during {name}: {look}: {why}"] if why else []
            why = change.wrong()
            wrong += [f"{name}: {why}"] if why else []
        shown = _shown(rig.point)
        rig.end()
    wrong += _differences(shown, left(rig))
    campaign.held("looks while the upper is frozen, engine kernel", points, wrong)


@every_kind
def test_changes_that_came_while_it_was_frozen(campaign: Campaign, memory: Memory, kind: str) -> None:
    """Many changes at once: they wait their turn, and reading everything meanwhile does not affect them."""
    with rigged(kind, memory.fresh(), ours(f"engine={engines.KERNEL},io=cached"), build=_many) as rig:
        places = {name: _prepared(rig, name) for name in changes(Path())}
        with frozen(rig.disk.point):
            running = {name: Running(changes(place)[name]) for name, place in places.items()}
            until(lambda: waits_for_disk(rig.daemon.pid))
            why = Running(lambda: _shown(rig.point / "many")).wrong()
            wrong = [f"looking at everything: {why}"] if why else []
        wrong += [f"{name}: {why}" for name, change in running.items() if (why := change.wrong())]
        shown = _shown(rig.point)
        rig.end()
    wrong += _differences(shown, left(rig))
    campaign.held("changes while the upper is frozen, engine kernel", len(running), wrong)


def test_a_loop_without_standby_is_noticed(campaign: Campaign, memory: Memory) -> None:
    with rigged("ext4", memory.fresh(), mutant(NO_STANDBY), build=build) as rig:
        place = _prepared(rig, "mkdir")
        with frozen(rig.disk.point):
            change = Running(changes(place)["mkdir"])
            until(lambda: waits_for_disk(rig.daemon.pid))
            look = Running(looks(rig)["look up"])
            why = look.wrong(within=1.0)
        change.wrong()
        look.wrong()
        rig.end()
    campaign.caught(NO_STANDBY, 1, [why] if why else [])


def _many(lower: Path) -> None:
    """More objects than the daemon caches."""
    build(lower)
    for number in range(MANY):
        (lower / "many" / str(number)).mkdir(parents=True)
        (lower / "many" / str(number) / "file").write_bytes(b"one of many")


def _shown(point: Path) -> dict[str, bytes | None]:
    """Every path of the mount, with the content of files."""
    files = (path for path in point.rglob("*") if not path.is_symlink())
    return {str(path.relative_to(point)): path.read_bytes() if path.is_file() else None for path in files}


def _differences(shown: dict[str, bytes | None], found: dict[bytes, tuple[object, ...]]) -> Iterator[str]:
    """Yield the differences between what the mount showed and what the stack has."""
    there = {os.fsdecode(path).strip("/"): facts for path, facts in found.items() if path}
    for path, content in shown.items():
        if path not in there or (content is not None and there[path][-1] != content):
            yield f"{path} was shown, and is {there.get(path)}"
    hidden = set(there) - set(shown) - {"way"} - {path for path in there if path.endswith("/soft")}
    if hidden:
        yield f"{hidden} were not shown"


@every_engine
@every_kind
def test_a_daemon_that_was_frozen_ends_in_time(campaign: Campaign, memory: Memory, kind: str, engine: str) -> None:
    """SIGTERM while it hangs: it has ten seconds from the moment the disk responds again."""
    with rigged(kind, memory.fresh(), ours(f"engine={engine}"), build=build) as rig:
        place = _prepared(rig, "mkdir")
        with frozen(rig.disk.point):
            change = Running(changes(place)["mkdir"])
            until(lambda: waits_for_disk(rig.daemon.pid))
            os.kill(rig.daemon.pid, signal.SIGTERM)
        ends = processes.ends(rig.daemon.pid, ENDING)
        change.wrong()
    wrong = [] if ends else ["SIGTERM did not end the daemon in time"]
    campaign.held(f"the end of a mount whose upper was frozen, engine {engine}", 1, wrong)


@every_engine
def test_a_daemon_that_was_frozen_and_killed_releases_its_clients(
    campaign: Campaign, memory: Memory, engine: str
) -> None:
    """It cannot end before the disk responds; unmounting releases the waiting clients, and reports it."""
    with rigged("ext4", memory.fresh(), ours(f"engine={engine}"), build=build) as rig:
        place = _prepared(rig, "mkdir")
        with frozen(rig.disk.point):
            change = Running(changes(place)["mkdir"])
            until(lambda: waits_for_disk(rig.daemon.pid))
            rig.daemon.kill()
            with pytest.raises(MountError, match="is unmounted, but its daemon"):
                unmount.unmount(os.fsencode(rig.point), wait=1.0)
            why = change.wrong()
        rig.daemon.wait()
    wrong = [] if "ConnectionAbortedError" in why else [f"the waiting client: {why or 'was answered'}"]
    campaign.held(f"kill -9 while the upper is frozen, engine {engine}", 1, wrong)


@every_engine
def test_a_waiting_fsync_blocks_no_other_request(campaign: Campaign, memory: Memory, engine: str) -> None:
    """The disk holds every flush until all other requests are answered, writes included."""
    wrong, points = [], 0
    with rigged("ext4", memory.fresh(), ours(f"engine={engine}"), build=build) as rig:
        place = _prepared(rig, "mkdir")
        fd = os.open(place / "up1", os.O_WRONLY)
        os.write(fd, b"written")
        rig.disk.behave("stuck")
        syncing = Running(lambda: os.fsync(fd))
        others = {**looks(rig), "write": changes(place)["write"]}
        for name, act in others.items():
            points += 1
            why = Running(act).wrong()
            wrong += [f"{name}: {why}"] if why else []
        assert syncing.hangs(), "the disk did not hold the flush"
        rig.disk.behave("")
        why = syncing.wrong()
        wrong += [f"fsync: {why}"] if why else []
        os.close(fd)
        rig.end()
    campaign.held(f"others beside an fsync that waits, engine {engine}", points, wrong)
