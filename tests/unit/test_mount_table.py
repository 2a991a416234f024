"""Which daemon is behind a mount: by its device, which the next mount may have while the last one is ending."""

from collections.abc import Callable

import pytest

from overlayfs.mount import records, table
from overlayfs.mount.mountinfo import TYPE, KernelMount
from overlayfs.mount.records import Record

Known = Callable[..., None]


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Known:
    """One mount at /m with the device 0:7, and records of so many daemons: pid, start, mount point, device."""
    mount = KernelMount(mountpoint=b"/m", root=b"/", device=b"0:7", type=TYPE, source=b"s", options=frozenset())
    monkeypatch.setattr(table, "kernel_mounts", lambda: [mount])

    def know(*daemons: tuple[int, int, str, str]) -> None:
        found = [Record(*daemon, "s", (), None, None, "kernel") for daemon in daemons]
        monkeypatch.setattr(records, "read_all", lambda: found)

    return know


@pytest.mark.parametrize("turn", [1, -1])
def test_a_daemon_that_is_ending_is_not_asked(known: Known, turn: int) -> None:
    known(*[(10, 1, "/m", "0:7"), (9, 2, "/m", "0:7")][::turn])
    assert table.find(b"/m").pid == 9


@pytest.mark.parametrize("turn", [1, -1])
def test_nor_is_one_of_another_place(known: Known, turn: int) -> None:
    known(*[(10, 1, "/m", "0:7"), (9, 2, "/other", "0:7"), (8, 3, "/m", "0:6")][::turn])
    assert table.find(b"/m").pid == 10


def test_a_place_that_was_renamed_keeps_its_daemon(known: Known) -> None:
    known((10, 1, "/former", "0:7"))
    assert table.find(b"/m").pid == 10
