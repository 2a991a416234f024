"""System calls: the effect of each, without following a link, without leaving its directory."""

import errno
import inspect
import os
import socket
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overlayfs import sysio
from overlayfs.sysio import attributes, data, filesystems, xattrs
from tests.support.disks import disk
from tests.unit.samples import attempt

root = pytest.mark.root
PATH = os.O_PATH | os.O_NOFOLLOW
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_NOATIME_FL = 0x80


@pytest.fixture
def here(place: Path) -> Iterator[int]:
    """The test's directory, opened with O_PATH as in a layer; checks that every descriptor is closed."""
    fd = os.open(place, os.O_PATH | os.O_DIRECTORY)
    before = set(os.listdir("/proc/self/fd"))
    yield fd
    assert set(os.listdir("/proc/self/fd")) == before
    os.close(fd)


def _write(place: Path, name: str, text: str = "text") -> bytes:
    (place / name).write_text(text)
    return name.encode()


@pytest.fixture
def trap(place: Path) -> bytes:
    """A link to a file outside, which nothing may touch."""
    (place / "outside").mkdir()
    _write(place / "outside", "secret", "secret")
    (place / "outside" / "secret").chmod(0o640)
    (place / "link").symlink_to("outside/secret")
    return b"link"


class _Open:
    """Closes a descriptor at the end of the block."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *_: object) -> None:
        sysio.close(self.fd)


# --- opening


def test_open_beneath_walks_many_components(place: Path, here: int) -> None:
    (place / "a" / "b").mkdir(parents=True)
    _write(place / "a" / "b", "c", "deep")
    with _Open(sysio.open_beneath(here, b"a/b/c", os.O_RDONLY)) as fd:
        assert os.read(fd, 9) == b"deep"
        assert not os.get_inheritable(fd)
    with _Open(sysio.open_beneath(here, b"", os.O_RDONLY | os.O_DIRECTORY)) as fd:
        assert os.path.sameopenfile(fd, here)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_PATH])
@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (b"up/outside/secret", errno.ELOOP),
        (b"link", errno.ELOOP),
        (b"../x", errno.EXDEV),
        (b"..", errno.EXDEV),
        (b"/etc/passwd", errno.EXDEV),
        (b"absent", errno.ENOENT),
        (b"outside/secret/x", errno.ENOTDIR),
        (b"x" * 256, errno.ENAMETOOLONG),
        (b"y" * 5000, errno.ENAMETOOLONG),
        (b"outside\0x", errno.EINVAL),
    ],
)
def test_open_beneath_never_leaves(place: Path, here: int, trap: bytes, path: bytes, expected: int, flags: int) -> None:
    (place / "up").symlink_to(".")
    with pytest.raises(OSError) as caught:
        sysio.open_beneath(here, path, flags)
    assert caught.value.errno == expected
    assert caught.value.filename is None or path.endswith(caught.value.filename)


def test_open_beneath_refuses_magic_links() -> None:
    with _Open(os.open("/proc/self", os.O_PATH)) as proc, pytest.raises(OSError) as caught:
        sysio.open_beneath(proc, b"root/etc", os.O_PATH)
    assert caught.value.errno == errno.ELOOP


@root
def test_mount_points_are_not_crossed(place: Path, here: int) -> None:
    with disk("tmpfs", place / "disk"):
        for path in (b"disk/mnt", b"disk/mnt/x"):
            with pytest.raises(OSError) as caught:
                sysio.open_beneath(here, path, os.O_PATH)
            assert caught.value.errno == errno.EXDEV
        with _Open(sysio.open_child(here, b"disk", PATH)) as fd, pytest.raises(OSError) as caught:
            sysio.open_child(fd, b"mnt", PATH)
        assert caught.value.errno == errno.EXDEV


@pytest.mark.parametrize("width", [1, 40, 200, 255])
def test_paths_of_any_length(place: Path, here: int, width: int) -> None:
    name = b"d" * width
    depth = 9000 // (width + 1)
    fd = sysio.open_beneath(here, b"", os.O_PATH)
    for _ in range(depth):
        sysio.mkdir_at(fd, name, 0o755)
        child = sysio.open_child(fd, name, PATH)
        sysio.close(fd)
        fd = child
    path = b"/".join([name] * depth)
    with _Open(fd), _Open(sysio.open_beneath(here, path, os.O_PATH)) as found:
        assert os.path.sameopenfile(found, fd)
    with pytest.raises(FileNotFoundError):
        sysio.open_beneath(here, path + b"/absent/absent", os.O_PATH)
    subprocess.run(["rm", "-rf", place / os.fsdecode(name)], check=True)  # shutil.rmtree recurses too deep


def test_open_child(place: Path, here: int, trap: bytes) -> None:
    _write(place, "file")
    with _Open(sysio.open_child(here, b"new", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o604)) as fd:
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o604
        assert not os.get_inheritable(fd)
    with _Open(sysio.open_child(here, trap, PATH)) as fd:
        assert stat.S_ISLNK(os.fstat(fd).st_mode)
    assert attempt(sysio.open_child, here, trap, os.O_RDONLY) == errno.ELOOP
    assert attempt(sysio.open_child, here, b"new", os.O_CREAT | os.O_EXCL, 0o600) == errno.EEXIST


def test_open_child_opens_the_descriptor_anew(place: Path, here: int, trap: bytes) -> None:
    _write(place, "file", "again")
    with _Open(sysio.open_child(here, b"file", PATH)) as pinned:
        os.unlink(place / "file")
        with _Open(sysio.open_child(pinned, b"", os.O_RDONLY | os.O_NOFOLLOW)) as fd:
            assert os.read(fd, 9) == b"again"
    with _Open(sysio.open_child(here, trap, PATH)) as pinned:
        assert attempt(sysio.open_child, pinned, b"", os.O_RDONLY) == errno.ELOOP


@pytest.mark.parametrize("name", [b"outside/secret", b"..", b"out\0side", b"/"])
def test_a_name_is_one_component(here: int, trap: bytes, name: bytes) -> None:
    calls: list[Callable[[], object]] = [
        lambda: sysio.open_child(here, name, PATH),
        lambda: sysio.stat_at(here, name),
        lambda: sysio.find_xattr(here, name, b"user.x"),
        lambda: sysio.getxattr_at(here, name, b"user.x"),
        lambda: sysio.file_handle(here, name),
        lambda: sysio.readlink_at(here, name),
        *(lambda call=call: call(here, name) for call in CHANGING_BY_NAME.values()),
    ]  # fmt: skip
    assert {attempt(call) for call in calls} == {errno.EINVAL}


# --- looking


def test_list_dir_tells_types(place: Path, here: int, trap: bytes) -> None:
    _write(place, "file")
    os.mkfifo(place / "fifo")
    with socket.socket(socket.AF_UNIX) as endpoint:
        endpoint.bind(str(place / "socket"))
    kinds = dict(sysio.list_dir(here))
    assert sorted(kinds) == sorted(os.listdir(os.fsencode(place)))
    for name, kind in kinds.items():
        assert kind in (0, stat.S_IFMT(sysio.stat_at(here, name).st_mode))


def test_list_dir_of_many_strange_names(place: Path, here: int) -> None:
    names = {b"%d" % number for number in range(3000)} | {bytes([byte]) * 255 for byte in range(128, 256)} | {b"..."}
    for name in names:
        sysio.mknod_at(here, name, stat.S_IFREG | 0o600, 0)
    listed = [name for name, _ in sysio.list_dir(here)]
    assert len(listed) == len(names)
    assert set(listed) == names
    assert sysio.list_dir(here) == sysio.list_dir(here)


def test_list_dir_of_a_file(place: Path, here: int) -> None:
    with _Open(sysio.open_child(here, _write(place, "file"), PATH)) as fd:
        assert attempt(sysio.list_dir, fd) == errno.ENOTDIR


def test_list_dir_of_a_removed_directory(here: int) -> None:
    sysio.mkdir_at(here, b"d", 0o755)
    with _Open(sysio.open_child(here, b"d", PATH)) as fd:
        sysio.rmdir_at(here, b"d")
        assert attempt(sysio.list_dir, fd) in ([], errno.ENOENT)


def test_stat_and_readlink_do_not_follow(place: Path, here: int, trap: bytes) -> None:
    assert stat.S_ISLNK(sysio.stat_at(here, trap).st_mode)
    assert sysio.readlink_at(here, trap) == b"outside/secret"
    with _Open(sysio.open_child(here, trap, PATH)) as fd:
        assert stat.S_ISLNK(sysio.stat_at(fd, b"").st_mode)
        assert sysio.readlink_at(fd, b"") == b"outside/secret"
    assert sysio.stat_at(here, b"").st_ino == place.stat().st_ino
    assert attempt(sysio.stat_at, here, b"absent") == errno.ENOENT


def test_exists_is_of_the_link_itself(place: Path, here: int) -> None:
    (place / "dangling").symlink_to("nowhere")
    assert sysio.exists_at(here, b"dangling")
    assert not sysio.exists_at(here, b"absent")
    assert attempt(sysio.exists_at, here, b"a" * 256) == errno.ENAMETOOLONG


# --- names


def test_links(place: Path, here: int, trap: bytes) -> None:
    sysio.link_at(here, _write(place, "file"), here, b"second")
    assert (place / "file").samefile(place / "second")
    sysio.link_at(here, trap, here, b"link2")
    assert (place / "link2").is_symlink()
    with _Open(sysio.open_child(here, b"file", PATH)) as fd:
        sysio.link_at(fd, b"", here, b"third")
    assert (place / "third").stat().st_nlink == 3
    with _Open(sysio.open_child(here, trap, PATH)) as fd:
        sysio.link_at(fd, b"", here, b"link3")
    assert (place / "link3").is_symlink()


def test_an_unnamed_file_gets_a_name(place: Path, here: int) -> None:
    with _Open(sysio.open_child(here, b"", os.O_TMPFILE | os.O_RDWR, 0o600)) as fd:
        sysio.write_at(fd, 0, b"unnamed")
        sysio.link_at(fd, b"", here, b"named")
    assert (place / "named").read_bytes() == b"unnamed"


def test_rename_flags(place: Path, here: int) -> None:
    a, b = _write(place, "a", "A"), _write(place, "b", "B")
    assert attempt(sysio.rename_at, here, a, here, b, sysio.RENAME_NOREPLACE) == errno.EEXIST
    sysio.rename_at(here, a, here, b, sysio.RENAME_EXCHANGE)
    assert (place / "a").read_text() == "B"
    sysio.rename_at(here, a, here, b)
    assert os.listdir(place) == ["b"]
    assert (place / "b").read_text() == "B"


@root
def test_rename_leaves_a_whiteout(place: Path, here: int) -> None:
    sysio.rename_at(here, _write(place, "a"), here, b"b", sysio.RENAME_WHITEOUT)
    status = (place / "a").stat()
    assert stat.S_ISCHR(status.st_mode)
    assert status.st_rdev == 0


def test_every_kind_is_made_and_removed(place: Path, here: int) -> None:
    sysio.mkdir_at(here, b"d", 0o700)
    sysio.mknod_at(here, b"f", stat.S_IFREG | 0o600, 0)
    sysio.mknod_at(here, b"p", stat.S_IFIFO | 0o600, 0)
    sysio.mknod_at(here, b"w", stat.S_IFCHR, 0)
    sysio.symlink_at(b"\xff/absent", here, b"l")
    assert os.readlink(os.fsencode(place / "l")) == b"\xff/absent"
    assert stat.S_ISFIFO((place / "p").stat().st_mode)
    for name in (b"f", b"p", b"w", b"l"):
        sysio.unlink_at(here, name)
    assert attempt(sysio.unlink_at, here, b"d") == errno.EISDIR
    sysio.rmdir_at(here, b"d")
    assert os.listdir(place) == []


# --- attributes


@pytest.fixture(params=["system call", "older kernel"])
def chmod_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "older kernel":
        monkeypatch.setattr(attributes, "_NR_FCHMODAT2", 99999)


@pytest.mark.usefixtures("chmod_way")
def test_chmod_never_follows(place: Path, here: int, trap: bytes) -> None:
    assert attempt(sysio.chmod_at, here, trap, 0o777) == errno.EOPNOTSUPP
    with _Open(sysio.open_child(here, trap, PATH)) as fd:
        assert attempt(sysio.chmod_at, fd, b"", 0o777) == errno.EOPNOTSUPP
    assert stat.S_IMODE((place / "outside" / "secret").stat().st_mode) == 0o640


@pytest.mark.usefixtures("chmod_way")
def test_chmod(place: Path, here: int) -> None:
    name = _write(place, "file")
    sysio.chmod_at(here, name, 0o4711)
    assert stat.S_IMODE((place / "file").stat().st_mode) == 0o4711
    with _Open(sysio.open_child(here, name, PATH)) as fd:
        sysio.chmod_at(fd, b"", 0o604)
    assert stat.S_IMODE((place / "file").stat().st_mode) == 0o604
    assert attempt(sysio.chmod_at, here, b"absent", 0o600) == errno.ENOENT


@root
def test_chown_never_follows(place: Path, here: int, trap: bytes) -> None:
    sysio.chown_at(here, trap, 7, -1)
    with _Open(sysio.open_child(here, trap, PATH)) as fd:
        sysio.chown_at(fd, b"", -1, 8)
    status = (place / "link").lstat()
    assert (status.st_uid, status.st_gid) == (7, 8)
    assert (place / "outside" / "secret").stat().st_uid == os.getuid()


@pytest.mark.parametrize("pinned", [False, True])
def test_times_in_nanoseconds(place: Path, here: int, trap: bytes, pinned: bool) -> None:
    with _Open(sysio.open_child(here, trap, PATH)) as fd:
        where = (fd, b"") if pinned else (here, trap)
        sysio.utimens_at(*where, 1_000_000_001, 2_999_999_999)
        sysio.utimens_at(*where, None, 3_000_000_003)
        status = (place / "link").lstat()
        assert (status.st_atime_ns, status.st_mtime_ns) == (1_000_000_001, 3_000_000_003)
        sysio.utimens_at(*where, -1, None)
        assert (place / "link").lstat().st_atime_ns == -1
    assert (place / "outside" / "secret").stat().st_mtime > 1000


# --- extended attributes


@pytest.fixture(params=["system call", "older kernel"])
def xattr_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "older kernel":
        monkeypatch.setattr(xattrs, "_HAS_GETXATTRAT", False)


@pytest.mark.usefixtures("xattr_way")
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize("value", [b"", b"v", b"\0\xff" * 100, b"w" * 256, b"x" * 257, b"y" * 3000])
def test_xattrs(place: Path, here: int, kind: str, pinned: bool, value: bytes) -> None:
    _write(place, "file")
    (place / "directory").mkdir()
    name = kind.encode()
    with _Open(sysio.open_child(here, name, PATH)) as fd:
        where = (fd, b"") if pinned else (here, name)
        assert sysio.find_xattr(*where, b"user.a") is None
        assert attempt(sysio.getxattr_at, *where, b"user.a") == errno.ENODATA
        sysio.setxattr_at(*where, b"user.a", value)
        assert sysio.find_xattr(*where, b"user.a") == sysio.getxattr_at(*where, b"user.a") == value
        assert b"user.a" in sysio.listxattr_at(*where)
        assert attempt(sysio.setxattr_at, *where, b"user.a", b"", os.XATTR_CREATE) == errno.EEXIST
        sysio.removexattr_at(*where, b"user.a")
        assert attempt(sysio.removexattr_at, *where, b"user.a") == errno.ENODATA
        assert sysio.find_xattr(*where, b"user.a") is None


@root
@pytest.mark.usefixtures("xattr_way")
def test_xattrs_of_a_link_are_its_own(place: Path, here: int, trap: bytes) -> None:
    with _Open(sysio.open_child(here, trap, PATH)) as fd:
        sysio.setxattr_at(here, trap, b"trusted.a", b"1")
        sysio.setxattr_at(fd, b"", b"trusted.b", b"2")
        for where in ((here, trap), (fd, b"")):
            assert [sysio.find_xattr(*where, attr) for attr in (b"trusted.a", b"trusted.b")] == [b"1", b"2"]
            assert {b"trusted.a", b"trusted.b"} <= set(sysio.listxattr_at(*where))
    assert b"trusted.a" not in [os.fsencode(attr) for attr in os.listxattr(place / "outside" / "secret")]


@pytest.mark.usefixtures("xattr_way")
def test_missing_objects_are_no_missing_attributes(here: int) -> None:
    for call in (sysio.find_xattr, sysio.getxattr_at):
        assert attempt(call, here, b"absent", b"user.a") == errno.ENOENT
    assert attempt(sysio.listxattr_at, here, b"absent") == errno.ENOENT


@pytest.mark.usefixtures("xattr_way")
def test_a_file_system_without_xattrs() -> None:
    with _Open(os.open("/proc", os.O_PATH)) as fd:
        assert attempt(sysio.getxattr_at, fd, b"version", b"user.a") == errno.EOPNOTSUPP
        assert sysio.find_xattr(fd, b"version", b"user.a") is None
        assert sysio.listxattr_at(fd, b"version") == []


# --- data

KILO = 4096


def _with_data(path: Path, extents: list[tuple[int, int]], size: int) -> None:
    with open(path, "wb") as file:
        for at, length in extents:
            file.seek(at * KILO)
            file.write(os.urandom(length))
        file.truncate(size)


def _data_blocks(path: Path) -> int:
    return path.stat().st_blocks


@pytest.fixture(params=["copy_file_range", "none", "refused", "silent"])
def copy_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise OSError(errno.EXDEV, "cross-device")

    def silent(*_: object) -> int:
        return 0

    if request.param == "none":
        monkeypatch.setattr(data, "next_data", lambda fd, offset: (offset, os.fstat(fd).st_size))
    elif request.param != "copy_file_range":
        monkeypatch.setattr(os, "copy_file_range", refused if request.param == "refused" else silent)


@pytest.mark.usefixtures("copy_way")
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 3 * KILO)), max_size=4),
    st.integers(0, 300 * KILO),
)
def test_copies_are_equal(place: Path, extents: list[tuple[int, int]], size: int) -> None:
    source, target = place / "source", place / "target"
    _with_data(source, extents, size)
    with open(source, "rb") as reading, open(target, "wb") as writing:
        copied = sysio.copy_data(reading.fileno(), writing.fileno(), size)
    assert source.read_bytes() == target.read_bytes()
    assert copied <= size


@pytest.mark.parametrize("refused", [False, True])
def test_copies_keep_holes(place: Path, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = place / "source", place / "target"
    _with_data(source, [(0, 100), (5000, 100)], 1 << 30)
    if refused:
        monkeypatch.setattr(data, "_CANNOT_COPY_RANGE", (errno.EBADF,))
        monkeypatch.setattr(os, "copy_file_range", lambda *_: (_ for _ in ()).throw(OSError(errno.EBADF, "bad")))
    with open(source, "rb") as reading, open(target, "wb") as writing:
        copied = sysio.copy_data(reading.fileno(), writing.fileno(), 1 << 30)
    assert target.stat().st_size == 1 << 30
    assert copied < 1 << 20
    assert _data_blocks(target) <= _data_blocks(source) + 8


def test_a_shrunken_source_ends_in_a_hole(place: Path) -> None:
    source, target = place / "source", place / "target"
    source.write_bytes(b"x" * 5000)
    with open(source, "rb") as reading, open(target, "wb") as writing:
        assert sysio.copy_data(reading.fileno(), writing.fileno(), 9000) == 5000
    assert target.read_bytes() == b"x" * 5000 + bytes(4000)


@root
def test_an_error_while_copying_is_raised(place: Path) -> None:
    (place / "source").write_bytes(b"x" * (4 << 20))
    with disk("tmpfs", place / "disk", size=1 << 20) as mnt:
        with open(place / "source", "rb") as reading, open(mnt / "target", "wb") as writing:
            result = attempt(sysio.copy_data, reading.fileno(), writing.fileno(), 4 << 20)
        assert result == errno.ENOSPC


@root
@pytest.mark.parametrize(("kind", "expected"), [("btrfs", True), ("xfs", True), ("ext4", False), ("tmpfs", False)])
def test_clone(place: Path, kind: str, expected: bool) -> None:
    with disk(kind, place / "disk") as mnt:
        (mnt / "source").write_bytes(b"data" * 5000)
        with open(mnt / "source", "rb") as reading, open(mnt / "target", "wb") as writing:
            assert sysio.clone_file(reading.fileno(), writing.fileno()) is expected
        assert (mnt / "target").read_bytes() == (b"data" * 5000 if expected else b"")


def test_read_and_write_at(place: Path, here: int) -> None:
    with _Open(sysio.open_child(here, b"file", os.O_CREAT | os.O_RDWR, 0o600)) as fd:
        assert sysio.write_at(fd, 3, memoryview(b"abcdef")) == 6
        for nowait in (False, True):
            assert sysio.read_at(fd, 0, 100, nowait) == b"\0\0\0abcdef"
            assert sysio.read_at(fd, 4, 2, nowait) == b"bc"
            assert sysio.read_at(fd, 9, 2, nowait) == b""
        sysio.truncate_fd(fd, 4)
        for sync in (sysio.fsync, sysio.fdatasync, sysio.syncfs):
            sync(fd)
        assert sysio.read_at(fd, 0, 9) == b"\0\0\0a"


def test_short_reads_and_writes_go_on(place: Path, here: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pread, pwrite = os.pread, os.pwrite
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 3), offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:4], offset))
    with _Open(sysio.open_child(here, b"file", os.O_CREAT | os.O_RDWR, 0o600)) as fd:
        assert sysio.write_at(fd, 0, b"0123456789") == 10
        assert sysio.read_at(fd, 0, 10) == b"0123456789"
        assert sysio.read_at(fd, 5, 100) == b"56789"


def test_an_error_behind_a_short_read_is_raised(place: Path, here: int, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[bytes | OSError] = [b"good", OSError(errno.EIO, "bad sector")]

    def pread(_fd: int, _size: int, _offset: int) -> bytes:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(os, "pread", pread)
    assert attempt(sysio.read_at, here, 0, 100) == errno.EIO


@root
def test_nowait_does_not_read_from_disk(place: Path) -> None:
    with disk("ext4", place / "disk") as mnt:
        (mnt / "file").write_bytes(b"x" * 100_000)
        with _Open(os.open(mnt / "file", os.O_RDONLY)) as fd:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            with pytest.raises(BlockingIOError):
                sysio.read_at(fd, 0, 100_000, nowait=True)
            assert sysio.read_at(fd, 0, 100_000) == b"x" * 100_000
            assert sysio.read_at(fd, 0, 100_000, nowait=True) == b"x" * 100_000


def test_nowait_unknown_to_the_file_system_is_a_plain_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(errno.EOPNOTSUPP, "unknown flag")
        return known(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    _write(place, "file", "plain")
    with _Open(os.open(place / "file", os.O_RDONLY)) as fd:
        assert sysio.read_at(fd, 0, 100, nowait=True) == b"plain"


def test_a_buffer_is_filled_with_what_is_there(place: Path) -> None:
    _write(place, "file", "plain")
    buffer = memoryview(bytearray(b"." * 8))
    with _Open(os.open(place / "file", os.O_RDONLY)) as fd:
        assert sysio.fill_at(fd, 1, buffer) == 4
        assert sysio.fill_at(fd, 5, buffer[4:]) == 0
    assert bytes(buffer) == b"lain...."


# --- identity


def test_handles(place: Path, here: int, trap: bytes) -> None:
    _write(place, "file")
    by_name = sysio.file_handle(here, b"file")
    with _Open(sysio.open_child(here, b"file", PATH)) as fd:
        assert sysio.file_handle(fd, b"") == by_name
    assert sysio.file_handle(here, trap) != by_name
    assert attempt(sysio.file_handle, here, b"absent") == errno.ENOENT


@root
def test_a_handle_opens_its_object(place: Path, here: int, trap: bytes) -> None:
    for name in (_write(place, "file"), b"outside", trap):
        handle = sysio.file_handle(here, name)
        assert handle is not None
        found = sysio.open_by_handle(here, *handle)
        assert found is not None
        with _Open(found):
            assert sysio.stat_at(found, b"").st_ino == sysio.stat_at(here, name).st_ino
    handle = sysio.file_handle(here, b"file")
    assert handle is not None
    sysio.unlink_at(here, b"file")
    assert sysio.open_by_handle(here, *handle) is None
    assert sysio.open_by_handle(here, handle[0], b"") is None


@root
def test_a_cloned_mount_shows_the_directory_without_its_mounts(place: Path, here: int) -> None:
    _write(place, "file")
    with disk("tmpfs", place / "disk") as mnt:
        (mnt / "inside").touch()
        clone = sysio.clone_mount(here)
        assert clone is not None
        with _Open(clone), _Open(sysio.open_beneath(clone, b"disk/mnt", os.O_PATH)) as covered:
            assert sysio.stat_at(clone, b"").st_ino == sysio.stat_at(here, b"").st_ino
            assert not os.get_inheritable(clone)
            assert sysio.list_dir(covered) == []
            assert attempt(sysio.link_at, clone, b"file", here, b"other") == errno.EXDEV


def test_no_handles_in_proc() -> None:
    with _Open(os.open("/proc", os.O_PATH)) as fd:
        assert sysio.file_handle(fd, b"self") is None
        assert sysio.fs_uuid(fd) is None


@root
@pytest.mark.parametrize(
    ("kind", "magic", "own_query"),
    [("ext4", 0xEF53, 1), ("xfs", 0x58465342, 2), ("btrfs", 0x9123683E, 3), ("tmpfs", 0x01021994, None)],
)
def test_identity_of_file_systems(place: Path, kind: str, magic: int, own_query: int | None) -> None:
    with disk(kind, place / "one") as one, disk(kind, place / "two") as two:
        (one / "sub").mkdir()
        with _Open(os.open(one, os.O_PATH)) as a, _Open(os.open(one / "sub", os.O_RDONLY)) as b:
            assert sysio.fs_type(a) == magic
            assert sysio.fs_id(a) == sysio.fs_id(b) != 0
            uuid = sysio.fs_uuid(a)
            assert uuid == sysio.fs_uuid(b)
            assert sysio.statvfs_fd(a).f_namemax == 255
            if own_query is not None:
                assert filesystems._uuid_by(b, *filesystems._UUID_QUERIES[own_query]) == uuid
        with _Open(os.open(two, os.O_PATH)) as other:
            assert sysio.fs_uuid(other) != uuid
            assert sysio.fs_id(other) != 0


def test_locks(place: Path) -> None:
    with _Open(os.open(place, os.O_RDONLY)) as second:
        with _Open(os.open(place, os.O_RDONLY)) as first:
            assert sysio.try_lock(first)
            assert sysio.try_lock(first)
            assert not sysio.try_lock(second)
        assert sysio.try_lock(second)


# --- space and flags


@pytest.fixture
def opened(place: Path) -> Iterator[int]:
    """A file of four blocks, open for reading and writing."""
    (place / "data").write_bytes(b"x" * 16384)
    with _Open(os.open(place / "data", os.O_RDWR)) as fd:
        yield fd


def test_a_hole_is_punched_and_found(opened: int) -> None:
    sysio.fallocate(opened, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, 4096, 4096)
    assert os.pread(opened, 16384, 0) == b"x" * 4096 + bytes(4096) + b"x" * 8192
    assert sysio.seek_data(opened, 0, os.SEEK_HOLE) == 4096
    assert sysio.seek_data(opened, 4096, os.SEEK_DATA) == 8192
    assert attempt(lambda: sysio.seek_data(opened, 16384, os.SEEK_DATA)) == errno.ENXIO


def test_data_is_found_piece_by_piece(opened: int) -> None:
    sysio.fallocate(opened, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, 4096, 4096)
    os.ftruncate(opened, 20000)
    assert [sysio.next_data(opened, at) for at in (0, 4096, 8200)] == [(0, 4096), (8192, 16384), (8200, 16384)]
    assert [sysio.next_data(opened, at) for at in (16384, 20000, 30000)] == [(20000, 20000)] * 3


def test_where_holes_are_unknown_all_is_data(opened: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def lseek(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "lseek", lseek)
    assert sysio.next_data(opened, 4096) == (4096, 16384)


def test_what_cannot_be_allocated_is_an_error(opened: int) -> None:
    assert attempt(lambda: sysio.fallocate(opened, 0, 0, 0)) == errno.EINVAL


def test_a_range_is_copied_within_a_file_system_and_across(opened: int, place: Path) -> None:
    with _Open(os.open(place / "target", os.O_RDWR | os.O_CREAT)) as near, _Open(os.memfd_create("far")) as far:
        for target in (near, far):
            assert sysio.copy_range(opened, 10, target, 5, 100) == 100
            assert os.pread(target, 200, 0) == bytes(5) + b"x" * 100
    assert sysio.copy_range(opened, 99999, opened, 0, 10) == 0


def test_the_birth_of_a_file_is_not_after_its_change(opened: int, here: int) -> None:
    born = sysio.birth_time(here, b"data")
    assert born is None or 0 < born <= os.fstat(opened).st_ctime_ns
    assert attempt(lambda: sysio.birth_time(here, b"missing")) == errno.ENOENT


def test_the_flags_of_a_file(opened: int) -> None:
    before = struct.unpack("I", sysio.get_file_attributes(opened, FS_IOC_GETFLAGS, 4))[0]
    sysio.set_file_attributes(opened, FS_IOC_SETFLAGS, struct.pack("I", before | FS_NOATIME_FL))
    assert struct.unpack("I", sysio.get_file_attributes(opened, FS_IOC_GETFLAGS, 4))[0] == before | FS_NOATIME_FL


@pytest.mark.root
def test_a_capability_is_left_out_for_a_while() -> None:
    def effective() -> int:
        status = Path("/proc/thread-self/status").read_text()
        return int(status.split("CapEff:")[1].split()[0], 16)

    before = effective()
    with sysio.WithoutCapability(sysio.CAP_FSETID):
        assert effective() == before & ~(1 << sysio.CAP_FSETID)
    assert effective() == before


# --- the fault hook

CHANGING_BY_NAME: dict[str, Callable[[int, bytes], object]] = {
    "mkdir_at": lambda fd, name: sysio.mkdir_at(fd, name, 0o755),
    "mknod_at": lambda fd, name: sysio.mknod_at(fd, name, stat.S_IFREG, 0),
    "symlink_at": lambda fd, name: sysio.symlink_at(b"t", fd, name),
    "link_at": lambda fd, name: sysio.link_at(fd, name, fd, b"other"),
    "unlink_at": sysio.unlink_at,
    "rmdir_at": sysio.rmdir_at,
    "rename_at": lambda fd, name: sysio.rename_at(fd, name, fd, b"other"),
    "chmod_at": lambda fd, name: sysio.chmod_at(fd, name, 0o700),
    "chown_at": lambda fd, name: sysio.chown_at(fd, name, -1, -1),
    "utimens_at": lambda fd, name: sysio.utimens_at(fd, name, 1, 1),
    "setxattr_at": lambda fd, name: sysio.setxattr_at(fd, name, b"user.x", b""),
    "removexattr_at": lambda fd, name: sysio.removexattr_at(fd, name, b"user.x"),
}
CHANGING_BY_DESCRIPTOR: dict[str, Callable[[int], object]] = {
    "open": lambda fd: sysio.open_beneath(fd, b"x", os.O_CREAT),
    "open, a child": lambda fd: sysio.open_child(fd, b"x", os.O_CREAT),
    "open, truncating": lambda fd: sysio.open_child(fd, b"", os.O_TRUNC | os.O_WRONLY),
    "open, unnamed": lambda fd: sysio.open_child(fd, b"", os.O_TMPFILE | os.O_WRONLY),
    "clone_file": lambda fd: sysio.clone_file(fd, fd),
    "copy_data": lambda fd: sysio.copy_data(fd, fd, 1),
    "write_at": lambda fd: sysio.write_at(fd, 0, b"x"),
    "truncate_fd": lambda fd: sysio.truncate_fd(fd, 9),
    "fsync": sysio.fsync,
    "fdatasync": sysio.fdatasync,
    "syncfs": sysio.syncfs,
    "fallocate": lambda fd: sysio.fallocate(fd, 0, 0, 4096),
    "copy_range": lambda fd: sysio.copy_range(fd, 0, fd, 0, 1),
    "set_file_attributes": lambda fd: sysio.set_file_attributes(fd, FS_IOC_SETFLAGS, bytes(4)),
}
READING = {
    "access_mode",
    "keep_atime",
    "open_beneath",
    "open_child",
    "close",
    "flush",
    "exists_at",
    "stat_at",
    "statvfs_fd",
    "list_dir",
    "readlink_at",
    "getxattr_at",
    "find_xattr",
    "listxattr_at",
    "fill_at",
    "read_at",
    "read_into",
    "file_handle",
    "open_by_handle",
    "fs_uuid",
    "fs_type",
    "fs_id",
    "clone_mount",
    "seek_data",
    "next_data",
    "birth_time",
    "get_file_attributes",
    "try_lock",
    "try_share",
    "wait_lock",
}
EVERY_CHANGE: dict[str, Callable[[int], object]] = {
    **{call: lambda fd, act=act: act(fd, b"file") for call, act in CHANGING_BY_NAME.items()},  # type: ignore[misc]
    **CHANGING_BY_DESCRIPTOR,
}


def test_every_call_is_known_to_change_or_to_read() -> None:
    public = {name for name, _ in inspect.getmembers(sysio, inspect.isfunction) if not name.startswith("_")}
    changing = {name.partition(",")[0] for name in EVERY_CHANGE}
    assert public == (changing - {"open"}) | READING


@pytest.mark.parametrize("call", EVERY_CHANGE)
def test_a_fault_stops_the_call(place: Path, here: int, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(place, "file")
    before = (place / "file").stat(), sorted(os.listdir(place))
    announced: list[str] = []

    def fail(name: str) -> None:
        announced.append(name)
        raise OSError(errno.ENOSPC, "injected")

    monkeypatch.setattr(sysio, "fault_hook", fail)
    assert attempt(EVERY_CHANGE[call], here) == errno.ENOSPC
    assert announced == [call.partition(",")[0]]
    assert before == ((place / "file").stat(), sorted(os.listdir(place)))


@pytest.mark.parametrize("call", EVERY_CHANGE)
def test_an_interrupted_change_is_repeated(here: int, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    announced: list[str] = []

    def interrupt(name: str) -> None:
        announced.append(name)
        raise InterruptedError if len(announced) < 4 else OSError(errno.ENOSPC, "enough")

    monkeypatch.setattr(sysio, "fault_hook", interrupt)
    assert attempt(EVERY_CHANGE[call], here) == errno.ENOSPC
    assert announced == [call.partition(",")[0]] * 4


def _first_data(dirfd: int) -> tuple[int, int]:
    fd = os.open("file", os.O_RDONLY, dir_fd=dirfd)
    try:
        return sysio.next_data(fd, 0)
    finally:
        os.close(fd)


READING_BY_NAME: dict[str, Callable[[int], object]] = {
    "stat": lambda fd: sysio.stat_at(fd, b"file"),
    "readlink": lambda fd: sysio.readlink_at(fd, b"link"),
    "getxattr": lambda fd: sysio.getxattr_at(fd, b"file", b"user.x"),
    "listxattr": lambda fd: sysio.listxattr_at(fd, b""),
    "lseek": _first_data,
}


@pytest.mark.parametrize("call", READING_BY_NAME)
def test_an_interrupted_read_is_repeated(place: Path, here: int, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    os.symlink("target", place / "link")
    os.setxattr(place / _write(place, "file").decode(), "user.x", b"1")
    expected = READING_BY_NAME[call](here)
    real, left = getattr(os, call), [InterruptedError] * 3

    def interrupted(*words: object, **more: object) -> object:
        if left:
            raise left.pop()
        return real(*words, **more)

    monkeypatch.setattr(os, call, interrupted)
    assert READING_BY_NAME[call](here) == expected
    assert not left


@pytest.mark.parametrize("code", [errno.EINTR, errno.EIO, errno.EDQUOT])
def test_an_error_of_close_is_raised_only_by_a_flush(place: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.open(place / _write(place, "file").decode(), os.O_WRONLY)
    close, closed = os.close, []

    def report(number: int) -> None:
        close(number)
        closed.append(number)
        if len(closed) == 1:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "close", report)
    assert attempt(sysio.flush, fd) == (None if code == errno.EINTR else code)
    closed.clear()
    sysio.close(fd)
    assert closed == [fd]
    assert attempt(sysio.close, fd) == errno.EBADF


def test_reading_announces_nothing(place: Path, here: int, monkeypatch: pytest.MonkeyPatch) -> None:
    announced: list[str] = []
    monkeypatch.setattr(sysio, "fault_hook", announced.append)
    name = _write(place, "file")
    with _Open(sysio.open_child(here, name, os.O_RDONLY)) as fd:
        sysio.read_at(fd, 0, 10)
        sysio.stat_at(here, name)
        sysio.list_dir(here)
        sysio.listxattr_at(here, name)
        sysio.try_lock(fd)
    assert announced == []
