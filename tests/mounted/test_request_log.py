"""Under -d each request has one line in the log, written when it is answered; without -d there is none."""

import os
import re
from collections import Counter
from pathlib import Path

from overlayfs.mount import control_client
from tests.mounted.conftest import Mount
from tests.support import syscalls
from tests.support.outcome import errno_of

_LINE = re.compile(r"overlayfs: DEBUG: ([A-Z_0-9]+) (\d+)((?: '[^']*')*): ([A-Z]+), (\d+) us\n")
_LARGE = b"x" * (8 << 20)  # its copy-up runs in a thread, and its OPEN is answered by a task


def _work(mount: Mount) -> None:
    """Requests that are answered at once, in a task and in a thread; some fail."""
    point = mount.point
    assert errno_of(os.stat, point / "absent") != 0
    (point / "made").mkdir()
    (point / "made").rename(point / "moved")
    (point / "link").symlink_to("moved")
    assert errno_of((point / "moved").rename, point / "d") != 0  # a directory that is not empty
    assert errno_of(os.getxattr, point / "t", "user.none") != 0
    with open(point / "large", "r+b", buffering=0) as file:
        file.write(b"y")
        os.fsync(file.fileno())


def _logged(mount: Mount, *flags: str) -> tuple[str, Counter[str]]:
    """Mount, work and unmount; return the log and how many requests of each kind there were before the end."""
    (mount.stack.base / "low" / "large").write_bytes(_LARGE)
    log = mount.stack.base / "log"
    with open(log, "w+") as written:
        daemon = mount.foreground(*flags, log=written)
        _work(mount)
        counted = Counter(control_client.Client.at(os.fsencode(mount.point)).stats().requests)
        syscalls.umount(os.fsencode(mount.point))
        daemon.ended()
    return log.read_text(), counted


def test_every_request_has_a_line(mount: Mount) -> None:
    written, counted = _logged(mount, "-d")
    found = [match.groups() for match in _LINE.finditer(written)]
    lines = Counter(kind for kind, *_ in found)
    late = {"FORGET", "BATCH_FORGET", "RELEASE", "RELEASEDIR", "FLUSH", "DESTROY", "INIT", "STATFS", "GETATTR"}
    assert {kind: lines[kind] for kind in counted if kind not in late} == {
        kind: count for kind, count in counted.items() if kind not in late
    }
    by_kind = {(kind, names.strip(), result) for kind, _, names, result, _ in found}
    rename = "RENAME2" if "RENAME2" in lines else "RENAME"
    assert by_kind >= {
        ("LOOKUP", "'absent'", "ENOENT"),
        ("LOOKUP", "'t'", "OK"),
        ("MKDIR", "'made'", "OK"),
        (rename, "'made' 'moved'", "OK"),
        ("SYMLINK", "'link' 'moved'", "OK"),
        ("GETXATTR", "'user.none'", "ENODATA"),
        ("OPEN", "", "OK"),
        ("FSYNC", "", "OK"),
    }
    assert any(kind.startswith("RENAME") and result == "ENOTEMPTY" for kind, _, result in by_kind)
    directory = next(int(node) for kind, node, names, *_ in found if (kind, names) == ("LOOKUP", " 'd'"))
    assert directory == 1, "the node id is that of the directory that the name is in"
    slowest = max(int(time) for kind, *_, time in found if kind == "OPEN")
    assert slowest >= 100, "the time ends before the copy-up"


def test_without_debugging_there_is_no_line(mount: Mount) -> None:
    written, _ = _logged(mount)
    assert not _LINE.search(written) and "LOOKUP" not in written


def test_names_are_shown_on_one_line(mount: Mount, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with open(log, "w+") as written:
        daemon = mount.foreground("-d", log=written)
        errno_of(os.stat, os.fsencode(mount.point) + b"/new\nline\xff")
        syscalls.umount(os.fsencode(mount.point))
        daemon.ended()
    assert r"'new\nline\udcff': ENOENT" in log.read_text()
