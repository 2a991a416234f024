"""T21: no exception of a verb ends the daemon, stops later requests of its kind, or leaves a caller without a reply."""

import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.mounted.conftest import Mount
from tests.support import engines, syscalls
from tests.support.campaign import Campaign

EXPECTED = {
    "EDQUOT": errno.EDQUOT,
    "ENOSYS": errno.EOPNOTSUPP,
    "NONE": errno.EIO,
    "MemoryError": errno.ENOMEM,
    "KeyError": errno.EIO,
    "RecursionError": errno.EIO,
}
SILENT = {"release", "forget"}  # the kernel ignores the errors of these

Act = Callable[[], object]


class Scene:
    """New objects for each attempt, named by its number, so that the kernel has cached nothing of them."""

    def __init__(self, mount: Mount) -> None:
        self.lower = mount.stack.base / "low"
        self.point = mount.point
        self.number = 0
        self.open: list[int] = []

    def fresh(self) -> "Scene":
        """Make the next set of objects, known to the kernel."""
        self.number += 1
        self.directory = self.point / f"dir{self.number}"
        self.directory.mkdir()
        self.file = self.directory / "file"
        self.file.write_bytes(b"content")
        os.setxattr(self.file, "user.a", b"b")
        os.symlink("target", self.directory / "link")
        os.lstat(self.directory / "link")
        (self.directory / "empty").mkdir()
        return self

    def lower_file(self) -> Path:
        """Return a file of a lower layer that the kernel has not looked up, in a directory that it knows."""
        return self.point / "many" / str(self.number)

    def opened(self, path: Path, flags: int) -> int:
        """Open a file that is closed at the end of the attempt."""
        self.open.append(os.open(path, flags))
        return self.open[-1]

    def close(self) -> None:
        """Close what is open."""
        while self.open:
            with suppress(OSError):
                os.close(self.open.pop())


def _closing(path: Path) -> Act:
    descriptor = os.open(path, os.O_RDONLY)
    return lambda: os.close(descriptor)


def _on_open(path: Path, flags: int, act: Callable[[int], object]) -> Callable[[Scene], Act]:
    def prepare(scene: Scene) -> Act:
        descriptor = scene.opened(scene.directory / path, flags)
        return lambda: act(descriptor)

    return prepare


def _read_lower(scene: Scene) -> Act:
    descriptor = scene.opened(scene.lower_file(), os.O_RDONLY | os.O_DIRECT)  # never answered from the page cache
    return lambda: os.read(descriptor, 10)


FILE, HERE = Path("file"), Path()

FS_IOC_GETFLAGS = 0x80086601


def _unnamed(scene: Scene) -> Act:
    return lambda: scene.opened(scene.directory, os.O_TMPFILE | os.O_RDWR)


# verb -> a function that prepares a scene and returns the system call that reaches the verb
_BOTH: dict[str, Callable[[Scene], Act]] = {
    "find": lambda scene: lambda: os.lstat(scene.directory / "absent"),
    "attributes": lambda scene: lambda: os.lstat(scene.lower_file()),
    "remember": lambda scene: lambda: os.lstat(scene.lower_file()),
    "set_attributes": lambda scene: lambda: os.chmod(scene.file, 0o600),
    "requirements.set_attributes": lambda scene: lambda: os.chmod(scene.file, 0o600),
    "readlink": lambda scene: lambda: os.readlink(scene.directory / "link"),
    "mkdir": lambda scene: lambda: os.mkdir(scene.directory / "new"),
    "mknod": lambda scene: lambda: os.mkfifo(scene.directory / "new"),
    "symlink": lambda scene: lambda: os.symlink("x", scene.directory / "new"),
    "link": lambda scene: lambda: os.link(scene.file, scene.directory / "new"),
    "unlink": lambda scene: lambda: os.unlink(scene.file),
    "requirements.unlink": lambda scene: lambda: os.unlink(scene.file),
    "rmdir": lambda scene: lambda: os.rmdir(scene.directory / "empty"),
    "move": lambda scene: lambda: os.rename(scene.file, scene.directory / "new"),
    "requirements.rename": lambda scene: lambda: os.rename(scene.file, scene.directory / "new"),
    "requirements.make": lambda scene: lambda: os.mkdir(scene.directory / "new"),
    "requirements.create": lambda scene: lambda: scene.opened(scene.directory / "new", os.O_WRONLY | os.O_CREAT),
    "create": lambda scene: lambda: scene.opened(scene.directory / "new", os.O_WRONLY | os.O_CREAT),
    "open": lambda scene: lambda: scene.opened(scene.file, os.O_RDWR),
    "requirements.open": lambda scene: lambda: scene.opened(scene.file, os.O_RDWR),
    "copy_up_all": lambda scene: lambda: os.mkdir(scene.directory / "new"),
    "write": _on_open(FILE, os.O_WRONLY, lambda descriptor: os.write(descriptor, b"x")),
    "prepare_fsync": _on_open(FILE, os.O_WRONLY, os.fsync),
    "release": lambda scene: _closing(scene.file),
    "getxattr": lambda scene: lambda: os.getxattr(scene.file, "user.a"),
    "listxattr": lambda scene: lambda: os.listxattr(scene.file),
    "setxattr": lambda scene: lambda: os.setxattr(scene.file, "user.b", b"c"),
    "removexattr": lambda scene: lambda: os.removexattr(scene.file, "user.a"),
    "statfs": lambda scene: lambda: os.statvfs(scene.directory),
    "forget": lambda scene: lambda: os.unlink(scene.file),
}
_OWN: dict[str, dict[str, Callable[[Scene], Act]]] = {
    engines.PYFUSE3: {
        "read": _read_lower,
        "open_dir": lambda scene: lambda: os.listdir(scene.directory),
        "read_dir": lambda scene: lambda: os.listdir(scene.directory),
        "prepare_fsync_dir": _on_open(HERE, os.O_RDONLY, os.fsync),
    },
    engines.KERNEL: {
        "copy_up_at_once": lambda scene: lambda: os.mkdir(scene.directory / "new"),
        "fill": _read_lower,
        "dir_offsets.read": lambda scene: lambda: os.listdir(scene.directory),
        "prepare_fsync_dir": _on_open(HERE, os.O_RDONLY, os.fsync),
        "writable": lambda scene: lambda: scene.opened(scene.file, os.O_RDWR),
        "masked": lambda scene: lambda: os.mkdir(scene.directory / "new"),
        "create_unnamed": _unnamed,
        "seek": _on_open(FILE, os.O_RDONLY, lambda descriptor: os.lseek(descriptor, 0, os.SEEK_DATA)),
        "allocate": _on_open(
            FILE, os.O_RDWR, lambda descriptor: syscalls.fallocate(descriptor, syscalls.KEEP_SIZE, 0, 10)
        ),
        "read_flags": _on_open(
            FILE, os.O_RDONLY, lambda descriptor: fcntl.ioctl(descriptor, FS_IOC_GETFLAGS, bytearray(8))
        ),
    },
}
CALLS = _BOTH | _OWN[engines.current()]
ABSENT = {"find"}  # without a fault the result is ENOENT


def _outcome(act: Act) -> int:
    try:
        act()
    except OSError as error:
        return error.errno or 0
    return 0


@pytest.mark.campaign("T21")
def test_every_verb_may_fail_in_every_way(campaign: Campaign, mount: Mount) -> None:
    (mount.stack.base / "low" / "many").mkdir()
    for number in range(2 * len(CALLS) * len(EXPECTED) + 1):
        (mount.stack.base / "low" / "many" / str(number)).write_bytes(b"lower")
    fault = mount.stack.base / "fault"
    with open(mount.stack.base / "log", "w+") as log:
        daemon = mount.faulty(fault, log)
        wrong = _try_all(mount, fault)
        campaign.held(f"verbs that raise, engine {engines.current()}", len(CALLS) * len(EXPECTED), wrong)
        syscalls.umount(os.fsencode(mount.point))
        assert daemon.ended()[0] == 0
        log.seek(0)
        written = log.read()
    assert written.count("failed by a defect") >= 3 * (len(CALLS) - 3)
    assert "EDQUOT" not in written


def _try_all(mount: Mount, fault: Path) -> list[str]:
    scene = Scene(mount)
    wrong = []
    os.stat(mount.point / "many")
    for verb, prepare in CALLS.items():
        for error, code in EXPECTED.items():
            act = prepare(scene.fresh())
            fault.write_text(f"{verb} {error}")
            found = _outcome(act)
            fault.unlink()
            if found != (0 if verb in SILENT else code):
                wrong.append(f"{verb} with {error}: {errno.errorcode.get(found, 'success')}")
            again = _outcome(prepare(scene.fresh()))  # the kernel must still ask
            if again != (errno.ENOENT if verb in ABSENT else 0):
                wrong.append(f"{verb} after {error}: {errno.errorcode.get(again, '')}")
            scene.close()
    return wrong
