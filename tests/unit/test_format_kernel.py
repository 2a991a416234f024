"""The kernel's overlayfs as reference: it writes the marks that we decode and follows those that we encode."""

import errno
import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from overlayfs import sysio
from overlayfs.format import metacopy, nlink, opaque, origin, redirect, whiteout, xattrs
from tests.support.disks import KINDS, disk
from tests.unit.samples import attempt

pytestmark = [pytest.mark.root, pytest.mark.kernel]

PREFIX = xattrs.prefix(xattrs.Mode.TRUSTED)
ON = "redirect_dir=on,metacopy=on,index=on"


@contextmanager
def _overlay(base: Path, point: Path, options: str = ON) -> Iterator[Path]:
    for name in ("upper", "work"):
        (base / name).mkdir(exist_ok=True)
    point.mkdir()
    stack = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", f"{stack},{options}", str(point)], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)
        point.rmdir()


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_PATH)
    try:
        yield fd
    finally:
        os.close(fd)


def _mark(path: Path, suffix: bytes) -> bytes | None:
    with _opened(path.parent) as fd:
        return sysio.find_xattr(fd, path.name.encode(), PREFIX + suffix)


def _set(path: Path, suffix: bytes, value: bytes) -> None:
    with _opened(path.parent) as fd:
        sysio.setxattr_at(fd, path.name.encode(), PREFIX + suffix, value)


def _origin_of(path: Path) -> origin.Origin:
    with _opened(path.parent) as fd:
        uuid, handle = sysio.fs_uuid(fd), sysio.file_handle(fd, path.name.encode())
    assert handle is not None
    return origin.Origin(uuid or bytes(16), *handle)


@dataclass
class Written:
    """An upper and work directory that the kernel has written."""

    lower: Path
    upper: Path
    index: Path


def _change(point: Path) -> None:
    (point / "meta").chmod(0o600)
    (point / "data").write_text("changed")
    (point / "linked").write_text("changed")
    (point / "directory").rename(point / "renamed")
    (point / "tree" / "inner").rename(point / "moved")
    (point / "gone").unlink()
    (point / "replaced" / "child").unlink()
    (point / "replaced").rmdir()
    (point / "replaced").mkdir()
    (point / "link").unlink()


def _build(lower: Path) -> None:
    for name in ("directory", "tree", "tree/inner", "replaced"):
        (lower / name).mkdir(parents=True)
    for name in ("meta", "data", "gone", "replaced/child", "linked"):
        (lower / name).write_text("lower" * 100)
    (lower / "linked2").hardlink_to(lower / "linked")
    (lower / "link").symlink_to("data")


@pytest.fixture(scope="module", params=KINDS)
def written(request: pytest.FixtureRequest, scratch: Path) -> Iterator[Written]:
    base = scratch / f"format-{request.param}"
    with disk(request.param, base) as mnt:
        root = mnt / "sub"
        if request.param == "btrfs":
            subprocess.run(["btrfs", "subvolume", "create", str(root)], check=True, capture_output=True)
        else:
            root.mkdir()
        _build(root / "lower")
        with _overlay(root, base / "kernel") as point:
            _change(point)
        yield Written(root / "lower", root / "upper", root / "work" / "index")


@pytest.mark.parametrize(
    ("upper", "lower"),
    [("meta", "meta"), ("data", "data"), ("linked", "linked"), ("renamed", "directory"), ("moved", "tree/inner")],
)
def test_origin_is_the_handle_of_the_lower_object(written: Written, upper: str, lower: str) -> None:
    value = _mark(written.upper / upper, xattrs.ORIGIN)
    expected = _origin_of(written.lower / lower)
    assert value == origin.encode(expected)
    assert origin.decode(value) == expected


@pytest.mark.parametrize("name", ["meta", "linked", "directory", "link"])
def test_a_handle_gives_the_inode_number(written: Written, name: str) -> None:
    found = origin.inode(_origin_of(written.lower / name))
    assert found is not None
    assert found[0] == (written.lower / name).lstat().st_ino
    assert (found[1] != 0) == written.lower.parent.parent.parent.name.endswith("btrfs")


def test_index_entries_are_named_by_the_handle(written: Written) -> None:
    entry = written.index / origin.index_name(_origin_of(written.lower / "linked")).decode()
    assert entry.lstat().st_ino == (written.upper / "linked").lstat().st_ino
    assert nlink.decode(_mark(entry, xattrs.NLINK) or b"") == ("U", 0)


def test_index_entries_of_directories_hold_the_handle_of_the_upper(written: Written) -> None:
    names = [origin.decode(bytes.fromhex(name)) for name in os.listdir(written.index) if not name.startswith("#")]
    assert names
    assert None not in names


def test_redirects(written: Written) -> None:
    assert redirect.parse(_mark(written.upper / "renamed", xattrs.REDIRECT) or b"") == b"directory"
    assert redirect.parse(_mark(written.upper / "moved", xattrs.REDIRECT) or b"") == b"/tree/inner"
    assert redirect.encode(b"/tree/inner") == _mark(written.upper / "moved", xattrs.REDIRECT)


def test_metacopy(written: Written) -> None:
    assert _mark(written.upper / "meta", xattrs.METACOPY) == metacopy.VALUE
    metacopy.check(metacopy.VALUE)
    assert _mark(written.upper / "data", xattrs.METACOPY) is None


@pytest.mark.parametrize("name", ["gone", "directory", "tree/inner", "link"])
def test_whiteouts(written: Written, name: str) -> None:
    status = (written.upper / name).lstat()
    assert whiteout.is_device_whiteout(status.st_mode, status.st_rdev)


def test_opaque_and_impure(written: Written) -> None:
    assert opaque.is_opaque(_mark(written.upper / "replaced", xattrs.OPAQUE))
    assert not opaque.is_opaque(_mark(written.upper / "renamed", xattrs.OPAQUE))
    assert _mark(written.upper, xattrs.IMPURE) == b"y"


def test_every_mark_of_the_kernel_is_private(written: Written) -> None:
    with _opened(written.upper) as fd:
        for name, _ in sysio.list_dir(fd):
            marks = [attr for attr in sysio.listxattr_at(fd, name) if attr.startswith(b"trusted.")]
            assert all(xattrs.is_private(attr) for attr in marks)


# --- the kernel reads what we write


@pytest.fixture
def base(place: Path) -> Iterator[Path]:
    with disk("tmpfs", place / "disk") as mnt:
        _build(mnt / "lower")
        (mnt / "upper").mkdir()
        yield mnt


def test_the_kernel_follows_our_redirects(base: Path, place: Path) -> None:
    deep = Path(*["x" * 80] * 3, "y" * 12)
    (base / "lower" / deep).mkdir(parents=True)
    (base / "lower" / deep / "found").touch()
    for name, path in {"one": b"replaced", "two": b"/tree", "far": b"/" + bytes(deep)}.items():
        (base / "upper" / name).mkdir()
        _set(base / "upper" / name, xattrs.REDIRECT, redirect.encode(path))
    with _overlay(base, place / "kernel") as point:
        assert os.listdir(point / "one") == ["child"]
        assert os.listdir(point / "two") == ["inner"]
        assert os.listdir(point / "far") == ["found"]


def test_the_kernel_follows_redirects_longer_than_it_writes(base: Path, place: Path) -> None:
    deep = Path(*["x" * 80] * 4)
    (base / "lower" / deep).mkdir(parents=True)
    (base / "lower" / deep / "found").touch()
    (base / "upper" / "far").mkdir()
    value = b"/" + bytes(deep)
    assert len(value) > redirect.MAX
    assert redirect.parse(value) == value
    _set(base / "upper" / "far", xattrs.REDIRECT, value)
    with _overlay(base, place / "kernel") as point:
        assert os.listdir(point / "far") == ["found"]


@pytest.mark.parametrize("value", [b"", b"..", b"/", b"a/b", b"/tree//inner", b"/tree/"])
def test_the_kernel_does_not_follow_what_we_refuse(base: Path, place: Path, value: bytes) -> None:
    (base / "upper" / "one").mkdir()
    _set(base / "upper" / "one", xattrs.REDIRECT, value)
    assert redirect.parse(value) is None
    with _overlay(base, place / "kernel") as point:
        assert attempt(os.listdir, point / "one") in (errno.EINVAL, errno.EACCES)


def test_the_kernel_takes_data_from_below_our_metacopy(base: Path, place: Path) -> None:
    upper = base / "upper" / "data"
    upper.touch(0o640)
    os.truncate(upper, (base / "lower" / "data").stat().st_size)
    _set(upper, xattrs.METACOPY, metacopy.VALUE)
    with _overlay(base, place / "kernel") as point:
        assert (point / "data").read_text() == "lower" * 100
        assert stat.S_IMODE((point / "data").stat().st_mode) == 0o640


@pytest.mark.parametrize("value", [b"\0", b"\0\4\0", b"\1\5\0\1d", b"\0\6\0\1d"])
def test_the_kernel_refuses_the_metacopies_that_we_refuse(base: Path, place: Path, value: bytes) -> None:
    """It checks more than the size only for files with a digest that it must verify."""
    (base / "upper" / "data").touch()
    _set(base / "upper" / "data", xattrs.METACOPY, value)
    with pytest.raises(OSError) as ours:
        metacopy.check(value)
    with _overlay(base, place / "kernel", ON + ",verity=on") as point, pytest.raises(OSError) as caught:
        (point / "data").read_bytes()
    assert caught.value.errno == ours.value.errno == errno.EIO


def test_the_kernel_reads_opaque_as_we_do(base: Path, place: Path) -> None:
    values = {"a": b"y", "b": b"yes", "c": b"x", "d": b""}
    for name, value in values.items():
        for layer in ("lower", "upper"):
            (base / layer / name).mkdir()
        (base / "lower" / name / "child").touch()
        _set(base / "upper" / name, xattrs.OPAQUE, value)
    with _overlay(base, place / "kernel") as point:
        for name, value in values.items():
            hidden = opaque.is_opaque(value)
            assert (os.listdir(point / name) == []) == hidden


def test_the_kernel_knows_whiteouts_by_their_attribute(base: Path, place: Path) -> None:
    (base / "upper" / "data").touch()
    _set(base / "upper" / "data", xattrs.WHITEOUT, b"")
    with _overlay(base, place / "kernel") as point:
        assert not (point / "data").exists()


@pytest.mark.parametrize("length", [24, 246, 247, 248, 255])
def test_the_kernel_escapes_as_we_do(base: Path, place: Path, length: int) -> None:
    name = PREFIX.ljust(length, b"n")
    stored = attempt(xattrs.stored_name, name)
    with _overlay(base, place / "kernel") as point:
        done = attempt(os.setxattr, point / "data", name, b"value")
        assert done == (stored if isinstance(stored, int) else None)
    if not isinstance(stored, int):
        assert os.getxattr(base / "upper" / "data", stored) == b"value"
        assert xattrs.shown_name(stored) == name
