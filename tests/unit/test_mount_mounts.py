"""What is mounted: reading /proc/self/mountinfo, and finding the daemon behind a mount.

A daemon is found by its device, which the kernel may reuse for the next mount while the last daemon is still ending.
"""

from collections.abc import Callable

import pytest

from overlayfs.mount import mounts, runtime_state
from overlayfs.mount.mounts import TYPE, KernelMount, kernel_mounts, parse, unescape
from overlayfs.mount.runtime_state import Record

Known = Callable[..., None]


def test_octal_escapes_are_undone() -> None:
    assert unescape(rb"/a\040b\011c\012d\134e") == b"/a b\tc\nd\\e"
    assert unescape(b"/\xff\xfe") == b"/\xff\xfe"


def test_a_line_with_optional_fields() -> None:
    line = (
        rb"36 35 0:98 / /mnt/x\040y rw,nosuid,noatime shared:1 master:2 - fuse.overlayfs over\054lay "
        rb"ro,user_id=0,group_id=0"
    )
    mount = parse(line)
    assert mount.device == b"0:98"
    assert mount.root == b"/"
    assert mount.mountpoint == b"/mnt/x y"
    assert mount.type == b"fuse.overlayfs"
    assert mount.source == b"over,lay"
    assert {b"nosuid", b"ro", b"user_id=0"} <= mount.options


def test_a_line_without_optional_fields() -> None:
    assert parse(b"1 0 8:1 /sub / rw - ext4 /dev/sda1 rw").root == b"/sub"


def test_this_machine_has_a_root() -> None:
    assert b"/" in {mount.mountpoint for mount in kernel_mounts()}


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Known:
    """Set up one mount at /m with the device 0:7, and records of daemons: pid, start, mount point, device."""
    mount = KernelMount(mountpoint=b"/m", root=b"/", device=b"0:7", type=TYPE, source=b"s", options=frozenset())
    monkeypatch.setattr(mounts, "kernel_mounts", lambda: [mount])

    def know(*daemons: tuple[int, int, str, str]) -> None:
        found = [Record(*daemon, "s", (), None, None, "kernel") for daemon in daemons]
        monkeypatch.setattr(runtime_state, "read_all", lambda: found)

    return know


@pytest.mark.parametrize("turn", [1, -1])
def test_the_newest_daemon_of_a_device_is_found(known: Known, turn: int) -> None:
    known(*[(10, 1, "/m", "0:7"), (9, 2, "/m", "0:7")][::turn])
    assert mounts.find(b"/m").pid == 9


@pytest.mark.parametrize("turn", [1, -1])
def test_a_daemon_of_another_mount_point_is_not(known: Known, turn: int) -> None:
    known(*[(10, 1, "/m", "0:7"), (9, 2, "/other", "0:7"), (8, 3, "/m", "0:6")][::turn])
    assert mounts.find(b"/m").pid == 10


def test_a_renamed_mount_point_keeps_its_daemon(known: Known) -> None:
    known((10, 1, "/former", "0:7"))
    assert mounts.find(b"/m").pid == 10
