"""Round trips: how many requests fixed pieces of work take. Counts are exact where times are not."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from overlayfs.mount import control_client
from tests.mounted.conftest import Mount
from tests.support import engines

# No caller waits for these, so they may come later.
_LATE = {"FORGET", "RELEASE", "RELEASEDIR"}


def _requests(mount: Mount) -> Counter[str]:
    found = Counter(control_client.Client.at(os.fsencode(mount.point)).stats().requests)
    return Counter({kind: count for kind, count in found.items() if kind not in _LATE})


@contextmanager
def _cost(mount: Mount, **expected: int) -> Iterator[None]:
    before = _requests(mount)
    yield
    assert _requests(mount) - before == Counter(expected)


@pytest.fixture
def point(mount: Mount) -> Path:
    """A mount with ten files, a link and a directory below one directory, all in the lower layer."""
    here = mount.stack.base / "low" / "tree"
    (here / "sub").mkdir(parents=True)
    for number in range(10):
        (here / f"f{number}").write_bytes(b"content")
    (here / "link").symlink_to("f0")
    return mount.point


def _walk(path: Path) -> int:
    found = list(os.scandir(path))
    below = [entry for entry in found if entry.is_dir(follow_symlinks=False)]
    return len(found) + sum(_walk(Path(entry)) for entry in below)


def test_names_and_attributes_are_requested_once(mount: Mount, point: Path) -> None:
    mount.start()
    os.stat(point / "tree")
    with _cost(mount, LOOKUP=10):
        for number in range(10):
            os.stat(point / "tree" / f"f{number}")
    with _cost(mount):
        for number in range(10):
            os.stat(point / "tree" / f"f{number}")
    mount.unmount()


def test_absences_are_cached_until_the_name_is_created(mount: Mount, point: Path) -> None:
    mount.start()
    os.stat(point / "tree")
    with _cost(mount, LOOKUP=1):
        for _ in range(5):
            assert not (point / "tree" / "absent").exists()
    with _cost(mount, LOOKUP=1, MKDIR=1):  # a new name is looked up once more
        (point / "tree" / "absent").mkdir()
    assert (point / "tree" / "absent").is_dir()
    mount.unmount()


def test_a_listing_brings_the_attributes(mount: Mount, point: Path) -> None:
    mount.start()
    os.stat(point / "tree")
    opened = 2 if engines.current() == engines.PYFUSE3 else 1  # the kernel engine declines once, for good
    with _cost(mount, OPENDIR=opened, READDIRPLUS=4):
        assert _walk(point / "tree") == 12
        for name in ("f0", "f5", "link"):
            os.lstat(point / "tree" / name)
    mount.unmount()


def test_pages_stay_cached(mount: Mount, point: Path) -> None:
    mount.start()
    path = point / "tree" / "f0"
    os.stat(path)
    # The kernel engine stores the content at the open; it declines FLUSH once, libfuse does so for pyfuse3.
    first = {"READ": 1} if engines.current() == engines.PYFUSE3 else {"FLUSH": 1}
    with _cost(mount, OPEN=1, **first):
        _read(path)
    with _cost(mount, OPEN=5):
        for _ in range(5):
            _read(path)
    mount.unmount()


def _read(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    assert os.pread(file, 100, 0) == b"content"
    os.close(file)


def _make(path: Path) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(file, b"x" * 100_000)
    os.close(file)


def test_a_new_file(mount: Mount, point: Path) -> None:
    """The GETXATTR asks for capabilities before a write; a close sends nothing after the first one."""
    mount.start()
    _make(point / "tree" / "first")
    written = {"WRITE": 1} if engines.current() == engines.PYFUSE3 else {}  # kernel: in passthrough
    with _cost(mount, LOOKUP=1, GETATTR=1, CREATE=1, GETXATTR=1, **written):
        _make(point / "tree" / "second")
    mount.unmount()


def test_a_timeout_lets_the_kernel_ask_again(mount: Mount, point: Path) -> None:
    mount.start(options="timeout=0")

    def asks(act: Callable[[], object], kind: str) -> None:
        act()
        before = _requests(mount)
        act()
        assert (_requests(mount) - before)[kind] >= 1

    asks(lambda: os.stat(point / "tree" / "f0"), "LOOKUP")
    asks((point / "tree" / "absent").exists, "LOOKUP")
    asks(lambda: _read(point / "tree" / "f0"), "READ")
    mount.unmount()
