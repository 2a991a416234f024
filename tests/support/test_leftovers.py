"""The check for leftovers finds mounts, loop devices and processes."""

import os
import subprocess
from pathlib import Path

from tests.support import leftovers, processes, syscalls
from tests.support.disks import disk
from tests.support.requirements import need_root


def test_a_mount_a_loop_device_and_a_process_are_found(place: Path) -> None:
    need_root()
    before = processes.children()
    with disk("ext4", place / "disk") as point:
        (daemon,) = start_orphan()
        lines = leftovers.leftovers(place, before)
        os.kill(daemon, 9)
        assert processes.reap(daemon) == -9
    assert [line.partition(":")[0] for line in lines] == ["still mounted", "still attached", "still running"]
    assert str(point) in lines[0] and str(daemon) in lines[2]
    assert not leftovers.leftovers(place, before)


def start_orphan() -> set[int]:
    """Start a process whose parent ends, like that of a daemon, so that it becomes our child."""
    before = processes.children()
    subprocess.run(["sh", "-c", "sleep 1000 > /dev/null 2>&1 &"], check=True)
    return processes.children() - before


def test_other_mounts_do_not_count(place: Path) -> None:
    need_root()
    inner = place / "inner"
    inner.mkdir()
    beside = place / "inner-beside"
    beside.mkdir()
    syscalls.mount(b"tmpfs", os.fsencode(beside), b"tmpfs", 0, b"")
    try:
        assert not leftovers.mounts_below(inner)
        assert leftovers.mounts_below(place) == [str(beside)]
    finally:
        syscalls.umount(os.fsencode(beside))
