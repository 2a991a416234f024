"""Starting: ready means that the mount answers, an error is one sentence, and no inherited descriptor stays open."""

import os
import re
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounted.conftest import Mount, Stack
from tests.support import processes, syscalls
from tests.support.polling import until


def _lines(point: Path) -> list[list[str]]:
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        return [fields for line in file if (fields := line.split())[4] == str(point)]


def test_success_means_that_the_mount_answers(mount: Mount) -> None:
    mount.start()
    assert (mount.point / "t").read_bytes() == b"top"
    assert sorted(os.listdir(mount.point)) == ["d", "t"]
    assert mount.unmount() == 0


def test_the_kernel_gets_the_options(mount: Mount) -> None:
    mount.start(options="fsname=a source\\, strange")
    (line,) = _lines(mount.point)
    assert line[-3] == "fuse.overlayfs"
    assert line[-2] == "a\\040source,\\040strange"
    assert {"nosuid", "nodev"} <= set(line[5].split(","))
    assert {"default_permissions", "allow_other"} <= set(line[-1].split(","))
    mount.unmount()


def test_flags_on_request(mount: Mount) -> None:
    mount.start(options="suid,dev,noexec,noatime,ro")
    (line,) = _lines(mount.point)
    flags = set(line[5].split(",")) | set(line[-1].split(","))
    assert {"noexec", "noatime", "ro"} <= flags
    assert not {"nosuid", "nodev"} & flags
    with pytest.raises(OSError, match="Read-only"):
        (mount.point / "new").mkdir()
    mount.unmount()


def test_a_caller_that_reads_standard_error_to_its_end_returns(mount: Mount) -> None:
    command = ["sh", "-c", 'exec "$@" 2>&1 | cat', "sh", *mount.stack.command()]
    before = processes.children()
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == ""
    mount.note_daemons(before)
    streams = {os.readlink(f"/proc/{mount.pid}/fd/{descriptor}") for descriptor in range(3)}
    assert streams == {"/dev/null"}
    mount.unmount()


def test_closed_standard_streams_are_not_reused(mount: Mount) -> None:
    before = processes.children()
    subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *mount.stack.command()], timeout=30, check=True)
    mount.note_daemons(before)
    streams = {os.readlink(f"/proc/{mount.pid}/fd/{descriptor}") for descriptor in range(3)}
    assert streams == {"/dev/null"}
    (mount.point / "t").write_bytes(b"changed")
    assert (mount.stack.upper / "t").read_bytes() == b"changed"
    mount.unmount()


def test_the_daemon_has_a_session_of_its_own(mount: Mount) -> None:
    mount.start()
    assert os.getsid(mount.pid) == mount.pid
    assert os.readlink(f"/proc/{mount.pid}/cwd") == "/"
    mount.unmount()


def test_inherited_descriptors_are_closed(mount: Mount) -> None:
    """Otherwise a lock that a script holds around the mount command would last as long as the mount."""
    reading, writing = os.pipe()
    before = processes.children()
    subprocess.run(mount.stack.command(), pass_fds=[writing], timeout=30, check=True)
    mount.note_daemons(before)
    os.close(writing)
    assert os.read(reading, 1) == b""  # end of file: no process has the other end open
    os.close(reading)
    mount.unmount()


def test_children_of_the_daemon_inherit_only_the_streams(mount: Mount) -> None:
    mount.start()
    inherited = []
    for name in os.listdir(f"/proc/{mount.pid}/fdinfo"):
        text = Path(f"/proc/{mount.pid}/fdinfo/{name}").read_text()
        flags = int(re.search(r"flags:\s*(\d+)", text)[1], 8)  # type: ignore[index]
        if not flags & os.O_CLOEXEC:
            inherited.append(int(name))
    assert sorted(inherited) == [0, 1, 2]
    mount.unmount()


def test_a_mount_point_on_its_own_layer(mount: Mount) -> None:
    """The layer is opened before the mount covers it."""
    point = mount.stack.base / "low"
    mount.start(point=point)
    assert sorted(os.listdir(point)) == ["d", "t"]
    (point / "d" / "f").unlink()
    syscalls.umount(os.fsencode(point))
    assert processes.reap(mount.pids.pop()) == 0
    assert (point / "d" / "f").exists()


def _missing(stack: Stack) -> None:
    stack.point.rmdir()


def _file(stack: Stack) -> None:
    stack.point.rmdir()
    stack.point.touch()


def _inside(stack: Stack) -> None:
    stack.point = stack.upper / "d"
    stack.point.mkdir()


def _no_layer(stack: Stack) -> None:
    (stack.base / "top" / "t").unlink()
    (stack.base / "top").rmdir()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_missing, r"cannot mount on .*/m: No such file or directory"),
        (_file, r"cannot mount on .*/m: Not a directory"),
        (_inside, r".*/u/d is inside .*/u, which is part of the stack; choose a mount point outside"),
        (_no_layer, r".*/top.*"),
    ],
)
def test_a_refusal_is_one_sentence_and_leaves_nothing(
    mount: Mount, spoil: Callable[[Stack], None], sentence: str
) -> None:
    spoil(mount.stack)
    done = mount.attempt()
    assert done.returncode == 32
    assert done.stdout == ""
    assert re.fullmatch(f"overlayfs: {sentence}\n", done.stderr)
    assert _lines(mount.stack.point) == []


@pytest.mark.parametrize("descriptors", [10, 11, 12, 13, 14])
def test_a_daemon_that_dies_at_once_is_an_error(mount: Mount, descriptors: int) -> None:
    """Descriptors run out while the layers are opened, or just before or after the mount is made."""
    before = processes.children()
    done = subprocess.run(
        ["sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh", *mount.stack.command()],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    processes.reap_since(before)
    assert done.returncode == 32
    assert done.stderr.startswith("overlayfs: ")
    assert len(done.stderr.splitlines()) == 1
    assert _lines(mount.point) == []


def test_in_the_foreground_a_service_manager_is_notified(mount: Mount) -> None:
    address = str(mount.stack.base / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(20)
        process = mount.foreground(environment={"NOTIFY_SOCKET": address})
        assert manager.recv(100) == b"READY=1"
        assert (mount.point / "t").exists()
        syscalls.umount(os.fsencode(mount.point))
        assert process.ended() == (0, "")


def test_debugging_implies_the_foreground_and_logs(mount: Mount) -> None:
    process = mount.foreground("-d")
    until(lambda: os.path.exists(f"/run/overlayfs/{process.pid}.sock"))
    syscalls.umount(os.fsencode(mount.point))
    code, written = process.ended()
    assert code == 0
    assert "DEBUG" in written
    assert "Traceback" not in written
